"""What stands beside an answer, against plain enumeration: uniform policies and random ones."""

import time

import pytest
from tables import budgets_of, cost_by_hand, made

from mpq_jax.importance import total
from mpq_jax.policy import validate
from mpq_jax.search import best_uniform, random_policies
from mpq_jax.search.others import uniform_policies


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
        validate(policy, importance.layers, importance.bit_widths, importance.activation_bit_widths, "random")
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


def test_uniform_policies_where_rules_forbid_them():
    """A layer that may not have those bits has the nearest, the narrower of two; tied layers share the nearest."""
    importance = made(7, tied=True, narrowed=True)._replace(rules=("layer2=2,2|4,4", "layer3=w3"))
    policies = dict(uniform_policies(importance))
    assert len(policies) == 9
    assert policies["W2A4"]["layer1"] == (3, 3) and policies["W2A4"]["layer0"] == (2, 3)
    assert policies["W3A3"]["layer2"] == (2, 2) and policies["W4A3"]["layer2"] == (4, 4)
    assert all(policy["layer3"].w == 3 and policy["first"] == (8, 8) for policy in policies.values())


def test_random_policies_move_what_is_bound_together():
    """Only pairs with gaps, shared rows, weight and activation bits equal: still near the budget."""
    importance = made(8, layers=10, widths=(2, 3, 4, 6), tied=True)
    importance = importance._replace(rules=("layer[2-5]=share", "layer[67]=2,2|4,4|6,6", "layer[89]=equal"))
    budgets = budgets_of(importance, "bitops=W3A4")
    found = random_policies(importance, budgets, 5, within=0.05)
    assert len(found) == 5
    for policy in found:
        assert len({policy[f"layer{i}"] for i in range(2, 6)}) == 1
        assert all(policy[f"layer{i}"] in [(2, 2), (4, 4), (6, 6)] for i in (6, 7))
        assert policy["layer8"].w == policy["layer8"].a and policy["layer0"].a == policy["layer1"].a
        assert 0.95 * budgets[0].limit <= cost_by_hand(importance, policy, "bitops") <= budgets[0].limit


def test_random_policies_favour_no_layer():
    """Layers of equal cost get equal bits on average."""
    importance = made(8, layers=8, widths=(2, 3, 4, 5, 6))
    equal = tuple(ly._replace(params=100, macs=1000) if ly.searched else ly for ly in importance.layers)
    importance = importance._replace(layers=equal)
    found = random_policies(importance, budgets_of(importance, "bitops=W4A4"), 200)
    means = [sum(policy[f"layer{i}"].w for policy in found) / len(found) for i in range(8)]
    assert len(found) == 200 and max(means) - min(means) < 0.6
