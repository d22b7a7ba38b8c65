"""Where the values of a jaxpr come from: parameters or data, which tensor, and whether they can be negative."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

# Calls whose body is a plain jaxpr of the same arguments.
INLINED = ("jit", "pjit", "closed_call", "core_call")
Fresh = Callable[[], int]  # a new tensor number


class Origin(NamedTuple):
    """Where a value comes from.

    leaves: paths of the parameters it was computed from, if from nothing but parameters and constants; else ().
    data: whether an input of the model took part.
    tensor: a number that stays the same through reshapes, transposes and casts.
    nonnegative: whether it is known to be >= 0 whatever the input.
    stack: which of the surrounding scans slice these leaves (0 is the outermost).
    """

    leaves: tuple[str, ...]
    data: bool
    tensor: int
    nonnegative: bool
    stack: tuple[int, ...] = ()

    @property
    def is_weight(self) -> bool:
        """Whether the value was computed from parameters, and from no input."""
        return bool(self.leaves) and not self.data


def constant(fresh: Fresh, value: Any) -> Origin:
    """The origin of a constant of the program; its sign is known where its value is."""
    known = isinstance(value, (int, float, bool, np.ndarray, np.generic))
    return Origin((), False, fresh(), bool(known and np.all(np.asarray(value) >= 0)))


def subjaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies of calls, loops and branches."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item) if not hasattr(item, "eqns") else item
            if hasattr(item, "eqns"):
                found.append(item)
    return found


_SAME_TENSOR = (
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "convert_element_type",
    "copy",
    "copy_p",
    "optimization_barrier",
    "broadcast_in_dim",
    "reduce_precision",
)
_KEEPS_SIGN = (
    *_SAME_TENSOR,
    "slice",
    "dynamic_slice",
    "rev",
    "gather",
    "reduce_max",
    "reduce_min",
    "reduce_sum",
    "reduce_window_max",
    "reduce_window_sum",
    "reduce_window_min",
    "reduce_window",
    "cumsum",
    "cummax",
    "sqrt",
    "rsqrt",
    "tanh",
    "log1p",
    "expm1",
    "sign",
    "floor",
    "ceil",
    "round",
)
_ALL_NONNEGATIVE = ("add", "add_any", "mul", "div", "min", "concatenate", "pad", "rem", "pow", "dot_general")
_NEVER_NEGATIVE = ("exp", "exp2", "logistic", "abs", "square", "iota", "argmax", "argmin", "random_bits")


def propagate(fresh: Fresh, eqn: Any, origins: list[Origin]) -> list[Origin]:
    """The origins of an equation's outputs."""
    name = eqn.primitive.name
    data = any(o.data for o in origins)
    weights = [] if data else [o for o in origins if o.leaves]
    leaves = tuple(dict.fromkeys(leaf for o in weights for leaf in o.leaves))
    stack = max((o.stack for o in weights), key=len, default=())
    inner = _inner_signs(fresh, eqn, origins)
    result = []
    for k in range(len(eqn.outvars)):
        nonnegative = inner[k] if inner is not None else _nonnegative(name, eqn, origins)
        tensor = origins[0].tensor if name in _SAME_TENSOR and origins else fresh()
        result.append(Origin(leaves, data, tensor, nonnegative, stack))
    return result


def _nonnegative(name: str, eqn: Any, origins: list[Origin]) -> bool:
    signs = [o.nonnegative for o in origins]
    if name in _NEVER_NEGATIVE:
        return True
    if name == "integer_pow":
        return eqn.params["y"] % 2 == 0 or signs[0]
    if name == "max":
        return any(signs)
    if name == "clamp":
        return signs[0]
    if name == "select_n":
        return all(signs[1:])
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        return True
    if name in _ALL_NONNEGATIVE:
        return all(signs)
    return bool(signs) and name in _KEEPS_SIGN and signs[0]


def _inner_signs(fresh: Fresh, eqn: Any, origins: list[Origin]) -> list[bool] | None:
    """Signs of the outputs of a call (jax.nn.relu is one), by walking its body; None where it has none such."""
    name = eqn.primitive.name
    if name not in (*INLINED, "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "checkpoint"):
        return None
    bodies = subjaxprs(eqn)
    if not bodies or len(bodies[0].invars) != len(origins):
        return None
    env: dict[Any, Origin] = dict(zip(bodies[0].invars, origins, strict=True))

    def read(atom: Any) -> Origin:
        if isinstance(atom, core.Literal):
            return constant(fresh, atom.val)
        return env.get(atom, Origin((), False, -1, False))

    for inner in bodies[0].eqns:
        outs = propagate(fresh, inner, [read(a) for a in inner.invars])
        env.update(zip(inner.outvars, outs, strict=True))
    return [read(a).nonnegative for a in bodies[0].outvars]
