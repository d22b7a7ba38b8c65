"""From probabilities to policies: samples against enumeration, repairs measured first."""

import jax.numpy as jnp
import numpy as np
import pytest
from measured import Known, log_without_seconds
from shares import allowed_policies, problem_of, random_theta
from tables import cost_by_hand

from mpq_jax.search import gumbel, likely
from mpq_jax.search.journal import Journal
from mpq_jax.search.problem import build


def test_samples_have_their_probabilities():
    importance, _, problem = problem_of(layers=2, rules=(), tied=True)
    shares = np.asarray(gumbel.final_shares(random_theta(gumbel.init_theta(problem), 3), problem))
    log_p = likely.log_probabilities(problem, shares)
    rng = np.random.default_rng(0)
    drawn = [tuple(likely.sampled(problem, log_p, rng)) for _ in range(3000)]
    for picks in allowed_policies(problem, importance):
        p = np.exp(log_p[np.arange(2), picks].sum())
        assert abs(drawn.count(tuple(picks)) / 3000 - p) < 4 * np.sqrt(p * (1 - p) / 3000) + 1e-3


def test_measured_at_the_end(tmp_path, capsys):
    """The most likely policy breaks the budget: it is repaired, said so, and measured first; then samples that fit."""
    importance, budgets, problem = problem_of(budget="bitops=W3A3", rules=())
    theta = random_theta(gumbel.init_theta(problem), 5)
    theta["pair"] = theta["pair"] + jnp.asarray([[[0.5 * (i + j) for j in range(3)] for i in range(3)]])
    shares = np.asarray(gumbel.final_shares(theta, problem))
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance))
    likely.measure_policies(problem, shares, journal, 4, np.random.default_rng(0))
    assert "breaks a budget; repaired" in capsys.readouterr().out
    first, *others = log_without_seconds(tmp_path / "log")
    assert first["repaired"] and first["least_loss"] and first["before"] > first["log_probability"]
    assert len(others) == 3 and all(line["sampled"] for line in others)
    assert len({str(e.policy) for e in journal.evaluated}) == 4
    for evaluation in journal.evaluated:
        assert cost_by_hand(importance, evaluation.policy, "bitops") <= budgets[0].limit
    loose = Journal(tmp_path / "loose", importance, [], Known(importance))
    likely.measure_policies(build(importance, []), shares, loose, 1, np.random.default_rng(0))
    (line,) = log_without_seconds(tmp_path / "loose")
    assert not line["repaired"] and line["log_probability"] == pytest.approx(first["before"])
