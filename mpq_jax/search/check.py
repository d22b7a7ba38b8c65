"""A policy that somebody edited: what it costs, which budgets and rules it keeps, what it loses against the best."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from mpq_jax import costs
from mpq_jax.importance import total
from mpq_jax.search.constraints import bound_by, parse_rule
from mpq_jax.search.ilp import solve
from mpq_jax.types import Budget, Importance, Policy, Refusal, Solution


class Check(NamedTuple):
    """objective: of the policy. used: per budget (used, limit), means as means. over: names of broken budgets.
    broken: rules that it breaks, each with the layer. best: the best policy within the budgets; None where none is.
    """

    objective: float
    used: dict[str, tuple[int | float, int | float]]
    over: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]
    best: Solution | None
    why_none: str

    @property
    def loss(self) -> float:
        """How much more importance than the best within the same budgets; negative for a policy beyond budgets or rules, or
        where the best is not proven to be."""
        return float("nan") if self.best is None else self.objective - self.best.objective


def check(
    importance: Importance,
    policy: Policy,
    budgets: Sequence[Budget],
    *,
    alpha: float | None = None,
    time_limit: float = 60.0,
) -> Check:
    """Adds the policy up in exact arithmetic and searches for the best within the same budgets and rules.

    Raises Refusal for a policy with weight bits per output channel, which no table of layers knows.
    """
    if by_channel := next((path for path, bits in policy.items() if isinstance(bits.w, Sequence)), None):
        raise Refusal(
            f"layer {by_channel!r} has weight bits per output channel, and the importance is one of whole layers; "
            "measure such a policy with train.py --policy"
        )
    used = {budget.name: costs.used(budget, policy, importance) for budget in budgets}
    best, why_none = None, ""
    try:
        best = solve(importance, budgets, alpha=alpha, time_limit=time_limit)
    except Refusal as refusal:
        why_none = str(refusal)
    return Check(
        objective=total(importance, policy, alpha),
        used={b.name: (costs.shown(b, used[b.name]), costs.shown(b, b.limit)) for b in budgets},
        over=tuple(budget.name for budget in budgets if used[budget.name] > budget.limit),
        broken=broken_rules(importance, policy),
        best=best,
        why_none=why_none,
    )


def broken_rules(importance: Importance, policy: Policy) -> tuple[tuple[str, str], ...]:
    """((rule, path of a layer that breaks it), ...)."""
    searched = [layer.path for layer in importance.layers if layer.searched]
    broken = []
    for rule in map(parse_rule, importance.rules):
        if rule.pair is not None:
            broken += [
                (rule.text, path) for path in searched if re.search(rule.pattern, path) and not rule.pair(*policy[path])
            ]
            continue
        for group in bound_by(rule, searched):
            paths = [searched[row] for row in group]
            first = policy[paths[0]]
            same = (lambda bits, first=first: bits.a == first.a) if rule.shared == "a" else first.__eq__
            broken += [(rule.text, path) for path in paths[1:] if not same(policy[path])]
    return tuple(broken)
