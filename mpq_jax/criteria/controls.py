"""Controls: tables that know little, which any claim for a criterion must beat.

On the indicators that LIMPQ published, a power law in the number of parameters explains most of what the learned step
sizes say of layers; so the simplest things that could do as well are criteria here too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq_jax.criteria import sites
from mpq_jax.criteria.learned import RowLog, fit_alpha, learned
from mpq_jax.importance import reversed_importance, spread
from mpq_jax.types import Importance, Layer, QuantizedModel


def initial(model: QuantizedModel, variables: Any, log: RowLog | None = None) -> Importance:
    """The step sizes that statistics start with (or whatever else stands in `variables`): nothing was trained.

    log: alpha is fitted to it, as for the learned ones; without, alpha is None.
    """
    return learned(model, variables, log)._replace(criterion="initial")


def power_law(base: Importance, log: RowLog | None = None) -> Importance:
    """For each bit-width b apart, log s_l = c_b + k_b log n_l, fitted over layers by least squares.

    base: the learned table. n_l: the layer's parameters for weights, elements of its input for activations.
    """
    assert base.weight is not None and base.activation is not None
    searched = [layer for layer in base.layers if layer.searched]
    weight = _fitted(base.weight, searched, "weight", base.bit_widths, [layer.params for layer in searched])
    inputs = [layer.inputs or 1 for layer in searched]
    activation = _fitted(base.activation, searched, "activation", base.activation_bit_widths, inputs)
    return _with_alpha(base._replace(criterion="power_law", weight=weight, activation=activation), log)


def constant(base: Importance, log: RowLog | None = None) -> Importance:
    """The geometric mean over layers at each bit-width, the same for every layer."""
    assert base.weight is not None and base.activation is not None
    searched = [layer for layer in base.layers if layer.searched]
    same = [1] * len(searched)
    weight = _fitted(base.weight, searched, "weight", base.bit_widths, same)
    activation = _fitted(base.activation, searched, "activation", base.activation_bit_widths, same)
    return _with_alpha(base._replace(criterion="constant", weight=weight, activation=activation), log)


def random(model: QuantizedModel, seed: int = 0) -> Importance:
    """s_l,b = 2^-b exp(z_l), z_l standard normal, drawn for the weights and for the activations of each layer."""
    rng = np.random.default_rng([seed, 8368])
    tables = {}
    for kind in sites.KINDS:
        every = model.bit_widths if kind == "weight" else model.activation_bit_widths
        searched = [layer for layer in model.layers if layer.searched]
        factors = np.exp(rng.standard_normal(len(searched)))
        table = factors[:, None] * 2.0 ** -np.array(every, np.float64)
        tables[kind] = _filled(table, searched, kind, every)
    return sites.importance(model, "random", tables["weight"], tables["activation"])


def reversed_(base: Importance) -> Importance:
    """The learned table with the rows of important and unimportant layers exchanged: the layer of rank r gets that of
    rank L + 1 - r."""
    table = reversed_importance(base)._replace(criterion="reversed")
    assert table.weight is not None and table.activation is not None
    searched = [layer for layer in base.layers if layer.searched]
    return table._replace(
        weight=_filled(table.weight, searched, "weight", base.bit_widths),
        activation=_filled(table.activation, searched, "activation", base.activation_bit_widths),
    )


def _fitted(
    table: np.ndarray, layers: Sequence[Layer], kind: str, widths: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
    """[L, K]: exp(c_b + k_b log size) over the layers that may have b; k_b is 0 where their sizes are all equal."""
    x = np.log(np.maximum(sizes, 1).astype(np.float64))
    result = np.empty_like(table)
    for column, bits in enumerate(widths):
        has = np.array([bits in layer.candidates(kind, widths) for layer in layers])
        if not has.any():
            result[:, column] = table[:, column]
            continue
        y = np.log(table[has, column])
        centred = x[has] - x[has].mean()
        slope = centred @ y / (centred @ centred) if np.ptp(x[has]) > 0 else 0.0
        result[:, column] = np.exp(y.mean() + slope * (x - x[has].mean()))
    return _filled(result, layers, kind, widths)


def _filled(table: np.ndarray, layers: Sequence[Layer], kind: str, widths: Sequence[int]) -> np.ndarray:
    """[L, K]: each row what `importance.spread` makes of its entries at the layer's own candidates."""
    return np.array(
        [
            spread({b: values[widths.index(b)] for b in layer.candidates(kind, widths)}, widths)
            for values, layer in zip(table, layers, strict=True)
        ]
    )


def _with_alpha(table: Importance, log: RowLog | None) -> Importance:
    return table if log is None else table._replace(alpha=fit_alpha(table, log))
