"""What criteria ask of a model's layers: their tensors' shapes, quantization errors, and tables from values a leaf."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.importance import spread
from mpq_jax.interpret import Call
from mpq_jax.joint import Batch, Task
from mpq_jax.layers import LayerSpec
from mpq_jax.numerics import wide
from mpq_jax.operands import fake_quants
from mpq_jax.quantized_model import learned_leaves
from mpq_jax.types import Importance, QuantizedModel, Refusal

KINDS = ("weight", "activation")


class Shapes(NamedTuple):
    """Operands of one call, with the lengths of the scans around it in front: shapes and dtypes."""

    weight: jax.ShapeDtypeStruct
    activation: jax.ShapeDtypeStruct


def searched_leaves(model: QuantizedModel) -> dict[str, LayerSpec]:
    """The parameter leaves that hold at least one searched layer."""
    searched = {layer.path for layer in model.layers if layer.searched}
    return {leaf: spec for leaf, spec in model.specs.items() if searched & set(spec.paths)}


def place(model: QuantizedModel, path: str) -> tuple[str, tuple[int, ...]]:
    """(leaf, position in its stack) of a layer; the position is () where there is no stack."""
    leaf, spec = next((leaf, spec) for leaf, spec in model.specs.items() if path in spec.paths)
    position = np.unravel_index(spec.paths.index(path), spec.stack) if spec.stack else ()
    return leaf, tuple(int(i) for i in position)


def searched_paths(model: QuantizedModel) -> list[str]:
    """Paths of the searched layers: the rows of every table, in order."""
    return [layer.path for layer in model.layers if layer.searched]


# ---- walks --------------------------------------------------------------------------------------------------------


def call_shapes(model: QuantizedModel, task: Task, variables: Any, batch: Batch) -> dict[tuple[str, int], Shapes]:
    """(leaf, call number) -> Shapes of every call of a searched leaf; one abstract walk."""
    leaves = searched_leaves(model)

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, Any]:
        out = ops.contract(call.primitive, call.params, "plain")(lhs, rhs)
        operands: tuple[Any, Any] = (lhs, rhs)  # shapes, once eval_shape has seen them
        tap = Shapes(operands[call.weight_side], operands[1 - call.weight_side])
        return out, (tap if call.leaf in leaves else None)

    def walk(variables: Any, batch: Batch) -> dict[tuple[str, int], Shapes]:
        return model.walk(variables, {}, handler, task.inputs(batch), task.eval_kwargs)[2]

    return jax.eval_shape(walk, variables, batch)


def elements(model: QuantizedModel, shapes: Mapping[tuple[str, int], Shapes], kind: str) -> dict[str, int]:
    """leaf -> elements of one layer's tensor: the weight's, or the inputs' of all its calls together."""
    result: dict[str, int] = {}
    for (leaf, number), shape in shapes.items():
        spec = model.specs[leaf]
        if kind == "weight":
            scans = shape.weight.shape[: len(spec.stack) + len(spec.shared)]
            result.setdefault(leaf, math.prod(shape.weight.shape) // math.prod(scans))
        else:
            stack = math.prod(spec.stack)
            result[leaf] = result.get(leaf, 0) + math.prod(shape.activation.shape) // stack
        del number
    return result


def make_squared_errors(model: QuantizedModel, task: Task) -> Callable[[Any, Batch], dict[str, dict[str, jax.Array]]]:
    """errors(variables, batch) -> {"weight": {leaf: [*stack, K]}, "activation": {leaf: [*stack, K]}}.

    ||Q_b(W) - W||^2 of each layer's weights at each of the leaf's bit-widths, and ||Q_b(X) - X||^2 of its inputs, all
    calls together, a sample.
    """
    leaves = searched_leaves(model)

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        out = ops.contract(call.primitive, call.params, "smooth")(lhs, rhs)
        if value is None:
            return out, None
        spec, operands = leaves[call.leaf], (lhs, rhs)
        tensors = (operands[call.weight_side], operands[1 - call.weight_side])
        both = fake_quants(spec, model.quantizer, call, tensors[0], value)
        widths = (spec.weight_bit_widths, spec.activation_bit_widths)
        return out, {
            kind: jnp.stack([jnp.square(wide(grid(x, jnp.int32(b)) - x)).sum() for b in held])
            for kind, x, grid, held in zip(KINDS, tensors, both, widths, strict=True)
        }

    def errors(variables: Any, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        values = {
            leaf: v for leaf, v in learned_leaves(model.specs, model.quantizer, variables).items() if leaf in leaves
        }
        inputs = task.inputs(batch)
        taps = model.walk(variables, values, handler, inputs, task.eval_kwargs)[2]
        samples = inputs[0].shape[0]
        result: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        for leaf, spec in leaves.items():
            calls = [tap for (tapped, _), tap in taps.items() if tapped == leaf]
            # The weights are the same in every call; the inputs are not.
            result["weight"][leaf] = sum(call["weight"].mean(axis=spec.shared) for call in calls) / len(calls)
            result["activation"][leaf] = sum(call["activation"].sum(axis=spec.shared) for call in calls) / samples
        return result

    return errors


# ---- tables -------------------------------------------------------------------------------------------------------


def layer_rows(model: QuantizedModel, kind: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """[L, K] float64 over the global bit-widths, filled in by `importance.spread`, from leaf -> [*stack, K of the leaf]."""
    every = model.bit_widths if kind == "weight" else model.activation_bit_widths
    rows = []
    for layer in model.layers:
        if layer.searched:
            leaf, position = place(model, layer.path)
            held = getattr(model.specs[leaf], f"{kind}_bit_widths")
            at = np.asarray(values[leaf], np.float64)[position]
            own = layer.candidates(kind, every)
            rows.append(spread({bits: float(at[held.index(bits)]) for bits in own}, every))
    return np.array(rows)


def importance(model: QuantizedModel, criterion: str, weight: np.ndarray, activation: np.ndarray) -> Importance:
    """The table of a criterion whose weights and activations share a unit (alpha is None)."""
    return Importance(criterion, model.bit_widths, model.activation_bit_widths, model.layers, weight, activation)


def uniform_activations(model: QuantizedModel, criterion: str, weight: np.ndarray, bits: int) -> Importance:
    """The table of a criterion of weights alone: every searched layer's activations at `bits`, without harm.

    Raises Refusal where `bits` is no candidate of some layer.
    """
    layers = []
    for layer in model.layers:
        allowed = layer.candidates("activation", model.activation_bit_widths)
        if layer.searched and bits not in allowed:
            raise Refusal(
                f"uniform_activations is {bits}, but the activation candidates of layer {layer.path!r} are "
                f"{', '.join(map(str, allowed))}; choose one that every layer has, or 0 to search activations too"
            )
        layers.append(layer._replace(activation_bit_widths=None))
    return Importance(criterion, model.bit_widths, (bits,), tuple(layers), weight, np.zeros((len(weight), 1)))


def mean_over(batches: Iterable[Batch], function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """(mean over samples of function(*arguments, batch), samples): its results are means over each batch. NumPy."""
    total, count = None, 0
    for batch in batches:
        size = samples_of(batch)
        part = jax.tree.map(lambda x, size=size: size * np.asarray(x, np.float64), function(*arguments, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
        count += size
    return jax.tree.map(lambda x: x / count, total), count


def samples_of(batch: Batch) -> int:
    """B, the length of the leading axis."""
    return len(jax.tree.leaves(batch)[0])


def one_of(sample: Any) -> Any:
    """A batch of one from a sample, for functions under `jax.vmap` over samples."""
    return jax.tree.map(lambda x: x[None], sample)


def percent(values: Sequence[float]) -> str:
    """The largest of some shares, as "4.2 %"."""
    return f"{100 * max(values, default=0.0):.1f} %"
