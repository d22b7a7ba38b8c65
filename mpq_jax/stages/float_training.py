"""Float training: the first stage, or weights that came trained."""

from collections.abc import Mapping
from typing import Any

from mpq_jax import checkpoint, joint, optimizers, parallel, processes
from mpq_jax.stages.loop import compile_step, train
from mpq_jax.stages.run import Run, is_linen, steps_of, train_batches
from mpq_jax.workdir import latest_whole


def pretrain(run: Run) -> Mapping[str, Any]:
    """Trains the float model, or takes the weights that were loaded or came with it. -> variables"""
    settings = run.config.pretrain
    steps = steps_of(settings, run)
    optimizer = optimizers.weights_optimizer(
        settings.optimizer,
        optimizers.schedule(settings.learning_rate, steps, warmup=min(settings.warmup_steps, steps // 2)),
        settings.momentum,
        settings.weight_decay,
    )
    state = joint.init_state(run.variables, optimizer, 1)
    if run.source.is_trained or run.config.model.weights:
        return joint.row_variables(_kept(run, steps, state), 0)
    step = joint.make_step(
        run.model, run.task(settings.label_smoothing), optimizer, dropout=is_linen(run.model), layout=run.layout
    )
    batches = train_batches(run, settings.batch_size, "pretrain")
    return joint.row_variables(train(run, "pretrain", state, compile_step(step), steps, batches, ["float"]), 0)


def _kept(run: Run, steps: int, state: joint.TrainState) -> joint.TrainState:
    """Weights that came trained, as the run was started with them: the stage's last checkpoint, made of `state` where there is none.

    So whatever follows finds the same ones, however the factory or the file that they came from changes.
    """
    directory = run.workdir / "pretrain"
    placed = parallel.place_state(run.layout, state)
    step = processes.from_first(latest_whole(directory)[0] if processes.first() else None)
    if step is not None:
        return parallel.whole(run.layout, checkpoint.read(directory, step, placed))
    with checkpoint.manager(directory) as manager:
        checkpoint.restore(manager, placed)  # names what is damaged, and sets it aside
        checkpoint.save(manager, steps, placed)
    return state
