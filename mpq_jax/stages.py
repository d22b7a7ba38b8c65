"""The stages of a run: float training, joint training, fine-tuning. Each resumes where it stopped.

A stage writes checkpoints under <workdir>/<stage>/ and nothing else that a later stage needs, but for joint training's
random_rows.npz and the importance.json made from it.
"""

import contextlib
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq_jax import build, checkpoint, data, flax_seam, joint, logs, optimizers, parallel, processes, stopping
from mpq_jax.config import Config, Finetune, Joint, Pretrain
from mpq_jax.criteria.learned import RowLog
from mpq_jax.fewer_widths import filled_in, trained_on
from mpq_jax.files import whole, write_json
from mpq_jax.float_model import FloatModel
from mpq_jax.policy import stack
from mpq_jax.progress import progress
from mpq_jax.tasks import Task, logits_of, random_streams, task_of
from mpq_jax.types import Bits, Policy, QuantizedModel, Refusal
from mpq_jax.workdir import latest_whole


class Run(NamedTuple):
    """What every stage needs.

    source: the float model that `model` was made from. statistics, evaluate: joint's functions of those names, compiled
    once for all policies. sinks: of the logs. layout: of the devices.
    """

    config: Config
    workdir: Path
    dataset: data.Dataset | data.OwnData
    source: FloatModel
    model: QuantizedModel
    variables: Mapping[str, Any]
    statistics: Callable[..., Any]
    evaluate: Callable[..., Any]
    sinks: tuple[logs.Sink, ...]
    layout: parallel.Layout

    def task(self, label_smoothing: float = 0.0) -> Task:
        """What the run trains for. Raises Refusal for label smoothing of a loss that is the model's own."""
        return task_of(self.source, label_smoothing)

    def example(self, count: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of what the model is called with, for `count` examples."""
        return build.example(self.source, self.dataset.features, count)

    @property
    def has_accuracy(self) -> bool:
        return self.source.loss is None or self.source.correct is not None


def open_run(config: Config, workdir: Path) -> Run:
    """Opens the data set and builds the model. Raises Refusal for whatever is missing."""
    layout = parallel.layout(config.parallel)
    sinks = logs.sinks(config, workdir) if processes.first() else ()
    dataset = processes.first_alone(lambda: build.open_data(config))  # it may have to be prepared
    source = build.float_model(config, dataset.num_classes)
    model = build.quantized(config, source, dataset.features)
    _check_layout(config, layout, model)
    variables = build.float_variables(config, source, model, dataset.features)
    task = task_of(source)
    return Run(
        config,
        workdir,
        dataset,
        source,
        model,
        variables,
        statistics=parallel.compiled(joint.make_batch_statistics(model, task, dropout=_is_linen(model)), layout),
        evaluate=parallel.compiled(joint.make_evaluate(model, task), layout),
        sinks=sinks,
        layout=layout,
    )


def _check_layout(config: Config, layout: parallel.Layout, model: QuantizedModel) -> None:
    """Refuses sizes that many devices cannot share out, of whatever stage, before the first of them begins."""
    if layout.mesh.size == 1:
        return
    for stage in ("pretrain", "joint", "finetune"):
        parallel.check_batch(layout, getattr(config, stage).batch_size, f"{stage}.batch_size")
    names = _row_names(trained_on(model, config.joint.bit_widths) if config.joint.bit_widths else model, config.joint)
    parallel.check_rows(layout, len(names), config.joint.rows_at_a_time)


def _row_names(model: QuantizedModel, settings: Joint) -> list[str]:
    """Of joint training: the uniform rows, then the random ones."""
    uniform = [build.uniform_name(b) for b in sorted({*model.bit_widths, *model.activation_bit_widths})]
    return uniform + [f"random{i + 1}" for i in range(settings.random_rows)]


def _is_linen(model: QuantizedModel) -> bool:
    """Linen models take random streams in their call; NNX models carry their own, beside their variables."""
    return model.variables is None


# ---- the loop all stages share ------------------------------------------------------------------------------------

AHEAD = 3  # steps that are handed to the device before the first of them is done


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
    config = run.config
    directory = run.workdir / stage
    key = jax.random.fold_in(jax.random.key(config.seed), sum(map(ord, stage)))
    # A copy: the step consumes its state, and the caller's arrays stay.
    state = parallel.place_state(run.layout, state)
    key, fixed = parallel.place(run.layout, (key, fixed))
    whole_step = processes.from_first(latest_whole(directory)[0] if processes.first() else None)
    if whole_step is not None and whole_step >= steps:
        if recorder and processes.first():
            recorder.load(whole_step)
        return parallel.whole(run.layout, checkpoint.read(directory, whole_step, state))
    with checkpoint.manager(directory) as manager, stopping.saves():
        found = checkpoint.restore(manager, state)
        first, state = found if found else (0, state)
        log = logs.recorder(stage, directory, row_names, config.log_every, run.sinks)
        recorders = [log, *([recorder] if recorder else [])] if processes.first() else []
        if stop(first, state):
            # It ended before its steps did: nothing is left to do or to drop; what was recorded may be asked for.
            if recorder and processes.first():
                recorder.load(first)
            return parallel.whole(run.layout, state)
        for each in recorders:
            each.load(first)
        agreed = processes.agreement(AHEAD)
        pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        stream = iter(batches(first))
        todo = logs.traced(
            range(first, steps),
            config.logs.profile,
            run.workdir / "profile" / stage,
            settle=lambda: jax.block_until_ready(state),
        )
        bar_of = progress(todo, total=steps - first, label=stage.partition("/")[0], stream=processes.error_stream())
        with contextlib.closing(log), contextlib.closing(todo), bar_of as bar:
            for i in bar:
                state, metrics = step(state, parallel.place_batch(run.layout, next(stream)), key, fixed)
                pending.append((i, metrics))
                if len(pending) >= AHEAD:  # few steps are under way at a time: what SIGTERM waits for is short
                    jax.block_until_ready(pending[-AHEAD])
                asked = agreed(stopping.asked())
                last = i + 1 == steps or stop(i + 1, state) or asked
                due = last or (i + 1) % config.checkpoint_every == 0
                if due or (i + 1) % config.log_every == 0:
                    latest = _settle(pending, row_names, stage, directory, recorders)
                    bar.note(_summary(row_names, latest))
                    pending = []
                if due:
                    _check_parameters(state.params, i, stage, directory)
                    for each in recorders:
                        each.flush()
                    checkpoint.save(manager, i + 1, state)
                if asked:
                    raise stopping.Stopped(f"step {i + 1} of {steps} is saved in {directory}")
                if last:
                    break
    return parallel.whole(run.layout, state)


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, compiled; its state is given back to it for reuse."""
    return jax.jit(step, donate_argnums=0)


def _check_parameters(params: Any, step: int, stage: str, directory: Path) -> None:
    """Refuses parameters that are not finite: a gradient can overflow where the loss does not."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
            raise Refusal(
                f"{jax.tree_util.keystr(path)} is not finite after step {step} of {stage}; the last good checkpoint is kept "
                f"in {directory}; lower the learning rate, or look at the data, and start again"
            )


def _settle(pending, row_names, stage: str, directory: Path, recorders: list[logs.Recorder]) -> np.ndarray:
    """Fetches the metrics of the steps since the last look; refuses losses that are not finite. -> mean losses [P]"""
    losses = []
    for i, metrics in pending:
        fetched = {name: np.asarray(value) for name, value in metrics.items()}
        losses.append(fetched["losses"])
        if not np.isfinite(fetched["losses"]).all():
            row = row_names[int(np.flatnonzero(~np.isfinite(fetched["losses"]))[0])]
            option = stage.split("/")[0].removeprefix("search_")
            raise Refusal(
                f"the loss of row {row} is not finite at step {i} of {stage}; the last good checkpoint is "
                f"kept in {directory}; lower the learning rate (--{option}.learning_rate) and start again"
            )
        for each in recorders:
            each.add(i, fetched)
    return np.mean(losses, axis=0)


def _summary(names: list[str], losses: np.ndarray) -> str:
    return " ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=True))


def steps_of(settings: Pretrain | Joint | Finetune, run: Run) -> int:
    """Steps of a stage: as given, or so many epochs of the training split."""
    if settings.steps:
        return settings.steps
    return max(1, round(settings.epochs * run.dataset.sizes["train"] / settings.batch_size))


def _train_batches(run: Run, batch_size: int, stage: str) -> Callable[[int], Iterator[Any]]:
    """batches(first step) -> this process's part of the batches. "calibrate", "alpha": all of them, for one device."""
    seed = run.config.seed * 1000 + sum(map(ord, stage)) % 1000
    index, count = (0, 1) if stage in ("calibrate", "alpha") else parallel.block(run.layout)

    def batches(first_step: int) -> Iterator[Any]:
        return iter(
            data.train_batches(
                run.dataset,
                batch_size,
                seed=seed,
                first_step=first_step,
                process_index=index,
                process_count=count,
                workers=run.config.data.workers,
            )
        )

    return batches


# ---- float training -----------------------------------------------------------------------------------------------


def pretrain(run: Run) -> Mapping[str, Any]:
    """Trains the float model, or takes the weights that were loaded or came with it. -> variables"""
    settings = run.config.pretrain
    if run.config.model.weights:
        return run.variables
    steps = steps_of(settings, run)
    optimizer = optimizers.weights_optimizer(
        settings.optimizer,
        optimizers.schedule(settings.learning_rate, steps, warmup=min(settings.warmup_steps, steps // 2)),
        settings.momentum,
        settings.weight_decay,
    )
    step = joint.make_step(
        run.model, run.task(settings.label_smoothing), optimizer, dropout=_is_linen(run.model), layout=run.layout
    )
    state = joint.init_state(run.variables, optimizer, 1)
    if run.source.is_trained:
        _keep(run.workdir / "pretrain", steps, parallel.place_state(run.layout, state))
    batches = _train_batches(run, settings.batch_size, "pretrain")
    return joint.row_variables(train(run, "pretrain", state, compile_step(step), steps, batches, ["float"]), 0)


def _keep(directory: Path, steps: int, state: joint.TrainState) -> None:
    """Weights that came trained are kept as the stage's last checkpoint: whatever follows finds them there, and finds
    the same ones however the factory changes."""
    with checkpoint.manager(directory) as manager:
        if manager.latest_step() is None:
            checkpoint.save(manager, steps, state)


# ---- joint training -----------------------------------------------------------------------------------------------


def calibrated(run: Run, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The float variables with step sizes started from one batch: whole, on each process's first device, so that they
    are the same on any number of devices."""
    batch = next(_train_batches(run, max(run.config.joint.batch_size, 256), "calibrate")(0))
    task = run.task()
    calibrate = jax.jit(lambda v, x: run.model.calibrate(v, *x, **task.eval_kwargs))
    started = calibrate(variables, task.inputs(batch))
    flat = flax_seam.flatten(started["params"])
    for path in sorted(optimizers.quantizer_leaves(run.model, "leaves")):
        if not (np.isfinite(flat[path]) & (np.asarray(flat[path]) > 0)).all():
            raise Refusal(
                f"{path} cannot be started: what it quantizes is not finite, or too large for its statistics; look at "
                "the float training, at the data and at model.dtype"
            )
    return started


def joint_optimizer(model: QuantizedModel, settings: Joint, steps: int) -> optax.GradientTransformation:
    """The default holds the weights still and moves log step sizes with Adam; the paper's trains all by SGD."""
    updates = max(1, steps // settings.accumulate)
    warmup = min(settings.warmup_steps, updates // 2)

    def sgd(clip: float, decay: float) -> optax.GradientTransformation:
        rate = optimizers.schedule(settings.learning_rate, updates, warmup=warmup, end=settings.end_learning_rate)
        return optimizers.sgd(rate, settings.momentum, decay, clip)

    if settings.weights not in ("still", "trained"):
        raise Refusal(f'joint.weights {settings.weights!r} is not known; choose "still" or "trained"')
    weights = optax.set_to_zero() if settings.weights == "still" else sgd(settings.clip, settings.weight_decay)
    if settings.settled and (settings.weights != "still" or settings.step_size_optimizer != "log_adam"):
        raise Refusal("joint.settled watches step sizes that log_adam moves beside still weights; leave it out")
    if settings.step_size_optimizer == "log_adam":
        rate: Any = optimizers.schedule(settings.step_size_learning_rate, updates, warmup=warmup)
        if settings.settled:
            rate = (
                optax.linear_schedule(0.0, settings.step_size_learning_rate, warmup)
                if warmup
                else (settings.step_size_learning_rate)
            )
        # A short memory of the second moment: gradients shrink by orders of magnitude on the way from a bad start.
        adam = optax.adam(rate, b2=0.95)
        if settings.settled:
            adam = optimizers.settling(adam, settings.settled, settings.window, updates, _watched_from(settings, steps))
        step_sizes = optimizers.log_space(adam)
    elif settings.step_size_optimizer == "sgd":
        step_sizes = optax.chain(sgd(settings.clip, settings.weight_decay), optimizers.keep_positive())
    else:
        raise Refusal(f'joint.step_size_optimizer {settings.step_size_optimizer!r}: choose "log_adam" or "sgd"')
    optimizer = optimizers.partition(model, weights, step_sizes)
    return optax.MultiSteps(optimizer, settings.accumulate) if settings.accumulate > 1 else optimizer


def _error_steps(settings: Joint, steps: int) -> int:
    """First steps, in which there is nothing but the quantization error: never more than a quarter."""
    return min(settings.error_steps, steps // 4) if settings.error_weight else 0


def _watched_from(settings: Joint, steps: int) -> int:
    """The optimizer update that `settled` looks at step sizes from: past the error's own steps and the warm-up."""
    updates = max(1, steps // settings.accumulate)
    return max(_error_steps(settings, steps) // settings.accumulate, min(settings.warmup_steps, updates // 2))


def joint_settled(settings: Joint, steps: int) -> Callable[[int, joint.TrainState], bool]:
    """`train`'s stop for joint training: looks at the state only where the test can have an answer: at windows' ends."""

    def stop(step: int, state: joint.TrainState) -> bool:
        if not settings.settled or step % settings.accumulate:
            return False
        at_end = (step // settings.accumulate - _watched_from(settings, steps)) % settings.window == 0
        return at_end and optimizers.settled(state.optimizer, settings.window)

    return stop


def joint_train(run: Run, variables: Mapping[str, Any]) -> tuple[joint.TrainState, RowLog]:
    """Joint training from calibrated variables. -> (state, log of the random rows)"""
    settings = run.config.joint
    if settings.slices and settings.distill:
        raise Refusal("joint.distill needs rows that see the same samples; leave out joint.slices")
    model = trained_on(run.model, settings.bit_widths) if settings.bit_widths else run.model
    steps = steps_of(settings, run)
    optimizer = joint_optimizer(model, settings, steps)
    uniform = joint.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    widths = sorted({*model.bit_widths, *model.activation_bit_widths})
    names = _row_names(model, settings)
    step = joint.make_step(
        model,
        run.task(settings.label_smoothing),
        optimizer,
        random=settings.random_rows,
        same_bits=settings.same_bits,
        rows_at_a_time=settings.rows_at_a_time or (0 if settings.distill else 1),
        distill=joint.Distill(settings.distill) if settings.distill else None,
        error_weight=settings.error_weight,
        error_steps=_error_steps(settings, steps),
        average=settings.average,
        dropout=_is_linen(model),
        sliced=settings.slices,
        layout=run.layout,
    )
    state = joint.init_state(
        variables, optimizer, len(names), affine_per_row=settings.affine_per_row, average=settings.average > 0
    )
    log = RowLogFile(
        run.workdir / "joint" / "random_rows.npz", len(widths), [ly.path for ly in model.layers if ly.searched]
    )
    batches = _train_batches(run, settings.batch_size, "joint")
    recorder = logs.Recorder(log.load, log.add, log.flush) if settings.random_rows else None
    stop = joint_settled(settings, steps)
    state = train(run, "joint", state, compile_step(step), steps, batches, names, uniform, recorder, stop)
    if stop(ended := int(state.step), state) and processes.first():
        write_json(run.workdir / "joint" / SETTLED, {"format": "mpq-settled", "version": 1, "step": ended})
    if settings.bit_widths:
        average = None if state.average is None else filled_in(run.model, model, state.average)
        state = state._replace(params=filled_in(run.model, model, state.params), average=average)
    return state, log.log()


SETTLED = "settled.json"  # beside the checkpoints of a joint training that ended before its steps did
ALPHA_BATCHES, ALPHA_ROWS = 2, 8  # measured_rows: batches, and policies drawn together


def measured_rows(run: Run, state: joint.TrainState, policies: int) -> RowLog:
    """Losses of `policies` random policies of the joint model (rounded up to a multiple of 8), all on the same batches.

    For `fit_alpha` where the rows' own log is too noisy, as with slices of the batch: policies that meet the same
    samples differ by their bits alone. Statistics are each batch's own, as in joint training. Cost: a forward pass of
    2 batches a policy.
    """
    settings, model, task = run.config.joint, run.model, run.task(run.config.joint.label_smoothing)
    variables = joint.row_variables(state, -1, averaged=True)
    rows = joint.init_state(variables, optax.identity(), 1).rows
    rngs = random_streams(task, jax.random.key(run.config.seed)) if _is_linen(model) else None

    @jax.jit
    def losses(params, rows, policies, batch):
        return joint.joint_loss(model, task, params, rows, policies, batch, rngs=rngs)[1][0]

    batches = list(itertools.islice(_train_batches(run, settings.batch_size, "alpha")(0), ALPHA_BATCHES))
    key = jax.random.fold_in(jax.random.key(run.config.seed), sum(map(ord, "alpha")))
    searched = [layer for layer in model.layers if layer.searched]
    assignments, found = [], []
    for i in range(-(-policies // ALPHA_ROWS)):
        drawn = joint.random_rows(
            jax.random.fold_in(key, i), model.layers, model.bit_widths, model.activation_bit_widths, ALPHA_ROWS
        )
        assignments.append(np.asarray(joint.assignment_array(drawn, searched)))
        for row in range(ALPHA_ROWS):
            part = jax.tree.map(lambda bits, row=row: bits[row : row + 1], drawn)
            found.append(np.mean([losses(variables["params"], rows, part, batch) for batch in batches], axis=0))
    loss = np.concatenate(found)
    return RowLog(np.zeros(len(loss), np.int32), np.concatenate(assignments), loss, np.zeros_like(loss))


class RowLogFile:
    """random_rows.npz: layers [L] paths; step [N], assignment [N, L, 2], loss [N] of the random rows, uniform [N, K]."""

    def __init__(self, path: Path, widths: int, layers: list[str]):
        self.path, self.widths, self.layers = path, widths, layers
        self.parts: list[dict[str, np.ndarray]] = []

    def load(self, step: int) -> None:
        """Reads what is there of the steps before `step`. Raises Refusal for a log that is damaged or lacks some."""
        self.parts = []
        if not step:
            return
        try:
            with np.load(self.path) as file:
                rows = {name: file[name] for name in ("step", "assignment", "loss", "uniform")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise Refusal(f"{self.path} cannot be read ({error}); {self._again()}") from None
        keep = rows["step"] < step
        if set(rows["step"][keep].tolist()) != set(range(step)):
            raise Refusal(f"{self.path} lacks steps before {step}; {self._again()}")
        self.parts = [{name: values[keep] for name, values in rows.items()}]

    def _again(self) -> str:
        return f"it cannot be made again without them: delete {self.path.parent} to start joint training again"

    def add(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        losses, assignment = metrics["losses"], metrics["assignment"]
        rows = len(assignment)
        self.parts.append(
            {
                "step": np.full(rows, step, np.int32),
                "assignment": assignment.astype(np.int32),
                "loss": losses[self.widths :],
                "uniform": np.broadcast_to(losses[: self.widths], (rows, self.widths)),
            }
        )

    def flush(self) -> None:
        with whole(self.path) as temporary:
            arrays: dict[str, Any] = {"layers": np.array(self.layers), **self._joined()}
            np.savez_compressed(temporary, **arrays)

    def _joined(self) -> dict[str, np.ndarray]:
        empty = {
            "step": np.zeros(0, np.int32),
            "assignment": np.zeros((0, len(self.layers), 2), np.int32),
            "loss": np.zeros(0, np.float32),
            "uniform": np.zeros((0, self.widths), np.float32),
        }
        return {name: np.concatenate([empty[name], *(part[name] for part in self.parts)]) for name in empty}

    def log(self) -> RowLog:
        """The log as the criteria take it."""
        joined = self._joined()
        return RowLog(joined["step"], joined["assignment"], joined["loss"], joined["uniform"].mean(-1))


# ---- what is finished ----------------------------------------------------------------------------------------------


def check_finished(run: Run, stage: str, settings: Pretrain | Joint) -> None:
    """Refuses a stage whose last checkpoint is not there, or damaged."""
    (step, damage), steps = latest_whole(run.workdir / stage), steps_of(settings, run)
    if (step or 0) < steps and not (run.workdir / stage / SETTLED).exists():
        raise Refusal(
            f"{run.workdir / stage} stands at step {step or 0} of {steps}{f' ({damage})' if damage else ''}; finish it "
            f"with: python train.py --config … --workdir {run.workdir}"
        )


def finished_float(run: Run) -> Mapping[str, Any]:
    """The float model's variables, of a float training that is finished, or loaded. Raises Refusal if it is not."""
    if not run.config.model.weights:
        check_finished(run, "pretrain", run.config.pretrain)
    return pretrain(run)


def finished_joint(run: Run, start: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first row's variables of a joint training that is finished. Raises Refusal if it is not.

    start: calibrated variables.
    """
    check_finished(run, "joint", run.config.joint)
    state, _ = joint_train(run, start)
    return joint.row_variables(state, 0, averaged=True)


# ---- fine-tuning --------------------------------------------------------------------------------------------------


def finetune_optimizer(model: QuantizedModel, settings: Finetune, steps: int) -> optax.GradientTransformation:
    """SGD for the weights, Adam on the logarithms of the step sizes, both warmed up and then cosine."""
    updates = max(1, steps // settings.accumulate)
    warmup = min(settings.warmup_steps, updates // 2)
    step_sizes = optax.adam(optimizers.schedule(settings.step_size_learning_rate, updates, warmup=warmup))
    optimizer = optimizers.partition(
        model,
        optimizers.weights_optimizer(
            settings.optimizer,
            optimizers.schedule(settings.learning_rate, updates, warmup=warmup),
            settings.momentum,
            settings.weight_decay,
        ),
        optimizers.log_space(step_sizes),
    )
    return optax.MultiSteps(optimizer, settings.accumulate) if settings.accumulate > 1 else optimizer


def finetuner(run: Run, teacher: Mapping[str, Any]) -> Callable[..., Mapping[str, Any]]:
    """finetune(stage, name, policy, start) -> variables: trains one policy, with statistics re-estimated at the end.

    All policies share one compilation (those with weight bits per output channel another). stage: part of the checkpoint's path. name: shown while it runs.
    start: variables with step sizes. teacher: the float variables, for distillation.
    """
    settings, model = run.config.finetune, run.model
    steps = steps_of(settings, run)
    optimizer = finetune_optimizer(model, settings, steps)
    task = run.task(settings.label_smoothing)
    distill = joint.Distill(settings.distill, "given") if settings.distill else None
    step = joint.make_step(
        model,
        task,
        optimizer,
        distill=distill,
        average=settings.average,
        dropout=_is_linen(model),
        layout=run.layout,
    )
    compiled = compile_step(_taught(step, model, task, teacher) if distill else step)
    batches = _train_batches(run, settings.batch_size, "finetune")

    def finetune(stage: str, name: str, policy: Policy, start: Mapping[str, Any]) -> Mapping[str, Any]:
        fixed = stack([policy])
        state = joint.init_state(start, optimizer, 1, average=settings.average > 0)
        state = train(run, f"finetune/{stage}", state, compiled, steps, batches, [name], fixed)
        variables = joint.row_variables(state, 0, averaged=True)
        stats = reestimated(run, variables["params"], rows_of(variables, 1), fixed)
        return {"params": variables["params"], **jax.tree.map(lambda x: x[0], stats)}

    return finetune


def _taught(step, model: QuantizedModel, task: Task, teacher: Mapping[str, Any]):
    def taught(state, batch, key, fixed):
        outputs = model.apply(teacher, None, *task.inputs(batch), **task.eval_kwargs)
        return step(state, {**batch, "teacher": logits_of(outputs)}, key, fixed)

    return taught


# ---- evaluation ---------------------------------------------------------------------------------------------------


def rows_of(variables: Mapping[str, Any], count: int) -> Any:
    """`count` copies [P, ...] of the collections that training changes."""
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    return jax.tree.map(lambda x: jnp.stack([x] * count), stats)


def reestimated(run: Run, params: Any, stats: Any, policies: Mapping[str, Bits] | None) -> Any:
    """stats [P, ...] with normalisation statistics measured anew for each row's policy.

    The mean over `statistics_batches` training batches of each batch's own statistics.
    """
    if "batch_stats" not in stats:
        return stats
    batches = _train_batches(run, run.config.joint.batch_size, "statistics")(0)
    total = None
    placed = parallel.place(run.layout, (params, stats, policies))
    for _ in range(run.config.statistics_batches):
        new = run.statistics(*placed, parallel.place_batch(run.layout, next(batches)))
        new = parallel.whole(run.layout, new)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {**stats, "batch_stats": jax.tree.map(lambda x: x / run.config.statistics_batches, total)}


def evaluate(
    run: Run,
    params: Any,
    stats: Any,
    policies: Mapping[str, Bits] | None,
    split: str,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(mean losses [P], accuracies [P]) of P rows on a split: all of it, or its first `limit` examples.

    Accuracies are not numbers where the run's task calls nothing right.
    """
    losses: Any = 0.0
    right: Any = 0
    examples = 0
    index, count = parallel.block(run.layout)
    size = parallel.up_to(run.layout, run.config.eval_batch_size)
    placed = parallel.place(run.layout, (params, stats, policies))
    for batch in data.eval_batches(run.dataset, split, size, limit=limit, process_index=index, process_count=count):
        loss, correct, valid = run.evaluate(*placed, parallel.place_batch(run.layout, batch))
        losses, right, examples = (
            losses + np.asarray(loss, np.float64),
            right + np.asarray(correct),
            examples + int(valid),
        )
    return losses / examples, right / examples
