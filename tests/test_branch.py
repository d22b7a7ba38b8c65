"""Branch and bound: every policy within the gap is looked at, against all policies one by one."""

import math
import time

import numpy as np
import pytest
from tables import budgets_of, cost_by_hand, every_policy, made

from mpq_jax.importance import total
from mpq_jax.search.branch import branch
from mpq_jax.search.dual import maximise
from mpq_jax.search.problem import build

TEXTS = [("bitops=W3A3",), ("bitops=W3A3", "size=W3"), ("size=W3", "wbits=3", "bitops=W4A4")]


def fitting(importance, budgets):
    """[(objective, bits in all)] of every policy within the budgets, best first."""
    fits = (p for p in every_policy(importance) if all(cost_by_hand(importance, p, b.name) <= b.limit for b in budgets))
    return sorted((total(importance, p), sum(p[ly.path].w + p[ly.path].a for ly in importance.layers)) for p in fits)


@pytest.mark.parametrize("texts", TEXTS)
def test_the_best_within_the_gap_or_none(texts):
    for seed in range(6):
        importance = made(seed, tied=seed % 2 == 0, narrowed=seed % 3 == 0)
        budgets = budgets_of(importance, *texts)
        problem = build(importance, budgets)
        dual, best = maximise(problem), fitting(importance, budgets)[0][0]
        enough, little = best - dual.bound + 1e-9, (best - dual.bound) / 2
        found = branch(problem, dual, enough, nodes=10**6)
        assert found.done and found.nodes > 0
        assert problem.value[np.arange(len(problem.paths)), found.picks].sum() == pytest.approx(best, abs=1e-9)
        if little > 1e-6:
            assert branch(problem, dual, little, nodes=10**6)[:2] == (None, True)
        everything = branch(problem, dual, math.inf, nodes=10**7)
        assert problem.value[np.arange(len(problem.paths)), everything.picks].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("texts", TEXTS)
def test_fewest_bits_within_the_gap(texts):
    """Among all policies at most `gap` above the bound, one with the fewest bits in all."""
    for seed in range(4):
        importance = made(seed, tied=seed % 2 == 0)
        rounded = {name: np.round(4 * getattr(importance, name)) for name in ("weight", "activation")}
        importance = importance._replace(**rounded, alpha=1.0)
        budgets = budgets_of(importance, *texts)
        problem = build(importance, budgets)
        dual, every = maximise(problem), fitting(importance, budgets)
        best = every[0][0]
        found = branch(problem, dual, best - dual.bound + 1e-9, nodes=10**6, fewest_bits=True)
        expected = min(bits for objective, bits in every if objective <= best + 1e-9)
        fixed = sum(sum(ly.bits) for ly in importance.layers if ly.bits is not None)
        assert problem.bits[np.arange(len(problem.paths)), found.picks].sum() + fixed == expected


def test_it_gives_up_and_says_so():
    importance = made(1, layers=30, widths=(2, 3, 4, 5, 6))
    problem = build(importance, budgets_of(importance, "bitops=W3A3", "size=W3", "abits=4"))
    dual = maximise(problem)
    assert not branch(problem, dual, 100.0, nodes=2000).done
    assert not branch(problem, dual, 100.0, nodes=10**9, deadline=time.monotonic() - 1).done


def test_a_beam_finds_policies_that_fit():
    importance = made(1, layers=30, widths=(2, 3, 4, 5, 6))
    problem = build(importance, budgets_of(importance, "bitops=W3A3", "size=W3"))
    dual = maximise(problem)
    found = branch(problem, dual, 1.0, nodes=10**6, beam=50)
    assert not found.done and problem.fits(found.picks)
    assert dual.bound <= problem.value[np.arange(30), found.picks].sum() <= dual.bound + 1.0
