"""HiGHS stated by us: CVXPY's program and SciPy's against brute force; the child that is ended at its limit."""

import math
import os
import time

import numpy as np
import pytest
from tables import best_by_force, budgets_of, made

from mpq_jax.search.problem import build
from mpq_jax.search.solvers import Answer, highs, highs_without_presolve, in_child, scipy_highs

SOLVERS = [highs, highs_without_presolve, scipy_highs]


@pytest.mark.parametrize("solver", SOLVERS)
def test_answers(solver):
    for seed in range(3):
        importance = made(seed, tied=seed % 2 == 0, pair=seed == 2)
        budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
        problem = build(importance, budgets)
        answer = solver(problem, (), 20.0)
        best, _ = best_by_force(importance, budgets)
        value = problem.value[np.arange(len(answer.picks)), answer.picks].sum()
        assert answer.proved and not answer.infeasible and problem.fits(answer.picks)
        assert value == pytest.approx(best, abs=1e-9) and answer.bound == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_cuts_take_the_best_away_until_none_is_left(solver):
    importance = made(1, layers=2, widths=(2, 3))
    problem = build(importance, budgets_of(importance, "bitops=W32A32"))
    cuts, values = [], []
    for _ in range(16):
        answer = solver(problem, tuple(cuts), 20.0)
        cuts.append(answer.picks)
        values.append(problem.value[np.arange(2), answer.picks].sum())
    assert np.allclose(values, np.sort(np.add.outer(*problem.value).ravel()))
    assert solver(problem, tuple(cuts), 20.0) == Answer(None, -math.inf, False, infeasible=True)


def slow(seconds):
    time.sleep(60)


def broken(seconds):
    raise MemoryError


def killed(seconds):
    os.kill(os.getpid(), 9)


def answers(word, seconds):
    return (word, seconds)


def test_a_child_is_ended_at_the_limit():
    began = time.monotonic()
    assert in_child(slow, (), 0.3) is None
    assert time.monotonic() - began < 3
    assert in_child(broken, (), 5.0) is None and in_child(killed, (), 5.0) is None
    assert in_child(answers, ("yes",), 5.0) == ("yes", 5.0)
