"""The Lagrangian dual: a lower bound, and a price for each budget, found without any solver.

For prices u >= 0 the least of  sum value + sum_m u_m (cost_m - limit_m)  over all policies is a lower bound on every
policy within the budgets (Fisher 1981). It is concave in u and has as many variables as there are budgets: few. So
the ellipsoid method (Shor 1977; Yudin and Nemirovski 1976) finds its maximum, which is the bound of the LP relaxation,
in a time that is known beforehand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mpq_jax.costs import add
from mpq_jax.search.problem import Problem

TOLERANCE = 1e-9  # of the bound, as a share of the spread of all values


class Dual(NamedTuple):
    """bound: no policy within the budgets has a lower objective.

    prices: float64 [M], u for costs as shares of `rooms` [M], what each budget leaves above the least of all rows.
    priced: float64 [L, C], each choice's costs at these prices, above its row's least. reduced: float64 [L, C], what a choice alone lifts the bound by, >= 0;
    infinite where not allowed. lifts: first row of each tied group -> [Ka], the part of `reduced` that the shared
    activation bits bring. picks: [N, L], policies that were cheapest at some prices, the last at the best.
    rounding: how far float arithmetic may have moved any of these.
    """

    bound: float
    prices: np.ndarray
    rooms: np.ndarray
    priced: np.ndarray
    reduced: np.ndarray
    lifts: dict[int, np.ndarray]
    picks: np.ndarray
    rounding: float


def shares(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [M, L, C], float64 [M]): costs above each row's least as shares of a budget's room, and that room.

    A budget holds where the shares picked add up to at most 1.
    """
    share, rooms = np.zeros((len(problem.cost), *problem.value.shape)), np.zeros(len(problem.cost))
    for m, (cost, limit) in enumerate(zip(problem.cost, problem.limit, strict=True)):
        lowest = np.where(problem.allowed, cost, cost.max()).min(1)
        room = float(limit - add(lowest.tolist()))
        above = (cost - lowest[:, None]).astype(np.float64)
        # Without room only what costs the least is left; one times the largest excess is a weaker, valid budget.
        rooms[m] = room if room > 0 else max(float(above.max()), 1.0)
        share[m] = above / rooms[m]
    return np.where(problem.allowed, share, 0.0), rooms


def cheapest(problem: Problem, priced: np.ndarray) -> np.ndarray:
    """The policy of least sum of `priced` [L, C], ties in activation bits respected. -> picks [L]"""
    picks = priced.argmin(1)
    if problem.tied:
        rows, starts = _tied(problem)
        by_a, best_w = _by_activation(problem, priced[rows])
        shared = np.add.reduceat(by_a, starts, axis=0).argmin(1)
        shared = np.repeat(shared, np.diff([*starts, len(rows)]))
        picks[rows] = best_w[np.arange(len(rows)), shared] * problem.widths[1] + shared
    return picks


def reduced_costs(problem: Problem, priced: np.ndarray) -> np.ndarray:
    """[L, C]: how much more the cheapest policy with that choice costs than the cheapest of all."""
    reduced = priced - priced.min(1, keepdims=True)
    if problem.tied:
        rows, starts = _tied(problem)
        by_a, _ = _by_activation(problem, priced[rows])
        group = np.add.reduceat(by_a, starts, axis=0)
        lift = np.repeat(group - group.min(1, keepdims=True), np.diff([*starts, len(rows)]), axis=0)
        lift = lift - np.where(np.isfinite(by_a), by_a, 0.0)  # inf stays inf
        reduced[rows] = priced[rows] + np.tile(lift, problem.widths[0])
    return np.where(problem.allowed, np.maximum(reduced, 0.0), np.inf)


def group_lifts(problem: Problem, priced: np.ndarray) -> dict[int, np.ndarray]:
    """First row of each tied group -> [Ka], what each shared activation width lifts the bound by."""
    if not problem.tied:
        return {}
    rows, starts = _tied(problem)
    group = np.add.reduceat(_by_activation(problem, priced[rows])[0], starts, axis=0)
    return {members[0]: lift - lift.min() for members, lift in zip(problem.tied, group, strict=True)}


def _tied(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The tied rows, group by group, and where each group starts among them."""
    rows = np.array([row for group in problem.tied for row in group])
    return rows, np.cumsum([0, *(len(group) for group in problem.tied)])[:-1]


def _by_activation(problem: Problem, priced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N, Ka]: the least over weight bits at each activation width, and which weight width that is."""
    table = priced.reshape(len(priced), *problem.widths)
    return table.min(1), table.argmin(1)


def maximise(problem: Problem, start: np.ndarray | None = None) -> Dual:
    """The best bound. start: prices a unit of cost [M] to look at first, e.g. those of a similar problem."""
    (share, rooms), count = shares(problem), len(problem.cost)
    rows = np.arange(len(problem.paths))
    seen: dict[bytes, np.ndarray] = {}
    best, best_prices = -math.inf, np.zeros(count)

    def evaluate(prices: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, best_prices
        priced = problem.value + np.tensordot(prices, share, 1)
        picks = cheapest(problem, priced)
        bound = math.fsum(priced[rows, picks]) - float(prices.sum())
        seen.pop(picks.tobytes(), None)
        if bound > best:
            best, best_prices = bound, prices
        seen[picks.tobytes()] = picks
        return bound, share[:, rows, picks].sum(1) - 1.0

    spread = _spread(problem)
    _, slope = evaluate(np.zeros(count))
    if count and (slope > 0).any():
        if start is not None:
            evaluate(np.maximum(start, 0.0) * rooms)
        radius = _radius(problem, share, spread)
        _ellipsoid(evaluate, lambda: best, radius, count, TOLERANCE * spread)
    priced = np.tensordot(best_prices, share, 1)
    total = problem.value + priced
    at_best = cheapest(problem, total)
    seen.pop(at_best.tobytes(), None)
    return Dual(
        bound=best,
        prices=best_prices,
        rooms=rooms,
        priced=priced,
        reduced=reduced_costs(problem, total),
        lifts=group_lifts(problem, total),
        picks=np.array([*seen.values(), at_best]),
        rounding=1e-12 * (math.fsum(np.abs(total.min(1))) + float(best_prices.sum()) + _largest(problem)),
    )


def _largest(problem: Problem) -> float:
    return float(np.abs(problem.value[problem.allowed]).max())


def _spread(problem: Problem) -> float:
    """The largest less the least sum of values."""
    finite = np.where(problem.allowed, problem.value, -np.inf)
    return float((finite.max(1) - problem.value.min(1)).sum())


def _radius(problem: Problem, share: np.ndarray, spread: float) -> float:
    """No best price is higher, where the narrowest policy leaves room in every budget."""
    narrow = cheapest(problem, np.where(problem.allowed, share.sum(0), np.inf))
    room = 1.0 - share[:, np.arange(len(narrow)), narrow].sum(1)
    # Without such a policy there is no bound on the prices; a bound that stops short of the best is a bound too.
    return spread / max(float(room.min()), 1e-4)


def _ellipsoid(
    evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]],
    best: Callable[[], float],
    radius: float,
    count: int,
    tolerance: float,
) -> None:
    """Deep-cut ellipsoid method over u >= 0, sum u <= radius; `evaluate` keeps the best."""
    centre = np.full(count, radius / 2)
    matrix = np.eye(count) * radius**2 / 4 * count
    for _ in range(200 * count * count):
        below = int(centre.argmin())
        if centre[below] < 0:
            normal, depth = -np.eye(count)[below], -centre[below]
        else:
            bound, slope = evaluate(centre)
            normal, depth = -slope, best() - bound
        length = math.sqrt(max(float(normal @ matrix @ normal), 0.0))
        if centre[below] >= 0 and length - depth <= tolerance:
            return  # nothing in the ellipsoid is better than the best by more
        if depth >= length:
            return
        step, n = depth / length, count
        if n == 1:  # an interval: the part on the right side of the cut
            half = math.sqrt(matrix[0, 0]) * (1 - step) / 2
            centre = centre - np.sign(normal) * (math.sqrt(matrix[0, 0]) - half)
            matrix = np.array([[half * half]])
            continue
        along = matrix @ normal / length
        centre = centre - (1 + n * step) / (n + 1) * along
        shrunk = 2 * (1 + n * step) / ((n + 1) * (1 + step))
        matrix = n * n * (1 - step * step) / (n * n - 1) * (matrix - shrunk * np.outer(along, along))
        matrix = (matrix + matrix.T) / 2
