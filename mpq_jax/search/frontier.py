"""The whole frontier: the best policy at each of many limits of one budget, the others held.

The limits are walked from the loosest down. A policy that keeps the next limit too is the best there as well, and is
not searched for again; otherwise the prices of the limit before start the dual, and its policy, made to fit, is the
first incumbent. All of it is as certified as a single search.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpq_jax import costs
from mpq_jax.files import whole, write_json
from mpq_jax.importance import total
from mpq_jax.search.greedy import made_to_fit
from mpq_jax.search.ilp import Progress, solution, solve_problem
from mpq_jax.search.others import fits, uniform_policies
from mpq_jax.search.problem import Problem, build, check_reachable, least
from mpq_jax.types import Budget, Importance, Refusal, Solution

FORMAT, VERSION = "mpq-frontier", 1


class Frontier(NamedTuple):
    """budget: the one whose limit is walked. limits [N], rising, in its table's unit; solutions [N], one each.

    without: limits that no policy keeps together with the other budgets, or where none was found in time.
    uniform: name -> (cost, objective) of each uniform policy that keeps the other budgets.
    seconds: wall-clock for all.
    """

    budget: Budget
    others: tuple[Budget, ...]
    limits: tuple[int | float, ...]
    solutions: tuple[Solution, ...]
    without: tuple[int | float, ...]
    uniform: dict[str, tuple[int | float, float]]
    seconds: float


def frontier(
    importance: Importance,
    budgets: Sequence[Budget],
    count: int,
    *,
    alpha: float | None = None,
    time_limit: float = 60.0,
) -> Frontier:
    """The best policies at `count` limits of the first budget, evenly spaced in their logarithm.

    From the least that any policy costs to the cost of the policy that is best without it. time_limit: seconds for all;
    limits that it leaves no time for are in `without`.
    Raises Refusal where the other budgets cannot be kept, and for a budget on the largest layer (its few steps are
    what `--budget memory=…` is for).
    """
    if count < 1:
        raise Refusal(f"a frontier of {count} limits cannot be; give a number from 1")
    began = time.monotonic()
    deadline = began + time_limit
    budget, others = budgets[0], list(budgets[1:])
    check_walkable(budget)
    loose = budget._replace(limit=costs.add([budget.fixed, *budget.table.max((1, 2)).tolist()]))
    full = build(importance, [loose, *others], alpha)
    check_reachable(full, [loose, *others])
    top = _solved(full, deadline, None)
    if top is None:
        raise Refusal("the other budgets cannot be kept together, or no policy was found in time; loosen one of them")
    lowest = least(full, 0, budget.fixed)
    highest = costs.add([budget.fixed, full.spent(_picks(top))[0]])
    limits = _spaced(lowest, highest, count)
    found: list[tuple[int | float, Solution]] = []
    without: list[int | float] = []
    last, progress = _picks(top), top
    for limit in reversed(limits):
        at = budget._replace(limit=limit)
        here = full._replace(limit=(limit - budget.fixed, *full.limit[1:]), whole=(limit, *full.whole[1:]))
        since = time.monotonic()
        if not here.fits(last):
            left = (deadline - since) / (len(limits) - len(found) - len(without))
            solved = _solved(here, since + left, progress) if left > 0 else None
            if solved is None:
                without.append(limit)
                continue
            last, progress = _picks(solved), solved
        found.append((limit, solution(importance, [at, *others], progress, time.monotonic() - since)))
    uniform = {
        name: (costs.used(budget, policy, importance), total(importance, policy, alpha))
        for name, policy in uniform_policies(importance)
        if fits(policy, others, importance)
    }
    return Frontier(
        budget,
        tuple(others),
        tuple(limit for limit, _ in reversed(found)),
        tuple(one for _, one in reversed(found)),
        tuple(reversed(without)),
        uniform,
        time.monotonic() - began,
    )


def check_walkable(budget: Budget) -> None:
    """Raises Refusal for a budget that no frontier runs over."""
    if budget.largest:
        raise Refusal(f"a frontier runs over a sum such as bitops or size, not over {budget.name}; name another first")


def _picks(progress: Progress) -> np.ndarray:
    assert progress.picks is not None
    return progress.picks


def _solved(problem: Problem, deadline: float, similar: Progress | None) -> Progress | None:
    """One search; similar: the search at a looser limit, for its prices and its policy. None where none was found."""
    began, prices, start = time.monotonic(), None, None
    if similar is not None:
        prices = similar.dual.prices / similar.dual.rooms
        start = made_to_fit(problem, _picks(similar))
    progress = solve_problem(problem, began, max(0.05, deadline - began), prices=prices, start=start)
    return progress if isinstance(progress, Progress) and progress.picks is not None else None


def _spaced(lowest: int | float, highest: int | float, count: int) -> list[int | float]:
    """`count` limits from lowest to highest, even in their logarithm; fewer where whole numbers fall together."""
    if lowest <= 0 or count == 1 or highest <= lowest:
        even = np.linspace(lowest, highest, count).tolist()
    else:
        even = np.exp(np.linspace(math.log(lowest), math.log(highest), count)).tolist()
    whole_numbers = isinstance(lowest, int) and isinstance(highest, int)
    inner = [round(value) if whole_numbers else round(value, 9) for value in even]
    ends = [lowest, *(min(max(value, lowest), highest) for value in inner[1:-1]), highest]
    return sorted(set(ends[-count:]))


# ---- files --------------------------------------------------------------------------------------------------------


def save_frontier(path: str | Path, found: Frontier, importance_sha256: str) -> None:
    """Writes frontier.json, whole or not at all."""
    budget = found.budget
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "budget": budget.name,
            "unit": budget.unit,
            "others": [other.text for other in found.others],
            "seconds": round(found.seconds, 4),
            "points": [
                {
                    "limit": costs.shown(budget, limit),
                    "used": one.used[budget.name][0],
                    "objective": one.objective,
                    "bound": one.bound,
                    "status": one.status,
                    "solver": one.solver,
                    "bits": {path: list(bits) for path, bits in one.policy.items()},
                }
                for limit, one in zip(found.limits, found.solutions, strict=True)
            ],
            "without": [costs.shown(budget, limit) for limit in found.without],
            "uniform": {
                name: {"used": costs.shown(budget, used), "objective": objective}
                for name, (used, objective) in found.uniform.items()
            },
            "importance_sha256": importance_sha256,
        },
    )


def draw_frontier(path: str | Path, found: Frontier, chosen: Solution | None = None) -> None:
    """Draws a PNG: objective over cost, uniform policies marked, the chosen policy too. Whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    budget = found.budget
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    used = [one.used[budget.name][0] for one in found.solutions]
    values = [one.objective for one in found.solutions]
    axes.step(used, values, where="post", color="#3366aa", linewidth=1.2, zorder=1)
    axes.plot(used, values, "o", color="#3366aa", markersize=3.5, label="best policy at each limit", zorder=2)
    open_ = [(u, one.bound) for u, one in zip(used, found.solutions, strict=True) if one.status != "optimal"]
    if open_:
        axes.plot(*zip(*open_, strict=True), "_", color="#3366aa", label="proven bound, where not optimal")
    points = {name: (costs.shown(budget, cost), value) for name, (cost, value) in found.uniform.items()}
    equal = {name: point for name, point in points.items() if _equal_widths(name)}
    rest = [point for name, point in points.items() if name not in equal]
    if rest:
        axes.plot(*zip(*rest, strict=True), "x", color="#bb7733", markersize=4, alpha=0.6, label="uniform WiAj")
    if equal:
        axes.plot(*zip(*equal.values(), strict=True), "s", color="#bb4422", markersize=5, label="uniform, W = A")
        for name, point in equal.items():
            axes.annotate(name, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
    if chosen is not None:
        point = (chosen.used[budget.name][0], chosen.objective)
        axes.plot(*point, "*", color="#118833", markersize=13, label="chosen policy", zorder=3)
    if min([*used, *(u for u, _ in points.values())]) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: costs.human(value, budget.unit))
    axes.margins(x=0.07)
    axes.set_xlabel(budget.name)
    axes.set_ylabel("importance of the policy (less is better)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        with whole(path) as temporary:
            figure.savefig(temporary, dpi=150)
    finally:
        plt.close(figure)


def _equal_widths(name: str) -> bool:
    w, _, a = name[1:].partition("A")
    return w == a
