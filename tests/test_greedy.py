"""Greedy policies: they fit, keep ties, are not far from the best, and the made_to_fit always ends."""

import numpy as np
from tables import best_by_force, budgets_of, made

from mpq_jax.search.dual import cheapest, maximise
from mpq_jax.search.greedy import incumbent, made_to_fit
from mpq_jax.search.problem import build


def conflicting(seed, layers=5):
    """A problem with two or three budgets that pull different ways: wide is cheap in one and dear in another."""
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
    return build(importance, budgets)


def test_repair_always_ends_within_the_budgets():
    """From any start, with budgets in conflict: None, or picks that fit, allowed ones, ties kept."""
    ended = {True: 0, False: 0}
    for seed in range(150):
        problem = conflicting(seed)
        start = cheapest(
            problem, np.where(problem.allowed, np.random.default_rng(seed).random(problem.value.shape), np.inf)
        )
        picks = made_to_fit(problem, start)
        ended[picks is None] += 1
        if picks is not None:
            assert problem.fits(picks) and problem.allowed[np.arange(len(picks)), picks].all()
            assert all(len(set(problem.a[picks[list(group)]].tolist())) == 1 for group in problem.tied)
    assert min(ended.values()) > 5


def test_incumbent_fits_and_is_near_the_best():
    """Between the best and, on average, 5 % of the spread above it."""
    above = []
    for seed in range(20):
        importance = made(seed, tied=seed % 2 == 0)
        budgets = budgets_of(importance, *(("bitops=W3A3", "size=W3") if seed % 3 else ("size=12x", "bitops=W2A3")))
        problem = build(importance, budgets)
        picks = incumbent(problem, maximise(problem))
        assert picks is not None and problem.fits(picks)
        best, _ = best_by_force(importance, budgets)
        value = problem.value[np.arange(len(picks)), picks].sum()
        assert value >= best - 1e-9
        above.append((value - best) / (problem.value.max(1) - problem.value.min(1)).sum())
    assert np.mean(above) < 0.05
