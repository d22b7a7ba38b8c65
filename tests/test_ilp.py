"""The integer program against trying every policy, and against SciPy's milp stated anew; limits, ties, refusals."""

import math
import re
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from tables import best_by_force, budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Importance, Refusal
from mpq_jax.importance import combined, total
from mpq_jax.search import best_uniform, ilp, lagrange, random_policies, solve
from mpq_jax.search.problem import build, least, without_dominated

CASES = {
    "one budget": ({}, ("bitops=W3A3",)),
    "two budgets": ({}, ("bitops=W3A3", "size=W3")),
    "tied": ({"tied": True}, ("bitops=W3A3",)),
    "tied, two budgets": ({"tied": True}, ("bitops=W3A4", "size=11x")),
    "pair": ({"pair": True}, ("bitops=W3A3",)),
    "pair, tied": ({"pair": True, "tied": True}, ("size=W3", "bitops=W3A3")),
    "narrowed": ({"narrowed": True}, ("bitops=W3A3",)),
    "narrowed, tied": ({"narrowed": True, "tied": True}, ("bitops=W3A3", "size=W3")),
    "other activation widths": ({"activation_widths": (2, 4, 8)}, ("bitops=W3A4",)),
    "loose": ({}, ("bitops=W8A8",)),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_brute_force(case):
    options, texts = CASES[case]
    for seed in range(2):
        importance = made(seed, **options)
        budgets = budgets_of(importance, *texts)
        found = solve(importance, budgets)
        best, _ = best_by_force(importance, budgets)
        assert found.status == "optimal" and found.bound == found.objective
        assert found.objective == pytest.approx(best, abs=1e-9)
        assert found.objective == pytest.approx(total(importance, found.policy), abs=1e-12)
        for budget in budgets:
            used, limit = found.used[budget.name]
            assert used == cost_by_hand(importance, found.policy, budget.name) <= limit == budget.limit
        assert found.policy in list(every_policy(importance))


def test_alpha_weighs_the_weights():
    importance = made(3)
    budgets = budgets_of(importance, "bitops=W3A3")
    for alpha in (0.01, 1.0, 50.0):
        found = solve(importance, budgets, alpha=alpha)
        assert found.objective == pytest.approx(best_by_force(importance, budgets, alpha)[0], abs=1e-9)


def test_equals_scipy_on_a_large_table():
    """52 layers x 25 choices, two budgets: the program stated anew for scipy.optimize.milp."""
    importance = made(5, layers=52, widths=(2, 3, 4, 5, 6))
    budgets = budgets_of(importance, "bitops=W3A4", "size=9x")
    found = solve(importance, budgets)
    table = combined(importance)
    one = np.kron(np.eye(52), np.ones(25))
    constraints = [LinearConstraint(one, 1, 1)]
    constraints += [LinearConstraint(b.table.reshape(1, -1) / b.limit, -np.inf, 1 - b.fixed / b.limit) for b in budgets]
    options = {"mip_rel_gap": 0.0}
    peer = milp(table.ravel(), constraints=constraints, integrality=1, bounds=Bounds(0, 1), options=options)
    assert found.status == "optimal" and found.objective == pytest.approx(peer.fun, abs=1e-7)
    assert all(used <= limit for used, limit in found.used.values())


def test_lagrangian_bound_and_incumbent():
    """Never above the best of all policies; what it offers fits; repair always ends, with three budgets too."""
    for seed in range(30):
        importance = made(seed, layers=3, tied=seed % 2 == 0)
        names = ("bitops=W3A3", "size=W3") if seed % 3 else ("size=12x", "bitops=W2A3")
        budgets = budgets_of(importance, *names)
        extra = budgets[0]._replace(name="other", table=budgets[0].table[:, ::-1, ::-1].copy(), limit=10**9)
        relaxed = lagrange.relax(build(importance, [*budgets, extra], None), rounds=60)
        best, _ = best_by_force(importance, budgets)
        if best is not None:
            assert relaxed.bound <= best + 1e-9
        if relaxed.picks is not None:
            problem = build(importance, budgets, None)
            assert problem.fits(relaxed.picks) and problem.value[relaxed.picks].sum() >= best - 1e-9


def test_dropping_dominated_choices_keeps_the_optimum():
    for seed in range(8):
        importance = made(seed, pair=True, tied=seed % 2 == 0)
        budgets = budgets_of(importance, "bitops=W3A3")
        problem = build(importance, budgets, None)
        small = without_dominated(problem)
        best, winners = best_by_force(importance, budgets)
        assert len(small.layer) < len(problem.layer)
        kept = {(small.paths[r], w, a) for r, w, a in zip(small.layer, small.w, small.a, strict=True)}
        assert any(all((p, *policy[p]) in kept for p in small.paths) for policy in winners), (seed, best)


def test_ties_go_to_fewer_bits_every_time():
    """Widths that harm alike: the narrowest; the same constant in every layer: the same answer each time."""
    importance = made(1)
    flat = importance._replace(weight=np.ones((4, 3)), activation=np.ones((4, 3)))
    found = solve(flat, budgets_of(flat, "bitops=W4A4"))
    assert all(found.policy[f"layer{i}"] == (2, 2) for i in range(4))
    constant = importance._replace(weight=np.tile([0.4, 0.2, 0.1], (4, 1)), activation=np.tile([0.4, 0.2, 0.1], (4, 1)))
    budgets = budgets_of(constant, "bitops=W3A3")
    answers = [solve(constant, budgets).policy for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    best, winners = best_by_force(constant, budgets)
    bits = [sum(b.w + b.a for b in policy.values()) for policy in winners]
    assert total(constant, answers[0]) == pytest.approx(best)
    assert sum(b.w + b.a for b in answers[0].values()) == min(bits)


# ---- solvers that misbehave ---------------------------------------------------------------------------------------


def hang(*_):
    time.sleep(60)


def fail(*_):
    raise RuntimeError("no")


@pytest.mark.parametrize("broken", [hang, fail])
def test_a_broken_solver_is_replaced(monkeypatch, broken):
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    monkeypatch.setattr(ilp, "_cvxpy_highs", broken)
    began = time.monotonic()
    found = solve(importance, budgets, time_limit=4.0)
    assert time.monotonic() - began < 6
    assert found.solver == "scipy" and found.status == "optimal"
    assert found.objective == pytest.approx(best_by_force(importance, budgets)[0], abs=1e-9)


def test_no_solver_at_all_is_never_called_optimal(monkeypatch):
    importance = made(2, layers=5)
    budgets = budgets_of(importance, "bitops=W3A3")
    for name in ("_cvxpy_highs", "_scipy_highs"):
        monkeypatch.setattr(ilp, name, hang)
    began = time.monotonic()
    found = solve(importance, budgets, time_limit=2.0)
    assert time.monotonic() - began < 4 and found.solver == "lagrange"
    best, _ = best_by_force(importance, budgets)
    assert found.bound <= best + 1e-9 <= found.objective + 2e-9
    assert found.status == "feasible" or found.objective == pytest.approx(best, abs=1e-9)
    assert found.used["bitops"][0] <= found.used["bitops"][1]


def test_an_overshooting_answer_is_cut_off(monkeypatch):
    """A solver that first says the widest policy, over the budget, is asked again without it."""
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    real = ilp._cvxpy_highs

    def overshoots(problem, cuts, bits_bound, seconds):
        if not cuts:
            rows = [np.flatnonzero(problem.layer == row) for row in range(len(problem.paths))]
            return ilp.Answer(np.array([mine[np.argmax(problem.cost[0][mine])] for mine in rows]), -math.inf, True)
        return real(problem, cuts, bits_bound, seconds)

    monkeypatch.setattr(ilp, "_cvxpy_highs", overshoots)
    found = solve(importance, budgets)
    assert found.objective == pytest.approx(best_by_force(importance, budgets)[0], abs=1e-9)
    assert found.used["bitops"][0] <= found.used["bitops"][1]


# ---- budgets that cannot be kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"narrowed": True, "tied": True}])
def test_least_reachable(options):
    importance = made(4, **options)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    problem = build(importance, budgets, None)
    for m, budget in enumerate(budgets):
        expected = min(cost_by_hand(importance, policy, budget.name) for policy in every_policy(importance))
        assert least(problem, m) + budget.fixed == expected
    tight = budgets[0]._replace(limit=1000, text="bitops=1K")
    lowest = min(cost_by_hand(importance, policy, "bitops") for policy in every_policy(importance))
    with pytest.raises(Refusal, match=f"bitops=1K.*{lowest}"):
        solve(importance, [tight])


def test_two_budgets_that_conflict_are_both_named():
    """A second cost that falls when bits rise: each budget can be kept, not both."""
    importance = made(6)
    (bitops,) = budgets_of(importance, "bitops=W2A2")
    other = bitops._replace(name="size", text="size=made", table=bitops.table[:, ::-1, ::-1].copy(), unit="bytes")
    least_other = other.table.min(axis=(1, 2)).sum() + other.fixed
    other = other._replace(limit=int(least_other * 1.2))
    with pytest.raises(Refusal) as refusal:
        solve(importance, [bitops, other])
    assert re.search("bitops=W2A2.*size=made|size=made.*bitops=W2A2", str(refusal.value))
    assert "cannot hold together" in str(refusal.value)


# ---- beside the answer --------------------------------------------------------------------------------------------


def test_best_uniform():
    importance = made(7)
    budgets = budgets_of(importance, "bitops=W3A3")
    name, policy = best_uniform(importance, budgets)
    values = {}
    for w in importance.bit_widths:
        for a in importance.activation_bit_widths:
            each = {ly.path: ly.bits or type(policy["first"])(w, a) for ly in importance.layers}
            if cost_by_hand(importance, each, "bitops") <= budgets[0].limit:
                values[f"W{w}A{a}"] = total(importance, each)
    assert name == min(values, key=values.get) and total(importance, policy) == pytest.approx(values[name])
    assert best_uniform(importance, [budgets[0]._replace(limit=1)]) is None


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"narrowed": True, "tied": True}])
def test_random_policies(options):
    """Allowed, within the budgets, at least 98 % of the first, reproducible, and different from each other."""
    importance = made(8, layers=12, widths=(2, 3, 4, 5, 6), **options)
    budgets = budgets_of(importance, "bitops=W3A4", "size=W4")
    found = random_policies(importance, budgets, 10, seed=1)
    assert len(found) == 10 and found == random_policies(importance, budgets, 10, seed=1)
    assert len({tuple(sorted(policy.items())) for policy in found}) == 10
    for policy in found:
        assert 0.98 * budgets[0].limit <= cost_by_hand(importance, policy, "bitops") <= budgets[0].limit
        assert cost_by_hand(importance, policy, "size") <= budgets[1].limit
        if "tied" in options:
            assert policy["layer0"].a == policy["layer1"].a
        if "narrowed" in options:
            assert policy["layer1"].w >= 3 and policy["layer1"].a <= 3


def test_result_is_plain_data():
    found = solve(made(0), budgets_of(made(0), "bitops=W3A3"))
    assert isinstance(made(0), Importance) and all(type(b.w) is int for b in found.policy.values())
