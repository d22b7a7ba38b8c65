"""What training says while it runs: log.jsonl in every stage's folder, always; TensorBoard, Weights & Biases and a
profile where they are asked for. Neither of those two is a dependency.
"""

import contextlib
import importlib.util
import itertools
import json
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpq_jax import config as config_lib
from mpq_jax.files import write_text
from mpq_jax.types import Refusal


class Recorder(NamedTuple):
    """What keeps something of every step.

    load(step): drops what a resumed run will do again, from `step` on. add(step, metrics): metrics of one step, fetched.
    flush(): called before every checkpoint; what was added until then must be on disk after it. close(): at the end.
    """

    load: Callable[[int], None]
    add: Callable[[int, Mapping[str, np.ndarray]], None]
    flush: Callable[[], None]
    close: Callable[[], None] = lambda: None


class Writer(NamedTuple):
    """Where scalars go beside log.jsonl: write(step, {name: value}), close()."""

    write: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None] = lambda: None


# sink(stage, first step) -> Writer
Sink = Callable[[str, int], Writer]


def sinks(config: config_lib.Config, workdir: Path) -> tuple[Sink, ...]:
    """The sinks that `config.logs` asks for. Raises Refusal, before anything is trained, where a package is missing."""
    found: list[Sink] = []
    if config.logs.tensorboard:
        _need("tensorboardX", "--logs.tensorboard")
        found.append(lambda stage, first: _tensorboard(workdir / "tensorboard" / stage, first))
    if config.logs.wandb:
        _need("wandb", "--logs.wandb")
        found.append(_wandb(config, workdir))
    return tuple(found)


def _need(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Refusal(
            f"{option} needs the package {package}; type: pip install {package} (log.jsonl is written anyway)"
        )


def _tensorboard(folder: Path, first: int) -> Writer:
    from tensorboardX import SummaryWriter

    # From `first` on TensorBoard forgets what a run wrote that was stopped after its last checkpoint.
    writer = SummaryWriter(str(folder), purge_step=first)

    def write(step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return Writer(write, writer.close)


def _wandb(config: config_lib.Config, workdir: Path) -> Sink:
    """One W&B run for all stages of a workdir; each stage has its own step axis, as each starts at 0."""
    import wandb

    run = wandb.init(
        project=config.logs.wandb,
        name=workdir.name,
        dir=str(workdir),
        id=_run_id(workdir),
        resume="allow",
        config=config_lib.to_json(config),
    )

    def sink(stage: str, first: int) -> Writer:
        del first
        run.define_metric(f"{stage}/step")
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

        def write(step: int, scalars: Mapping[str, float]) -> None:
            run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in scalars.items()}})

        return Writer(write)

    return sink


def _run_id(workdir: Path) -> str:
    """The workdir's own W&B identity, made once and kept, so that a resumed run goes on in the same curves."""
    path = workdir / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def recorder(stage: str, folder: Path, names: Sequence[str], every: int, sinks: Sequence[Sink] = ()) -> Recorder:
    """Keeps <folder>/log.jsonl, one line each `every` steps, and writes the same to `sinks`.

    A line: {"step": steps done, "losses": {name: of that step}, any other scalar metric of the step, "seconds": since this
    process began the stage}. A line is of its own step alone, not a mean, so that a run that was stopped and resumed
    writes the same lines (but for the seconds).
    names: of the losses [P].
    """
    path, began, writers = folder / "log.jsonl", time.monotonic(), list[Writer]()

    def load(first: int) -> None:
        kept = [line for line in read(path) if line["step"] <= first]
        if kept or path.exists():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        writers.extend(sink(stage, first) for sink in sinks)

    def add(step: int, metrics: Mapping[str, np.ndarray]) -> None:
        if (step + 1) % every:
            return
        losses = {name: float(loss) for name, loss in zip(names, metrics["losses"], strict=True)}
        others = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        line = {"step": step + 1, "losses": losses, **others, "seconds": round(time.monotonic() - began, 3)}
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for writer in writers:
            writer.write(step + 1, {**{f"loss/{name}": loss for name, loss in losses.items()}, **others})

    def close() -> None:
        for writer in writers:
            writer.close()

    return Recorder(load, add, flush=lambda: None, close=close)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, without one that a kill cut short; [] where there is none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def traced(steps: Iterable[int], count: int, folder: Path, settle: Callable[[], Any]) -> Generator[int, None, None]:
    """`steps`, of which `count` (0: none) after the first two, which compile, run under JAX's profiler.

    settle: waits for all that was started, so that the trace holds whole steps. The trace is written to `folder` when
    the last of them is done, the steps end, or the generator is closed.
    """
    rest = iter(steps)
    yield from itertools.islice(rest, 2)
    if count:
        import jax

        settle()
        try:
            with jax.profiler.trace(folder):
                try:
                    yield from itertools.islice(rest, count)
                finally:
                    settle()
        finally:
            print(f"profile: {folder} (XProf, TensorBoard's profile plugin, shows it)")
    yield from rest
