"""Walks the jaxpr of a model and hands every product of data with a parameter to a handler.

This is how a model is reached without editing it: whatever its modules look like, in the jaxpr a layer is a
`dot_general` or `conv_general_dilated` with one operand that was computed from parameters alone. The walk carries an
`Origin` beside every value, and goes into `jit`, `checkpoint` (nn.remat) and `scan` (nn.scan).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from mpq_jax import ops
from mpq_jax.jaxprs import PLAIN, REMATS, bind, called, contains, inner_jaxprs, loop, outputs_of
from mpq_jax.origins import CONTRACTIONS, Origin, constant, propagate

# Products that no quantizer here can take apart; with a parameter in them they count as not reached.
OTHER_CONTRACTIONS = ("ragged_dot_general", "ragged_dot")
WITH_OTHERS = "whose weight is computed from other variables, too (a mask, a norm's statistics),"


class Call(NamedTuple):
    """One product of data with a weight, as the handler sees it.

    leaf: path of the parameter (the largest, where the weight was computed from several).
    weight_side: 0 or 1, which operand is the weight.
    channel_axes: axes of the weight operand that are output channels.
    scans: lengths of the surrounding scans, outermost first.
    stack: which of them slice the leaf: a stack of layers. The others run the same layer again.
    number: how many calls of this leaf came before it in the walk.
    where: the module path (name stack), for messages.
    """

    leaf: str
    primitive: str
    params: dict[str, Any]
    weight_side: int
    channel_axes: tuple[int, ...]
    activation: Origin
    scans: tuple[int, ...]
    stack: tuple[int, ...]
    number: int
    where: str
    macs: int


class Trace(NamedTuple):
    """What a walk saw beside the layers: products of two activations, and products it could not reach."""

    products: list[tuple[str, int]]
    unreached: list[tuple[str, str, tuple[str, ...]]]


# handler(call, lhs, rhs, value of the leaf) -> (out, tap)
Handler = Callable[[Call, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Taps = dict[tuple[str, int], Any]  # (leaf, call number) -> tap, stacked under scans
Walked = tuple[list[Any], list[Origin], Taps]  # outputs, their origins, taps


class _Walk:
    """The state of one walk: the handler, counters, and what was noticed."""

    def __init__(self, handler: Handler, sizes: dict[str, int]):
        self.handler = handler
        self.sizes = sizes
        self.counter = itertools.count()
        self.calls: dict[str, int] = {}
        self.trace = Trace([], [])
        self.scans: tuple[int, ...] = ()

    def fresh(self) -> int:
        return next(self.counter)


def interpret(
    closed: core.ClosedJaxpr,
    arguments: Sequence[Any],
    leaves: Sequence[str | None],
    values: Mapping[Any, Any],
    handler: Handler,
) -> tuple[list[Any], Taps, Trace]:
    """Evaluates a jaxpr, with `handler` in place of every product of data with a parameter.

    arguments: flat arguments. leaves: for each, the parameter's path, "" for another variable, or None for an input.
    values: parameter path -> pytree given to the handler with that layer; under a scan that slices the parameter, its
    arrays have the scan's length as their leading axis and are sliced alike. (path, call number) -> pytree for that
    one call, in place of the parameter's: its arrays lead with the lengths of all scans around the call, as taps do.
    Returns the flat outputs; what the handler tapped, (path, call number) -> tap, stacked under scans; and the Trace.
    """
    walk = _Walk(handler, {leaf: int(np.size(a)) for leaf, a in zip(leaves, arguments, strict=True) if leaf})
    origins = [
        Origin((leaf,), False, walk.fresh(), False)
        if leaf
        else Origin((), True, walk.fresh(), False, given=leaf is None)
        for leaf in leaves
    ]
    constants = [constant(walk.fresh, c) for c in closed.consts]
    outs, _, taps = _evaluate(walk, closed.jaxpr, [*closed.consts, *arguments], [*constants, *origins], values)
    return outs, taps, walk.trace


def _evaluate(
    walk: _Walk, jaxpr: Any, arguments: Sequence[Any], origins: Sequence[Origin], values: Mapping[Any, Any]
) -> Walked:
    """The jaxpr's constants come first among the arguments."""
    taps: Taps = {}

    def equation(eqn: Any, read: list[tuple[Any, Origin]]) -> list[tuple[Any, Origin]]:
        outs, outs_origins, new = _equation(walk, eqn, [v for v, _ in read], [o for _, o in read], values)
        taps.update(new)
        return list(zip(outs, outs_origins, strict=True))

    def literal(atom: core.Literal) -> tuple[Any, Origin]:
        return atom.val, constant(walk.fresh, atom.val)

    results = outputs_of(jaxpr, list(zip(arguments, origins, strict=True)), literal, equation)
    return [v for v, _ in results], [o for _, o in results], taps


def _equation(walk: _Walk, eqn: Any, ins: list[Any], origins: list[Origin], values: Mapping[Any, Any]) -> Walked:
    name = eqn.primitive.name
    if name in CONTRACTIONS:
        return _contraction(walk, eqn, ins, origins, values)
    if any(contains(inner, (*CONTRACTIONS, *OTHER_CONTRACTIONS)) for inner in inner_jaxprs(eqn)):
        if (body := called(eqn, PLAIN)) is not None:
            constants = [constant(walk.fresh, c) for c in body.consts]
            return _evaluate(walk, body.jaxpr, [*body.consts, *ins], [*constants, *origins], values)
        if (body := called(eqn, REMATS)) is not None:
            return _checkpoint(walk, eqn, body, ins, origins, values)
        if name == "scan":
            return _scan(walk, eqn, ins, origins, values)
        _note_unreached(walk, eqn, origins)
    elif name in OTHER_CONTRACTIONS:
        _note_unreached(walk, eqn, origins)
    outs = bind(eqn, ins)
    return outs, propagate(walk.fresh, eqn, origins), {}


def _where(eqn: Any) -> str:
    return str(eqn.source_info.name_stack) or "the model's top level"


def _note_unreached(walk: _Walk, eqn: Any, origins: list[Origin]) -> None:
    leaves = tuple(dict.fromkeys(leaf for o in origins if o.is_weight for leaf in o.leaves))
    if leaves:
        walk.trace.unreached.append((_where(eqn), eqn.primitive.name, leaves))


# ---- products -----------------------------------------------------------------------------------------------------


def _contraction(walk: _Walk, eqn: Any, ins: list[Any], origins: list[Origin], values: Mapping[Any, Any]) -> Walked:
    lhs, rhs = origins
    macs = contraction_macs(eqn.primitive.name, eqn.params, *(v.aval for v in (*eqn.invars, *eqn.outvars)))
    out_origin = propagate(walk.fresh, eqn, origins)
    weights = [_is_weight(eqn, side, origin) for side, origin in enumerate(origins)]
    if weights[0] == weights[1] or not (lhs.data or rhs.data):
        # Two activations, or two parameters: the latter's result is a weight itself, seen where it meets data.
        if (lhs.data or lhs.leaves) and (rhs.data or rhs.leaves) and (lhs.data or rhs.data):
            walk.trace.products.append((_where(eqn), macs * math.prod(walk.scans)))
            for one, other, v in ((lhs, rhs, eqn.invars[0]), (rhs, lhs, eqn.invars[1])):
                # A parameter as large as the operand is its weight; a smaller one, such as a bias, is beside it.
                if other.given and any(walk.sizes[leaf] >= v.aval.size for leaf in one.mixed):
                    walk.trace.unreached.append((_where(eqn), f"{eqn.primitive.name} {WITH_OTHERS}", one.mixed))
        return bind(eqn, ins), out_origin, {}
    side = 0 if weights[0] else 1
    weight, activation = origins[side], origins[1 - side]
    leaf = max(weight.leaves, key=lambda path: walk.sizes[path])
    number = walk.calls.get(leaf, 0)
    walk.calls[leaf] = number + 1
    call = Call(
        leaf=leaf,
        primitive=eqn.primitive.name,
        params=eqn.params,
        weight_side=side,
        channel_axes=_channel_axes(eqn.primitive.name, eqn.params, side, eqn.invars[side].aval.ndim),
        activation=activation,
        scans=walk.scans,
        stack=weight.stack,
        number=number,
        where=_where(eqn),
        macs=macs,
    )
    out, tap = walk.handler(call, ins[0], ins[1], values.get((leaf, number), values.get(leaf)))
    return [out], out_origin, ({} if tap is None else {(leaf, number): tap})


def _is_weight(eqn: Any, side: int, origin: Origin) -> bool:
    """Whether an operand is a layer's weight. A product of parameters that shares an axis with the data is none: so do the
    queries of attention that are learned, one set for all samples, of which each sample gets its copy."""
    shared = eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][1][side]
    return origin.is_weight and not (origin.product and shared)


def contraction_macs(name: str, params: dict[str, Any], lhs: Any, rhs: Any, out: Any) -> int:
    """Multiply-accumulates of one product, from its shapes. A transposed convolution counts no inserted zeros."""
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        return math.prod(out.shape) * math.prod(lhs.shape[i] for i in contracting)
    numbers = params["dimension_numbers"]
    kernel = math.prod(rhs.shape[i] for i in numbers.rhs_spec[2:])
    per_group = rhs.shape[numbers.rhs_spec[1]]
    if any(d > 1 for d in params["lhs_dilation"]):
        positions = math.prod(lhs.shape[i] for i in (numbers.lhs_spec[0], *numbers.lhs_spec[2:]))
        return positions * kernel * per_group * rhs.shape[numbers.rhs_spec[0]]
    return math.prod(out.shape) * kernel * per_group


def _channel_axes(name: str, params: dict[str, Any], side: int, ndim: int) -> tuple[int, ...]:
    if name == "conv_general_dilated":
        return (params["dimension_numbers"].rhs_spec[0],)
    contracting, batch = params["dimension_numbers"]
    return tuple(i for i in range(ndim) if i not in contracting[side] and i not in batch[side])


# ---- control flow -------------------------------------------------------------------------------------------------


def _checkpoint(
    walk: _Walk,
    eqn: Any,
    body: core.ClosedJaxpr,
    ins: list[Any],
    origins: list[Origin],
    values: Mapping[Any, Any],
) -> Walked:
    found: list[list[Origin]] = []
    constants = [constant(walk.fresh, c) for c in body.consts]

    def walked(arguments: list[Any], values: Mapping[Any, Any]) -> tuple[list[Any], Taps]:
        outs, outs_origins, taps = _evaluate(
            walk, body.jaxpr, [*body.consts, *arguments], [*constants, *origins], values
        )
        found.append(outs_origins)
        return outs, taps

    remat = jax.checkpoint(
        _counted_once(walk, walked), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    outs, taps = remat(ins, values)
    return outs, found[-1], taps


def _scan(walk: _Walk, eqn: Any, ins: list[Any], origins: list[Origin], values: Mapping[Any, Any]) -> Walked:
    closed, consts, carry, xs, length, reverse = loop(eqn, ins)
    inner, leaves = _origins_inside(walk, eqn, origins)
    sliced: set[Any] = {*leaves}
    constants = [constant(walk.fresh, c) for c in closed.consts]
    if any(isinstance(key, tuple) for key in values):
        sliced |= _calls_inside(walk, closed, [*constants, *inner])
    sliced_values = {key: value for key, value in values.items() if key in sliced}
    shared_values = {key: value for key, value in values.items() if key not in sliced}
    found: list[list[Origin]] = []

    def body(carry: list[Any], slices: tuple[list[Any], dict[Any, Any]]) -> tuple[list[Any], tuple[list[Any], Taps]]:
        xs, leaf_values = slices
        arguments, given = [*closed.consts, *consts, *carry, *xs], {**shared_values, **leaf_values}
        outs, outs_origins, taps = _evaluate(walk, closed.jaxpr, arguments, [*constants, *inner], given)
        found.append(outs_origins)
        return outs[: len(carry)], (outs[len(carry) :], taps)

    walk.scans = (*walk.scans, length)
    carry, (ys, taps) = jax.lax.scan(
        _counted_once(walk, body),
        carry,
        (xs, sliced_values),
        length=length,
        reverse=reverse,
        unroll=eqn.params["unroll"],
    )
    walk.scans = walk.scans[:-1]
    outs_origins = [o._replace(tensor=walk.fresh(), stack=()) for o in found[-1]]
    return [*carry, *ys], outs_origins, taps


def _origins_inside(walk: _Walk, eqn: Any, origins: list[Origin]) -> tuple[list[Origin], set[str]]:
    """Origins of the operands of a scan's body, and the leaves of which each step gets a slice: stacks of layers."""
    body, consts, carry, xs, _, _ = loop(eqn, [o._replace(tensor=walk.fresh()) for o in origins])
    # What a step hands to the next stays what it was only if the step returns it untouched.
    returned = zip(body.jaxpr.outvars, body.jaxpr.invars[len(consts) :], carry, strict=False)
    carry = [o if out is given else Origin((), True, walk.fresh(), False, given=True) for out, given, o in returned]
    leaves = {leaf for o in xs for leaf in o.leaves}
    xs = [o._replace(stack=(*o.stack, len(walk.scans))) if o.leaves else o for o in xs]
    return [*consts, *carry, *xs], leaves


def _calls_inside(walk: _Walk, closed: core.ClosedJaxpr, origins: list[Origin]) -> set[tuple[str, int]]:
    """(leaf, call number) of every product with a parameter in a body that is about to be walked: one abstract walk."""
    found = set()

    def noting(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, None]:
        found.add((call.leaf, call.number))
        return ops.contract(call.primitive, call.params, "plain")(lhs, rhs), None

    ahead = _Walk(noting, walk.sizes)
    ahead.calls = dict(walk.calls)

    def body(arguments: list[Any]) -> list[Any]:
        return _evaluate(ahead, closed.jaxpr, [*closed.consts, *arguments], origins, {})[0]

    jax.eval_shape(_counted_once(ahead, body), [v.aval for v in closed.jaxpr.invars])
    return found


def _counted_once(walk: _Walk, body: Callable[..., Any]) -> Callable[..., Any]:
    """JAX may trace a body more than once; only the last trace counts."""
    calls, noticed = dict(walk.calls), (len(walk.trace.products), len(walk.trace.unreached))

    def counted(*arguments: Any) -> Any:
        walk.calls = dict(calls)
        del walk.trace.products[noticed[0] :]
        del walk.trace.unreached[noticed[1] :]
        return body(*arguments)

    return counted
