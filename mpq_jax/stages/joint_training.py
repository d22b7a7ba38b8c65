"""Joint training: step sizes started from one batch, then trained with all uniform policies and random ones at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from mpq_jax import flax_seam, joint, logs, optimizers, processes, row_policies
from mpq_jax.config import Joint
from mpq_jax.criteria.learned import RowLog
from mpq_jax.fewer_widths import filled_in, trained_on
from mpq_jax.files import write_json
from mpq_jax.stages.loop import compile_step, train
from mpq_jax.stages.row_log import RowLogFile
from mpq_jax.stages.run import Run, is_linen, row_names, sliced, steps_of, train_batches
from mpq_jax.types import QuantizedModel, Refusal

SETTLED = "settled.json"  # beside the checkpoints of a joint training that ended before its steps did


def calibrated(run: Run, variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The float variables with step sizes started from one batch: whole, on each process's first device, so that they
    are the same on any number of devices."""
    batch = next(train_batches(run, max(run.config.joint.batch_size, 256), "calibrate")(0))
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


def joint_train(run: Run, variables: Mapping[str, Any]) -> tuple[joint.TrainState, RowLog]:
    """Joint training from calibrated variables. -> (state, log of the random rows)"""
    settings = run.config.joint
    model = trained_on(run.model, settings.bit_widths) if settings.bit_widths else run.model
    steps = steps_of(settings, run)
    optimizer = joint_optimizer(model, settings, steps)
    uniform = row_policies.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    widths = sorted({*model.bit_widths, *model.activation_bit_widths})
    names = row_names(run.model, settings)
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
        dropout=is_linen(model),
        sliced=sliced(settings, len(names)),
        recompute=settings.recompute,
        trained=optimizers.quantizer_leaves(model, "leaves") if settings.weights == "still" else None,
        layout=run.layout,
    )
    state = joint.init_state(
        variables, optimizer, len(names), affine_per_row=settings.affine_per_row, average=settings.average > 0
    )
    log = RowLogFile(
        run.workdir / "joint" / "random_rows.npz", len(widths), [ly.path for ly in model.layers if ly.searched]
    )
    batches = train_batches(run, settings.batch_size, "joint")
    recorder = logs.Recorder(log.load, log.add, log.flush) if settings.random_rows else None
    stop = joint_settled(settings, steps)
    state = train(run, "joint", state, compile_step(step), steps, batches, names, uniform, recorder, stop)
    if stop(ended := int(state.step), state) and processes.first():
        write_json(run.workdir / "joint" / SETTLED, {"format": "mpq-settled", "version": 1, "step": ended})
    if settings.bit_widths:
        average = None if state.average is None else filled_in(run.model, model, state.average)
        state = state._replace(params=filled_in(run.model, model, state.params), average=average)
    return state, log.log()


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
            rate = settings.step_size_learning_rate
            rate = optax.linear_schedule(0.0, rate, warmup) if warmup else rate
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
