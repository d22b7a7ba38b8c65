"""Criteria: each ends as one `Importance`, the harm of every searched layer at each of its bit-widths.

One table of all there are. Nothing is imported until a criterion is measured: what one needs, costs and means can be
read without JAX.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mpq_jax.types import Importance, Refusal

FIRST_ORDER = ("samples", "batch_size", "step_sizes")
SECOND_ORDER = (*FIRST_ORDER, "relative_error", "max_draws", "uniform_activations")


class Measured(NamedTuple):
    """A criterion's table and what can be said of how it came about.

    sample_passes: forward-and-backward passes of one sample that it took beyond what was there; a forward pass alone
        counts a third, a Hessian-vector product two.
    notes: lines for people: where draws stopped and why, what was counted as 0.
    details: the same in numbers, plain JSON values.
    """

    importance: Importance
    sample_passes: float = 0.0
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = MappingProxyType({})


class Criterion(NamedTuple):
    """One row of the table.

    function: "module:function" under mpq_jax.criteria; it names what it takes (see `compute.measure`) and returns an
        Importance, or Measured.
    needs: of "checkpoint" (finished float weights), "labels" (beside the images), "rows" (the log of joint training's
        random rows), "joint" (the joint model of a finished joint training), "indicators" (its importance.json).
    unit: of the table. cost: in passes over data. line: what it is.
    settings: the values of the config's `criteria` section that change it.
    """

    function: str
    needs: tuple[str, ...]
    unit: str
    cost: str
    line: str
    settings: tuple[str, ...] = ()


CRITERIA: Mapping[str, Criterion] = {
    "learned": Criterion(
        "learned:learned",
        ("indicators",),
        "step size (alpha weighs weights against activations)",
        "joint training: a pass a row and step",
        "the learned step sizes of joint training (LIMPQ, 2022)",
    ),
    "hawq": Criterion(
        "hawq:hawq",
        ("checkpoint", "labels"),
        "loss, twice an upper bound of its second-order change",
        "2 passes over hessian_samples an iteration and tensor, until the residual is within relative_error",
        "largest Hessian eigenvalue times squared quantization error (HAWQ, 2019)",
        (*SECOND_ORDER, "hessian_samples"),
    ),
    "hawq_v2": Criterion(
        "hawq_v2:hawq_v2",
        ("checkpoint", "labels"),
        "loss, twice its expected second-order change",
        "2 passes over one batch a draw and tensor, until the standard error is within relative_error",
        "mean Hessian trace times squared quantization error (HAWQ-v2, 2019)",
        SECOND_ORDER,
    ),
    "mpqco": Criterion(
        "mpqco:mpqco",
        ("checkpoint", "labels"),
        "loss",
        "1 pass over samples, and K products a layer and operand",
        "empirical Fisher: mean squared first-order change of the loss of each sample (MPQCO, 2021)",
        (*FIRST_ORDER, "uniform_activations"),
    ),
    "output_fisher": Criterion(
        "output_fisher:output_fisher",
        ("checkpoint", "labels"),
        "loss (alpha weighs weights against activations)",
        "1 pass over samples, and K products a layer and operand",
        "squared gradients of each layer's outputs times their squared quantization errors",
        (*FIRST_ORDER, "alpha"),
    ),
    "regression": Criterion(
        "regression:regression",
        ("rows",),
        "log loss",
        "none: the passes of joint training's random rows",
        "ridge regression of the random rows' log loss on their bits",
        ("monotone", "settled"),
    ),
    "regression_pairwise": Criterion(
        "regression:regression_pairwise",
        ("rows",),
        "log loss",
        "none: the passes of joint training's random rows",
        "the same with terms of pairs of neighbouring and residual-coupled layers",
        ("monotone", "settled"),
    ),
    "sampled": Criterion(
        "sampled:sampled",
        ("checkpoint", "joint"),
        "log divergence",
        "1 forward pass over samples a policy",
        "ridge regression of random policies' divergence from the float model, near the budget, on their bits",
        ("samples", "batch_size", "policies", "near", "monotone"),
    ),
    "one_at_a_time": Criterion(
        "one_at_a_time:one_at_a_time",
        ("checkpoint", "labels"),
        "loss",
        "1 forward pass over samples a tensor and bit-width",
        "rise of the loss when one tensor at a time is quantized",
        (*FIRST_ORDER, "others"),
    ),
    "initial": Criterion(
        "controls:initial",
        ("checkpoint",),
        "step size (alpha weighs weights against activations)",
        "1 forward pass over one batch",
        "control: step sizes as the statistics start them, no training",
    ),
    "power_law": Criterion(
        "controls:power_law",
        ("indicators",),
        "step size (alpha weighs weights against activations)",
        "that of learned",
        "control: the learned step sizes' power law in parameters (weights) and input elements (activations)",
    ),
    "constant": Criterion(
        "controls:constant",
        ("indicators",),
        "step size (alpha weighs weights against activations)",
        "that of learned",
        "control: the geometric mean over layers at each width, the same in every layer",
    ),
    "random": Criterion("controls:random", (), "none", "none", "control: a random factor for every layer"),
    "reversed": Criterion(
        "controls:reversed_",
        ("indicators",),
        "step size (alpha weighs weights against activations)",
        "that of learned",
        "control: the learned table with important and unimportant layers exchanged",
    ),
}


def find(name: str) -> Criterion:
    """The row of that name. Raises Refusal, listing those that exist, for any other."""
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise Refusal(f"criterion {name!r} is not known{meant}; there are: {', '.join(CRITERIA)}")
    return CRITERIA[name]
