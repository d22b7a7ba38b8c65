"""The multiple-choice problem behind a search, as flat arrays: one entry a (layer, weight bits, activation bits)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.costs import add, human
from mpq_jax.importance import combined
from mpq_jax.policy import tied_candidates
from mpq_jax.types import Bits, Budget, Importance, Refusal


class Problem(NamedTuple):
    """minimise value @ x over boolean x [C], one choice a layer, cost[m] @ x <= limit[m].

    layer, w, a: int [C], the searched layer's number and bits of each choice. value: float64 [C].
    cost: per budget [C] (int64 where exact). limit: what is left of each budget after the fixed layers, which cost
    `fixed` of `whole`.
    paths: [L] of the searched layers. tied: groups of layer numbers that share activation bits.
    """

    layer: np.ndarray
    w: np.ndarray
    a: np.ndarray
    value: np.ndarray
    cost: tuple[np.ndarray, ...]
    limit: tuple[int | float, ...]
    fixed: tuple[int | float, ...]
    whole: tuple[int | float, ...]
    paths: tuple[str, ...]
    tied: tuple[tuple[int, ...], ...]

    def keep(self, chosen: np.ndarray) -> "Problem":
        """The problem with only some choices; chosen: bool [C]."""
        return self._replace(
            layer=self.layer[chosen],
            w=self.w[chosen],
            a=self.a[chosen],
            value=self.value[chosen],
            cost=tuple(c[chosen] for c in self.cost),
        )

    def policy(self, picks: np.ndarray) -> dict[str, Bits]:
        """Bits of the searched layers, from the indices [L] of the chosen entries."""
        return {self.paths[self.layer[p]]: Bits(int(self.w[p]), int(self.a[p])) for p in picks}

    def spent(self, picks: np.ndarray) -> tuple[int | float, ...]:
        """What the picks cost, exactly."""
        return tuple(sum(c[p].item() for p in picks) for c in self.cost)

    def fits(self, picks: np.ndarray) -> bool:
        """Whether every budget holds: in exact arithmetic; for measured costs as `costs.used` adds them up."""
        return all(
            add([fixed, *(c[p].item() for p in picks)]) <= whole
            for c, fixed, whole in zip(self.cost, self.fixed, self.whole, strict=True)
        )

    def only(self, minimise: int, within: int) -> "Problem":
        """The least of one budget's cost within another budget."""
        return self._replace(
            value=self.cost[minimise].astype(np.float64),
            cost=(self.cost[within],),
            limit=(self.limit[within],),
            fixed=(self.fixed[within],),
            whole=(self.whole[within],),
        )


def build(importance: Importance, budgets: Sequence[Budget], alpha: float | None) -> Problem:
    """All allowed choices.

    Raises Refusal where tied layers have no activation bits in common, for numbers too large to add up, and for
    interactions.
    """
    if importance.interactions:
        raise Refusal(
            f"this importance has {len(importance.interactions)} interactions of pairs of layers, which this search "
            "cannot weigh; use an additive one, e.g. --criterion regression"
        )
    with np.errstate(over="ignore"):
        table = combined(importance, alpha)
    # 1e280: products with a solver's scales and multipliers stay finite too.
    if not np.abs(table).max() < 1e280:
        raise Refusal("the importance holds numbers of 1e280 or more; divide the whole table by a constant")
    searched = [layer for layer in importance.layers if layer.searched]
    allowed_a = tied_candidates(importance.layers, importance.activation_bit_widths)
    entries = [
        (row, i, j)
        for row, layer in enumerate(searched)
        for i, w in enumerate(importance.bit_widths)
        for j, a in enumerate(importance.activation_bit_widths)
        if w in (layer.weight_bit_widths or importance.bit_widths) and a in allowed_a[layer.path]
    ]
    index = tuple(np.array(entries).T)
    groups: dict[str, list[int]] = {}
    for row, layer in enumerate(searched):
        if layer.tied is not None:
            groups.setdefault(layer.tied, []).append(row)
    return Problem(
        layer=index[0],
        w=np.array(importance.bit_widths)[index[1]],
        a=np.array(importance.activation_bit_widths)[index[2]],
        value=table[index],
        cost=tuple(budget.table[index] for budget in budgets),
        limit=tuple(budget.limit - budget.fixed for budget in budgets),
        fixed=tuple(budget.fixed for budget in budgets),
        whole=tuple(budget.limit for budget in budgets),
        paths=tuple(layer.path for layer in searched),
        tied=tuple(tuple(group) for group in groups.values() if len(group) > 1),
    )


def without_dominated(problem: Problem) -> Problem:
    """Drops every choice that another of its layer beats or equals in value and in every cost.

    One of equal value goes only if the other has no more bits, since fewer bits win ties: of equal choices the one
    with fewer bits stays (then fewer weight bits), the same way every time. Among tied layers only choices of the same
    activation bits compare.
    """
    in_group = {row for group in problem.tied for row in group}
    keep = np.ones(len(problem.layer), bool)
    # Rank first what should win a tie.
    order = np.lexsort((problem.w, problem.w + problem.a))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    for row in range(len(problem.paths)):
        mine = np.flatnonzero(problem.layer == row)
        value, costs = problem.value[mine], [c[mine] for c in problem.cost]
        for x, p in enumerate(mine):
            better = (value < value[x]) | ((value == value[x]) & (rank[mine] < rank[p]))
            for c in costs:
                better &= c <= c[x]
            if row in in_group:
                better &= problem.a[mine] == problem.a[p]
            keep[p] = not better.any()
    return problem.keep(keep)


def least(problem: Problem, budget: int, fixed: int | float = 0) -> int | float:
    """The least that any policy costs in one budget beside `fixed`, ties respected."""
    cost = problem.cost[budget]
    grouped = {row for group in problem.tied for row in group}
    terms = [cost[problem.layer == row].min().item() for row in range(len(problem.paths)) if row not in grouped]
    for group in problem.tied:
        shared = set.intersection(*(set(problem.a[problem.layer == row].tolist()) for row in group))
        cheapest = [[cost[(problem.layer == row) & (problem.a == a)].min().item() for row in group] for a in shared]
        terms += min(cheapest, key=add)
    return add([fixed, *terms])


def check_reachable(problem: Problem, budgets: Sequence[Budget]) -> None:
    """Raises Refusal for a budget that no policy keeps, with the least reachable value."""
    for m, budget in enumerate(budgets):
        reachable = least(problem, m, budget.fixed)
        if reachable > budget.limit:
            raise Refusal(
                f"budget {budget.text} allows {human(budget.limit, budget.unit)} ({budget.limit}), but the least "
                f"reachable is {human(reachable, budget.unit)} ({reachable}); ask for at least that, or allow fewer bits"
            )
