"""Lagrangian bound and greedy incumbents: what is known of a problem without any solver."""

import math
import time
from typing import NamedTuple

import numpy as np

from mpq_jax.search.problem import Problem


class Relaxed(NamedTuple):
    """bound: no policy within the budgets has a lower objective. picks: the best policy found [L], or None.

    priced [C] and discount: the values plus the multipliers' prices, and what comes off their sum, at the best bound.
    """

    bound: float
    picks: np.ndarray | None
    priced: np.ndarray
    discount: float


def relax(problem: Problem, rounds: int = 300, deadline: float = math.inf) -> Relaxed:
    """Subgradient ascent on the multipliers of the budgets (Fisher 1981), repairing each round's policy greedily.

    For multipliers u >= 0 the least of  value + sum_m u_m (cost_m - limit_m)  over all policies is a lower bound.
    deadline: of time.monotonic(); the rounds end there, the first one is always done.
    """
    scaled = np.stack([c / (abs(limit) or 1.0) for c, limit in zip(problem.cost, problem.limit, strict=True)])
    spread = float(problem.value.max() - problem.value.min()) or 1.0
    u = np.zeros(len(problem.cost))
    best, incumbent, incumbent_value = -np.inf, None, np.inf
    best_priced, best_discount = problem.value, 0.0
    ones = np.array([np.sign(limit) for limit in problem.limit], float)
    for k in range(rounds):
        if k and time.monotonic() > deadline:
            break
        priced = problem.value + u @ scaled
        picks = cheapest(problem, priced)
        bound = float(priced[picks].sum() - u @ ones)
        if bound > best:
            best, best_priced, best_discount = bound, priced, float(u @ ones)
        repaired = repair(problem, picks)
        if repaired is not None and problem.value[repaired].sum() < incumbent_value:
            incumbent, incumbent_value = repaired, float(problem.value[repaired].sum())
        excess = scaled[:, picks].sum(1) - ones
        if not (excess > 0).any() and not u.any():
            break  # no budget binds: the unconstrained best is the answer
        step = spread * len(problem.paths) / (1 + k) ** 0.7 / 10
        u = np.maximum(0, u + step * excess / max(np.abs(excess).max(), 1e-12))
    return Relaxed(best, incumbent, best_priced, best_discount)


def within(problem: Problem, relaxed: Relaxed, ceiling: float) -> np.ndarray:
    """Which choices [C] a policy within the budgets may have whose objective is at most `ceiling`: the others' reduced
    costs alone lift the Lagrangian bound above it."""
    lowest = np.array([relaxed.priced[problem.layer == row].min() for row in range(len(problem.paths))])
    bounds = math.fsum(lowest) - relaxed.discount + relaxed.priced - lowest[problem.layer]
    return bounds <= ceiling + 1e-9 * max(
        float(np.abs(problem.value).max()), float(np.abs(lowest).sum()), abs(relaxed.discount)
    )


def cheapest(problem: Problem, priced: np.ndarray) -> np.ndarray:
    """The policy of least `priced` [C], ties in activation bits respected. -> picks [L]"""
    picks = np.empty(len(problem.paths), int)
    for row in range(len(problem.paths)):
        mine = np.flatnonzero(problem.layer == row)
        picks[row] = mine[np.argmin(priced[mine])]
    for group in problem.tied:
        options = []
        for a in sorted(set(problem.a[np.isin(problem.layer, group)].tolist())):
            members = [np.flatnonzero((problem.layer == row) & (problem.a == a)) for row in group]
            if all(len(m) for m in members):
                chosen = [m[np.argmin(priced[m])] for m in members]
                options.append((float(priced[chosen].sum()), chosen))
        picks[list(group)] = min(options, key=lambda option: option[0])[1]
    return picks


def repair(problem: Problem, picks: np.ndarray) -> np.ndarray | None:
    """Takes bits away, least loss for the saving first, until every budget holds; then gives back what fits.

    Tied layers move their weight bits only. None where that does not reach the budgets.
    """
    picks = picks.copy()
    tied = np.isin(problem.layer, [row for group in problem.tied for row in group])
    while not problem.fits(picks):
        move = _best_move(problem, picks, tied, down=True)
        if move is None:
            return None
        picks[problem.layer[move]] = move
    while (move := _best_move(problem, picks, tied, down=False)) is not None:
        picks[problem.layer[move]] = move
    return picks


def _best_move(problem: Problem, picks: np.ndarray, tied: np.ndarray, down: bool) -> int | None:
    current = picks[problem.layer]
    movable = ~tied | (problem.a == problem.a[current])
    harm = problem.value - problem.value[current]
    saved = np.zeros(len(harm))
    room = np.ones(len(harm), bool)
    cheaper = np.ones(len(harm), bool)
    for c, limit, spent in zip(problem.cost, problem.limit, problem.spent(picks), strict=True):
        delta = c[current] - c
        if spent > limit:
            saved += delta / (abs(limit) or 1.0)
        room &= spent - delta <= limit
        cheaper &= delta >= 0  # a move that costs more of another budget could go round in circles
    if down:
        candidates = movable & cheaper & (saved > 0)
        score = harm / np.where(saved > 0, saved, 1)
    else:
        candidates = movable & room & (harm < 0)
        score = harm
    if not candidates.any():
        return None
    chosen = np.flatnonzero(candidates)
    return int(chosen[np.argmin(score[chosen])])
