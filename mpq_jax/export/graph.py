"""A quantized model as a flat list of operations, its weights as integer codes: what every exported file is made from.

The model is traced once. Whatever depends on its variables alone is computed; calls, loops and checkpoints are written
out; each product of data with a parameter becomes one node that holds the codes of its weight and the grid of its input.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mpq_jax import flax_seam, ops
from mpq_jax.export.encoding import Activation, Weight, encode_activation, encode_weight
from mpq_jax.interpret import Call
from mpq_jax.jaxprs import bind, called, loop, outputs_of
from mpq_jax.layers import MAX_BITS
from mpq_jax.policy import completed
from mpq_jax.types import Bits, Policy, QuantizedModel, Refusal


class Product(NamedTuple):
    """A layer: a product of data with a weight.

    path, leaf: of the layer, and of the parameter that its weight comes from; position: in the leaf's stack, or ().
    bits: of the policy; (32, 32) in float. weight: codes, or None in float. operand: the float weight as it came to the
    product. activation: None in float. side: 0 or 1, which operand the weight is. whole: whether the operand is the leaf
    itself (at `position`), element by element, be it in another type. affine: (multiplier, offset) that were folded in,
    broadcasting with the output; None: none were.
    """

    path: str
    leaf: str
    position: tuple[int, ...]
    bits: Bits
    weight: Weight | None
    operand: np.ndarray
    activation: Activation | None
    primitive: str
    params: Mapping[str, Any]
    side: int
    channel_axes: tuple[int, ...]
    whole: bool
    affine: tuple[np.ndarray, np.ndarray] | None = None


class Constant(NamedTuple):
    """A value known in advance. value: broadcasts to `shape`, same rank. leaves: the variables that it was made from."""

    value: Any
    shape: tuple[Any, ...]
    leaves: frozenset[str]

    def full(self) -> Any:
        """The value in all of its shape."""
        return self.value if self.value.shape == self.shape else jnp.broadcast_to(self.value, self.shape)


class Value(NamedTuple):
    """A value that depends on the input. number: of the value in its graph."""

    number: int
    shape: tuple[Any, ...]
    dtype: Any


class Node(NamedTuple):
    """One operation. eqn: its equation, for its primitive and parameters. product: set for a layer.

    inputs: the data of a product alone; else one for each input of the equation. where: the module path, for messages.
    """

    eqn: Any
    inputs: tuple[Value | Constant, ...]
    outputs: tuple[Value, ...]
    product: Product | None
    where: str

    @property
    def name(self) -> str:
        """JAX's name of the operation, e.g. "add"."""
        return self.eqn.primitive.name


class Graph(NamedTuple):
    """nodes: in an order in which they can run, none without use. inputs, outputs: in the model's flat order."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value | Constant, ...]
    nodes: tuple[Node, ...]

    @property
    def products(self) -> tuple[Node, ...]:
        """The nodes that are layers."""
        return tuple(node for node in self.nodes if node.product)


# (path, weight operand) -> the codes that a file has for it; of a layer in float its weight
Packed = Callable[[str, np.ndarray], Weight | np.ndarray]


def graph(
    model: QuantizedModel,
    variables: Any,
    policy: Policy | None,
    *inputs: Any,
    packed: Packed | None = None,
    **kwargs: Any,
) -> Graph:
    """The model with this policy as a Graph; None: in float.

    variables: with the quantizer's leaves. inputs: arrays or jax.ShapeDtypeStruct; a leading dimension may be symbolic
    (jax.export.symbolic_shape). packed: where the codes come from; default: the weights in `variables` are encoded.
    Raises Refusal for a product in a loop whose length is not known, for grids that are not finite, and for a policy of
    another model.
    """
    if policy is not None and packed is None:
        policy = completed(policy, model.layers, model.bit_widths, model.activation_bit_widths)
    calls: dict[str, Call] = {}

    def marking(call: Call, lhs: Any, rhs: Any, _: Any) -> tuple[Any, None]:
        name = f"mpq_layer {call.leaf} {call.number}"
        calls[name] = call
        product = ops.contract(call.primitive, call.params, "plain")

        def marked(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
            return product(lhs, rhs)

        marked.__name__ = name
        return jax.jit(marked)(lhs, rhs), None

    closed = jax.make_jaxpr(lambda v, *inputs: model.walk(v, {}, marking, inputs, kwargs)[0])(variables, *inputs)
    flat = {
        f"{collection}/{path}": leaf
        for collection, tree in variables.items()
        for path, leaf in flax_seam.flatten(tree).items()
    }
    names = jax.tree.leaves(
        {c: flax_seam.unflatten({p: f"{c}/{p}" for p in flax_seam.flatten(tree)}) for c, tree in variables.items()}
    )
    builder = _Builder(model, policy, flax_seam.flatten(variables["params"]), calls, packed)
    arguments: list[Value | Constant] = [
        Constant(jnp.asarray(flat[name]), jnp.shape(flat[name]), frozenset([name])) for name in names
    ]
    given = [builder.value(v.aval) for v in closed.jaxpr.invars[len(names) :]]
    outputs = builder.evaluate(closed.jaxpr, [*_constants(closed), *arguments, *given], ())
    return Graph(tuple(given), tuple(outputs), tuple(_used(builder.nodes, outputs)))


def _constants(closed: core.ClosedJaxpr) -> list[Constant]:
    return [Constant(jnp.asarray(c), jnp.shape(c), frozenset()) for c in closed.consts]


def _is_whole(leaf: np.ndarray, index: tuple[int, ...], operand: np.ndarray) -> bool:
    """Whether an operand is the leaf at a place of its first axes: as it is, or in the operand's type."""
    if any(i >= n for i, n in zip(index, leaf.shape, strict=False)):  # stacked along another axis
        return False
    own = leaf[index]
    return own.shape == operand.shape and bool((own.astype(operand.dtype) == operand).all())


def _used(nodes: Sequence[Node], outputs: Iterable[Value | Constant]) -> list[Node]:
    wanted = {o.number for o in outputs if isinstance(o, Value)}
    kept = []
    for node in reversed(nodes):
        if any(o.number in wanted for o in node.outputs):
            kept.append(node)
            wanted |= {i.number for i in node.inputs if isinstance(i, Value)}
    return kept[::-1]


@contextlib.contextmanager
def of_any_batch() -> Iterator[None]:
    """Around the trace of a model with a batch of no known size. Raises Refusal where the model needs it as a number."""
    try:
        yield
    except TypeError as error:
        if "_DimExpr" not in str(error):
            raise
        raise Refusal(
            "the model asks how long its batch is as a number, which a file for any batch does not know; write x.shape[0] in "
            "place of len(x) and int(x.shape[0])"
        ) from None


class _Builder:
    """One walk over the traced model. `at`: the position in each surrounding loop, outermost first."""

    def __init__(
        self,
        model: QuantizedModel,
        policy: Policy | None,
        params: Mapping[str, Any],
        calls: Mapping[str, Call],
        packed: Packed | None,
    ):
        self.model, self.policy, self.params, self.calls, self.packed = model, policy, params, calls, packed
        self.nodes: list[Node] = []
        self.count = 0
        self.scope = ""  # of the calls around; the name stacks inside of one begin there

    def value(self, aval: Any) -> Value:
        self.count += 1
        return Value(self.count, tuple(aval.shape), aval.dtype)

    def where(self, eqn: Any) -> str:
        return "/".join(part for part in (self.scope, str(eqn.source_info.name_stack)) if part)

    def inside(
        self, eqn: Any, body: core.ClosedJaxpr, operands: Sequence[Value | Constant], at: tuple[int, ...]
    ) -> list[Value | Constant]:
        """The outputs of the body of a call or a loop, from its operands but for its own constants."""
        outer, self.scope = self.scope, self.where(eqn)
        outs = self.evaluate(body.jaxpr, [*_constants(body), *operands], at)
        self.scope = outer
        return outs

    def evaluate(
        self, jaxpr: Any, arguments: Sequence[Value | Constant], at: tuple[int, ...]
    ) -> list[Value | Constant]:
        def literal(atom: core.Literal) -> Constant:
            return Constant(jnp.asarray(atom.val, getattr(atom.aval, "dtype", None)), jnp.shape(atom.val), frozenset())

        return outputs_of(jaxpr, arguments, literal, lambda eqn, ins: self.equation(eqn, ins, at))

    def equation(self, eqn: Any, ins: list[Value | Constant], at: tuple[int, ...]) -> list[Value | Constant]:
        body = called(eqn)
        if body is not None and eqn.params.get("name") in self.calls:
            return [self.product(eqn, self.calls[eqn.params["name"]], ins, at)]
        if body is not None:
            return self.inside(eqn, body, ins, at)
        if eqn.primitive.name == "scan" and any(isinstance(i, Value) for i in ins):
            there = loop(eqn, ins)
            return there.unrolled(
                lambda i, operands: self.inside(eqn, there.body, operands, (*at, i)),
                lambda x, i: self.run(lambda x: x[i], x),
                lambda xs: self.run(lambda *xs: jnp.stack(xs), *xs),
            )
        if (known := self.known(eqn, ins)) is not None:
            return known
        outs = [self.value(v.aval) for v in eqn.outvars]
        self.nodes.append(Node(eqn, tuple(ins), tuple(outs), None, self.where(eqn) or "the model's top level"))
        return list(outs)

    def known(self, eqn: Any, ins: list[Value | Constant]) -> list[Value | Constant] | None:
        """The outputs of an equation of constants; None where it is not one, or its shape is symbolic."""
        constants = [i for i in ins if isinstance(i, Constant)]
        if len(constants) < len(ins) or eqn.primitive.name == "dim_as_value":  # how long the batch is
            return None
        leaves = frozenset().union(*(c.leaves for c in constants))
        if eqn.primitive.name == "broadcast_in_dim" and constants[0].value.shape == constants[0].shape:
            # Left as it is but for axes of length 1: the whole would be as large as the activations.
            shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
            small = [constants[0].shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]
            return [Constant(constants[0].value.reshape(small), tuple(shape), leaves)]
        if not all(isinstance(n, int) for v in (*eqn.invars, *eqn.outvars) for n in v.aval.shape):
            return None
        return [Constant(out, out.shape, leaves) for out in bind(eqn, [c.full() for c in constants])]

    def run(self, function: Callable[..., Any], *ins: Value | Constant) -> Value | Constant:
        """A function of our own, traced into the graph."""
        shapes = [jax.ShapeDtypeStruct(i.shape, i.dtype if isinstance(i, Value) else i.value.dtype) for i in ins]
        closed = jax.make_jaxpr(function)(*shapes)
        return self.evaluate(closed.jaxpr, [*_constants(closed), *ins], ())[0]

    def product(self, eqn: Any, call: Call, ins: list[Value | Constant], at: tuple[int, ...]) -> Value | Constant:
        weight, data = ins[call.weight_side], ins[1 - call.weight_side]
        spec = self.model.specs[call.leaf]
        index = tuple(at[depth] for depth in call.stack)
        path = spec.paths[int(np.ravel_multi_index(index, spec.stack)) if spec.stack else 0]
        if not isinstance(weight, Constant):
            raise Refusal(f"the weight of layer {path!r} depends on the model's input; leave it in float with a rule")
        operand = np.asarray(weight.full())
        left = spec.in_float[spec.paths.index(path)]
        bits = Bits(32, 32) if left or self.policy is None else self.policy[path]
        activation = None if bits.a > MAX_BITS else encode_activation(self.model, spec, self.params, index, int(bits.a))
        encoded = None
        in_float = isinstance(bits.w, int) and bits.w > MAX_BITS
        if self.packed:
            found = self.packed(path, operand)
            encoded, operand = (found, operand) if isinstance(found, Weight) else (None, found)
        elif not in_float:
            encoded = encode_weight(self.model, call.leaf, self.params, index, bits.w, operand, call.channel_axes)
        out = self.value(eqn.outvars[0].aval)
        made = Product(
            path=path,
            leaf=call.leaf,
            position=index,
            bits=bits,
            weight=encoded,
            operand=operand,
            activation=activation,
            primitive=call.primitive,
            params=call.params,
            side=call.weight_side,
            channel_axes=call.channel_axes,
            whole=_is_whole(np.asarray(self.params[call.leaf]), index, operand),
        )
        self.nodes.append(Node(eqn, (data,), (out,), made, call.where))
        return out
