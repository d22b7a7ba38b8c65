"""The frontier: every point equal to a search of its own, and files that hold it."""

import json
import sys
import time

import numpy as np
import pytest
from tables import best_by_force, budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Refusal
from mpq_jax.importance import total
from mpq_jax.search import random_policies, solve
from mpq_jax.search.frontier import draw_frontier, frontier, save_frontier


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"pair": True, "narrowed": True}])
@pytest.mark.parametrize("texts", [("bitops=W3A3",), ("size=W3", "bitops=W3A3")])
def test_every_point_is_the_best_at_its_limit(options, texts):
    importance = made(5, **options)
    budgets = budgets_of(importance, *texts)
    found = frontier(importance, budgets, 12)
    lowest = min(cost_by_hand(importance, policy, budgets[0].name) for policy in every_policy(importance))
    assert found.limits[0] >= lowest and list(found.limits) == sorted(set(found.limits))
    assert len(found.limits) + len(found.without) == 12
    for limit, one in zip(found.limits, found.solutions, strict=True):
        here = [budgets[0]._replace(limit=limit), *budgets[1:]]
        best, _ = best_by_force(importance, here)
        assert one.status == "optimal" and one.objective == pytest.approx(best, abs=1e-9)
        assert all(cost_by_hand(importance, one.policy, b.name) <= b.limit for b in here)
    for limit in found.without:
        assert best_by_force(importance, [budgets[0]._replace(limit=limit), *budgets[1:]])[0] is None
    # Above the last limit nothing is better.
    assert found.solutions[-1].objective == pytest.approx(best_by_force(importance, budgets[1:])[0])


def test_equals_single_searches_on_a_large_table():
    importance = made(5, layers=40, widths=(2, 3, 4, 5, 6), tied=True)
    (budget,) = budgets_of(importance, "bitops=W3A3")
    found = frontier(importance, [budget], 24)
    assert len(found.limits) == 24
    for i in range(0, 24, 5):
        single = solve(importance, [budget._replace(limit=found.limits[i])])
        assert found.solutions[i].objective == pytest.approx(single.objective, abs=1e-9)
    assert (np.diff([one.objective for one in found.solutions]) <= 1e-9).all()


def test_the_time_limit_is_for_all_limits_together(monkeypatch):
    """With searches that take all the time they are given, 40 limits end with the half second, not with 40 shares of it."""
    module = sys.modules[frontier.__module__]
    search, asked = module._solved, []

    def slow(problem, deadline, similar):
        asked.append(problem)
        if similar is not None:
            time.sleep(max(0.05, deadline - time.monotonic()))
        return search(problem, time.monotonic() + 5, similar)

    monkeypatch.setattr(module, "_solved", slow)
    importance = made(5, layers=40, widths=(2, 3, 4, 5, 6))
    found = frontier(importance, budgets_of(importance, "bitops=W3A3"), 40, time_limit=0.5)
    assert found.seconds < 3 and found.without and len(asked) < 40
    assert len(found.limits) + len(found.without) == 40


def test_uniform_policies_are_on_it():
    importance = made(5)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    found = frontier(importance, budgets, 4)
    expected = {}
    for w in (2, 3, 4):
        for a in (2, 3, 4):
            policy = {ly.path: ly.bits or type(ly.bits or importance.layers[0].bits)(w, a) for ly in importance.layers}
            if cost_by_hand(importance, policy, "size") <= budgets[1].limit:
                expected[f"W{w}A{a}"] = (cost_by_hand(importance, policy, "bitops"), total(importance, policy))
    assert found.uniform == expected and "W4A4" not in expected


def test_files(tmp_path):
    importance = made(5)
    budgets = budgets_of(importance, "wbits=3", "size=W4")
    found = frontier(importance, budgets, 5)
    save_frontier(tmp_path / "frontier.json", found, "abc")
    saved = json.loads((tmp_path / "frontier.json").read_text())
    assert saved["format"] == "mpq-frontier" and saved["budget"] == "wbits" and saved["others"] == ["size=W4"]
    assert [p["objective"] for p in saved["points"]] == [one.objective for one in found.solutions]
    params = sum(ly.params for ly in importance.layers)
    for point, one in zip(saved["points"], found.solutions, strict=True):
        assert point["used"] == pytest.approx(cost_by_hand(importance, one.policy, "wbits") / params)
        assert point["used"] <= point["limit"] and point["bits"]["first"] == [8, 8]
    draw_frontier(tmp_path / "frontier.png", found, found.solutions[2])
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frontier.json", "frontier.png"]


def test_refused_calls():
    table = made(0)
    (budget,) = budgets_of(table, "bitops=W3A3")
    with pytest.raises(Refusal, match="a frontier of 0 limits"):
        frontier(table, [budget], 0)
    other = made(0, widths=(2, 3))
    with pytest.raises(Refusal, match="parsed for another table"):
        frontier(other, [budget], 3)
    assert len(random_policies(table, [], 3)) == 3


def test_refused():
    importance = made(5)
    with pytest.raises(Refusal, match="name another first"):
        frontier(importance, budgets_of(importance, "memory=1MB"), 5)
    with pytest.raises(Refusal, match="least reachable"):
        frontier(importance, budgets_of(importance, "bitops=W3A3", "size=10B"), 5)
