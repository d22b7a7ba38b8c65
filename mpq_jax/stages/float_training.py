"""Float training: the first stage, or weights that came trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq_jax import checkpoint, joint, optimizers, parallel
from mpq_jax.stages.loop import compile_step, train
from mpq_jax.stages.run import Run, is_linen, steps_of, train_batches


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
        run.model, run.task(settings.label_smoothing), optimizer, dropout=is_linen(run.model), layout=run.layout
    )
    state = joint.init_state(run.variables, optimizer, 1)
    if run.source.is_trained:
        _keep(run.workdir / "pretrain", steps, parallel.place_state(run.layout, state))
    batches = train_batches(run, settings.batch_size, "pretrain")
    return joint.row_variables(train(run, "pretrain", state, compile_step(step), steps, batches, ["float"]), 0)


def _keep(directory: Path, steps: int, state: joint.TrainState) -> None:
    """Weights that came trained are kept as the stage's last checkpoint: whatever follows finds them there, and finds
    the same ones however the factory changes."""
    with checkpoint.manager(directory) as manager:
        if manager.latest_step() is None:
            checkpoint.save(manager, steps, state)
