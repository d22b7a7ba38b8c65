"""What search.py prints: bits per layer, what was achieved of what was asked, and what stands beside it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpq_jax import costs
from mpq_jax.importance import reversed_importance, total
from mpq_jax.policy import text
from mpq_jax.search.check import Check
from mpq_jax.search.frontier import Frontier
from mpq_jax.search.ilp import solve
from mpq_jax.search.others import best_uniform, random_policies
from mpq_jax.types import Budget, Importance, Policy, Refusal, Solution


def table(importance: Importance, policy: Policy) -> str:
    """One line a layer: bits, parameters, BitOps."""
    width = max(len(layer.path) for layer in importance.layers)
    lines = [f"{'layer':{width}}  bits       {'params':>11}  {'BitOps':>10}"]
    for layer in importance.layers:
        bits = policy[layer.path]
        cost = costs.human(costs.layer_bitops(layer, bits), "BitOps")
        fixed = "" if layer.searched else "  fixed"
        lines.append(f"{layer.path:{width}}  {text(bits):9}  {layer.params:11,}  {cost:>10}{fixed}")
    return "\n".join(lines)


def achieved(budgets: Sequence[Budget], used: dict[str, tuple[int | float, int | float]]) -> str:
    """One line a budget: achieved of asked, and in per cent."""
    lines = []
    for budget in budgets:
        spent, limit = used[budget.name]
        over = "" if spent <= limit else "  OVER THE BUDGET"
        share = f"{100 * spent / limit:.2f} %"
        lines.append(
            f"{budget.text}: {costs.human(spent, budget.unit)} of {costs.human(limit, budget.unit)} ({share}){over}"
        )
    return "\n".join(lines)


def certificate(solution: Solution) -> str:
    """The objective, its proven bound, and who proved it."""
    assert solution.bound is not None and solution.gap is not None
    gap = "" if solution.status == "optimal" else f", gap {100 * solution.gap:.3g} %"
    return (
        f"objective {solution.objective:.6g}, bound {solution.bound:.6g}: {solution.status}{gap} "
        f"({solution.solver}, {solution.seconds:.3f} s)"
    )


def written(out: Path, before: str | None) -> str:
    """Where the policy is, and what it took the place of, as `policy.replaced` says it."""
    note = f"replaced: {out} held {before}; --out writes elsewhere\n" if before else ""
    return f"{note}policy: {out}"


def beside(importance: Importance, budgets: Sequence[Budget], alpha: float | None, count: int) -> str:
    """The importance of others within the same budgets: best uniform, mean of random, reversed."""
    lines = ["importance of others within the same budgets (and of the first budget, what they use):"]

    def line(name: str, policies: Sequence[Policy], note: str) -> str:
        value = np.mean([total(importance, policy, alpha) for policy in policies])
        spent = np.mean([costs.used(budgets[0], policy, importance) for policy in policies])
        return f"  {name:14} {value:<10.6g} {100 * spent / budgets[0].limit:6.2f} %  {note}"

    uniform = best_uniform(importance, budgets, alpha)
    lines.append("  best uniform   none fits" if uniform is None else line("best uniform", [uniform[1]], uniform[0]))
    others = random_policies(importance, budgets, count)
    # A limit on the largest layer only has to hold.
    near = f"{'within' if budgets[0].largest else 'within 2 % of'} {budgets[0].text}"
    if others:
        lines.append(line("random", others, f"mean of {len(others)} {near}"))
    elif count > 0:
        lines.append(f"  random         none found {near}")
    try:
        wrong = solve(reversed_importance(importance, alpha), budgets, alpha=alpha, time_limit=10.0)
        lines.append(line("reversed", [wrong.policy], "the layer of rank r gets the row of rank L+1-r"))
    except Refusal:
        lines.append("  reversed       none found")
    return "\n".join(lines)


def frontier_table(found: Frontier, most: int = 16) -> str:
    """Some of the frontier's points, evenly picked, and the uniform policies of equal widths."""
    budget, count = found.budget, len(found.limits)
    lines = [f"{budget.name:>12}  {'objective':>10}  status   solver"]
    for i in sorted(set(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist())):
        one = found.solutions[i]
        spent = costs.human(one.used[budget.name][0], budget.unit)
        lines.append(f"{spent:>12}  {one.objective:10.6g}  {one.status:8} {one.solver}")
    for name, (cost, objective) in found.uniform.items():
        if len(set(name[1:].split("A"))) == 1:
            lines.append(
                f"{costs.human(costs.shown(budget, cost), budget.unit):>12}  {objective:10.6g}  uniform {name}"
            )
    optimal = sum(one.status == "optimal" for one in found.solutions)
    lines.append(f"{count} limits, {optimal} proven optimal, in {found.seconds:.2f} s")
    if found.without:
        lines.append(f"at {len(found.without)} limits no policy keeps the other budgets, or none was found in time")
    return "\n".join(lines)


def check_text(budgets: Sequence[Budget], result: Check) -> str:
    """What a hand-edited policy costs and loses."""
    lines = [achieved(budgets, result.used)]
    lines += [f"breaks the rule {rule!r} at {path}" for rule, path in result.broken]
    lines.append(f"objective {result.objective:.6g}")
    if result.best is None:
        lines.append(f"no best to compare with: {result.why_none}")
        return "\n".join(lines)
    lines.append(f"the best within the same budgets: {certificate(result.best)}")
    share = f" ({100 * result.loss / abs(result.best.objective):.3g} %)" if result.best.objective else ""
    if abs(result.loss) <= 1e-9 * abs(result.objective):
        lines.append(
            "loses nothing against the best" if result.best.status == "optimal" else "as good as the best known"
        )
    elif result.loss > 0:
        lines.append(f"loses {result.loss:.6g}{share} against the best")
    else:
        why = (
            "by breaking a budget or a rule" if result.over or result.broken else "which was not proven to be the best"
        )
        lines.append(f"lies {-result.loss:.6g}{share.replace('-', '')} below the best, {why}")
    return "\n".join(lines)
