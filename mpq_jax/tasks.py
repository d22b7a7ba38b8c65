"""What a network is trained for: how it is called, its loss, what counts as right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpq_jax.float_model import FloatModel
from mpq_jax.types import Refusal

Batch = Mapping[str, Any]  # of arrays


class Task(NamedTuple):
    """What the network is trained for.

    inputs(batch) -> positional arguments of the model's call.
    loss(outputs, batch) -> [], the mean over the batch.
    correct(outputs, batch) -> (right answers [], examples []); padded examples count in neither. Where there is no such
        thing as a right answer, the first is not a number.
    train_kwargs, eval_kwargs: keyword arguments of the model's call in training and in evaluation.
    streams: names of the random streams that a Linen model asks for in training.
    needs_label: whether batches must have a "label".
    """

    inputs: Callable[[Batch], tuple[Any, ...]]
    loss: Callable[[Any, Batch], jax.Array]
    correct: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    train_kwargs: Mapping[str, Any]
    eval_kwargs: Mapping[str, Any]
    streams: tuple[str, ...] = ("dropout",)
    needs_label: bool = True


def logits_of(outputs: Any) -> Any:
    """[..., classes] of a model's outputs: themselves, the first of several, or "logits" of a dict.

    Raises Refusal for outputs that have none, such as a dict without "logits".
    """
    found = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not hasattr(found, "shape"):
        what = f"a dict of {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else type(outputs).__name__
        raise Refusal(
            f"the model gives {what}, which has no logits: distillation and the criterion sampled compare logits; set "
            '--joint.distill and --finetune.distill to 0, take another criterion, or name an output "logits"'
        )
    return found


def answer_of(structure: Any) -> int:
    """Which leaf of a model's outputs is its answer: the logits, else the first there is. structure: of jax.tree."""
    places = jax.tree.unflatten(structure, [np.asarray(i) for i in range(structure.num_leaves)])
    try:
        return int(logits_of(places))
    except Refusal:
        return 0


def classification(
    label_smoothing: float = 0.0,
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = ("image",),
    streams: Sequence[str] = ("dropout",),
) -> Task:
    """Images to labels: batches {"image": [B, H, W, C], "label": int32 [B]}, a label of -1 marking padding.

    inputs: names of the arrays in the batch that the model is called with.
    """

    def loss(outputs: Any, batch: Batch) -> jax.Array:
        logits, labels = logits_of(outputs), batch["label"]
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        each = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
        valid = labels >= 0
        return jnp.where(valid, each, 0).sum() / jnp.maximum(valid.sum(), 1)

    def correct(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        valid = batch["label"] >= 0
        return ((logits_of(outputs).argmax(-1) == batch["label"]) & valid).sum(), valid.sum()

    return Task(
        _picked(inputs),
        loss,
        correct,
        {"train": True} if train_kwargs is None else train_kwargs,
        {"train": False} if eval_kwargs is None else eval_kwargs,
        tuple(streams),
    )


def by_example(
    loss: Callable[[Any, Batch], jax.Array],
    correct: Callable[[Any, Batch], jax.Array] | None,
    inputs: Sequence[str],
    train_kwargs: Mapping[str, Any],
    eval_kwargs: Mapping[str, Any],
    streams: Sequence[str] = ("dropout",),
) -> Task:
    """A task of one's own. loss(outputs, batch) -> [B, ...], of each example; further axes (time, pixels) are averaged.

    correct(outputs, batch) -> [B, ...], what of each example is right, from 0 to 1; None: nothing is called right.
    Batches may have "valid", bool [B]: False for padding, which counts in no mean.
    """

    def of_each(function: Callable[[Any, Batch], jax.Array], outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        valid = _valid(batch, inputs)
        each = jnp.asarray(function(outputs, batch)).astype(jnp.float32)
        each = each.reshape(*each.shape[:1], -1).mean(-1)
        return jnp.where(valid, each, 0).sum(), valid.sum()

    def mean_loss(outputs: Any, batch: Batch) -> jax.Array:
        total, count = of_each(loss, outputs, batch)
        return total / jnp.maximum(count, 1)

    def right(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if correct is None:
            return jnp.float32(jnp.nan), _valid(batch, inputs).sum()
        return of_each(correct, outputs, batch)

    return Task(_picked(inputs), mean_loss, right, train_kwargs, eval_kwargs, tuple(streams), needs_label=False)


def random_streams(task: Task, key: jax.Array) -> dict[str, jax.Array]:
    """{stream: key} for a model's call; all of them different."""
    return {name: jax.random.fold_in(key, i) if i else key for i, name in enumerate(task.streams)}


def task_of(model: FloatModel, label_smoothing: float = 0.0) -> Task:
    """The task of a user's model. Raises Refusal for label smoothing where the loss is the model's own."""
    kwargs = dict(model.train_kwargs or {}), dict(model.eval_kwargs or {})
    if model.loss is None:
        return classification(label_smoothing, *kwargs, inputs=model.inputs, streams=model.rngs)
    if label_smoothing:
        raise Refusal(
            f"label_smoothing is {label_smoothing:g}, and the model has a loss of its own; set it to 0 "
            "(--pretrain.label_smoothing 0 --joint.label_smoothing 0 --finetune.label_smoothing 0), or smooth in the loss"
        )
    return by_example(model.loss, model.correct, model.inputs, *kwargs, model.rngs)


def _picked(names: Sequence[str]) -> Callable[[Batch], tuple[Any, ...]]:
    return lambda batch: tuple(batch[name] for name in names)


def _valid(batch: Batch, inputs: Sequence[str]) -> jax.Array:
    return batch["valid"] if "valid" in batch else jnp.ones(len(batch[inputs[0]]), bool)
