"""The paper's search: a small integer program, solved to proven optimality (LIMPQ equation 3).

  minimise    sum_l sum_ij x[l,i,j] (s_a[l,j] + alpha s_w[l,i])
  subject to  sum_ij x[l,i,j] = 1,  sum cost * x <= limit for every budget,  x boolean

Three steps, each for what the one before has left: the Lagrangian dual drops most choices by their reduced costs;
branch and bound on the same bound walks the rest, which for one budget is nearly always the end; HiGHS, stated in
CVXPY, takes what is larger, in a child that is ended at the limit.
"""

import itertools
import math
import time
from collections.abc import Sequence

import numpy as np

from mpq_jax import costs
from mpq_jax.search.branch import branch
from mpq_jax.search.dual import Dual, maximise
from mpq_jax.search.greedy import incumbent, polish
from mpq_jax.search.problem import Problem, build, check_reachable, within_room, without_dominated
from mpq_jax.search.solvers import Answer, highs, highs_without_presolve, in_child, scipy_highs
from mpq_jax.types import Budget, Importance, Refusal, Solution

# Objectives are sums of float64 numbers; rounding alone moves them by this much of the largest number, a layer.
ROUNDING = 1e-12
# Partial policies that branch and bound looks at before the solvers get their turn: a few tenths of a second.
NODES = 4_000_000
BEAM_NODES = 400_000
# (name, function, its share of the time that is left), in turn.
SOLVERS = (
    ("highs", highs, 0.6),
    ("highs without presolve", highs_without_presolve, 0.4),
    ("scipy", scipy_highs, 0.6),
)


class Progress:
    """What is known of a problem so far: a lower bound, the best policy, whether it is proven best, and by whom."""

    def __init__(self, problem: Problem, dual: Dual):
        self.problem, self.dual = problem, dual
        self.bound = dual.bound
        self.picks: np.ndarray | None = None
        self.objective = math.inf
        self.proved = False
        self.infeasible = False  # proven: no policy keeps all budgets
        self.solver = "lagrange"
        self.fewest = False  # whether the picks have the fewest bits of all of their objective
        largest = [np.abs(problem.value[problem.allowed]).max(), *(np.abs(term.table).max() for term in problem.terms)]
        self.slack = ROUNDING * (len(problem.paths) + len(problem.terms)) * float(max(largest))

    def offer(self, picks: np.ndarray | None, solver: str) -> None:
        """Takes a policy that fits if it is better, by more than rounding, than the best so far."""
        if picks is not None and self.problem.fits(picks):
            objective = value_of(self.problem, picks)
            if self.picks is None or objective < self.objective - self.slack:
                self.picks, self.objective, self.solver = picks, objective, solver

    @property
    def gap(self) -> float:
        """How far the best policy lies above the dual bound."""
        return self.objective - self.dual.bound


def solve(
    importance: Importance,
    budgets: Sequence[Budget],
    *,
    alpha: float | None = None,
    time_limit: float = 60.0,
    nodes: int = NODES,
) -> Solution:
    """The policy of least importance within every budget, with a proof, or the best known and its gap.

    alpha: weights' factor; None: the table's own, or 1. time_limit: wall-clock seconds for everything.
    nodes: partial policies that branch and bound looks at before HiGHS is asked; 0 asks it at once.
    Among equal objectives the policy with fewer bits in all wins (where there are no interactions).
    The table is searched as it is. `search.py` and the end of joint training first call `mpq_jax.repair`, so that no layer
    gets fewer bits because they are said to harm less.
    Raises Refusal for budgets that no policy keeps, alone or together, and where the time ends before any is found.
    """
    began = time.monotonic()
    full = build(importance, budgets, alpha)
    check_reachable(full, budgets)
    if not full.paths:
        raise Refusal("no layer is searched, so there is nothing to choose; free some with rules or quantize.ends")
    progress = solve_problem(full, began, time_limit, nodes)
    if isinstance(progress, Answer):
        raise Refusal(_conflict(full, [b for b in budgets if not b.largest], began + time_limit))
    if progress.picks is None:
        raise Refusal(
            f"no policy within the budgets was found in {time_limit:g} s, nor a proof that there is none; "
            "give --time-limit more seconds"
        )
    return solution(importance, budgets, progress, time.monotonic() - began)


def solution(importance: Importance, budgets: Sequence[Budget], progress: Progress, seconds: float) -> Solution:
    """What was found, as policy and certificate; every budget is added up again from the policy."""
    assert progress.picks is not None
    policy = {ly.path: ly.bits for ly in importance.layers if ly.bits is not None}
    policy |= progress.problem.policy(progress.picks)
    ordered = {ly.path: policy[ly.path] for ly in importance.layers}
    used = {budget.name: costs.used(budget, ordered, importance) for budget in budgets}
    assert all(used[budget.name] <= budget.limit for budget in budgets), "a policy over its budget"
    return Solution(
        policy=ordered,
        objective=progress.objective,
        bound=progress.objective if progress.proved else min(progress.objective, progress.bound),
        status="optimal" if progress.proved else "feasible",
        solver=progress.solver,
        seconds=seconds,
        used={b.name: (costs.shown(b, used[b.name]), costs.shown(b, b.limit)) for b in budgets},
    )


def solve_problem(
    full: Problem,
    began: float,
    time_limit: float,
    nodes: int = NODES,
    prices: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> Progress | Answer:
    """Solves a problem; an Answer stands for a proof that no policy keeps all budgets.

    prices: a unit of cost [M], of a similar problem's dual, to start from. start: picks [L] that may fit.
    """
    deadline = began + time_limit
    problem = within_room(full)
    if not problem.allowed.any(1).all():
        return Answer(None, -math.inf, False, infeasible=True)
    problem = without_dominated(problem)
    alone = problem.lowered()
    dual = maximise(alone, prices)
    progress = Progress(problem, dual)
    if start is not None and problem.allowed[np.arange(len(start)), start].all():
        progress.offer(start, "lagrange")
    if progress.picks is None:
        progress.offer(incumbent(alone, dual), "lagrange")
    if problem.terms and progress.picks is not None:
        progress.offer(polish(problem, progress.picks), "lagrange")
    # Branch and bound adds rows up one by one: it has nothing for what two rows do together.
    additive = not problem.terms
    if nodes and additive:
        _widen(progress, nodes, deadline)
    if progress.infeasible:
        return Answer(None, -math.inf, False, infeasible=True)
    if not progress.proved:
        answer = _by_solvers(progress, deadline)
        if answer.infeasible and progress.picks is None:
            return answer
    if not progress.proved and progress.picks is not None and additive and time.monotonic() < deadline:
        _last_resort(progress, deadline)
    # A bound that meets the objective is a proof, whoever found the policy.
    progress.proved |= progress.objective - progress.bound <= progress.slack
    if progress.proved and additive and not progress.fewest:
        _fewest_bits(progress, deadline)
    return progress


def value_of(problem: Problem, picks: np.ndarray) -> float:
    """The objective of picks, rounded once."""
    alone = problem.value[np.arange(len(picks)), picks].tolist()
    return math.fsum([*alone, *(t.table[t.level_a[picks[t.a]], t.level_b[picks[t.b]]] for t in problem.terms)])


# ---- branch and bound ---------------------------------------------------------------------------------------------


def _widen(progress: Progress, nodes: int, deadline: float) -> None:
    """Looks at all policies within a small gap of the bound, then a larger one, until one fits: it is the best.

    How many partial policies there are grows like a power of the gap: each gap is chosen for four times as many.
    """
    problem, dual = progress.problem, progress.dual
    # No policy at all lies further above the bound.
    highest = float(np.where(problem.allowed, problem.value, -np.inf).max(1).sum()) - dual.bound + progress.slack
    scale = min(progress.gap, highest)
    gap, factor, power, before = max(scale / 32, dual.rounding), 4.0, 6.0, 0
    while nodes > 0:
        gap = min(gap, progress.gap + progress.slack, highest)
        found = branch(problem, dual, gap, nodes=nodes, deadline=deadline)
        nodes -= found.nodes + 1000
        progress.offer(found.picks, "branch and bound")
        # With several budgets it looks at all equals; with one it drops them early.
        progress.fewest = len(problem.cost) > 1 and found.picks is not None and progress.picks is found.picks
        if found.done:
            progress.bound = max(progress.bound, min(dual.bound + gap, progress.objective))
            if found.picks is not None or gap >= progress.gap:
                progress.proved, progress.solver = True, "branch and bound"
                return
            if gap >= highest:
                progress.infeasible = True
                return
        if found.nodes > 100:
            if before:
                power = max(2.0, math.log(found.nodes / before) / math.log(factor)) if found.nodes > before else 2.0
            factor = max(4.0, 20_000 / found.nodes) ** (1 / power)
            before = found.nodes
        gap *= factor
    # Too many to look at: the most promising ones make a better policy, and fewer choices for the solver.
    if math.isfinite(progress.gap):
        found = branch(problem, dual, progress.gap, nodes=BEAM_NODES, deadline=deadline, beam=1000)
        progress.offer(found.picks, "branch and bound")


def _last_resort(progress: Progress, deadline: float) -> None:
    """Branch and bound until the time ends, when no solver came to an end."""
    found = branch(progress.problem, progress.dual, progress.gap + progress.slack, nodes=10**12, deadline=deadline)
    progress.offer(found.picks, "branch and bound")
    if found.done:
        progress.proved, progress.solver = True, "branch and bound"


def _fewest_bits(progress: Progress, deadline: float) -> None:
    """Among policies of the same objective (to rounding), one with the fewest bits in all."""
    problem = progress.problem
    assert progress.picks is not None
    rows = np.arange(len(progress.picks))
    gap = progress.gap + progress.slack
    found = branch(problem, progress.dual, gap, nodes=BEAM_NODES, deadline=deadline, fewest_bits=True)
    if found.picks is None or not problem.fits(found.picks):
        return
    bits = problem.bits
    fewer = bits[rows, found.picks].sum() < bits[rows, progress.picks].sum()
    if fewer and value_of(problem, found.picks) <= progress.objective + progress.slack:
        progress.picks, progress.objective = found.picks, value_of(problem, found.picks)


# ---- solvers ------------------------------------------------------------------------------------------------------


def _by_solvers(progress: Progress, deadline: float) -> Answer:
    """HiGHS on what reduced costs leave; an answer that breaks a budget is cut off and asked again.

    That there is no policy at all is believed when two solvers say it.
    """
    problem, impossible = progress.problem, 0
    if math.isfinite(progress.gap):
        # Whatever is better than the best so far has none of the other choices.
        problem = problem.keep(progress.dual.reduced <= progress.gap + progress.slack + progress.dual.rounding)
    # Here, so that every child finds it loaded.
    import cvxpy  # noqa: F401

    for name, function, share in SOLVERS:
        cuts: list[np.ndarray] = []
        while (left := (deadline - time.monotonic()) * share) > 0.05:
            answer = in_child(function, (problem, tuple(cuts)), left)
            if answer is None:
                break  # it failed, or was ended at the limit: the next solver
            if answer.picks is not None and not problem.fits(answer.picks):
                # Within the solver's tolerance, but over a budget in exact arithmetic.
                cuts.append(answer.picks)
                continue
            progress.offer(answer.picks, name)
            if answer.proved:
                progress.proved, progress.solver = True, name
                return answer
            if answer.infeasible:
                impossible += 1
                if impossible == 2 and progress.picks is None:
                    return answer
                break
            # Cuts only took away policies over a budget: the bound holds for all others.
            progress.bound = max(progress.bound, min(answer.bound, progress.objective))
            break
    return Answer(None, -math.inf, False)


def _conflict(problem: Problem, budgets: Sequence[Budget], deadline: float) -> str:
    """Which two budgets cannot hold together, and what the one leaves of the other at least."""
    known = True
    for m, n in itertools.combinations(range(len(budgets)), 2):
        began = time.monotonic()
        found = solve_problem(problem.only(m, within=n), began, min(10.0, max(0.5, deadline - began)))
        proved = isinstance(found, Progress) and found.proved
        known = known and proved
        if isinstance(found, Answer) or found.picks is None or not proved:
            continue
        rows = np.arange(len(found.picks))
        lowest = costs.add([budgets[m].fixed, *problem.cost[m][rows, found.picks].tolist()])
        if lowest > budgets[m].limit:
            least = costs.shown(budgets[m], lowest)
            return (
                f"budgets {budgets[m].text} and {budgets[n].text} cannot hold together: within {budgets[n].text} the "
                f"least reachable {budgets[m].name} is {costs.human(least, budgets[m].unit)} ({least}); "
                "loosen one of them"
            )
    texts = ", ".join(budget.text for budget in budgets)
    though = ", though any two of them can" if known and len(budgets) > 2 else ""
    return f"the budgets {texts} cannot all hold together{though}; loosen one of them"
