"""The loop that all stages share: restored, stepped, logged, saved; SIGTERM and losses that are not finite end it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mpq_jax import checkpoint, logs, parallel, processes, stopping
from mpq_jax.progress import progress
from mpq_jax.stages.run import Run
from mpq_jax.types import Bits, Refusal
from mpq_jax.workdir import latest_whole

AHEAD = 3  # steps that are handed to the device before the first of them is done


class _Stage(NamedTuple):
    """A stage under way. recorders: what keeps something of every step, on process 0."""

    name: str
    directory: Path
    row_names: list[str]
    recorders: list[logs.Recorder]


def train(
    run: Run,
    stage: str,
    state: Any,
    step: Callable[..., Any],
    steps: int,
    batches: Callable[[int], Iterable[Any]],
    row_names: list[str],
    fixed: Mapping[str, Bits] | None = None,
    recorder: logs.Recorder | None = None,
    stop: Callable[[int, Any], bool] = lambda step, state: False,
) -> Any:
    """Runs a compiled `step` until `steps`, from the newest checkpoint of the stage if there is one. -> state

    step: joint's step, or another of its signature, from `compile_step`; it consumes its state. fixed: its rows that
    stay. stop(steps done, state): whether to end here, with a checkpoint. Where the stage is finished, nothing is
    written.
    batches(first_step) -> batches from that step on. Losses are looked at every `log_every` steps and before every
    checkpoint, so that a checkpoint never holds a state that followed a loss that was not finite.
    Raises Refusal at such a loss, naming row and step; Stopped after the checkpoint that SIGTERM asked for.
    """
    directory, first_process = run.workdir / stage, processes.first()
    own = [recorder] if recorder and first_process else []
    key = jax.random.fold_in(jax.random.key(run.config.seed), sum(map(ord, stage)))
    # A copy: the step consumes its state, and the caller's arrays stay.
    state = parallel.place_state(run.layout, state)
    key, fixed = parallel.place(run.layout, (key, fixed))
    done = processes.from_first(latest_whole(directory)[0] if first_process else None)
    if done is not None and done >= steps:
        _load(own, done)
        return parallel.whole(run.layout, checkpoint.read(directory, done, state))
    with checkpoint.manager(directory) as manager, stopping.saves():
        found = checkpoint.restore(manager, state)
        first, state = found if found else (0, state)
        _load(own, first)  # `stop` may ask what was recorded
        if stop(first, state):
            # It ended before its steps did: nothing is left to do or to drop.
            return parallel.whole(run.layout, state)
        with contextlib.closing(logs.recorder(stage, directory, row_names, run.config.log_every, run.sinks)) as log:
            recorders = [log, *own] if first_process else []
            if first_process:
                log.load(first)
            under_way = _Stage(stage, directory, row_names, recorders)

            def stepped(state: Any, batch: Any) -> Any:
                return step(state, parallel.place_batch(run.layout, batch), key, fixed)

            state = _until(run, under_way, manager, state, stepped, range(first, steps), iter(batches(first)), stop)
    return parallel.whole(run.layout, state)


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, compiled; its state is given back to it for reuse."""
    return jax.jit(step, donate_argnums=0)


def _load(recorders: list[logs.Recorder], first: int) -> None:
    for each in recorders:
        each.load(first)


def _until(
    run: Run,
    stage: _Stage,
    manager: ocp.CheckpointManager,
    state: Any,
    step: Callable[[Any, Any], Any],
    todo: range,
    batches: Iterator[Any],
    stop: Callable[[int, Any], bool],
) -> Any:
    """The steps of `todo`, or those until `stop` or SIGTERM. step(state, batch) -> (state, metrics). -> state"""
    config = run.config
    agreed = processes.agreement(AHEAD)
    pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    traced = logs.traced(
        todo, config.logs.profile, run.workdir / "profile" / stage.name, settle=lambda: jax.block_until_ready(state)
    )
    label = stage.name.partition("/")[0]
    bar_of = progress(traced, total=len(todo), label=label, stream=processes.error_stream())
    with contextlib.closing(traced), bar_of as bar:
        for i in bar:
            state, metrics = step(state, next(batches))
            pending.append((i, metrics))
            if len(pending) >= AHEAD:  # few steps are under way at a time: what SIGTERM waits for is short
                jax.block_until_ready(pending[-AHEAD])
            asked = agreed(stopping.asked())
            last = i + 1 == todo.stop or stop(i + 1, state) or asked
            due = last or (i + 1) % config.checkpoint_every == 0
            if due or (i + 1) % config.log_every == 0:
                bar.note(_summary(stage.row_names, _settle(stage, pending)))
                pending = []
            if due:
                _save(stage, manager, i, state)
            if asked:
                raise stopping.Stopped(f"step {i + 1} of {todo.stop} is saved in {stage.directory}")
            if last:
                break
    return state


def _save(stage: _Stage, manager: ocp.CheckpointManager, step: int, state: Any) -> None:
    """The checkpoint after `step`, and what was recorded until then."""
    _check_parameters(state.params, step, stage.name, stage.directory)
    for each in stage.recorders:
        each.flush()
    checkpoint.save(manager, step + 1, state)


def _check_parameters(params: Any, step: int, stage: str, directory: Path) -> None:
    """Refuses parameters that are not finite: a gradient can overflow where the loss does not."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
            raise Refusal(
                f"{jax.tree_util.keystr(path)} is not finite after step {step} of {stage}; {_kept(directory)}lower the "
                "learning rate, or look at the data, and start again"
            )


def _kept(directory: str | Path) -> str:
    """What a refusal says of the checkpoints there: nothing where there is none."""
    there = any(each.name.isdigit() for each in Path(directory).glob("*"))
    return f"the last good checkpoint is kept in {directory}; " if there else ""


def _settle(stage: _Stage, pending: list[tuple[int, Mapping[str, jax.Array]]]) -> np.ndarray:
    """Fetches the metrics of the steps since the last look; refuses losses that are not finite. -> mean losses [P]"""
    losses = []
    for i, metrics in pending:
        fetched = {name: np.asarray(value) for name, value in metrics.items()}
        losses.append(fetched["losses"])
        if not np.isfinite(fetched["losses"]).all():
            row = stage.row_names[int(np.flatnonzero(~np.isfinite(fetched["losses"]))[0])]
            option = stage.name.split("/")[0].removeprefix("search_")
            raise Refusal(
                f"the loss of row {row} is not finite at step {i} of {stage.name}; "
                f"{_kept(stage.directory)}lower the learning rate (--{option}.learning_rate), or look at the data (NaN, "
                "numbers beyond an embedding's table), and start again"
            )
        for each in stage.recorders:
            each.add(i, fetched)
    return np.mean(losses, axis=0)


def _summary(names: list[str], losses: np.ndarray) -> str:
    return " ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=True))
