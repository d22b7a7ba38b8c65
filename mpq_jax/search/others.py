"""What stands beside every answer: the best uniform policy that fits, random ones of the same budget, the reversed one."""

from collections.abc import Sequence

import numpy as np

from mpq_jax import costs
from mpq_jax.importance import total
from mpq_jax.search.problem import Problem, build
from mpq_jax.types import Bits, Budget, Importance


def fits(policy: dict[str, Bits], budgets: Sequence[Budget], importance: Importance) -> bool:
    """Whether every budget holds, exactly."""
    return all(costs.used(budget, policy, importance) <= budget.limit for budget in budgets)


# ---- uniform ------------------------------------------------------------------------------------------------------


def best_uniform(
    importance: Importance, budgets: Sequence[Budget], alpha: float | None = None
) -> tuple[str, dict[str, Bits]] | None:
    """("W3A3", policy): of all WiAj that fit, the one of least importance (of equals, the one with more bits).

    A layer that a candidate list or a rule keeps from those bits has the nearest it may have. None where not even the
    narrowest fits. alpha: weights' factor; None: the table's own, or 1.
    Raises Refusal where rules and candidates leave a layer no bits.
    """
    found = []
    for name, policy in uniform_policies(importance):
        if fits(policy, budgets, importance):
            more_bits = tuple(-bits for bits in _widths_of(name))
            found.append((total(importance, policy, alpha), sum(more_bits), more_bits, name, policy))
    return min(found)[3:] if found else None


def uniform_policies(importance: Importance) -> list[tuple[str, dict[str, Bits]]]:
    """[("W2A2", policy), ...] for all pairs of the candidates, each layer at the nearest bits that it may have."""
    problem = build(importance, [])
    fixed = {layer.path: layer.bits for layer in importance.layers if layer.bits is not None}
    named = []
    for w in importance.bit_widths:
        for a in importance.activation_bit_widths:
            policy = fixed | problem.policy(_nearest(problem, w, a))
            named.append((f"W{w}A{a}", {layer.path: policy[layer.path] for layer in importance.layers}))
    return named


def _widths_of(name: str) -> tuple[int, int]:
    w, a = name[1:].split("A")
    return int(w), int(a)


def _nearest(problem: Problem, w: int, a: int) -> np.ndarray:
    """picks [L]: the allowed choice nearest to WwAa in each row, the narrower of two; tied rows share activation bits."""
    far = np.abs(problem.w - w) + np.abs(problem.a - a)
    order = np.lexsort((problem.w, problem.w + problem.a, far))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    picks = np.where(problem.allowed, rank, len(order)).argmin(1)
    for group in problem.tied:
        rows = list(group)
        shared = min(problem.shared_bits(group), key=lambda bits: (abs(bits - a), bits))
        mask = problem.allowed[rows] & (problem.a == shared)
        picks[rows] = np.where(mask, rank, len(order)).argmin(1)
    return picks


# ---- random -------------------------------------------------------------------------------------------------------


def random_policies(
    importance: Importance, budgets: Sequence[Budget], count: int, seed: int = 0, within: float = 0.02
) -> list[dict[str, Bits]]:
    """Up to `count` random policies that fit and use at least (1 - within) of the first budget.

    Drawn uniformly, then moved by random single changes towards the budget, so that no layer is favoured. Fewer come
    back, none in most cases, where 200 tries in a row find no such policy: a budget above what the widest policy
    costs, or another budget that binds first. A first budget on the largest layer only has to hold.
    Raises Refusal where rules and candidates leave a layer no bits.
    """
    rng = np.random.default_rng(seed)
    problem = build(importance, budgets)
    fixed = {layer.path: layer.bits for layer in importance.layers if layer.bits is not None}
    first = problem.names.index(budgets[0].name) if budgets and budgets[0].name in problem.names else None
    found: list[dict[str, Bits]] = []
    for _ in range(count):
        tries = (_towards(problem, rng, first, within) for _ in range(200))
        picks = next((picks for picks in tries if picks is not None), None)
        if picks is None:
            break
        policy = fixed | problem.policy(picks)
        found.append({layer.path: policy[layer.path] for layer in importance.layers})
    return found


def random_fitting(problem: Problem, rng: np.random.Generator, tries: int = 200) -> np.ndarray | None:
    """picks [L] drawn uniformly, then moved by random single changes until every budget holds; None after `tries`."""
    return next((picks for _ in range(tries) if (picks := _towards(problem, rng, None, 0.0)) is not None), None)


def _drawn(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """picks [L], each row's drawn uniformly from what it may have; tied rows draw their activation bits together."""
    picks = np.array([rng.choice(np.flatnonzero(allowed)) for allowed in problem.allowed])
    for group in problem.tied:
        rows = list(group)
        shared = rng.choice(sorted(problem.shared_bits(group)))
        for row in rows:
            picks[row] = rng.choice(np.flatnonzero(problem.allowed[row] & (problem.a == shared)))
    return picks


def _towards(problem: Problem, rng: np.random.Generator, first: int | None, within: float) -> np.ndarray | None:
    """One random walk: bits taken away while a budget is broken, then given back while all hold.

    None where it gets stuck below the first budget, or above any.
    """
    picks = _drawn(problem, rng)
    units = [*problem.tied, *((row,) for row in range(len(picks)))]
    spent, limits = list(problem.spent(picks)), problem.limit
    while True:
        down = any(s > limit for s, limit in zip(spent, limits, strict=True))
        if not down and (first is None or spent[first] + problem.fixed[first] >= (1 - within) * problem.whole[first]):
            return picks if problem.fits(picks) else None
        for unit in rng.permutation(len(units)):
            rows = list(units[unit])
            moved = _moved(problem, picks, rows, down, rng)
            if moved is None:
                continue
            after = [
                s + costs.add((c[rows, moved] - c[rows, picks[rows]]).tolist())
                for s, c in zip(spent, problem.cost, strict=True)
            ]
            if down or all(s <= limit for s, limit in zip(after, limits, strict=True)):
                picks[rows], spent = moved, after
                break
        else:
            return None


def _moved(
    problem: Problem, picks: np.ndarray, rows: list[int], down: bool, rng: np.random.Generator
) -> np.ndarray | None:
    """Columns of some rows after one step narrower or wider: a row's own next choices, or a group's next shared width.

    None where there is none.
    """
    w, a, sign = problem.w, problem.a, -1 if down else 1
    now = picks[rows[0]]
    if len(rows) == 1:
        further = problem.allowed[rows[0]] & (sign * w >= sign * w[now]) & (sign * a >= sign * a[now])
        if any(rows[0] in group for group in problem.tied):
            further &= a == a[now]
        further[now] = False
        columns = np.flatnonzero(further)
        # The next ones: those that no other lies before.
        before = (sign * w[columns] <= sign * w[columns, None]) & (sign * a[columns] <= sign * a[columns, None])
        columns = columns[before.sum(1) == 1]
        return columns[[rng.integers(len(columns))]] if len(columns) else None
    options = [bits for bits in problem.shared_bits(tuple(rows)) if sign * bits > sign * a[now]]
    if not options:
        return None
    shared, moved = min(options, key=lambda bits: sign * bits), []
    for row in rows:
        columns = np.flatnonzero(problem.allowed[row] & (a == shared) & (sign * w >= sign * w[picks[row]]))
        if not len(columns):
            return None
        moved.append(columns[(sign * w[columns]).argmin()])
    return np.array(moved)
