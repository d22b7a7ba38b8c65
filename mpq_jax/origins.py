"""Where the values of a jaxpr come from: parameters or data, which tensor, and whether they can be negative."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.jaxprs import called, outputs_of

Fresh = Callable[[], int]  # a new tensor number
CONTRACTIONS = ("dot_general", "conv_general_dilated")


class Origin(NamedTuple):
    """Where a value comes from.

    leaves: paths of the parameters it was computed from, if from nothing but parameters and constants; else ().
    data: whether an input of the model took part, or a variable that is no parameter.
    tensor: a number that stays the same through reshapes, transposes and casts.
    nonnegative: whether it is known to be >= 0 whatever the input.
    stack: which of the surrounding scans slice these leaves (0 is the outermost).
    product: whether a product of parameters took part.
    given: whether an input took part.
    mixed: paths of the parameters it was computed from together with other variables (masks, statistics), if no input
        took part; a product is no weight any more.
    """

    leaves: tuple[str, ...]
    data: bool
    tensor: int
    nonnegative: bool
    stack: tuple[int, ...] = ()
    product: bool = False
    given: bool = False
    mixed: tuple[str, ...] = ()

    @property
    def is_weight(self) -> bool:
        """Whether the value was computed from parameters, and from no input."""
        return bool(self.leaves) and not self.data


def constant(fresh: Fresh, value: Any) -> Origin:
    """The origin of a constant of the program; its sign is known where its value is."""
    known = isinstance(value, (int, float, bool, np.ndarray, np.generic))
    return Origin((), False, fresh(), bool(known and np.all(np.asarray(value) >= 0)))


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
    """The origins of an equation's outputs; of a call (jax.nn.relu is one) those that its body gives."""
    if (body := called(eqn)) is not None:
        return outputs_of(
            body.jaxpr,
            [*(constant(fresh, c) for c in body.consts), *origins],
            lambda literal: constant(fresh, literal.val),
            lambda inner, ins: propagate(fresh, inner, ins),
        )
    name = eqn.primitive.name
    data = any(o.data for o in origins)
    weights = [] if data else [o for o in origins if o.leaves]
    leaves = tuple(dict.fromkeys(leaf for o in weights for leaf in o.leaves))
    stack = max((o.stack for o in weights), key=len, default=())
    given = any(o.given for o in origins)
    every = (leaf for o in origins for leaf in (*o.leaves, *o.mixed))
    found = Origin(
        leaves,
        data,
        origins[0].tensor if name in _SAME_TENSOR and origins else -1,
        _nonnegative(name, eqn, origins),
        stack,
        product=bool(leaves) and (name in CONTRACTIONS or any(o.product for o in weights)),
        given=given,
        mixed=tuple(dict.fromkeys(every)) if data and not given and name not in CONTRACTIONS else (),
    )
    return [found._replace(tensor=fresh()) if found.tensor < 0 else found for _ in eqn.outvars]


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
