"""The problem as arrays: what is dropped is in no best policy; what is least; ties and shared bits."""

import numpy as np
import pytest
from tables import best_by_force, budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Refusal
from mpq_jax.importance import total
from mpq_jax.search.problem import build, least, within_room, without_dominated


def in_problem(problem, policy):
    return problem.picks(policy) is not None


def test_picks_and_policies_are_each_other():
    importance = made(2, tied=True, narrowed=True)
    problem = build(importance, budgets_of(importance, "bitops=W3A3", "size=W3"))
    seen = set()
    for policy in every_policy(importance):
        picks = problem.picks(policy)
        seen.add(picks.tobytes())
        assert problem.policy(picks) == {path: policy[path] for (path,) in problem.paths}
        spent = problem.spent(picks)
        for name, fixed, value in zip(problem.names, problem.fixed, spent, strict=True):
            assert fixed + value == cost_by_hand(importance, policy, name)
    assert len(seen) == sum(1 for _ in every_policy(importance))
    for wrong in ({"layer0": (2, 2), "layer1": (3, 3)}, {"layer1": (2, 2), "layer0": (2, 2)}, {"layer2": (8, 8)}):
        bits = {path: type(policy["first"])(*wrong.get(path, policy[path])) for path in policy}
        assert problem.picks(bits) is None


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"narrowed": True, "tied": True}])
def test_least(options):
    importance = made(4, **options)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    problem = build(importance, budgets)
    for m, budget in enumerate(budgets):
        expected = min(cost_by_hand(importance, policy, budget.name) for policy in every_policy(importance))
        assert least(problem, m, budget.fixed) == expected


def test_dropping_dominated_choices_keeps_an_optimum_with_fewest_bits():
    dropped = 0
    for seed in range(8):
        importance = made(seed, pair=True, tied=seed % 2 == 0)
        budgets = budgets_of(importance, "bitops=W3A3")
        problem = build(importance, budgets)
        small = without_dominated(problem)
        _, winners = best_by_force(importance, budgets)
        fewest = min(sum(b.w + b.a for b in policy.values()) for policy in winners)
        dropped += problem.allowed.sum() - small.allowed.sum()
        assert any(in_problem(small, policy) for policy in winners if sum(b.w + b.a for b in policy.values()) == fewest)
    assert dropped > 30


def test_what_has_no_room_is_in_no_policy_that_fits():
    dropped = 0
    for seed in range(6):
        importance = made(seed, tied=seed % 2 == 0)
        budgets = budgets_of(importance, "bitops=W2A3", "size=W3")
        problem = build(importance, budgets)
        small = within_room(problem)
        dropped += problem.allowed.sum() - small.allowed.sum()
        for policy in every_policy(importance):
            if all(cost_by_hand(importance, policy, b.name) <= b.limit for b in budgets):
                assert in_problem(small, policy)
    assert dropped > 10


def test_a_budget_on_the_largest_layer():
    importance = made(3, tied=True)
    (budget,) = budgets_of(importance, "memory=500B")
    problem = build(importance, [budget])
    for policy in every_policy(importance):
        assert in_problem(problem, policy) == (cost_by_hand(importance, policy, "memory") <= 500)
    lowest = min(cost_by_hand(importance, policy, "memory") for policy in every_policy(importance))
    with pytest.raises(Refusal, match=rf"memory=1B.*least reachable is {lowest} B \({lowest}\)"):
        build(importance, budgets_of(importance, "memory=1B"))


def test_shared_rows_add_up():
    """Layers that a rule binds together are one row: the sum of their costs and their harm."""
    importance = made(3)._replace(rules=("layer[02]=share",))
    problem = build(importance, budgets_of(importance, "bitops=W3A3"))
    assert problem.paths == (("layer0", "layer2"), ("layer1",), ("layer3",))
    for policy in every_policy(importance):
        picks = problem.picks(policy)
        assert (picks is None) == (policy["layer0"] != policy["layer2"])
        if picks is not None:
            assert problem.value[np.arange(3), picks].sum() == pytest.approx(total(importance, policy))
            assert problem.spent(picks)[0] + problem.fixed[0] == cost_by_hand(importance, policy, "bitops")


def test_ties_that_a_shared_row_connects_are_one_group():
    """layer0 and layer1 read one tensor, layer2 and layer3 another; layer1 shares its bits with layer2."""
    importance = made(3, tied=True)
    layers = [ly._replace(tied="x") if ly.path in ("layer2", "layer3") else ly for ly in importance.layers]
    importance = importance._replace(layers=tuple(layers), rules=("layer[12]=share",))
    problem = build(importance, [])
    assert problem.paths == (("layer0",), ("layer1", "layer2"), ("layer3",)) and problem.tied == ((0, 1, 2),)
