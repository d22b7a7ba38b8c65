"""HiGHS, through CVXPY and in SciPy's own build, each in a forked child that is ended at the limit.

A solver can hang and ignore its own time limit, so the limit is kept from outside.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.search.problem import Problem, Term

# SciPy leaves HiGHS's absolute tolerances at 1e-6; objectives of this size make them small.
MAGNIFIED = 1e4


class Answer(NamedTuple):
    """What a solver says: picks [L] or None, a lower bound on the objective, whether it proved the picks best, and
    whether it proved that there are none."""

    picks: np.ndarray | None
    bound: float
    proved: bool
    infeasible: bool = False


def highs(problem: Problem, cuts: Sequence[np.ndarray], seconds: float) -> Answer:
    """HiGHS by CVXPY, gap 0 (LIMPQ equation 3): minimise value @ x over boolean x, one choice a row.

    Terms are linearised exactly: z[i, j] >= 0 says that rows a and b are at levels i and j; its sums over j and over i
    are what x says of a and of b, so with x boolean z is boolean too (Glover and Woolsey 1974).
    """
    return _highs(problem, cuts, seconds, presolve=True)


def highs_without_presolve(problem: Problem, cuts: Sequence[np.ndarray], seconds: float) -> Answer:
    """The same, past what presolve may trip over."""
    return _highs(problem, cuts, seconds, presolve=False)


def _highs(problem: Problem, cuts: Sequence[np.ndarray], seconds: float, presolve: bool) -> Answer:
    import cvxpy as cp

    flat = _flat(problem, cuts)
    x = cp.Variable(len(flat.row), boolean=True)
    both: Any = x
    objective = flat.values[: len(flat.row)] @ x
    if together := len(flat.values) - len(flat.row):
        z = cp.Variable(together, nonneg=True)
        both = cp.hstack([x, z])
        objective = objective + flat.values[len(flat.row) :] @ z
    constraints = [flat.equal @ both == flat.right]
    if len(flat.limits):
        constraints.append(flat.upper @ x <= flat.limits)
    program = cp.Problem(cp.Minimize(objective), constraints)
    program.solve(
        solver=cp.HIGHS,
        mip_rel_gap=0.0,
        mip_abs_gap=0.0,
        mip_feasibility_tolerance=1e-9,
        primal_feasibility_tolerance=1e-9,
        time_limit=max(0.1, 0.95 * seconds),
        **({} if presolve else {"presolve": "off"}),
    )
    if program.status in (cp.INFEASIBLE, cp.INFEASIBLE_INACCURATE):
        return Answer(None, -math.inf, False, infeasible=True)
    # For an interrupted search HiGHS tells how far its bound has come; CVXPY passes it on as it is.
    dual = getattr(program.solver_stats.extra_stats, "mip_dual_bound", None) if program.solver_stats else None
    bound = -math.inf if dual is None else dual * flat.scale + flat.offset
    if x.value is None:
        return Answer(None, bound, False)
    return Answer(_picks(problem, flat, x.value), bound, program.status == cp.OPTIMAL)


def scipy_highs(problem: Problem, cuts: Sequence[np.ndarray], seconds: float) -> Answer:
    """The same program in SciPy's own build of HiGHS."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = _flat(problem, cuts)
    constraints = [LinearConstraint(flat.equal, flat.right, flat.right)]
    count = len(flat.row)
    if len(flat.limits):
        from scipy import sparse

        upper = sparse.hstack([flat.upper, sparse.csr_array((len(flat.limits), len(flat.values) - count))])
        constraints.append(LinearConstraint(sparse.csr_array(upper), -np.inf, flat.limits))
    found = milp(
        MAGNIFIED * flat.values,
        constraints=constraints,
        integrality=(np.arange(len(flat.values)) < count).astype(int),
        bounds=Bounds(0, 1),
        options={"time_limit": max(0.1, 0.95 * seconds), "mip_rel_gap": 0.0},
    )
    if found.status == 2:
        return Answer(None, -math.inf, False, infeasible=True)
    dual = found.mip_dual_bound
    bound = -math.inf if dual is None else dual / MAGNIFIED * flat.scale + flat.offset
    if found.x is None:
        return Answer(None, bound, False)
    return Answer(_picks(problem, flat, found.x[:count]), bound, found.status == 0)


# ---- the program --------------------------------------------------------------------------------------------------


class _Flat(NamedTuple):
    """The allowed choices as one vector x, row and column of each, then what terms need, z:
    equal @ [x, z] == right, upper @ x <= limits.

    values from 0 to 1, for a solver's absolute tolerances: objective = scale * values @ [x, z] + offset.
    """

    row: np.ndarray
    column: np.ndarray
    values: np.ndarray
    scale: float
    offset: float
    equal: Any
    right: np.ndarray
    upper: Any
    limits: np.ndarray


def _flat(problem: Problem, cuts: Sequence[np.ndarray]) -> _Flat:
    from scipy import sparse

    row, column = np.nonzero(problem.allowed)
    count, layers = len(row), len(problem.paths)
    least = problem.value.min(1)
    above, offset = [problem.value[row, column] - least[row]], [*least]
    blocks: list[Any] = [sparse.csr_array((np.ones(count), (row, np.arange(count))), shape=(layers, count))]
    right = [np.ones(layers)]
    if ties := _ties(problem, row, column):
        blocks.append(sparse.csr_array(np.array(ties)))
        right.append(np.zeros(len(ties)))
    for number, term in enumerate(problem.terms):
        on_x, on_z, table = _linearised(problem, term, row, column)
        least_of = table.min()
        above.append((table - least_of).ravel())
        offset.append(least_of)
        # Columns of the terms before stay empty here.
        before = sum(len(values) for values in above[1 : number + 1])
        blocks.append(sparse.hstack([on_x, sparse.csr_array((on_z.shape[0], before)), on_z]))
        right.append(np.zeros(on_z.shape[0]))
    values = np.concatenate(above)
    scale = float(values.max()) or 1.0
    wide = [sparse.hstack([b, sparse.csr_array((b.shape[0], len(values) - b.shape[1]))]) for b in blocks]
    upper, limits = _limits(problem, cuts, row, column)
    return _Flat(
        row=row,
        column=column,
        values=values / scale,
        scale=scale,
        offset=math.fsum(offset),
        equal=sparse.csr_array(sparse.vstack(wide)),
        right=np.concatenate(right),
        upper=sparse.csr_array(np.array(upper).reshape(-1, count)),
        limits=np.array(limits),
    )


def _ties(problem: Problem, row: np.ndarray, column: np.ndarray) -> list[np.ndarray]:
    """Rows of  equal @ x == 0  that give tied rows the same activation bits."""
    activation, ties = problem.a[column], []
    for group in problem.tied:
        for first, second in itertools.pairwise(group):
            for a in sorted(set(activation[(row == first) | (row == second)].tolist())):
                here = activation == a
                ties.append(((row == first) & here).astype(float) - ((row == second) & here))
    return ties


def _linearised(problem: Problem, term: Term, row: np.ndarray, column: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """(on x, on z, table [I, J] of the levels that are left): on_x @ x + on_z @ z == 0 binds z [I * J] to x."""
    from scipy import sparse

    open_a = np.unique(term.level_a[problem.allowed[term.a]])
    open_b = np.unique(term.level_b[problem.allowed[term.b]])
    on_x = [-((row == term.a) & (term.level_a[column] == i)).astype(float) for i in open_a]
    on_x += [-((row == term.b) & (term.level_b[column] == j)).astype(float) for j in open_b]
    i, j = len(open_a), len(open_b)
    on_z = np.concatenate([np.kron(np.eye(i), np.ones(j)), np.kron(np.ones(i), np.eye(j))])
    return sparse.csr_array(np.array(on_x)), sparse.csr_array(on_z), term.table[np.ix_(open_a, open_b)]


def _limits(
    problem: Problem, cuts: Sequence[np.ndarray], row: np.ndarray, column: np.ndarray
) -> tuple[list[np.ndarray], list[float]]:
    """Rows and limits of  upper @ x <= limits: the budgets, and policies that were cut off."""
    upper, limits = [], []
    for cost, limit in zip(problem.cost, problem.limit, strict=True):
        # Above each row's least: the numbers that the budget decides by, not large ones that they stand on.
        lowest = np.where(problem.allowed, cost, cost.max()).min(1)
        room = float(limit - lowest.sum())
        upper.append((cost - lowest[:, None])[row, column] / (abs(room) or 1.0))
        limits.append(room / (abs(room) or 1.0))
    for picks in cuts:
        upper.append((picks[row] == column).astype(float))
        limits.append(len(problem.paths) - 1.0)
    return upper, limits


def _picks(problem: Problem, flat: _Flat, x: np.ndarray) -> np.ndarray:
    chosen = np.full(problem.value.shape, -1.0)
    chosen[flat.row, flat.column] = x
    return chosen.argmax(1)


# ---- the child ----------------------------------------------------------------------------------------------------


def in_child(function: Callable[..., Answer], arguments: tuple[Any, ...], seconds: float) -> Answer | None:
    """function(*arguments, seconds) in a forked child; None if it fails or is not done in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        # Ends it whatever HiGHS does, and though the parent was killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(seconds) + 5)
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
