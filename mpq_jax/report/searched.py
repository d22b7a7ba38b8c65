"""A report of a search alone, before anything is fine-tuned. No JAX, no matplotlib."""

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_jax import __version__, costs
from mpq_jax.importance import sha256
from mpq_jax.report.curves import curve
from mpq_jax.report.tables import Report
from mpq_jax.search import best_uniform, random_policies
from mpq_jax.types import Budget, Importance, Refusal, Solution

if TYPE_CHECKING:
    from mpq_jax.search.frontier import Frontier


def searched(
    path: Path, importance: Importance, budgets: Sequence[Budget], solution: Solution, found: "Frontier | None" = None
) -> Report:
    """The report of one search.

    path: the importance.json that was read; importance: as it was searched, with the alpha and the rules of the search.
    found: the frontier of the first budget, where it is known already.
    """
    policies = {}
    uniform = best_uniform(importance, budgets)
    if uniform is not None:
        policies[f"uniform {uniform[0]}"] = uniform[1]
    for chosen in random_policies(importance, budgets, 1):
        policies["random"] = chosen
    try:
        shown, why = curve(importance, budgets, solution.policy, found=found), ""
    except Refusal as refusal:
        shown, why = None, f"There is no frontier: {refusal}."
    spent = {budget.name: (*solution.used[budget.name], budget.unit) for budget in budgets}
    return Report(
        title=f"Search in {path.parent.resolve().name}/{path.name}",
        importance=importance,
        policies={**policies, "mixed": solution.policy},
        used=spent,
        accuracy=[],
        grids=[],
        depthwise_pairs=[],
        indicators=None,
        initial=None,
        outliers=[],
        provenance=_provenance(path, importance, budgets),
        solution=solution._asdict(),
        curve=shown,
        no_curve=why,
    )


def _provenance(path: Path, importance: Importance, budgets: Sequence[Budget]) -> dict[str, str]:
    packages = ("numpy", "cvxpy", "highspy")
    limits = {f"budget {budget.text}": f"{costs.shown(budget, budget.limit):,} {budget.unit}" for budget in budgets}
    rules = {"rules": "; ".join(importance.rules)} if importance.rules else {}
    return {
        "mpq_jax": __version__,
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        **limits,
        **rules,
        f"{path.name} (SHA-256)": sha256(path),
    }
