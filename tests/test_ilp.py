"""The integer program against trying every policy, and against SciPy's milp stated anew; limits, ties, refusals."""

import itertools
import math
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from tables import best_by_force, budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Refusal
from mpq_jax.importance import combined, total
from mpq_jax.search import ilp, solve
from mpq_jax.search.branch import Found
from mpq_jax.search.check import broken_rules
from mpq_jax.search.solvers import Answer
from mpq_jax.types import Interaction

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
    "means and memory": ({"tied": True}, ("wbits=3.5", "abits=3.6", "memory=600B")),
    "four budgets": ({}, ("bitops=W3A4", "size=W3", "abits=4", "memory=700B")),
}


# Which of the ways to a proof is taken: all in turn, each solver at once, or branch and bound until the end.
WAYS = {
    "all": (None, ilp.SOLVERS),
    "highs": (0, ilp.SOLVERS[:1]),
    "highs without presolve": (0, ilp.SOLVERS[1:2]),
    "scipy": (0, ilp.SOLVERS[2:]),
    "branch and bound": (0, ()),
}


def solve_by(monkeypatch, way, importance, budgets, **more):
    nodes, solvers = WAYS[way]
    monkeypatch.setattr(ilp, "SOLVERS", solvers)
    return solve(importance, budgets, **({} if nodes is None else {"nodes": nodes}), **more)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_equals_brute_force(monkeypatch, case, way):
    options, texts = CASES[case]
    for seed in range(2):
        importance = made(seed, **options)
        budgets = budgets_of(importance, *texts)
        found = solve_by(monkeypatch, way, importance, budgets)
        assert way == "all" or found.solver == way
        best, _ = best_by_force(importance, budgets)
        assert found.status == "optimal" and found.bound == found.objective
        assert found.objective == pytest.approx(best, abs=1e-9)
        assert found.objective == pytest.approx(total(importance, found.policy), abs=1e-12)
        for budget in budgets:
            used, limit = found.used[budget.name]
            assert used * budget.per == pytest.approx(cost_by_hand(importance, found.policy, budget.name), rel=1e-15)
            assert cost_by_hand(importance, found.policy, budget.name) <= budget.limit == round(limit * budget.per)
        assert found.policy in list(every_policy(importance))


@st.composite
def problems(draw):
    """(importance, budgets): up to six layers, ties, narrowed candidates, equal costs, equal harm, one to three budgets."""
    widths = draw(st.sampled_from([(2,), (2, 3), (2, 4, 8), (4, 2, 3)]))
    layers = draw(st.integers(1, 6 if len(widths) < 3 else 4))  # a few thousand policies at most
    seed = draw(st.integers(0, 10**6))
    pair, narrowed = draw(st.booleans()), len(widths) > 2 and draw(st.booleans())
    importance = made(seed, layers=layers, widths=widths, tied=draw(st.booleans()), pair=pair, narrowed=narrowed)
    same_costs, coarse = draw(st.booleans()), draw(st.booleans())
    if same_costs:
        table = [ly._replace(params=64, macs=1000, inputs=50, outputs=50) for ly in importance.layers]
        importance = importance._replace(layers=tuple(table))
    if coarse:  # harm in whole numbers: many ties, sums among them
        rounded = {n: None if t is None else np.round(3 * t) for n, t in importance._asdict().items() if n in TABLES}
        importance = importance._replace(**rounded)
    chosen = draw(st.lists(st.sampled_from(sorted(LOOSE)), min_size=1, max_size=3, unique=True))
    budgets = []
    for budget in budgets_of(importance, *(LOOSE[name] for name in chosen)):
        spent = sorted(cost_by_hand(importance, policy, budget.name) for policy in every_policy(importance))
        # From just too little to all of it.
        at = draw(st.integers(-1, len(spent) - 1))
        limit = spent[at] if at >= 0 else spent[0] - 1
        budgets.append(budget._replace(limit=max(1, limit), text=f"{budget.name}={limit}"))
    return importance, budgets


TABLES = ("weight", "activation", "pair")
LOOSE = {
    "bitops": "bitops=W32A32",
    "size": "size=W32",
    "memory": "memory=1GB",
    "wbits": "wbits=32",
    "abits": "abits=32",
}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from(sorted(WAYS)))
def test_any_small_problem_equals_brute_force(problem, way):
    importance, budgets = problem
    best, winners = best_by_force(importance, budgets)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if best is None:
            with pytest.raises(Refusal, match=r"least reachable|cannot|no choice is left"):
                solve_by(monkeypatch, way if way != "branch and bound" else "all", importance, budgets)
            return
        found = solve_by(monkeypatch, way, importance, budgets)
    assert found.status == "optimal" and found.gap == 0 and found.objective == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert all(cost_by_hand(importance, found.policy, b.name) <= b.limit for b in budgets)
    bits = [sum(b.w + b.a for b in policy.values()) for policy in winners]
    assert sum(b.w + b.a for b in found.policy.values()) == min(bits)


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


@pytest.mark.parametrize("seed", [0, 106, 190, 328])
def test_ties_under_two_budgets_go_to_fewer_bits(seed):
    """Also where the first policy that was tried has the least objective already (the last three)."""
    rng = np.random.default_rng(seed)
    importance = made(seed, layers=2, alpha=1.0)
    weight, activation = (rng.integers(0, 3, (2, 3)).astype(float) for _ in range(2))
    importance = importance._replace(weight=weight, activation=activation)
    budgets = budgets_of(importance, *(f"{name}={rng.integers(25, 45) / 10}" for name in ("wbits", "abits")))
    best, winners = best_by_force(importance, budgets)
    found = solve(importance, budgets)
    assert found.objective == best
    assert sum(b.w + b.a for b in found.policy.values()) == min(sum(b.w + b.a for b in p.values()) for p in winners)


def test_a_dearer_narrow_choice_still_wins_ties():
    """Where fewer bits are slower, as some latency tables have it, equal harm still goes to fewer bits."""
    importance = made(1)
    flat = importance._replace(weight=np.ones((4, 3)), activation=np.ones((4, 3)))
    (budget,) = budgets_of(flat, "bitops=W8A8")
    found = solve(flat, [budget._replace(table=budget.table[:, ::-1, ::-1].copy())])
    assert all(found.policy[f"layer{i}"] == (2, 2) for i in range(4))


@pytest.mark.parametrize("scale, offset", [(1e-12, 0.0), (1e9, 0.0), (1.0, 1e6), (0.0, 0.0), (-1.0, 0.0)])
@pytest.mark.parametrize("way", WAYS)
def test_any_unit_and_offset(monkeypatch, scale, offset, way):
    """Tables in any unit, far from zero, constant or negative: the same proof, by every way."""
    importance = made(4, pair=True)
    importance = importance._replace(pair=importance.pair * scale + offset)
    budgets = budgets_of(importance, "bitops=W3A3")
    found = solve_by(monkeypatch, way, importance, budgets)
    fitting = (p for p in every_policy(importance) if cost_by_hand(importance, p, "bitops") <= budgets[0].limit)
    best = min(total(importance, policy) for policy in fitting)
    assert found.status == "optimal" and found.objective == pytest.approx(best, rel=1e-12, abs=0)


def test_numbers_too_large_to_add_are_refused():
    importance = made(1)
    with pytest.raises(Refusal, match="1e140"):
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


# ---- interactions -------------------------------------------------------------------------------------------------


def with_interactions(seed, count=4, **options):
    """A made importance with `count` random terms between decisions, one within a layer among them."""
    importance = made(seed, **options)
    rng = np.random.default_rng(seed + 1000)
    paths = [ly.path for ly in importance.layers if ly.searched]
    widths = {"w": importance.bit_widths, "a": importance.activation_bit_widths}
    terms = []
    for number in range(count):
        first, second = rng.choice(len(paths), 2, replace=False)
        ends = [(paths[first], "wa"[rng.integers(2)]), (paths[second], "wa"[rng.integers(2)])]
        if number == 0:
            ends = [(paths[0], "w"), (paths[0], "a")]
        table = rng.normal(size=(len(widths[ends[0][1]]), len(widths[ends[1][1]])))
        terms.append(Interaction(*ends, table))
    return importance._replace(interactions=tuple(terms))


@pytest.mark.parametrize("way", ["all", "highs", "scipy"])
@pytest.mark.parametrize(
    "options, rules, texts",
    [
        ({}, (), ("bitops=W3A3",)),
        ({"tied": True, "pair": True}, (), ("bitops=W3A3", "size=W3")),
        ({"narrowed": True, "activation_widths": (2, 4, 8)}, (), ("size=W3", "abits=4")),
        ({}, ("layer[02]=share", "layer1=equal"), ("bitops=W3A3",)),
    ],
)
def test_interactions_equal_brute_force(monkeypatch, way, options, rules, texts):
    for seed in range(3):
        importance = with_interactions(seed, **options)._replace(rules=rules)
        budgets = budgets_of(importance, *texts)
        best, _ = best_by_force(importance, budgets, allowed=lambda p, i=importance: not broken_rules(i, p))
        found = solve_by(monkeypatch, way, importance, budgets)
        assert found.status == "optimal" and found.objective == pytest.approx(best, abs=1e-8)
        assert found.objective == pytest.approx(total(importance, found.policy), abs=1e-12)
        assert all(cost_by_hand(importance, found.policy, b.name) <= b.limit for b in budgets)


def test_interactions_without_a_solver_are_never_called_optimal(monkeypatch):
    """The polished greedy policy, and a bound that holds."""
    for seed in range(4):
        importance = with_interactions(seed)
        budgets = budgets_of(importance, "bitops=W3A3")
        monkeypatch.setattr(ilp, "SOLVERS", ())
        found = solve(importance, budgets)
        best, _ = best_by_force(importance, budgets)
        assert found.bound <= best + 1e-9 and found.objective >= best - 1e-9
        assert found.status == "feasible" or found.objective == pytest.approx(best)


def test_interactions_matter():
    """Two layers that only harm together: the additive part alone would narrow both."""
    importance = made(0, layers=2, widths=(2, 4), activation_widths=(8,), alpha=1.0)
    layers = tuple(ly._replace(params=100, macs=100) if ly.searched else ly for ly in importance.layers)
    table = np.array([[5.0, 0.0], [0.0, 0.0]])
    importance = importance._replace(layers=layers, weight=np.zeros((2, 2)), activation=np.zeros((2, 1)))
    importance = importance._replace(interactions=(Interaction(("layer0", "w"), ("layer1", "w"), table),))
    (budget,) = budgets_of(importance, "size=W4")
    found = solve(importance, [budget._replace(limit=budget.fixed + 75)])
    assert found.objective == 0 and sorted(found.policy[f"layer{i}"].w for i in range(2)) == [2, 4]


# ---- solvers that misbehave ---------------------------------------------------------------------------------------


def hang(*_):
    time.sleep(60)


def fail(*_):
    raise RuntimeError("no")


def lies_about_feasibility(*_):
    return Answer(None, -math.inf, False, infeasible=True)


def instead(monkeypatch, *functions):
    """Other functions in the place of the first solvers; the rest stay."""
    names, old, shares = zip(*ilp.SOLVERS, strict=True)
    replaced = [*functions, *old[len(functions) :]]
    monkeypatch.setattr(ilp, "SOLVERS", tuple(zip(names, replaced, shares, strict=True)))


@pytest.mark.parametrize("broken", [hang, fail, lies_about_feasibility])
def test_a_broken_solver_is_replaced(monkeypatch, broken):
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    instead(monkeypatch, broken, broken)
    began = time.monotonic()
    found = solve(importance, budgets, time_limit=8.0, nodes=0)
    assert time.monotonic() - began < 12
    assert found.solver == "scipy" and found.status == "optimal"
    assert found.objective == pytest.approx(best_by_force(importance, budgets)[0], abs=1e-9)


def test_with_no_solver_at_all_branch_and_bound_proves_it(monkeypatch):
    importance = made(2, layers=5)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    instead(monkeypatch, fail, fail, fail)
    found = solve(importance, budgets, time_limit=20.0, nodes=0)
    assert found.solver == "branch and bound" and found.status == "optimal"
    assert found.objective == pytest.approx(best_by_force(importance, budgets)[0], abs=1e-9)


def test_what_is_not_proved_is_never_called_optimal(monkeypatch):
    """No solver, no branch and bound: the greedy policy, with a bound that holds and the gap between them."""
    importance = made(2, layers=5)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    instead(monkeypatch, hang, hang, hang)
    monkeypatch.setattr(ilp, "branch", lambda *_, **__: Found(None, False, 0))
    began = time.monotonic()
    found = solve(importance, budgets, time_limit=2.0)
    assert time.monotonic() - began < 6 and found.solver == "lagrange" and found.status == "feasible"
    best, _ = best_by_force(importance, budgets)
    assert found.bound <= best + 1e-9 <= found.objective + 2e-9
    assert found.gap == pytest.approx((found.objective - found.bound) / abs(found.objective))
    assert all(used <= limit for used, limit in found.used.values())


def test_a_parent_that_used_highs_does_not_hang_the_child():
    """HiGHS keeps threads; a fork inherits what waits for them, not the threads."""
    import cvxpy

    x = cvxpy.Variable(60, boolean=True)
    rows = np.random.default_rng(0).random((5, 60))
    cvxpy.Problem(cvxpy.Minimize(rows[0] @ x), [rows @ x >= 10]).solve(solver=cvxpy.HIGHS)
    importance = made(2)
    found = solve(importance, budgets_of(importance, "bitops=W3A3"), time_limit=20, nodes=0)
    assert found.solver == "highs" and found.status == "optimal" and found.seconds < 10


def test_only_policies_over_the_budget_means_infeasible(monkeypatch):
    """Every policy that a careless solver offers is cut off in exact arithmetic, until none is left: two budgets named."""
    importance = made(3, layers=2, widths=(2, 3))
    (one,) = budgets_of(importance, "bitops=W2A2")
    two = one._replace(name="other", text="other=1", table=one.table[:, ::-1, ::-1].copy())
    two = two._replace(limit=int(two.table.min((1, 2)).sum()) + two.fixed)
    real = ilp.SOLVERS[0][1]

    def careless(problem, cuts, seconds):
        limits = tuple(limit + 1 for limit in problem.limit) if len(cuts) < 2 else problem.limit
        return real(problem._replace(limit=limits), cuts, seconds)

    instead(monkeypatch, careless, careless)
    with pytest.raises(Refusal, match="cannot hold together"):
        solve(importance, [one, two], time_limit=20, nodes=0)


def test_an_overshooting_answer_is_cut_off(monkeypatch):
    """A solver that first says the widest policy, over the budget, is asked again without it."""
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    real, asked = ilp.SOLVERS[0][1], []

    def overshoots(problem, cuts, seconds):
        if not cuts:
            return Answer(np.where(problem.allowed, problem.cost[0], -1).argmax(1), -math.inf, True)
        return real(problem, cuts, seconds)

    instead(monkeypatch, overshoots)
    monkeypatch.setattr(ilp, "in_child", lambda f, arguments, s: asked.append(len(arguments[1])) or f(*arguments, s))
    found = solve(importance, budgets, nodes=0)
    assert asked == [0, 1]
    assert found.objective == pytest.approx(best_by_force(importance, budgets)[0], abs=1e-9)
    assert found.used["bitops"][0] <= found.used["bitops"][1]


# ---- budgets that cannot be kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"narrowed": True, "tied": True}])
def test_least_reachable(options):
    importance = made(4, **options)
    budgets = budgets_of(importance, "bitops=W3A3")
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


def test_one_layer_and_none():
    importance = made(0, layers=1)
    budgets = budgets_of(importance, "bitops=W3A3")
    assert solve(importance, budgets).objective == pytest.approx(best_by_force(importance, budgets)[0])
    fixed = tuple(ly for ly in importance.layers if not ly.searched)
    none = importance._replace(layers=fixed, weight=np.zeros((0, 3)), activation=np.zeros((0, 3)))
    with pytest.raises(Refusal, match="no layer is searched"):
        solve(none, budgets_of(none, "bitops=1G"))
    with pytest.raises(Refusal, match="least reachable"):
        solve(none, budgets_of(none, "bitops=1K"))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_any_large_problem_equals_scipy(seed, count):
    """Forty layers, sixteen choices: SciPy's milp on the program stated anew."""
    importance = made(seed, layers=40, widths=(2, 3, 4, 6), pair=seed % 2 == 0)
    texts = ("bitops=W4A4", "size=W4", "abits=3.7")[:count]
    budgets = budgets_of(importance, *texts)
    found = solve(importance, budgets)
    table = combined(importance)
    one = np.kron(np.eye(40), np.ones(16))
    constraints = [LinearConstraint(one, 1, 1)]
    constraints += [LinearConstraint(b.table.reshape(1, -1) / b.limit, -np.inf, 1 - b.fixed / b.limit) for b in budgets]
    options = {"mip_rel_gap": 0.0, "time_limit": 30.0}
    peer = milp(1e4 * table.ravel(), constraints=constraints, integrality=1, bounds=Bounds(0, 1), options=options)
    assert found.status == "optimal" and found.objective == pytest.approx(peer.fun / 1e4, abs=1e-7)


def test_result_is_plain_data():
    found = solve(made(0), budgets_of(made(0), "bitops=W3A3"))
    assert all(type(b.w) is int and type(b.a) is int for b in found.policy.values())
    assert type(found.objective) is float and type(found.used["bitops"][0]) is int
