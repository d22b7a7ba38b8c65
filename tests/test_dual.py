"""The Lagrangian dual against SciPy's LP relaxation and against every policy."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog
from tables import best_by_force, budgets_of, cost_by_hand, every_policy, made

from mpq_jax.importance import total
from mpq_jax.search.dual import cheapest, maximise
from mpq_jax.search.problem import build


def lp_relaxation(problem):
    """The same program with x in [0, 1], stated anew for SciPy."""
    row, column = np.nonzero(problem.allowed)
    equal = [(row == r).astype(float) for r in range(len(problem.paths))]
    for group in problem.tied:
        for first, second in itertools.pairwise(group):
            for a in set(problem.a.tolist()):
                here = problem.a[column] == a
                equal.append(((row == first) & here).astype(float) - ((row == second) & here))
    right = np.concatenate([np.ones(len(problem.paths)), np.zeros(len(equal) - len(problem.paths))])
    upper = np.array([cost[row, column] / limit for cost, limit in zip(problem.cost, problem.limit, strict=True)])
    found = linprog(problem.value[row, column], A_ub=upper, b_ub=np.ones(len(upper)), A_eq=np.array(equal), b_eq=right)
    return found.fun


@pytest.mark.parametrize(
    "texts", [("bitops=W3A3",), ("bitops=W3A3", "size=W3"), ("size=12x", "bitops=W2A3", "abits=3")]
)
def test_the_bound_is_that_of_the_lp_relaxation(texts):
    for seed in range(6):
        importance = made(seed, layers=12, widths=(2, 3, 4, 5), tied=seed % 2 == 0, pair=seed % 3 == 0)
        problem = build(importance, budgets_of(importance, *texts))
        assert maximise(problem).bound == pytest.approx(lp_relaxation(problem), rel=1e-6)


def test_reduced_costs_are_what_a_choice_lifts_the_bound_by():
    """Every policy within the budgets costs at least the bound plus any of its choices' reduced costs."""
    for seed in range(8):
        importance = made(seed, tied=seed % 2 == 0, narrowed=seed % 3 == 0)
        budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
        problem = build(importance, budgets)
        dual = maximise(problem)
        assert dual.bound <= best_by_force(importance, budgets)[0] + 1e-9
        assert (dual.reduced[~problem.allowed] == np.inf).all() and dual.reduced.min() >= 0
        largest = 0.0
        for policy in every_policy(importance):
            if all(cost_by_hand(importance, policy, b.name) <= b.limit for b in budgets):
                each = dual.reduced[np.arange(len(problem.paths)), problem.picks(policy)]
                assert total(importance, policy) >= dual.bound + each.max() - 1e-9
                largest = max(largest, each.max())
        assert largest > 0.01


def test_prices_that_are_known_are_a_start():
    importance = made(3, layers=12, widths=(2, 3, 4, 5))
    problem = build(importance, budgets_of(importance, "bitops=W3A3", "size=W3"))
    dual = maximise(problem)
    again = maximise(problem, dual.prices / dual.rooms)
    assert again.bound == pytest.approx(dual.bound, rel=1e-9) and again.bound >= dual.bound - 1e-12


def test_cheapest_keeps_ties():
    """Against every policy, at random prices."""
    for seed in range(5):
        importance = made(seed, tied=True, pair=True)
        problem = build(importance, [])
        picks = cheapest(problem, problem.value)
        assert len(set(problem.a[picks[list(problem.tied[0])]])) == 1
        value = problem.value[np.arange(len(picks)), picks].sum()
        assert value == pytest.approx(min(total(importance, policy) for policy in every_policy(importance)))
