"""Calling a user's model for the first time, in shapes only: whatever is wrong with the call is said in one line."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen

from mpq_jax import flax_seam
from mpq_jax.factories import told
from mpq_jax.float_model import FloatModel
from mpq_jax.tasks import logits_of, random_streams, task_of
from mpq_jax.types import QuantizedModel, Refusal


def init(model: FloatModel, key: jax.Array, inputs: Sequence[Any]) -> Mapping[str, Any]:
    """Fresh variables of a Linen module, as plain dicts of arrays. inputs: shapes."""
    rngs = {"params": key} | {
        name: jax.random.fold_in(key, i + 1) for i, name in enumerate(model.rngs) if name != "params"
    }
    zeros = [jax.numpy.zeros(x.shape, x.dtype) for x in inputs]
    return plain(model.module.init(rngs, *zeros, **(model.eval_kwargs or {})))


def plain(variables: Any) -> dict[str, Any]:
    """Nested dicts of arrays: without Flax's frozen dicts and its boxes of sharding names."""
    unboxed = linen.meta.unbox(variables)
    return {name: _dicts(tree) for name, tree in unboxed.items()}


def _dicts(tree: Any) -> Any:
    return {str(key): _dicts(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def shapes(model: FloatModel, inputs: Sequence[Any], name: str) -> Mapping[str, Any]:
    """The model's variables as shapes. Raises Refusal where the module cannot be called so."""
    if not isinstance(model.module, linen.Module):
        return flax_seam.seam(model.module).shapes((), {})
    try:
        return jax.eval_shape(lambda: init(model, jax.random.key(0), inputs))
    except Exception as error:
        raise Refusal(_call_failed(model, inputs, model.eval_kwargs, name, error)) from None


def check_calls(
    model: FloatModel, quantized: QuantizedModel, variables: Any, features: Mapping[str, Any], name: str
) -> None:
    """Calls the float model in evaluation and in training, its loss and what it calls right, in shapes of 2 examples.

    Raises Refusal where one of them fails, or gives something of another shape than it should.
    """
    batch = {key: jax.ShapeDtypeStruct((2, *shape), dtype) for key, (shape, dtype) in features.items()}
    task = task_of(model)
    inputs = task.inputs(batch)
    is_linen = quantized.variables is None
    stats = [key for key in variables if key != "params"]

    def training(variables: Any, inputs: Any) -> Any:
        rngs = random_streams(task, jax.random.key(0)) if is_linen else None
        return quantized.apply(variables, None, *inputs, mutable=stats, rngs=rngs, **task.train_kwargs)

    def evaluation(variables: Any, inputs: Any) -> Any:
        return quantized.apply(variables, None, *inputs, **task.eval_kwargs)

    for call, kwargs in ((training, task.train_kwargs), (evaluation, task.eval_kwargs)):
        try:
            outputs = jax.eval_shape(call, variables, inputs)
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(_call_failed(model, inputs, kwargs, name, error)) from None
    _check_outputs(model, outputs, batch, name)


def _check_outputs(model: FloatModel, outputs: Any, batch: Mapping[str, Any], name: str) -> None:
    if model.loss is None:
        label = batch.get("label")
        if label is None or label.ndim != 1 or label.dtype != np.int32:
            have = ", ".join(f"{key} {x.dtype.name}{list(x.shape[1:])}" for key, x in batch.items())
            raise Refusal(
                f'--model {name} has no loss of its own, so the data need a "label", one integer an example; they have '
                f"{have}; give one, or FloatModel(…, loss=…)"
            )
        try:
            logits = logits_of(outputs)
        except (KeyError, IndexError):
            logits = None
        if getattr(logits, "ndim", 0) != 2 or len(logits) != 2:
            raise Refusal(
                f"--model {name} returned {_shown(outputs)} for 2 examples; classification needs logits [2, classes]: "
                "give FloatModel(…, loss=…) for anything else"
            )
        return
    for what, function in (("loss", model.loss), ("correct", model.correct)):
        if function is None:
            continue
        try:
            found = jax.eval_shape(function, outputs, batch)
        except Exception as error:
            raise Refusal(f"{what} of --model {name} failed on outputs {_shown(outputs)}: {told(error)}") from None
        if not hasattr(found, "shape") or not found.shape or found.shape[0] != 2:
            raise Refusal(
                f"{what} of --model {name} returned {_shown(found)} for 2 examples; return one number an example, [2] or "
                "[2, …]: the mean is taken here, so that padding does not count"
            )
        if (more := _of_three(function, outputs, batch)) is not None and more[1:] != found.shape[1:]:
            raise Refusal(
                f"{what} of --model {name} returned {list(found.shape)} for 2 examples and {list(more)} for 3, every example "
                "with every other: labels of [N, 1] beside predictions of [N], perhaps; return one number an example"
            )


def _of_three(function: Any, outputs: Any, batch: Any) -> tuple[int, ...] | None:
    """The shape of a loss of 3 examples, from the outputs and the batch of 2; None where it cannot be told."""

    def grown(x: Any) -> Any:
        return jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype) if x.shape[:1] == (2,) else x

    try:
        return jax.eval_shape(function, *jax.tree.map(grown, (outputs, batch))).shape
    except Exception:
        return None


def _call_failed(model: FloatModel, inputs: Sequence[Any], kwargs: Any, name: str, error: Exception) -> str:
    arguments = [f"{key} {x.dtype}{list(x.shape)}" for key, x in zip(model.inputs, inputs, strict=True)]
    arguments += [f"{key}={value}" for key, value in (kwargs or {}).items()]
    return (
        f"--model {name} cannot be called with {', '.join(arguments)}: {told(error)}; say how with "
        "mpq_jax.FloatModel(module, inputs=…, train_kwargs=…, eval_kwargs=…, rngs=…)"
    )


def _shown(outputs: Any) -> str:
    leaves = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(outputs) if hasattr(x, "shape")]
    return ", ".join(leaves) or type(outputs).__name__
