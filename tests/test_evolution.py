"""Evolution on problems small enough to try every policy."""

import numpy as np
import pytest
from measured import Known, check_resumed, losses
from tables import budgets_of, cost_by_hand, made

from mpq_jax import Refusal
from mpq_jax.policy import validate
from mpq_jax.search import solve
from mpq_jax.search.evolution import crossed, evolve, mutated
from mpq_jax.search.journal import Ended, Journal
from mpq_jax.search.methods import Evolution
from mpq_jax.search.others import random_fitting
from mpq_jax.search.problem import build

SMALL = Evolution(generations=4, population=20, top=5, mutations=8, crossovers=8)


@pytest.mark.parametrize("options", [{}, {"tied": True}])
def test_finds_the_optimum(tmp_path, options):
    """With the published settings, 1000 of 531441 policies: the optimum that the ILP proves. Each policy once."""
    importance = made(5, layers=6, **options)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance))
    evolve(build(importance, budgets), journal, Evolution(), seed=1)
    assert min(losses(journal)) == pytest.approx(solve(importance, budgets).objective, rel=1e-12)
    seen = {tuple(sorted(e.policy.items())) for e in journal.evaluated}
    assert len(seen) == len(journal.evaluated) == 1000
    for evaluation in journal.evaluated:
        assert all(cost_by_hand(importance, evaluation.policy, b.name) <= b.limit for b in budgets)
        validate(evaluation.policy, importance.layers, importance.bit_widths, importance.bit_widths, "evolution")


def test_children_are_allowed():
    """Mutations and crossovers keep candidates, rules and ties; probability 0 changes nothing, 1 anything."""
    importance = made(8, layers=6, tied=True, narrowed=True)._replace(rules=("layer[45]=share", "layer3=2,2|4,4"))
    problem = build(importance, budgets_of(importance, "bitops=W4A4"))
    rng = np.random.default_rng(0)
    one, other = (random_fitting(problem, rng) for _ in range(2))
    assert (mutated(problem, one, 0.0, rng) == one).all()
    changed = np.zeros(len(one), bool)
    for _ in range(200):
        child = mutated(problem, one, 0.5, rng)
        assert (problem.picks(problem.policy(child)) == child).all()
        changed |= child != one
        both = crossed(problem, one, other, rng)
        assert (problem.picks(problem.policy(both)) == both).all() and ((both == one) | (both == other)).all()
    assert changed.all()


def test_a_space_that_is_used_up(tmp_path):
    """Nine policies in all: each is measured once, and the search ends."""
    importance = made(3, layers=1)
    budgets = budgets_of(importance, "bitops=W4A4")
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance))
    evolve(build(importance, budgets), journal, SMALL, seed=0)
    assert len(journal.evaluated) == 9


def test_resumed(tmp_path):
    importance = made(5, layers=4, tied=True)
    budgets = budgets_of(importance, "bitops=W3A3")
    problem = build(importance, budgets)
    check_resumed(tmp_path, importance, budgets, lambda journal: evolve(problem, journal, SMALL, 3), [7, 30])
    with pytest.raises(Ended):
        journal = Journal(tmp_path / "whole", importance, budgets, Known(importance), evaluations=25)
        evolve(problem, journal, SMALL, 3)
    assert len(journal.evaluated) == 25


def test_nothing_fits(tmp_path):
    importance = made(5, layers=4)
    budgets = [b._replace(limit=b.fixed + 1) for b in budgets_of(importance, "bitops=W3A3")]
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance))
    with pytest.raises(Refusal, match="no policy within the budgets was found at random"):
        evolve(build(importance, budgets), journal, SMALL, seed=0)
