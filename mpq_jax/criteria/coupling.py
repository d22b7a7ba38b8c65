"""Which layers of a model are coupled: one reads what the other makes, or an addition joins what both make.

The model is traced with a mark on the inputs and on the output of every layer; then marks are followed through the
jaxpr, scans unrolled. The sources of a value are the layers whose outputs reach it without passing another layer.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mpq_jax import ops
from mpq_jax.interpret import Call
from mpq_jax.jaxprs import called, contains, inner_jaxprs, loop, outputs_of
from mpq_jax.types import QuantizedModel

_ADDITIONS = ("add", "add_any", "sub")
Sources = tuple[int, ...]  # numbers of layer runs, in execution order


class Pair(NamedTuple):
    """Two coupled layers, the earlier first. kind: "neighbours" or "residual"."""

    first: str
    second: str
    kind: str


def coupled_pairs(model: QuantizedModel, variables: Any, *inputs: Any, **kwargs: Any) -> tuple[Pair, ...]:
    """All pairs of coupled layers, in execution order; variables and inputs may be shapes.

    neighbours: the second reads, through anything but layers, what the first makes.
    residual: an addition joins what they make; of each side of it the last layer counts, so that a residual stream
        of N blocks gives N pairs, not N^2.
    """
    calls: list[Call] = []

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, Any]:
        calls.append(call)
        operands = [lhs, rhs]
        side = 1 - call.weight_side
        operands[side] = checkpoint_name(operands[side], f"in {len(calls) - 1}")
        out = ops.contract(call.primitive, call.params, "plain")(*operands)
        return checkpoint_name(out, f"out {len(calls) - 1}"), None

    closed = jax.make_jaxpr(lambda variables, inputs: model.walk(variables, {}, handler, inputs, kwargs)[0])(
        variables, inputs
    )
    walk = _Follow(lambda call, steps: _path(model, call, steps), calls)
    walk.through(closed.jaxpr, [()] * len(closed.jaxpr.invars))
    return tuple(walk.pairs.values())


def _path(model: QuantizedModel, call: Call, steps: Sequence[int]) -> str:
    """The layer of a call in these steps of the scans around it."""
    spec = model.specs[call.leaf]
    position = tuple(steps[depth] for depth in call.stack)
    return spec.paths[int(np.ravel_multi_index(position, spec.stack)) if position else 0]


class _Follow:
    """Follows sources through a jaxpr. runs: the layer of each run, in execution order; pairs: what was found."""

    def __init__(self, path: Callable[[Call, Sequence[int]], str], calls: Sequence[Call]):
        self.path, self.calls = path, calls
        self.runs: list[str] = []
        self.pairs: dict[frozenset[str], Pair] = {}
        self.steps: tuple[int, ...] = ()

    def note(self, first: int, second: int, kind: str) -> None:
        a, b = self.runs[first], self.runs[second]
        if a != b:
            self.pairs.setdefault(frozenset((a, b)), Pair(a, b, kind))

    def through(self, jaxpr: Any, sources: Sequence[Sources]) -> list[Sources]:
        """Sources of the outputs, from those of the inputs (constants have none)."""
        constants: list[Sources] = [()] * len(jaxpr.constvars)
        return outputs_of(jaxpr, [*constants, *sources], lambda _: (), self.equation)

    def equation(self, eqn: Any, sources: list[Sources]) -> list[Sources]:
        name = eqn.primitive.name
        if name == "name":
            return [self.mark(eqn.params["name"], sources[0])]
        if (body := called(eqn)) is not None:
            return self.through(body.jaxpr, sources)
        if name == "scan" and any(contains(inner, ["name"]) for inner in inner_jaxprs(eqn)):
            return self.scan(eqn, sources)
        known = [each for each in sources if each]
        if name in _ADDITIONS and len(known) == 2 and known[0] != known[1]:
            first, second = sorted(each[-1] for each in known)
            if first != second:
                self.note(first, second, "residual")
                return [(first, second)]
        return [_union(known)] * len(eqn.outvars)

    def mark(self, text: str, sources: Sources) -> Sources:
        where, _, number = text.partition(" ")
        if where not in ("in", "out") or not number.isdigit():
            return sources  # the user's own name
        if where == "out":
            return (len(self.runs) - 1,)
        self.runs.append(self.path(self.calls[int(number)], self.steps))
        for source in sources:
            self.note(source, len(self.runs) - 1, "neighbours")
        return sources

    def scan(self, eqn: Any, sources: list[Sources]) -> list[Sources]:
        there, around = loop(eqn, sources), self.steps

        def step(number: int, operands: list[Sources]) -> list[Sources]:
            self.steps = (*around, number)
            return self.through(there.body.jaxpr, operands)

        outs = there.unrolled(step, lambda x, _: x, _union)
        self.steps = around
        return outs


def _union(sources: Sequence[Sources]) -> Sources:
    return tuple(sorted(set(itertools.chain.from_iterable(sources))))


def searched_pairs(model: QuantizedModel, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Those whose layers are both searched."""
    searched: Mapping[str, bool] = {layer.path: layer.searched for layer in model.layers}
    return tuple(pair for pair in pairs if searched[pair.first] and searched[pair.second])
