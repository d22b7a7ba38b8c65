"""Loss regression: the harm of bits, from what random policies have cost in joint training. No pass over data.

  log loss_n = c + k log reference_n + sum_u effect_u[bits_n,u] + sum_(u,v) effect_uv[bits_n,u, bits_n,v] + noise

u, v: decisions (weight bits of a layer; activation bits of a layer, or of layers tied together). reference_n: the mean
loss of the uniform rows of the same step, on the same weights and batch. Additive: without the last sum.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.criteria import Measured, sites
from mpq_jax.criteria.coupling import Pair
from mpq_jax.criteria.learned import RowLog
from mpq_jax.importance import spread
from mpq_jax.types import Interaction, QuantizedModel, Refusal

FEWEST_ROWS = 20
FOLDS = 5
PENALTIES = np.logspace(-4, 3, 15)  # of the rows' mean square, a row
PAIR_SCALES = (0.5, 0.25, 0.125, 0.0625)  # the larger, the cheaper effects of pairs are


class Decision(NamedTuple):
    """Bits that are drawn together. rows: the searched layers' numbers; kind: "w" or "a"; candidates: in ascending
    order."""

    rows: tuple[int, ...]
    kind: str
    candidates: tuple[int, ...]


def regression(model: QuantizedModel, rows: RowLog, *, monotone: bool = False, settled: float = 0.5) -> Measured:
    """weight[l, i], activation[l, j]: the additive effects on the log loss, 0 at each layer's widest candidate.

    Ridge regression: each decision's effects are drawn to those of the average layer at the same width, by a penalty
    that cross-validation chooses (5 folds, the rows of a step in one fold).
    monotone: effects must not rise with bits. settled: the share of the log, from its end, that is used: step sizes of
    early rows had not settled. Layers tied together share their effect equally.
    Raises Refusal for a log of fewer than 20 rows, or 5 steps.
    """
    return fitted(model, rows, (), "regression", monotone, settled)


def regression_pairwise(
    model: QuantizedModel, rows: RowLog, pairs: Sequence[Pair], *, monotone: bool = False, settled: float = 0.5
) -> Measured:
    """The same with a [K, K] term for the weight and activation bits of each two layers in `pairs`.

    The terms have means of 0 over each of their axes: what one decision does alone is in `weight` and `activation`.
    Their penalty is chosen beside the other one. monotone: of the additive effects.
    """
    return fitted(model, rows, pairs, "regression_pairwise", monotone, settled)


# ---- the design ---------------------------------------------------------------------------------------------------


def decisions(model: QuantizedModel) -> list[Decision]:
    """Weight bits of every searched layer, then activation bits of every group that `row_policies.random_rows` draws as one."""
    searched = [layer for layer in model.layers if layer.searched]
    found = [
        Decision((row,), "w", tuple(sorted(layer.candidates("weight", model.bit_widths))))
        for row, layer in enumerate(searched)
    ]
    groups: dict[tuple[str, bool, tuple[int, ...]], list[int]] = {}
    for row, layer in enumerate(searched):
        candidates = tuple(sorted(layer.candidates("activation", model.activation_bit_widths)))
        tied = layer.tied is not None
        groups.setdefault((layer.tied if layer.tied is not None else layer.path, tied, candidates), []).append(row)
    return found + [Decision(tuple(rows), "a", key[2]) for key, rows in groups.items()]


def coupled(model: QuantizedModel, pairs: Sequence[Pair], units: Sequence[Decision]) -> list[tuple[int, int]]:
    """Numbers of the decisions whose layers are coupled, each two once."""
    number = {path: row for row, path in enumerate(sites.searched_paths(model))}
    of = {(row, unit.kind): u for u, unit in enumerate(units) for row in unit.rows}
    found: dict[tuple[int, int], None] = {}
    for pair in pairs:
        if pair.first in number and pair.second in number:
            for k, m in itertools.product("wa", repeat=2):
                u, v = sorted((of[number[pair.first], k], of[number[pair.second], m]))
                if u != v and min(len(units[u].candidates), len(units[v].candidates)) > 1:
                    found[u, v] = None
    return list(found)


def _centred(unit: Decision, policies: np.ndarray) -> np.ndarray:
    """[N, k]: one column a candidate, 1 where it was drawn, minus what a uniform draw gives."""
    bits = policies[:, unit.rows[0], 0 if unit.kind == "w" else 1]
    return (bits[:, None] == np.array(unit.candidates)) - 1 / len(unit.candidates)


def _log(loss: np.ndarray) -> np.ndarray:
    """Of a loss of exactly 0, too, something finite."""
    return np.log(np.maximum(loss.astype(np.float64), 1e-12))


class Design(NamedTuple):
    """log loss ~ free @ . + alone @ . + together @ .

    free [N, F]: not penalised: log reference, and the shared effect of each width. alone [N, A]: what each decision
    deviates from it. together [N, T]: pairs. shared [A, F]: alone @ shared is the part of `free` that widths are.
    """

    free: np.ndarray
    alone: np.ndarray
    together: np.ndarray
    shared: np.ndarray


def _design(
    units: Sequence[Decision], pairs: Sequence[tuple[int, int]], log: RowLog, widths: Mapping[str, Sequence[int]]
) -> Design:
    columns = [_centred(unit, log.policies) for unit in units]
    alone = np.concatenate(columns, axis=1)
    # Widths that all decisions of a kind share, each counted once a layer.
    names = [(kind, bits) for kind in "wa" for bits in widths[kind]]
    shared = np.array(
        [
            [float((unit.kind, bits) == name) * len(unit.rows) for name in names]
            for unit in units
            for bits in unit.candidates
        ]
    )
    reference = _log(log.reference)[:, None]
    together = [(columns[u][:, :, None] * columns[v][:, None, :]).reshape(len(alone), -1) for u, v in pairs]
    empty = np.zeros((len(alone), 0))
    free = np.concatenate([reference - reference.mean(), alone @ shared], axis=1)
    return Design(free, alone, np.concatenate([empty, *together], axis=1), np.pad(shared, ((0, 0), (1, 0))))


# ---- the fit ------------------------------------------------------------------------------------------------------


def fitted(
    model: QuantizedModel, rows: RowLog, pairs: Sequence[Pair], name: str, monotone: bool, settled: float
) -> Measured:
    """The table `name` of the regression on any rows; arguments as above."""
    log = _usable(rows, settled)
    units = decisions(model)
    couples = coupled(model, pairs, units)
    widths = {"w": model.bit_widths, "a": model.activation_bit_widths}
    design = _design(units, couples, log, widths)
    target = _log(log.loss)
    penalty, scale, r2 = _chosen(design, target, log.step)
    alone, together = _solve(design, target, penalty, scale)
    if monotone:
        alone, together = _monotone(design, target, penalty, scale, units)
    weight, activation = _tables(model, units, alone)
    table = sites.importance(model, name, weight, activation)
    table = table._replace(interactions=_interactions(model, units, couples, together))
    notes = [f"{len(target)} of {len(rows.loss)} rows; penalty {penalty:.2g}; out of fold, R^2 is {r2:.3f}"]
    if couples:
        notes.append(f"{len(couples)} pairs of decisions, their effects scaled by {scale:g}")
    if (rows.policies[..., 0] == rows.policies[..., 1]).all():
        notes.append(
            "weights and activations were always drawn alike, so that their parts cannot be told apart: "
            "each gets half (train with --joint.same_bits false to know)"
        )
    details = {"rows": len(target), "penalty": penalty, "r2": r2, "pairs": len(couples)}
    return Measured(table, 0.0, tuple(notes), details)


def _usable(rows: RowLog, settled: float) -> RowLog:
    """The last share of the log."""
    if not 0 < settled <= 1:
        raise Refusal(f"criteria.settled is {settled}; give a share of the log above 0 and up to 1, such as 0.5")
    steps = np.unique(rows.step)
    first = min(int((1 - settled) * len(steps)), len(steps) - 1)  # the last one at least, whatever rounding says
    late = rows.step >= (steps[first] if len(steps) else 0)
    log = RowLog(*(np.asarray(field)[late] for field in rows))
    if len(log.loss) < FEWEST_ROWS or len(np.unique(log.step)) < FOLDS:
        raise Refusal(
            f"the log of random rows has {len(log.loss)} rows to use of {len(rows.loss)}, and regression needs "
            f"{FEWEST_ROWS} of {FOLDS} steps; train with more --joint.steps or --joint.random_rows, or use more of it (criteria.settled)"
        )
    return log


def _chosen(design: Design, target: np.ndarray, step: np.ndarray) -> tuple[float, float, float]:
    """(penalty, scale of pairs, out-of-fold R^2) of the least out-of-fold error. Rows of a step are in one fold."""
    fold = np.unique(step, return_inverse=True)[1] % FOLDS
    spread = float(np.square(target - target.mean()).mean()) or 1.0
    best = (np.inf, 1.0, 0.0)
    for scale in PAIR_SCALES if design.together.shape[1] else (0.0,):
        x = _weighted(design, scale)
        predicted = np.empty((len(PENALTIES), len(target)))
        for k in range(FOLDS):
            predicted[:, fold == k] = _ridge_path(x[fold != k], target[fold != k], x[fold == k])
        errors = np.square(predicted - target).mean(1)
        best = min(best, (float(errors.min()), float(PENALTIES[errors.argmin()]), scale))
    return best[1], best[2], 1 - best[0] / spread


def _ridge_path(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """[penalties, new rows]: predictions of ridge regressions of y on x, of all penalties by one decomposition."""
    x, new, centre = x - x.mean(0), new - x.mean(0), y.mean()
    strengths = [_strength(penalty, y) for penalty in PENALTIES]
    if x.shape[1] <= len(x):
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = new @ vectors, vectors.T @ (x.T @ (y - centre))
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = new @ (x.T @ vectors), vectors.T @ (y - centre)
    return np.array([centre + left @ (right / (np.maximum(values, 0) + s)) for s in strengths])


FREE = 1e3  # columns this much larger are as good as not penalised


def _weighted(design: Design, scale: float) -> np.ndarray:
    return np.concatenate([FREE * design.free, design.alone, scale * design.together], axis=1)


def _strength(penalty: float, target: np.ndarray) -> float:
    return penalty * len(target)


def _solve(design: Design, target: np.ndarray, penalty: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(effects of decisions [A], effects of pairs [T]) by ridge regression."""
    from sklearn.linear_model import Ridge

    found = Ridge(_strength(penalty, target)).fit(_weighted(design, scale), target).coef_
    free, alone, together = np.split(found, np.cumsum([design.free.shape[1], design.alone.shape[1]]))
    return alone + design.shared @ (FREE * free), scale * together


def _monotone(
    design: Design, target: np.ndarray, penalty: float, scale: float, units: Sequence[Decision]
) -> tuple[np.ndarray, np.ndarray]:
    """The same, with effects that do not rise with bits: a quadratic program."""
    import cvxpy as cp

    free, alone = cp.Variable(design.free.shape[1]), cp.Variable(design.alone.shape[1])
    constant, together = cp.Variable(), cp.Variable(max(1, design.together.shape[1]))
    effects = alone + design.shared @ free
    predicted = constant + design.free @ free + design.alone @ alone
    if design.together.shape[1]:
        predicted = predicted + scale * design.together @ together
    loss = cp.sum_squares(target - predicted) / len(target)
    loss = loss + penalty * (cp.sum_squares(alone) + cp.sum_squares(together))
    ends = np.cumsum([len(unit.candidates) for unit in units])
    first = np.setdiff1d(np.arange(ends[-1] - 1), ends - 1)  # not from one decision to the next
    constraints = [effects[first] >= effects[first + 1]] if len(first) else []
    cp.Problem(cp.Minimize(loss), constraints).solve(solver=cp.CLARABEL)
    return np.asarray(effects.value), scale * np.asarray(together.value)[: design.together.shape[1]]


# ---- tables -------------------------------------------------------------------------------------------------------


def _by_unit(units: Sequence[Decision], effects: np.ndarray) -> list[np.ndarray]:
    return np.split(effects, np.cumsum([len(unit.candidates) for unit in units])[:-1])


def _tables(model: QuantizedModel, units: Sequence[Decision], effects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L, Kw], [L, Ka]: 0 at the widest candidate; rows are filled in by `importance.spread`."""
    layers = len(sites.searched_paths(model))
    tables: dict[str, Any] = {"w": [None] * layers, "a": [None] * layers}
    every = {"w": model.bit_widths, "a": model.activation_bit_widths}
    for unit, values in zip(units, _by_unit(units, effects), strict=True):
        harm = dict(zip(unit.candidates, (values - values[-1]) / len(unit.rows), strict=True))
        for row in unit.rows:
            tables[unit.kind][row] = spread(harm, every[unit.kind])
    return np.array(tables["w"], np.float64), np.array(tables["a"], np.float64)


def _interactions(
    model: QuantizedModel, units: Sequence[Decision], couples: Sequence[tuple[int, int]], effects: np.ndarray
) -> tuple[Interaction, ...]:
    """Over all bit-widths; 0 at those that a rule took from a layer."""
    paths = sites.searched_paths(model)
    every = {"w": model.bit_widths, "a": model.activation_bit_widths}
    found, start = [], 0
    for u, v in couples:
        a, b = units[u], units[v]
        size = len(a.candidates) * len(b.candidates)
        raw = effects[start : start + size].reshape(len(a.candidates), len(b.candidates))
        start += size
        # What the centred columns make of it: means of 0 over both axes.
        raw = raw - raw.mean(0) - raw.mean(1, keepdims=True) + raw.mean()
        table = np.zeros((len(every[a.kind]), len(every[b.kind])))
        places = ([every[a.kind].index(c) for c in a.candidates], [every[b.kind].index(c) for c in b.candidates])
        table[np.ix_(*places)] = raw
        found.append(Interaction((paths[a.rows[0]], a.kind), (paths[b.rows[0]], b.kind), table))
    return tuple(found)
