"""Fine-tuning: one policy, with the float model as its teacher where that is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from mpq_jax import joint, optimizers
from mpq_jax.config import Finetune
from mpq_jax.policy import stack
from mpq_jax.stages.evaluation import with_statistics
from mpq_jax.stages.loop import compile_step, train
from mpq_jax.stages.run import Run, is_linen, steps_of, train_batches
from mpq_jax.tasks import Task, logits_of
from mpq_jax.types import Policy, QuantizedModel


def finetuner(run: Run, teacher: Mapping[str, Any]) -> Callable[..., Mapping[str, Any]]:
    """finetune(stage, name, policy, start) -> variables: trains one policy, with the better statistics at the end.

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
        recompute=settings.recompute,
        dropout=is_linen(model),
        layout=run.layout,
    )
    compiled = compile_step(_taught(step, model, task, teacher) if distill else step)
    batches = train_batches(run, settings.batch_size, "finetune")

    def finetune(stage: str, name: str, policy: Policy, start: Mapping[str, Any]) -> Mapping[str, Any]:
        fixed = stack([policy])
        state = joint.init_state(start, optimizer, 1, average=settings.average > 0)
        state = train(run, f"finetune/{stage}", state, compiled, steps, batches, [name], fixed)
        variables = joint.row_variables(state, 0, averaged=True)
        stats = with_statistics(run, variables, fixed)
        return {"params": variables["params"], **jax.tree.map(lambda x: x[0], stats)}

    return finetune


def _taught(step, model: QuantizedModel, task: Task, teacher: Mapping[str, Any]):
    def taught(state, batch, key, fixed):
        outputs = model.apply(teacher, None, *task.inputs(batch), **task.eval_kwargs)
        return step(state, {**batch, "teacher": logits_of(outputs)}, key, fixed)

    return taught


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
