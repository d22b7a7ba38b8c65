"""Branch and bound on the Lagrangian bound: exact, without any solver, for what reduced costs leave.

A policy's objective is the dual bound, plus the reduced costs of its choices, plus the price of what it leaves of each
budget: three terms that are never negative. So every policy within `gap` of the bound is found by walking the rows and
dropping each partial policy whose terms exceed the gap already; many partial policies are one array.
"""

import math
import time
from typing import NamedTuple

import numpy as np

from mpq_jax.search.dual import Dual
from mpq_jax.search.problem import Problem

BLOCK = 1 << 14  # partial policies that go on together


class Found(NamedTuple):
    """picks: [L] of the best policy found, or None. done: whether every policy within the gap was looked at."""

    picks: np.ndarray | None
    done: bool
    nodes: int


class _Leaf(NamedTuple):
    """picks: [L] of a whole policy, or None."""

    picks: np.ndarray | None
    objective: float
    bits: float


class _Row(NamedTuple):
    """One row as the walk meets it: kept columns, their reduced costs and costs, and what the rows after it cost.

    lift: [N] added for the shared activation bits by the first row of a tied group, taken off by the later ones.
    """

    row: int
    columns: np.ndarray
    reduced: np.ndarray
    costs: list[np.ndarray]
    bits: np.ndarray
    activation: np.ndarray | None  # column of the shared width, in tied rows
    first: bool
    last: bool
    least_after: list[int | float]
    most_after: list[int | float]


class _Block(NamedTuple):
    """Partial policies at one depth. reduced [N], costs M x [N], bits [N], shared [N]: the group's activation width."""

    depth: int
    reduced: np.ndarray
    costs: list[np.ndarray]
    bits: np.ndarray
    shared: np.ndarray
    parent: "_Block | None"
    origin: np.ndarray  # of the parent's partial policy
    choice: np.ndarray  # its column in the row of this depth

    def take(self, chosen: np.ndarray) -> "_Block":
        return self._replace(
            reduced=self.reduced[chosen],
            costs=[cost[chosen] for cost in self.costs],
            bits=self.bits[chosen],
            shared=self.shared[chosen],
            origin=self.origin[chosen],
            choice=self.choice[chosen],
        )


def branch(
    problem: Problem,
    dual: Dual,
    gap: float,
    *,
    nodes: int,
    deadline: float = math.inf,
    fewest_bits: bool = False,
    beam: int = 0,
) -> Found:
    """The best policy within `gap` of the dual bound; of equals (to rounding) one with few bits.

    fewest_bits: of all within `gap`, the one with the fewest bits instead.
    nodes: partial policies to look at before giving up (then `done` is false); deadline: of time.monotonic().
    beam: keep only so many partial policies at each depth: not exact, fast.
    """
    rows = _walk_order(problem, dual, gap)
    if rows is None:
        return Found(None, True, 0)
    prices = dual.prices / dual.rooms
    best = _Leaf(None, math.inf, math.inf)
    zero = np.zeros(1, int)
    stack = [_Block(0, np.zeros(1), [np.zeros(1, c.dtype) for c in problem.cost], zero, zero, None, zero, zero)]
    looked = 0
    while stack:
        if looked > nodes or time.monotonic() > deadline:
            return Found(best.picks, False, looked)
        block = stack.pop()
        if block.depth == len(rows):
            best = _best_leaf(problem, block, rows, dual, prices, gap, fewest_bits, best)
            if best.picks is not None and not fewest_bits:
                gap = min(gap, max(best.objective - dual.bound, 0.0) + dual.rounding)
            continue
        grown, size = _grow(problem, block, rows[block.depth], prices, gap, dual.rounding, fewest_bits)
        looked += size
        if beam and len(grown.reduced) > beam:
            grown = grown.take(np.argsort(_promise(problem, grown, rows[block.depth], prices), kind="stable")[:beam])
        if len(grown.reduced) > BLOCK:
            order = np.argsort(_promise(problem, grown, rows[block.depth], prices), kind="stable")
            stack += [grown.take(order[i : i + BLOCK]) for i in range(0, len(order), BLOCK)][::-1]
        elif len(grown.reduced):
            stack.append(grown)
    return Found(best.picks, beam == 0, looked)


def _walk_order(problem: Problem, dual: Dual, gap: float) -> list[_Row] | None:
    """The rows, those that move the budgets most first, tied ones together. None where a row has no choice left."""
    kept = problem.allowed & (dual.reduced <= gap + dual.rounding)
    if not kept.any(1).all():
        return None
    swing = np.where(kept, dual.priced, -np.inf).max(1) - np.where(kept, dual.priced, np.inf).min(1)
    units: list[tuple[int, ...]] = list(problem.tied)
    if problem.tied:
        grouped = {row for group in problem.tied for row in group}
        units += [(row,) for row in range(len(swing)) if row not in grouped]
        units.sort(key=lambda unit: (-max(swing[list(unit)]), unit))
    else:
        units = [(row,) for row in np.argsort(-swing, kind="stable").tolist()]
    order = np.array([row for unit in units for row in unit])
    # What the rows after each depth cost at least and at most; int64 sums are exact.
    least = _after([np.where(kept, c, c.max()).min(1) for c in problem.cost], order)
    most = _after([np.where(kept, c, c.min()).max(1) for c in problem.cost], order)
    bits, rows, depth = problem.bits, [], 0
    for unit in units:
        for row in unit:
            columns = kept[row].nonzero()[0]
            activation = columns % problem.widths[1] if len(unit) > 1 else None
            reduced = dual.reduced[row, columns]
            if activation is not None and row != unit[0]:
                reduced = reduced - dual.lifts[unit[0]][activation]
            rows.append(
                _Row(
                    row=row,
                    columns=columns,
                    reduced=reduced,
                    costs=[c[row, columns] for c in problem.cost],
                    bits=bits[row, columns],
                    activation=activation,
                    first=row == unit[0],
                    last=row == unit[-1],
                    least_after=[each[depth] for each in least],
                    most_after=[each[depth] for each in most],
                )
            )
            depth += 1
    return rows


def _after(each: list[np.ndarray], order: np.ndarray) -> list[list[int | float]]:
    """Per budget and depth: the sum over the rows that come after."""
    return [(np.cumsum(values[order][::-1])[::-1] - values[order]).tolist() for values in each]


def _grow(
    problem: Problem, block: _Block, row: _Row, prices: np.ndarray, gap: float, rounding: float, fewest_bits: bool
) -> tuple[_Block, int]:
    """The block with every choice of one more row that may still end within the gap and the budgets."""
    reduced = block.reduced[:, None] + row.reduced
    possible = reduced <= gap + rounding
    if row.activation is not None and not row.first:
        possible &= block.shared[:, None] == row.activation
    costs = [had[:, None] + cost for had, cost in zip(block.costs, row.costs, strict=True)]
    left = reduced.copy()
    for m, cost in enumerate(costs):
        # Measured costs are added up to 9 decimals; the leaf decides.
        slack = 0 if cost.dtype.kind == "i" else 1e-8
        possible &= cost + row.least_after[m] <= problem.limit[m] + slack
        left += prices[m] * np.maximum(problem.limit[m] - (cost + row.most_after[m]), 0)
    possible &= left <= gap + rounding
    index, choice = np.nonzero(possible)
    bits = block.bits[index] + row.bits[choice]
    shared = block.shared[index] if row.activation is None or not row.first else row.activation[choice]
    grown = _Block(
        block.depth + 1,
        reduced[possible],
        [c[possible] for c in costs],
        bits,
        shared,
        block,
        index,
        row.columns[choice],
    )
    if len(costs) == 1 and row.last and len(index) > 1:
        grown = grown.take(_undominated(grown, prices[0], rounding if fewest_bits else 0.0))
    return grown, reduced.size


def _undominated(block: _Block, price: float, unit: float) -> np.ndarray:
    """With one budget: the partial policies that no other equals or beats in value and cost.

    With a unit of value: those that no other of equal value (to that unit) equals or beats in cost and bits.
    """
    value, cost, bits = block.reduced - price * block.costs[0], block.costs[0], block.bits
    if unit:
        key = np.round(value / (unit / 64))
        order = np.lexsort((bits, cost, key))
        # Each later group of equal value lies below all before it, so that they never speak for it.
        groups = np.cumsum(np.diff(key[order], prepend=key[order[0]]) != 0)
        measure = bits[order] - groups * (int(bits.max()) + 1)
    else:
        order = np.lexsort((bits, value, cost))
        measure = value[order]
    lowest = np.minimum.accumulate(measure)
    return order[np.concatenate([[True], measure[1:] < lowest[:-1]])]


def _promise(problem: Problem, block: _Block, row: _Row, prices: np.ndarray) -> np.ndarray:
    """A lower bound on what each partial policy ends above the dual bound."""
    left = block.reduced.copy()
    for m, cost in enumerate(block.costs):
        left += prices[m] * np.maximum(problem.limit[m] - (cost + row.most_after[m]), 0)
    return left


def _best_leaf(
    problem: Problem,
    block: _Block,
    rows: list[_Row],
    dual: Dual,
    prices: np.ndarray,
    gap: float,
    fewest_bits: bool,
    best: _Leaf,
) -> _Leaf:
    """The better of `best` and the best whole policy of a block that fits."""
    total = block.reduced + sum(
        price * (limit - cost) for price, limit, cost in zip(prices, problem.limit, block.costs, strict=True)
    )
    inside = np.flatnonzero(total <= gap + dual.rounding)
    # Totals that differ by rounding alone are equal.
    coarse = np.round(total[inside] / dual.rounding) if dual.rounding else total[inside]
    keys = (coarse, block.bits[inside]) if fewest_bits else (block.bits[inside], coarse)
    for leaf in inside[np.lexsort(keys)]:
        picks = _trace(block, int(leaf), rows)
        objective = math.fsum(problem.value[np.arange(len(picks)), picks])
        if problem.fits(picks) and objective <= dual.bound + gap + dual.rounding:
            bits = float(block.bits[leaf])
            if fewest_bits:
                better = (bits, objective) < (best.bits, best.objective)
            else:
                better = objective < best.objective - dual.rounding
                better |= bits < best.bits and objective <= best.objective + dual.rounding
            return _Leaf(picks, objective, bits) if better else best
    return best


def _trace(block: _Block, leaf: int, rows: list[_Row]) -> np.ndarray:
    picks = np.empty(len(rows), int)
    here: _Block | None = block
    while here is not None and here.depth:
        picks[rows[here.depth - 1].row] = here.choice[leaf]
        leaf, here = int(here.origin[leaf]), here.parent
    return picks
