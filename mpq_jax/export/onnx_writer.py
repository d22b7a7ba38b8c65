"""An ONNX file in the making: its nodes, its initializers, and in which order of axes each value is stored.

Convolutions of ONNX want channels first, those of Flax are channels last. A value is therefore kept in the order of axes
that its producer left it in, and turned only where a consumer needs another: between convolutions, nothing is.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.export.graph import Constant, Graph, Node, Value
from mpq_jax.types import Refusal

try:
    import onnx
except ImportError:
    raise Refusal("ONNX files need the package onnx, which is not installed; type: pip install onnx") from None
from onnx import helper, numpy_helper

BATCH = "batch"
CODES = "mpq_jax.codes"  # the key, in a file's metadata, of where the codes of quantized inputs are


class Stored(NamedTuple):
    """A value's tensor in the file: its axis i is the value's axis order[i]."""

    name: str
    order: tuple[int, ...]


class Names:
    """Every name at most once."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def fresh(self, wanted: str) -> str:
        """The wanted name, or the first of wanted.2, wanted.3, … that is free."""
        name, i = wanted, 1
        while name in self.used:
            i += 1
            name = f"{wanted}.{i}"
        self.used.add(name)
        return name


class Writer:
    """Takes a Graph's nodes one after another. opset: of the standard operators."""

    def __init__(self, opset: int):
        self.opset = opset
        self.names = Names()
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.found: dict[tuple[Any, ...], str] = {}
        self.values: dict[int, Stored] = {}
        self.turned: dict[tuple[int, tuple[int, ...]], str] = {}
        self.codes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.where = ""
        self.input: Value | None = None

    # ---- nodes and constants ----------------------------------------------------------------------------------

    def emit(
        self, op: str, *inputs: str, name: str = "", outputs: int | None = None, domain: str = "", **attrs: Any
    ) -> Any:
        """Adds a node; the name of its output, or, with `outputs`, the list of their names."""
        stem = f"{self.where}/{op}" if self.where else op
        made = [self.names.fresh(name or stem) for _ in range(outputs or 1)]
        node = helper.make_node(op, list(inputs), made, name=made[0], domain=domain, **attrs)
        self.nodes.append(node)
        return made if outputs else made[0]

    def constant(self, array: Any, name: str = "") -> str:
        """The name of an initializer with these values; equal ones are stored once."""
        array = np.asarray(array)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.found:
            self.found[key] = self.names.fresh(name or "constant")
            self.initializers[self.found[key]] = array
        return self.found[key]

    def integers(self, values: Sequence[int]) -> str:
        """The name of an int64 initializer, [len(values)]."""
        return self.constant(np.asarray(values, np.int64))

    # ---- values -----------------------------------------------------------------------------------------------

    def put(self, value: Value, name: str, order: Sequence[int] | None = None) -> None:
        """Says which tensor holds a value, and in which order of its axes; None: its own."""
        self.values[value.number] = Stored(name, tuple(range(len(value.shape))) if order is None else tuple(order))

    def order(self, inputs: Sequence[Value | Constant]) -> tuple[int, ...]:
        """The order that an operation on all of these, element by element, had best run in."""
        orders = [self.values[i.number].order for i in inputs if isinstance(i, Value)]
        rank = max((len(i.shape) for i in inputs), default=0)
        full = [o for o in orders if len(o) == rank]
        plain = tuple(range(rank))
        return next((o for o in full if o != plain), plain)

    def of(self, x: Value | Constant, order: Sequence[int] | None = None) -> str:
        """The name of x's tensor with its axes in this order; a constant keeps its axes of length 1 for broadcasting."""
        order = tuple(range(len(x.shape))) if order is None else tuple(order)
        if isinstance(x, Constant):
            return self.constant(np.transpose(np.asarray(x.value), order), "/".join(sorted(x.leaves)[:1]))
        stored = self.values[x.number]
        if stored.order == order:
            return stored.name
        if (x.number, order) not in self.turned:
            turn = [stored.order.index(axis) for axis in order]
            self.turned[x.number, order] = self.emit("Transpose", stored.name, perm=turn)
        return self.turned[x.number, order]

    def full(self, x: Value | Constant) -> str:
        """x with nothing left to broadcast."""
        if isinstance(x, Value) or x.value.shape == x.shape:
            return self.of(x)
        return self.expand(self.of(x), x.value.shape, x.shape)

    # ---- shapes -----------------------------------------------------------------------------------------------

    def batch(self) -> str:
        """[1] int64: how many samples the model was given."""
        assert self.input is not None
        return self.emit("Gather", self.emit("Shape", self.values[self.input.number].name), self.integers([0]), axis=0)

    def dimensions(self, shape: Sequence[Any]) -> str:
        """A shape as a tensor, int64 [rank]; symbolic dimensions are worked out when the model runs."""
        if all(isinstance(n, int) for n in shape):
            return self.integers([int(n) for n in shape])
        parts = []
        for n in shape:
            if isinstance(n, int):
                parts.append(self.integers([n]))
                continue
            factor = n // self.input.shape[0] if self.input is not None else None
            if not isinstance(factor, int):
                raise Refusal(f"{self.where}: the dimension {n} is no multiple of the batch; keep the batch an axis")
            parts.append(self.emit("Mul", self.batch(), self.integers([factor])) if factor > 1 else self.batch())
        return self.emit("Concat", *parts, axis=0)

    def reshape(self, name: str, before: Sequence[Any], after: Sequence[Any]) -> str:
        """The tensor in another shape; with several symbolic dimensions that is worked out when the model runs."""
        before, after = tuple(before), tuple(after)
        if before == after:
            return name
        symbolic = [i for i, n in enumerate(after) if not isinstance(n, int)]
        if len(symbolic) > 1:
            return self.emit("Reshape", name, self.dimensions(after))
        return self.emit("Reshape", name, self.integers([-1 if i in symbolic else n for i, n in enumerate(after)]))

    def expand(self, name: str, before: Sequence[Any], after: Sequence[Any]) -> str:
        """Broadcasts axes of length 1."""
        if tuple(before) == tuple(after):
            return name
        target = [1 if b == a else a for b, a in zip(before, after, strict=True)]
        return self.emit("Expand", name, self.dimensions(target))

    def reduce(self, op: str, name: str, axes: Sequence[int], keep: bool = False) -> str:
        """A reduction over these places of the tensor's axes, in the form that the opset has."""
        attributes: dict[str, Any] = {"keepdims": int(keep)}
        if op != "ReduceSum" and self.opset < 18:
            return self.emit(op, name, axes=list(axes), **attributes)
        return self.emit(op, name, self.integers(axes), **attributes)

    def refuse(self, node: Node, what: str, instead: str) -> Refusal:
        """The Refusal of a node, to be raised: what ONNX lacks there, and what to do instead."""
        return Refusal(f"{node.name} at {node.where}: {what}; {instead}")

    # ---- the file ---------------------------------------------------------------------------------------------

    def model(self, graph: Graph, domains: Mapping[str, int], metadata: Mapping[str, str], name: str) -> Any:
        """The ModelProto. domains: operator sets beside the standard one, with their versions."""
        inputs = [helper.make_tensor_value_info(self.values[v.number].name, *_info(v)) for v in graph.inputs]
        outputs = []
        for i, value in enumerate(graph.outputs):
            tensor = self.emit("Identity", self.full(value), name="logits" if len(graph.outputs) == 1 else f"output{i}")
            like = value if isinstance(value, Value) else Value(0, value.shape, value.value.dtype)
            outputs.append(helper.make_tensor_value_info(tensor, *_info(like)))
        tensors = [numpy_helper.from_array(array, key) for key, array in self.initializers.items()]
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in domains.items())]
        proto = helper.make_model(
            helper.make_graph(self.nodes, name, inputs, outputs, tensors),
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets[:1]),
            producer_name="mpq_jax",
        )
        helper.set_model_props(proto, dict(metadata))
        return proto


@functools.cache
def element_type(dtype: str) -> int:
    """ONNX's number for a NumPy dtype's name."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _info(value: Value) -> tuple[int, list[Any]]:
    dims = [n if isinstance(n, int) else (BATCH if str(n).isidentifier() else None) for n in value.shape]
    return element_type(str(np.dtype(value.dtype))), dims


__all__ = ["BATCH", "CODES", "Names", "Stored", "Writer", "element_type", "helper", "numpy_helper", "onnx"]
