"""A run opened: its data, its model, what is compiled once for all stages, and how long and on what each stage trains."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpq_jax import build, data, evaluation, logs, parallel, processes
from mpq_jax.config import Config, Finetune, Joint, Pretrain
from mpq_jax.fewer_widths import trained_on
from mpq_jax.float_model import FloatModel
from mpq_jax.tasks import Task, logits_of, task_of
from mpq_jax.types import QuantizedModel, Refusal

LEAST_SLICE = 10  # samples: with so many the step sizes are those of whole batches (docs/results.md)


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
    sliced(config.joint, len(row_names(model, config.joint)))  # refuses now what joint training would refuse later
    variables = build.float_variables(config, source, model, dataset.features)
    task = task_of(source)
    example = build.example(source, dataset.features)
    outputs = jax.eval_shape(lambda v, x: model.apply(v, None, *x, **task.eval_kwargs), variables, example)
    if config.joint.distill or config.finetune.distill:  # refuses now what has none
        logits_of(outputs)
    if source.loss is None:
        dataset = data.answered(dataset, logits_of(outputs).shape[-1])
    if not dataset.sizes["validation"]:
        raise Refusal(
            "the validation split is empty, and searches and reports need it; give --data.validation_fraction a share "
            "of train, e.g. 0.1"
        )
    opened = Run(
        config,
        workdir,
        dataset,
        source,
        model,
        variables,
        statistics=parallel.compiled(evaluation.make_batch_statistics(model, task, dropout=is_linen(model)), layout),
        evaluate=parallel.compiled(evaluation.make_evaluate(model, task), layout),
        sinks=sinks,
        layout=layout,
    )
    _check_steps(opened)
    return opened


def _check_steps(run: Run) -> None:
    """Refuses, of whatever stage, settings under which nothing would be trained."""
    for name in ("pretrain", "joint", "finetune"):
        settings = getattr(run.config, name)
        if name == "pretrain" and (run.source.is_trained or run.config.model.weights):
            continue
        if not settings.steps and not settings.epochs:
            raise Refusal(f"{name}.steps and {name}.epochs are both 0; give one of them")
        steps, accumulate = steps_of(settings, run), getattr(settings, "accumulate", 1)
        if accumulate > steps:
            raise Refusal(
                f"{name}.accumulate is {accumulate}, and {name} has {steps} steps: no update would be made; give at most "
                f"--{name}.accumulate {steps}"
            )


def _check_layout(config: Config, layout: parallel.Layout, model: QuantizedModel) -> None:
    """Refuses sizes that many devices cannot share out, of whatever stage, before the first of them begins."""
    if layout.mesh.size == 1:
        return
    for stage in ("pretrain", "joint", "finetune"):
        parallel.check_batch(layout, getattr(config, stage).batch_size, f"{stage}.batch_size")
    parallel.check_rows(layout, len(row_names(model, config.joint)), config.joint.rows_at_a_time)


def row_names(model: QuantizedModel, settings: Joint) -> list[str]:
    """Of joint training of the run's model: the uniform rows, at the widths that are trained, then the random ones."""
    if settings.bit_widths:
        model = trained_on(model, settings.bit_widths)
    uniform = [build.uniform_name(b) for b in sorted({*model.bit_widths, *model.activation_bit_widths})]
    return uniform + [f"random{i + 1}" for i in range(settings.random_rows)]


def sliced(settings: Joint, rows: int) -> bool:
    """Whether each row sees a slice of the batch of its own. Raises Refusal for settings that cannot be had together."""
    if settings.slices not in ("auto", "true", "false"):
        raise Refusal(f'joint.slices {settings.slices!r} is not known; choose "auto", "true" or "false"')
    if settings.slices == "true" and settings.distill:
        raise Refusal("joint.distill needs rows that see the same samples; leave out joint.slices")
    if settings.slices != "auto":
        return settings.slices == "true"
    # Without measured policies alpha is fitted to the rows' log, and a slice's losses say next to nothing of it.
    alpha = settings.alpha != "auto" or bool(settings.alpha_policies)
    enough = settings.batch_size // rows >= LEAST_SLICE
    return enough and alpha and settings.weights == "still" and not settings.distill


def is_linen(model: QuantizedModel) -> bool:
    """Linen models take random streams in their call; NNX models carry their own, beside their variables."""
    return model.variables is None


def steps_of(settings: Pretrain | Joint | Finetune, run: Run) -> int:
    """Steps of a stage: as given, or so many epochs of the training split."""
    if settings.steps:
        return settings.steps
    return max(1, round(settings.epochs * run.dataset.sizes["train"] / settings.batch_size))


def train_batches(run: Run, batch_size: int, stage: str) -> Callable[[int], Iterator[Any]]:
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
