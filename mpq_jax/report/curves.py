"""The frontier that a page shows: best, uniform and chosen policies, objective against the cost of one budget. No JAX."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mpq_jax import costs
from mpq_jax.importance import repair, total
from mpq_jax.types import Budget, Importance, Policy, Refusal

if TYPE_CHECKING:
    from mpq_jax.search.frontier import Frontier

LIMITS = 24  # points enough for a curve
SECONDS = 10.0


class CurvePoint(NamedTuple):
    """One policy: cost in the budget's unit, objective; bound: what was proven of the least one (None: not asked).

    name: "W3A3" of a uniform policy, "" of a best one. proven: whether no policy of that cost has a lower objective.
    """

    cost: float
    objective: float
    bound: float | None = None
    name: str = ""
    proven: bool = False


class Curve(NamedTuple):
    """budget, unit, limit: the one whose limit is walked, and where the chosen policy was searched.

    others: budgets that were held. best: rising in cost. chosen: None where `why` says what keeps it from the plot.
    """

    budget: str
    unit: str
    limit: float
    others: tuple[str, ...]
    best: tuple[CurvePoint, ...]
    uniform: tuple[CurvePoint, ...]
    chosen: CurvePoint | None
    why: str = ""


def curve(
    importance: Importance,
    budgets: Sequence[Budget],
    chosen: Policy,
    *,
    found: "Frontier | None" = None,
    count: int = LIMITS,
    time_limit: float = SECONDS,
) -> Curve:
    """The best policies at `count` limits of the first budget that is a sum, the others held; `found` where it is known.

    Searched as search.py does: without the table's outliers, with the table's own alpha. Raises Refusal where there is
    no such budget, or where the budgets cannot be kept together.
    """
    if not budgets:
        raise Refusal("the policy was given without a budget that can be told again from the importance")
    ordered = sorted(budgets, key=lambda budget: budget.largest)  # stable: the first sum comes to the front
    table, _ = repair(importance)
    if found is None:
        from mpq_jax.search.frontier import frontier  # brings the solvers along

        found = frontier(table, ordered, count, time_limit=time_limit)
    budget = found.budget
    best = [
        CurvePoint(one.used[budget.name][0], one.objective, one.bound, proven=one.status == "optimal")
        for one in found.solutions
    ]
    uniform = [
        CurvePoint(costs.shown(budget, cost), objective, name=name) for name, (cost, objective) in found.uniform.items()
    ]
    limit = next(costs.shown(each, each.limit) for each in budgets if each.name == budget.name)
    point, why = _chosen(table, budget, chosen)
    others = tuple(each.text for each in found.others)
    return Curve(budget.name, budget.unit, limit, others, tuple(best), tuple(uniform), point, why)


def _chosen(table: Importance, budget: Budget, chosen: Policy) -> tuple[CurvePoint | None, str]:
    if any(isinstance(bits.w, Sequence) for bits in chosen.values()):
        return None, "The chosen policy has bits per output channel, of which the importance table says nothing."
    cost = costs.shown(budget, costs.used(budget, chosen, table))
    return CurvePoint(cost, total(table, chosen), name="mixed"), ""
