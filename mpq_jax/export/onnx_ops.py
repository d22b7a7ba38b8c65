"""What each JAX operation is in ONNX, element by element, and the table of them all. Layers are in onnx_products.py."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mpq_jax.export import onnx_axes as axes
from mpq_jax.export.graph import Constant, Node, Value
from mpq_jax.export.onnx_writer import Writer, element_type

# JAX's name -> ONNX's, for operations that work element by element and mean the same.
SAME = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
    **{"neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "sqrt": "Sqrt"},
    **{"abs": "Abs", "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "pow": "Pow", "sin": "Sin", "cos": "Cos"},
    **{"tan": "Tan", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "not": "Not"},
    **{"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"},
    **{"and": "And", "or": "Or", "xor": "Xor"},
}
LOGICAL = ("and", "or", "xor", "not")
IDENTITIES = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint")


def write(w: Writer, node: Node) -> None:
    """Adds a node that is no layer. Raises Refusal for an operation that has no form in ONNX."""
    if node.name in SAME:
        _same(w, node)
    elif node.name in IDENTITIES:
        for value, out in zip(node.inputs, node.outputs, strict=True):
            _alias(w, value, out)
    elif node.name in OPERATIONS:
        OPERATIONS[node.name](w, node)
    else:
        raise w.refuse(
            node,
            "it has no ONNX form here",
            "write the model with other operations there, or export it as StableHLO, which holds any",
        )


def _alias(w: Writer, x: Value | Constant, out: Value) -> None:
    if isinstance(x, Value):
        w.values[out.number] = w.values[x.number]
    else:
        w.put(out, w.full(x))


# ---- element by element --------------------------------------------------------------------------------------------


def _operands(w: Writer, node: Node) -> tuple[list[str], tuple[int, ...]]:
    """The inputs' names in one order of axes, and that order."""
    order, shape = w.order(node.inputs), node.outputs[0].shape
    names = [w.of(x, order if len(x.shape) == len(order) else None) for x in node.inputs]
    held = [x.value.shape if isinstance(x, Constant) else x.shape for x in node.inputs]
    reached = all(any(len(h) == len(shape) and h[i] == n for h in held) for i, n in enumerate(shape))
    if not reached:  # only constants have this axis, and hold one entry of it
        wide = next(i for i, x in enumerate(node.inputs) if x.shape == shape)
        x = node.inputs[wide]
        assert isinstance(x, Constant)
        names[wide] = w.expand(names[wide], [x.value.shape[i] for i in order], [shape[i] for i in order])
    return names, order


def _elementwise(form: Callable[..., str]) -> Callable[[Writer, Node], None]:
    """form(w, node, *names of the inputs) -> the name of the output."""

    def operation(w: Writer, node: Node) -> None:
        names, order = _operands(w, node)
        w.put(node.outputs[0], form(w, node, *names), order)

    return operation


def _one(w: Writer, node: Node, value: float) -> str:
    return w.constant(np.asarray(value, np.dtype(node.outputs[0].dtype)))


def _same(w: Writer, node: Node) -> None:
    if node.name in LOGICAL and np.dtype(node.outputs[0].dtype) != np.bool_:
        raise w.refuse(node, "bits of integers", "write it with arithmetic")
    _elementwise(lambda w, node, *names: w.emit(SAME[node.name], *names))(w, node)


def _integer_pow(w: Writer, node: Node, x: str) -> str:
    return w.emit("Mul", x, x) if node.eqn.params["y"] == 2 else w.emit("Pow", x, _one(w, node, node.eqn.params["y"]))


def _round(w: Writer, node: Node, x: str) -> str:
    if node.eqn.params["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        return w.emit("Round", x)
    away = w.emit("Floor", w.emit("Add", w.emit("Abs", x), _one(w, node, 0.5)))
    return w.emit("Mul", w.emit("Sign", x), away)


def _select(w: Writer, node: Node, which: str, *cases: str) -> str:
    if len(cases) != 2 or np.dtype(_dtype(node.inputs[0])) != np.bool_:
        raise w.refuse(node, f"a choice among {len(cases)} by an integer", "nest jnp.where")
    return w.emit("Where", which, cases[1], cases[0])


def _dtype(x: Value | Constant) -> Any:
    return x.dtype if isinstance(x, Value) else x.value.dtype


def _convert(w: Writer, node: Node, x: str) -> str:
    before, after = np.dtype(_dtype(node.inputs[0])), np.dtype(node.eqn.params["new_dtype"])
    if before == after:
        return x
    if before.kind == "f" and after.kind in "iu" and after.itemsize <= 2:
        # What is out of range goes to its end, in ONNX round and round.
        ends = (w.constant(np.asarray(n, before)) for n in (np.iinfo(after).min, np.iinfo(after).max))
        x = w.emit("Clip", x, *ends)
    return w.emit("Cast", x, to=element_type(after.name))


def _reduce_precision(w: Writer, node: Node) -> None:
    kept, params = jax.numpy.finfo(node.outputs[0].dtype), node.eqn.params
    if params["exponent_bits"] < kept.nexp or params["mantissa_bits"] < kept.nmant:
        raise w.refuse(node, "numbers of fewer bits", "leave out lax.reduce_precision, or export it as StableHLO")
    _alias(w, node.inputs[0], node.outputs[0])


def _is_finite(w: Writer, node: Node, x: str) -> str:
    return w.emit("Not", w.emit("Or", w.emit("IsInf", x), w.emit("IsNaN", x)))


OPERATIONS: dict[str, Callable[[Writer, Node], None]] = {
    "erfc": _elementwise(lambda w, node, x: w.emit("Sub", _one(w, node, 1), w.emit("Erf", x))),
    "rsqrt": _elementwise(lambda w, node, x: w.emit("Div", _one(w, node, 1), w.emit("Sqrt", x))),
    "square": _elementwise(lambda w, node, x: w.emit("Mul", x, x)),
    "expm1": _elementwise(lambda w, node, x: w.emit("Sub", w.emit("Exp", x), _one(w, node, 1))),
    "log1p": _elementwise(lambda w, node, x: w.emit("Log", w.emit("Add", x, _one(w, node, 1)))),
    "exp2": _elementwise(lambda w, node, x: w.emit("Pow", _one(w, node, 2), x)),
    "rem": _elementwise(lambda w, node, x, y: w.emit("Mod", x, y, fmod=1)),
    "ne": _elementwise(lambda w, node, x, y: w.emit("Not", w.emit("Equal", x, y))),
    "clamp": _elementwise(lambda w, node, low, x, high: w.emit("Min", w.emit("Max", x, low), high)),
    "integer_pow": _elementwise(_integer_pow),
    "round": _elementwise(_round),
    "select_n": _elementwise(_select),
    "convert_element_type": _elementwise(_convert),
    "is_finite": _elementwise(_is_finite),
    "reduce_precision": _reduce_precision,
    "transpose": axes.transpose,
    "reshape": axes.reshape,
    "broadcast_in_dim": axes.broadcast,
    "squeeze": axes.squeeze,
    "concatenate": axes.concatenate,
    "stack": axes.stack,
    "tile": axes.tile,
    "split": axes.split,
    "slice": axes.slice_,
    "dynamic_slice": axes.dynamic_slice,
    "rev": axes.reverse,
    "pad": axes.pad,
    "gather": axes.gather,
    **dict.fromkeys(axes.REDUCTIONS, axes.reduce),
    "reduce_and": axes.reduce_logical,
    "reduce_or": axes.reduce_logical,
    "argmax": axes.arg,
    "argmin": axes.arg,
    "cumsum": axes.cumsum,
    "reduce_window_max": axes.pool,
    "reduce_window_sum": axes.pool,
    "iota": axes.iota,
    "dim_as_value": axes.dimension,
}
