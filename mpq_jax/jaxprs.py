"""Walking a jaxpr: which of its equations are calls, what their bodies take, and loops of known length.

Several parts of this package walk the program of a model, each with a kind of value of its own: arrays with their origins
(`interpret`), origins alone (`origins`), the layers that a value comes from (`criteria.coupling`), the values of a graph
(`export.graph`), arrays again (`export.litert`). What an equation holds is the same for all of them, and is said here.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from jax.extend import core

T = TypeVar("T")

# A call has one body, which takes the equation's operands and gives its outputs, one for one.
PLAIN = ("jit", "pjit", "closed_call", "core_call", "call")
# As `jax.checkpoint`; JAX has renamed it more than once.
REMATS = ("checkpoint", "remat", "remat2")
# The body says what is computed; beside it stand rules of the call's own, for derivatives, batching or lowering. Who walks
# into one gives them up: right for an export, wrong in a training step.
WITH_RULES = (
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_vmap_call",
    "linear_call",
    "composite",
)
CALLS = (*PLAIN, *REMATS, *WITH_RULES)
# Which of an equation's parameters is the body.
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "callee")
# Not calls: `scan`, see `loop`; `cond` and `while`, into which no walk goes: which branch runs, and how often, is known
# only when it runs.


def called(eqn: Any, which: Sequence[str] = CALLS) -> core.ClosedJaxpr | None:
    """The body of a call that is among `which`: a jaxpr of the equation's own operands and outputs. None: not a call."""
    if eqn.primitive.name not in which:
        return None
    body = next(eqn.params[name] for name in _BODIES if name in eqn.params)
    return body if hasattr(body, "consts") else core.ClosedJaxpr(body, [])


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies of calls, loops and branches."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item) if not hasattr(item, "eqns") else item
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def contains(jaxpr: Any, primitives: Iterable[str]) -> bool:
    """Whether one of these primitives is among the equations, at whatever depth."""
    names = set(primitives)
    return any(
        e.primitive.name in names or any(contains(inner, names) for inner in inner_jaxprs(e))
        for e in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


def outputs_of(
    jaxpr: Any,
    arguments: Sequence[T],
    literal: Callable[[core.Literal], T],
    equation: Callable[[Any, list[T]], Sequence[T]],
) -> list[T]:
    """The outputs of a jaxpr, in whatever kind of value the walk has.

    arguments: of its constants, then of its inputs. literal: the value of a literal. equation: (equation, values of its
    operands) -> values of its outputs.
    """
    env: dict[Any, T] = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))

    def read(atom: Any) -> T:
        return literal(atom) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, equation(eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(a) for a in jaxpr.outvars]


def bind(eqn: Any, ins: list[Any]) -> list[Any]:
    """The equation itself on the values `ins`, with None for outputs that nobody reads.

    Evaluated as a jaxpr of one equation: JAX's public way to keep its derivative rules.
    """
    given = {v: x for v, x in zip(eqn.invars, ins, strict=True) if not isinstance(v, core.Literal)}
    outvars = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    names = core.DebugInfo("interpret", eqn.primitive.name, tuple("" for _ in given), tuple("" for _ in outvars))
    jaxpr = core.Jaxpr([], list(given), outvars, [eqn], eqn.effects, names)
    outs = iter(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))(*given.values()))
    return [None if isinstance(v, core.DropVar) else next(outs) for v in eqn.outvars]


class Loop(NamedTuple):
    """A `scan` with its operands. body: (body's constants, consts, carry, a slice of each of xs) -> (carry, slices out)."""

    body: core.ClosedJaxpr
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    length: int
    reverse: bool

    def unrolled(
        self,
        step: Callable[[int, list[Any]], Sequence[Any]],
        at: Callable[[Any, int], Any],
        stack: Callable[[Sequence[Any]], Any],
    ) -> list[Any]:
        """The loop's outputs, its steps written out.

        step: (number of the step, operands but for the body's own constants) -> outputs of the body. at: (one of xs,
        number) -> its slice. stack: (an output's values in the order of numbers) -> the output.
        """
        carry, slices = self.carry, []
        for i in range(self.length)[:: -1 if self.reverse else 1]:
            outs = step(i, [*self.consts, *carry, *(at(x, i) for x in self.xs)])
            carry = list(outs[: len(carry)])
            slices.append(outs[len(carry) :])
        if self.reverse:
            slices.reverse()
        return [*carry, *(stack(each) for each in zip(*slices, strict=True))]


def loop(eqn: Any, ins: Sequence[Any]) -> Loop:
    """A `scan` equation's parts. ins: the values of its operands."""
    params = eqn.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry, _ = (len(list(part)) for part in params["ft_in"].unpack())  # JAX 0.11 tells it by trees
    ins, end = list(ins), consts + carry
    return Loop(params["jaxpr"], ins[:consts], ins[consts:end], ins[end:], params["length"], params["reverse"])
