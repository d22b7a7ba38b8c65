"""Checking an edited policy: its cost by hand, its loss against brute force, and which rules it breaks."""

import pytest
from tables import best_by_force, budgets_of, cost_by_hand, made

from mpq_jax import Bits
from mpq_jax.importance import total
from mpq_jax.search import solve
from mpq_jax.search.check import broken_rules, check
from mpq_jax.search.show import check_text


def test_cost_and_loss():
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3", "wbits=3.5")
    best = solve(importance, budgets).policy
    for path in ("layer0", "layer3"):
        policy = {**best, path: Bits(2, 2)}
        result = check(importance, policy, budgets)
        expected = total(importance, policy) - best_by_force(importance, budgets)[0]
        assert result.loss == pytest.approx(expected) and result.over == () == result.broken
        assert result.used["bitops"][0] == cost_by_hand(importance, policy, "bitops")
        assert f"loses {expected:.6g}" in check_text(budgets, result) or expected == 0
    assert "loses nothing" in check_text(budgets, check(importance, best, budgets))


def test_over_the_budget():
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W2A2")
    policy = {ly.path: ly.bits or Bits(4, 4) for ly in importance.layers}
    result = check(importance, policy, budgets)
    assert result.over == ("bitops",) and result.loss < 0
    text = check_text(budgets, result)
    assert "OVER THE BUDGET" in text and "by breaking a budget" in text


def test_better_than_a_best_that_is_not_proven():
    """Of an answer that the time cut short, a legal policy may be better; no rule is said to be broken."""
    importance = made(2)
    budgets = budgets_of(importance, "bitops=W3A3")
    best = solve(importance, budgets)
    result = check(importance, best.policy, budgets)
    worse = best._replace(objective=best.objective + 1, status="feasible")
    text = check_text(budgets, result._replace(best=worse))
    assert "below the best, which was not proven to be the best" in text and "breaking" not in text


def test_no_best_to_compare_with():
    importance = made(2)
    budgets = budgets_of(importance, "bitops=1K")
    result = check(importance, {ly.path: ly.bits or Bits(2, 2) for ly in importance.layers}, budgets)
    assert result.best is None and "least reachable" in check_text(budgets, result)


def test_broken_rules():
    rules = ("layer0=w3+", "layer[12]=share", "layer3=equal", "layer=2/3/4", "layer[01]=share a")
    importance = made(2)._replace(rules=rules)
    policy = {ly.path: ly.bits or Bits(3, 3) for ly in importance.layers}
    assert broken_rules(importance, policy) == ()
    assert broken_rules(importance, policy | {"layer0": Bits(4, 4)}) == (("layer[01]=share a", "layer1"),)
    policy |= {"layer0": Bits(2, 3), "layer2": Bits(3, 4), "layer3": Bits(4, 3)}
    assert broken_rules(importance, policy) == (
        ("layer0=w3+", "layer0"),
        ("layer[12]=share", "layer2"),
        ("layer3=equal", "layer3"),
    )
