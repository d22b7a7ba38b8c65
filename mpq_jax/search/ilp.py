"""The paper's search: a small integer program, stated in CVXPY, solved by HiGHS with gap 0 (LIMPQ equation 3).

  minimise    sum_l sum_ij x[l,i,j] (s_a[l,j] + alpha s_w[l,i])
  subject to  sum_ij x[l,i,j] = 1,  sum cost * x <= limit for every budget,  x boolean

A solver can hang and ignore its own time limit, so it runs in a forked child that is ended at the limit; what is known
without a solver (a Lagrangian bound and a greedy policy) is there before it starts.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax import costs
from mpq_jax.search.lagrange import Relaxed, relax, within
from mpq_jax.search.problem import Problem, build, check_reachable, without_dominated
from mpq_jax.types import Budget, Importance, Refusal, Solution

# Objectives are sums of float64 numbers; rounding alone moves them by this much of the largest number, a layer.
ROUNDING = 1e-12
# SciPy leaves HiGHS's absolute tolerances at 1e-6; objectives of this size make them small.
MAGNIFIED = 1e4


class Answer(NamedTuple):
    """What a solver says: picks [L] or None, a lower bound on the objective, whether it proved the picks best, and
    whether it proved that there are none."""

    picks: np.ndarray | None
    bound: float
    proved: bool
    infeasible: bool = False


def solve(
    importance: Importance, budgets: Sequence[Budget], *, alpha: float | None = None, time_limit: float = 60.0
) -> Solution:
    """The policy of least importance within every budget, with a proof, or the best known and its gap.

    alpha: weights' factor; None: the table's own, or 1. time_limit: wall-clock seconds for everything.
    Among equal objectives the policy with fewer bits in all wins.
    Raises Refusal for budgets that no policy keeps, alone or together, and where the time ends before any is found.
    """
    began = time.monotonic()
    full = build(importance, budgets, alpha)
    check_reachable(full, budgets)
    began -= time.monotonic()
    # Only now, so that what can be refused without it is; and here, so that every child finds it loaded. Loading is
    # not part of the time.
    import cvxpy  # noqa: F401

    began += time.monotonic()
    deadline = began + time_limit
    problem = without_dominated(full)
    relaxed = relax(problem, deadline=began + time_limit / 4)
    answer, solver = _by_solvers(problem, deadline)
    if answer.infeasible and relaxed.picks is None:
        raise Refusal(_conflict(problem, budgets, deadline))
    picks, proved = answer.picks, answer.proved
    if picks is None or (relaxed.picks is not None and _better(problem, relaxed.picks, picks)):
        picks, proved, solver = relaxed.picks, False, "lagrange"
    if picks is None:
        raise Refusal(
            f"no policy within the budgets was found in {time_limit:g} s, nor a proof that there is none; "
            "give --time-limit more seconds"
        )
    if proved:
        picks = _fewest_bits(problem, relaxed, picks, deadline)
    objective = _value(problem, picks)
    bound = objective if proved else min(objective, max(relaxed.bound, answer.bound))
    # A bound that meets the objective is a proof, whoever found the policy.
    proved = proved or objective - bound <= _slack(problem)
    policy = {ly.path: ly.bits for ly in importance.layers if ly.bits is not None} | problem.policy(picks)
    ordered = {ly.path: policy[ly.path] for ly in importance.layers}
    return Solution(
        policy=ordered,
        objective=objective,
        bound=objective if proved else bound,
        status="optimal" if proved else "feasible",
        solver=solver,
        seconds=time.monotonic() - began,
        used={budget.name: (costs.used(budget, ordered, importance), budget.limit) for budget in budgets},
    )


def _value(problem: Problem, picks: np.ndarray) -> float:
    return math.fsum(problem.value[picks])


def _slack(problem: Problem) -> float:
    """How far rounding may move an objective: in the unit of the table, whatever that is."""
    return ROUNDING * len(problem.paths) * float(np.abs(problem.value).max())


def _better(problem: Problem, picks: np.ndarray, than: np.ndarray) -> bool:
    """Whether an objective is lower by more than rounding."""
    return _value(problem, picks) < _value(problem, than) - _slack(problem)


# ---- solvers ------------------------------------------------------------------------------------------------------


def _by_solvers(problem: Problem, deadline: float) -> tuple[Answer, str]:
    """HiGHS through CVXPY, then SciPy's own build of it; an answer that breaks a budget is cut off and asked again."""
    last = Answer(None, -math.inf, False)
    for name, function, share in (("highs", _cvxpy_highs, 0.7), ("scipy", _scipy_highs, 0.9)):
        cuts: list[np.ndarray] = []
        while (left := (deadline - time.monotonic()) * share) > 0.05:
            answer = _in_child(function, (problem, tuple(cuts), None), left)
            if answer is None:
                break  # it failed, or was ended at the limit: the next solver
            if answer.picks is not None and not problem.fits(answer.picks):
                # Within the solver's tolerance, but over a budget in exact arithmetic.
                cuts.append(answer.picks)
                continue
            if answer.proved or answer.infeasible:
                return answer, name
            last = answer
            break
    return last, "highs"


def _in_child(function: Callable[..., Answer], arguments: tuple[Any, ...], seconds: float) -> Answer | None:
    """function(*arguments, seconds) in a forked child; None if it fails or is not done in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work():
        # HiGHS prints a banner; the child's standard output is nobody's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            _forget_threads()
            sender.send(function(*arguments, seconds))
        except Exception:
            sender.send(None)

    with warnings.catch_warnings():
        # The child touches nothing that a thread of the parent could hold.
        warnings.simplefilter("ignore")
        child = context.Process(target=work, daemon=True)
        child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()
        receiver.close()


def _forget_threads() -> None:
    """Drops HiGHS's pool of threads: if the parent has used HiGHS, a fork inherits the pool and none of its threads,
    and would wait for them for ever."""
    with contextlib.suppress(ImportError, AttributeError):
        import highspy

        highspy.Highs.resetGlobalScheduler(False)


def _constraints(problem: Problem, cuts: Sequence[np.ndarray]) -> tuple[Any, np.ndarray, Any, np.ndarray]:
    """Sparse A_eq, b_eq (one choice a layer, ties), A_ub, b_ub (budgets, each divided by its limit; cuts)."""
    from scipy import sparse

    choices = len(problem.layer)
    rows = [(problem.layer == row).astype(float) for row in range(len(problem.paths))]
    right = [1.0] * len(rows)
    for group in problem.tied:
        for first, second in itertools.pairwise(group):
            for a in sorted(set(problem.a.tolist())):
                mine = (problem.layer == first) & (problem.a == a)
                other = (problem.layer == second) & (problem.a == a)
                if mine.any() or other.any():
                    rows.append(mine.astype(float) - other)
                    right.append(0.0)
    upper, limits = [], []
    for cost, limit in zip(problem.cost, problem.limit, strict=True):
        upper.append(cost / (abs(limit) or 1.0))
        limits.append(limit / (abs(limit) or 1.0))
    for picks in cuts:
        cut = np.zeros(choices)
        cut[picks] = 1
        upper.append(cut)
        limits.append(len(picks) - 1.0)
    upper_matrix = sparse.csr_array(np.array(upper).reshape(-1, choices))
    return sparse.csr_array(np.array(rows)), np.array(right), upper_matrix, np.array(limits)


def _cvxpy_highs(problem: Problem, cuts, bits_bound: float | None, seconds: float) -> Answer:
    import cvxpy as cp

    x = cp.Variable(len(problem.layer), boolean=True)
    equal, right, upper, limits = _constraints(problem, cuts)
    constraints = [equal @ x == right]
    if len(limits):
        constraints.append(upper @ x <= limits)
    values, scale, offset = _scaled(problem)
    objective = values
    if bits_bound is not None:
        constraints.append(values @ x <= (bits_bound - offset) / scale)
        objective = (problem.w + problem.a).astype(float)
    program = cp.Problem(cp.Minimize(objective @ x), constraints)
    program.solve(
        solver=cp.HIGHS,
        mip_rel_gap=0.0,
        mip_abs_gap=0.0,
        mip_feasibility_tolerance=1e-9,
        primal_feasibility_tolerance=1e-9,
        time_limit=max(0.1, 0.95 * seconds),
    )
    if program.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
        return Answer(None, -math.inf, False, infeasible=True)
    # For an interrupted search HiGHS tells how far its bound has come; CVXPY passes it on as it is.
    dual = getattr(program.solver_stats.extra_stats, "mip_dual_bound", None) if program.solver_stats else None
    bound = -math.inf if dual is None or bits_bound is not None else dual * scale + offset
    if x.value is None:
        return Answer(None, bound, False)
    return Answer(_picks(problem, x.value), bound, program.status == cp.OPTIMAL)


def _scipy_highs(problem: Problem, cuts, bits_bound: float | None, seconds: float) -> Answer:
    from scipy.optimize import Bounds, LinearConstraint, milp

    equal, right, upper, limits = _constraints(problem, cuts)
    constraints = [LinearConstraint(equal, right, right)]
    if len(limits):
        constraints.append(LinearConstraint(upper, -np.inf, limits))
    values, scale, offset = _scaled(problem)
    objective = MAGNIFIED * values
    if bits_bound is not None:
        constraints.append(LinearConstraint(values[None], -np.inf, (bits_bound - offset) / scale))
        objective = (problem.w + problem.a).astype(float)
    found = milp(
        objective,
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"time_limit": max(0.1, 0.95 * seconds), "mip_rel_gap": 0.0},
    )
    if found.status == 2:
        return Answer(None, -math.inf, False, infeasible=True)
    dual = found.mip_dual_bound
    bound = -math.inf if dual is None or bits_bound is not None else dual / MAGNIFIED * scale + offset
    if found.x is None:
        return Answer(None, bound, False)
    return Answer(_picks(problem, found.x), bound, found.status == 0)


def _scaled(problem: Problem) -> tuple[np.ndarray, float, float]:
    """(values, scale, offset), value @ x = scale * values @ x + offset: from 0 to 1, for a solver's absolute tolerances.

    One choice a layer is taken, so each layer's least value can stand apart.
    """
    least = np.array([problem.value[problem.layer == row].min() for row in range(len(problem.paths))])
    above = problem.value - least[problem.layer]
    scale = float(above.max()) or 1.0
    return above / scale, scale, math.fsum(least)


def _picks(problem: Problem, x: np.ndarray) -> np.ndarray:
    rows = (np.flatnonzero(problem.layer == row) for row in range(len(problem.paths)))
    return np.array([mine[np.argmax(x[mine])] for mine in rows])


# ---- ties and conflicts -------------------------------------------------------------------------------------------


def _fewest_bits(problem: Problem, relaxed: Relaxed, picks: np.ndarray, deadline: float) -> np.ndarray:
    """Among policies of the same objective (to rounding), one with the fewest bits in all.

    Only choices that such a policy may have are asked about, mostly one or two in a few layers.
    """
    objective = _value(problem, picks)
    slack = _slack(problem)
    chosen = within(problem, relaxed, objective + slack)
    chosen[picks] = True
    small, back = problem.keep(chosen), np.flatnonzero(chosen)
    if len(small.layer) == len(picks):
        return picks
    answer = _in_child(_cvxpy_highs, (small, (), objective + slack), max(0.1, deadline - time.monotonic()))
    if answer is None or answer.picks is None or not small.fits(answer.picks):
        return picks
    others = back[answer.picks]
    equal = _value(problem, others) <= objective + slack
    fewer = (problem.w + problem.a)[others].sum() < (problem.w + problem.a)[picks].sum()
    return others if equal and fewer else picks


def _conflict(problem: Problem, budgets: Sequence[Budget], deadline: float) -> str:
    """Which two budgets cannot hold together, and what the one leaves of the other at least."""
    known = True
    for m, n in itertools.combinations(range(len(budgets)), 2):
        answer, _ = _by_solvers(problem.only(m, within=n), min(deadline, time.monotonic() + 10))
        known = known and answer.proved
        if not answer.proved or answer.picks is None:
            continue
        lowest = costs.add([budgets[m].fixed, *(problem.cost[m][p].item() for p in answer.picks)])
        if lowest > budgets[m].limit:
            return (
                f"budgets {budgets[m].text} and {budgets[n].text} cannot hold together: within {budgets[n].text} the "
                f"least reachable {budgets[m].name} is {costs.human(lowest, budgets[m].unit)} ({lowest}); "
                "loosen one of them"
            )
    texts = ", ".join(budget.text for budget in budgets)
    though = ", though any two of them can" if known and len(budgets) > 2 else ""
    return f"the budgets {texts} cannot all hold together{though}; loosen one of them"
