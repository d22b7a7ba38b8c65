"""The integer program against trying every policy, and against SciPy's milp stated anew; limits, ties, refusals."""

import itertools
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


def conflicting(seed, layers=5):
    """A problem with three budgets that pull different ways: wide is cheap in one and dear in another."""
    importance = made(seed, layers=layers, tied=seed % 2 == 0, pair=seed % 3 == 0)
    (budget,) = budgets_of(importance, "bitops=W3A3")
    rng = np.random.default_rng(seed)
    turned = [budget.table, budget.table[:, ::-1, ::-1], rng.integers(1, 10**6, budget.table.shape)]
    tables = [table.copy() for table in turned[: 2 + seed % 2]]
    limits = [int(rng.uniform(0.9, 1.3) * table.mean((1, 2)).sum()) + budget.fixed for table in tables]
    budgets = [
        budget._replace(name=f"b{m}", text=f"b{m}", table=table, limit=limit)
        for m, (table, limit) in enumerate(zip(tables, limits, strict=True))
    ]
    return build(importance, budgets, None)


def test_repair_always_ends_within_the_budgets():
    """From any start, with two and three budgets in conflict: None, or picks that fit, one a layer, ties kept."""
    ended = {True: 0, False: 0}
    for seed in range(150):
        problem = conflicting(seed)
        rng = np.random.default_rng(seed)
        start = lagrange.cheapest(problem, rng.random(len(problem.value)))
        picks = lagrange.repair(problem, start)
        ended[picks is None] += 1
        if picks is not None:
            assert problem.fits(picks) and problem.layer[picks].tolist() == list(range(len(problem.paths)))
            assert all(len(set(problem.a[picks[list(group)]].tolist())) == 1 for group in problem.tied)
    assert min(ended.values()) > 5


def test_reduced_costs_keep_every_policy_below_the_ceiling():
    """What is dropped is in no policy that fits and is that good; most choices are dropped."""
    kept = 0.0
    for seed in range(12):
        importance = made(seed, tied=seed % 2 == 0)
        budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
        problem = build(importance, budgets, None)
        relaxed = lagrange.relax(problem)
        best, _ = best_by_force(importance, budgets)
        chosen = lagrange.within(problem, relaxed, best + 0.05)
        left = {
            (problem.paths[r], w, a)
            for r, w, a in zip(problem.layer[chosen], problem.w[chosen], problem.a[chosen], strict=True)
        }
        for policy in every_policy(importance):
            fits = all(cost_by_hand(importance, policy, b.name) <= b.limit for b in budgets)
            if fits and total(importance, policy) <= best + 0.05:
                assert all((path, *policy[path]) in left for path in problem.paths)
        kept += chosen.mean() / 12
    assert kept < 0.8


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


def test_ties_of_sums_go_to_fewer_bits_too():
    """One layer's difference equals the sum of two others': no pair of layers trades places, three do."""
    importance = made(1, layers=3, widths=(2, 3), activation_widths=(8,), alpha=1.0)
    layers = [ly._replace(params=100 * k) for ly, k in zip(importance.layers, (0, 3, 1, 2, 0), strict=True)]
    weight = np.array([[3.0, 0], [1.0, 0], [2.0, 0]])
    importance = importance._replace(layers=tuple(layers), weight=weight, activation=np.zeros((3, 1)))
    budgets = [b._replace(limit=b.fixed + 2 * 75 + 38) for b in budgets_of(importance, "size=W2")]
    best, winners = best_by_force(importance, budgets)
    bits = [sum(b.w for b in policy.values()) for policy in winners]
    assert len(set(bits)) == 2
    for _ in range(2):
        found = solve(importance, budgets)
        assert found.objective == best and sum(b.w for b in found.policy.values()) == min(bits)


def test_a_dearer_narrow_choice_still_wins_ties():
    """Where fewer bits are slower, as some latency tables have it, equal harm still goes to fewer bits."""
    importance = made(1)
    flat = importance._replace(weight=np.ones((4, 3)), activation=np.ones((4, 3)))
    (budget,) = budgets_of(flat, "bitops=W8A8")
    found = solve(flat, [budget._replace(table=budget.table[:, ::-1, ::-1].copy())])
    assert all(found.policy[f"layer{i}"] == (2, 2) for i in range(4))


@pytest.mark.parametrize("scale, offset", [(1e-12, 0.0), (1e9, 0.0), (1.0, 1e6), (0.0, 0.0), (-1.0, 0.0)])
@pytest.mark.parametrize("broken", [(), ("_cvxpy_highs",)])
def test_any_unit_and_offset(monkeypatch, scale, offset, broken):
    """Tables in any unit, far from zero, constant or negative: the same proof, by either solver."""
    for name in broken:
        monkeypatch.setattr(ilp, name, fail)
    importance = made(4, pair=True)
    importance = importance._replace(pair=importance.pair * scale + offset)
    budgets = budgets_of(importance, "bitops=W3A3")
    found = solve(importance, budgets)
    fitting = (p for p in every_policy(importance) if cost_by_hand(importance, p, "bitops") <= budgets[0].limit)
    best = min(total(importance, policy) for policy in fitting)
    assert found.status == "optimal" and found.objective == pytest.approx(best, rel=1e-12, abs=0)


def test_numbers_too_large_to_add_are_refused():
    importance = made(1)
    with pytest.raises(Refusal, match="1e280"):
        solve(importance, budgets_of(importance, "bitops=W3A3"), alpha=1e300)


def test_a_budget_met_to_the_last_float():
    """Measured costs: ten times 0.1 ms beside 0.2 ms fixed is within 1.2 ms, whatever float addition makes of it."""
    importance = made(1, layers=10)
    (budget,) = budgets_of(importance, "bitops=W3A3")
    table = np.full(budget.table.shape, 0.1)
    table[:, 1:, :] = 0.2
    budget = budget._replace(name="latency", text="latency=1.2ms", table=table, fixed=0.2, limit=1.2, unit="ms")
    found = solve(importance, [budget])
    assert found.status == "optimal" and found.used["latency"] == (1.2, 1.2)
    with pytest.raises(Refusal, match=r"least reachable is 1\.200 ms"):
        solve(importance, [budget._replace(limit=1.19)])


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


def test_a_parent_that_used_highs_does_not_hang_the_child():
    """HiGHS keeps threads; a fork inherits what waits for them, not the threads."""
    import cvxpy

    x = cvxpy.Variable(60, boolean=True)
    rows = np.random.default_rng(0).random((5, 60))
    cvxpy.Problem(cvxpy.Minimize(rows[0] @ x), [rows @ x >= 10]).solve(solver=cvxpy.HIGHS)
    importance = made(2)
    found = solve(importance, budgets_of(importance, "bitops=W3A3"), time_limit=20)
    assert found.solver == "highs" and found.status == "optimal" and found.seconds < 10


def test_a_false_proof_of_infeasibility_is_not_believed(monkeypatch):
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    monkeypatch.setattr(ilp, "_cvxpy_highs", lambda *_: ilp.Answer(None, -math.inf, False, infeasible=True))
    found = solve(importance, budgets)
    best, _ = best_by_force(importance, budgets)
    assert found.bound <= best + 1e-9 and found.objective >= best - 1e-9 and found.solver == "lagrange"


def test_only_policies_over_the_budget_means_infeasible(monkeypatch):
    """Every policy that a careless solver offers is cut off in exact arithmetic, until none is left: two budgets named."""
    importance = made(3, layers=2, widths=(2, 3))
    (one,) = budgets_of(importance, "bitops=W2A2")
    two = one._replace(name="other", text="other=1", table=one.table[:, ::-1, ::-1].copy())
    two = two._replace(limit=int(two.table.min((1, 2)).sum()) + two.fixed)
    real = ilp._cvxpy_highs

    def careless(problem, cuts, bits_bound, seconds):
        limits = tuple(limit + 1 for limit in problem.limit) if len(cuts) < 2 else problem.limit
        return real(problem._replace(limit=limits), cuts, bits_bound, seconds)

    monkeypatch.setattr(ilp, "_cvxpy_highs", careless)
    with pytest.raises(Refusal, match="cannot hold together"):
        solve(importance, [one, two], time_limit=20)


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


def test_budgets_of_which_any_two_hold():
    """Of each pair of three layers at most one narrow, and at most one wide in all: any two hold, all four do not."""
    importance = made(6, layers=3, widths=(2, 3), activation_widths=(8,))
    (base,) = budgets_of(importance, "bitops=W3A3")
    tables = np.zeros((4, 3, 2, 1), np.int64)
    for m in range(3):
        tables[m, [m, (m + 1) % 3], 0] = 1
    tables[3, :, 1] = 1
    budgets = [
        base._replace(name=f"b{m}", text=f"b{m}=1", table=table, fixed=0, limit=1) for m, table in enumerate(tables)
    ]
    for two in itertools.combinations(budgets, 2):
        assert all(used <= limit for used, limit in solve(importance, two).used.values())
    with pytest.raises(Refusal, match="b0=1, b1=1, b2=1, b3=1 cannot all hold together, though any two"):
        solve(importance, budgets)


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


@pytest.mark.parametrize("texts", [("bitops=W8A8",), ("bitops=W6A6", "size=W2")])
def test_no_random_policies_where_none_can_spend_the_budget(texts):
    """A budget above the widest policy, or another that binds first: an empty answer, soon."""
    importance = made(8, layers=20, widths=(2, 3, 4, 5, 6))
    began = time.monotonic()
    assert random_policies(importance, budgets_of(importance, *texts), 20) == []
    assert time.monotonic() - began < 10


def test_random_policies_reach_over_gaps_in_the_candidates():
    """A layer that may have 2 or 6 bits only steps over 3, 4 and 5."""
    importance = made(8, layers=3, widths=(2, 3, 4, 5, 6))
    gaps = [
        ly._replace(weight_bit_widths=(2, 6), activation_bit_widths=(2, 6)) if ly.searched else ly
        for ly in importance.layers
    ]
    importance = importance._replace(layers=tuple(gaps))
    budgets = budgets_of(importance, "bitops=W2A2")
    found = random_policies(importance, budgets, 3)
    assert len(found) == 3 and all(p[f"layer{i}"] == (2, 2) for p in found for i in range(3))


def test_result_is_plain_data():
    found = solve(made(0), budgets_of(made(0), "bitops=W3A3"))
    assert isinstance(made(0), Importance) and all(type(b.w) is int for b in found.policy.values())
