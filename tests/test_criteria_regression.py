"""Regression finds planted models, and equals ridge regression by its normal equations."""

import itertools

import numpy as np
import pytest
from planted import ACTIVATIONS, LAYERS, MODEL, PATHS, WIDTHS, draw, log_loss, logged, planted
from scipy import stats
from sklearn.linear_model import Ridge

from mpq_jax import Bits, Refusal
from mpq_jax.criteria import regression
from mpq_jax.criteria.coupling import Pair
from mpq_jax.importance import total

PAIRS = (Pair("a", "b", "neighbours"), Pair("b", "d", "residual"))


def of_policies(table, bits):
    return np.array([total(table, {p: Bits(*map(int, b)) for p, b in zip(PATHS, row, strict=True)}) for row in bits])


def check_rows(table, truth, tolerance):
    """Against the planted effects, 0 at the widest; tied layers share theirs; what a rule took is the largest."""
    weight = truth[0] - truth[0][:, -1:]
    weight[3] = weight[3] - weight[3, 2]
    weight[3, [1, 3]] = weight[3, 0]
    activation = truth[1] - truth[1][:, -1:]
    activation[1:3] = activation[1:3].mean(0)
    np.testing.assert_allclose(table.weight, weight, atol=tolerance)
    np.testing.assert_allclose(table.activation, activation, atol=tolerance)


@pytest.mark.parametrize("monotone", [False, True])
def test_a_planted_additive_model(monotone):
    truth = planted(np.random.default_rng(0))
    measured = regression.regression(MODEL, logged(truth, 600), monotone=monotone)
    table = measured.importance
    assert table.alpha is None and table.interactions == () and measured.sample_passes == 0
    check_rows(table, truth, 0.02)
    fresh = draw(np.random.default_rng(9), 300)
    assert stats.spearmanr(of_policies(table, fresh), log_loss(truth, fresh)).statistic > 0.999
    assert measured.details["rows"] == 300 and measured.details["r2"] > 0.99


def test_a_planted_pairwise_model():
    truth = planted(np.random.default_rng(1), pairwise=True)
    log = logged(truth, 1500)
    measured = regression.regression_pairwise(MODEL, log, PAIRS, settled=1.0)
    table = measured.importance
    check_rows(table, truth, 0.05)
    found = {(each.a, each.b): each.table for each in table.interactions}
    # All that couple a with b and b with d, c's activation bits being b's; d's weights have two candidates of four.
    assert len(found) == 8 and all(t.shape == (len(_widths(a)), len(_widths(b))) for (a, b), t in found.items())
    for pair, matrix in found.items():
        np.testing.assert_allclose(matrix, truth[2].get(pair, np.zeros_like(matrix)), atol=0.06)
    fresh = draw(np.random.default_rng(9), 300)
    expected = log_loss(truth, fresh)
    predicted = of_policies(table, fresh)
    assert stats.spearmanr(predicted, expected).statistic > 0.995
    np.testing.assert_allclose(predicted - predicted.mean(), expected - expected.mean(), atol=0.15)
    additive = regression.regression(MODEL, log, settled=1.0).importance
    assert stats.spearmanr(of_policies(additive, fresh), expected).statistic < 0.98


def _widths(decision):
    return WIDTHS if decision[1] == "w" else ACTIVATIONS


def test_ridge_equals_its_normal_equations():
    """Least squares with rows sqrt(penalty) for what is penalised, and none for what is not."""
    log = logged(planted(np.random.default_rng(2)), 80, noise=0.2)
    units = regression.decisions(MODEL)
    couples = regression.coupled(MODEL, PAIRS, units)
    design = regression._design(units, couples, log, {"w": WIDTHS, "a": ACTIVATIONS})
    target, penalty, scale = np.log(log.loss.astype(np.float64)), 0.03, 0.5
    alone, together = regression._solve(design, target, penalty, scale)
    constant = np.ones((80, 1))
    x = np.concatenate([constant, design.free, design.alone, scale * design.together], 1)
    free = 1 + design.free.shape[1]
    penalties = np.eye(x.shape[1])[free:] * np.sqrt(penalty * 80)
    solved = np.linalg.lstsq(np.concatenate([x, penalties]), np.pad(target, (0, len(penalties))), rcond=None)[0]
    count = design.alone.shape[1]
    expected = solved[free : free + count] + design.shared @ solved[1:free]
    np.testing.assert_allclose(alone - _means(alone, units), expected - _means(expected, units), atol=1e-4)
    np.testing.assert_allclose(together, scale * solved[free + count :], atol=1e-4)
    # Cross-validation's predictions, of more columns than rows and of fewer, are those of the same regression.
    for rows in (slice(0, 20), slice(0, 80)):
        x, y = regression._weighted(design, scale)[rows], target[rows]
        for k in (0, 7, 14):
            theirs = Ridge(regression.PENALTIES[k] * len(y)).fit(x, y).predict(x[:5])
            np.testing.assert_allclose(regression._ridge_path(x, y, x[:5])[k], theirs, atol=1e-4)
    # Where no constraint can bind, the quadratic program is the ridge regression.
    singles = [regression.Decision((0,), "w", (2,))] * count
    np.testing.assert_allclose(regression._monotone(design, target, penalty, scale, singles)[1], together, atol=1e-3)


def _means(effects, units):
    parts = np.split(effects, np.cumsum([len(u.candidates) for u in units])[:-1])
    return np.concatenate([np.full(len(part), part.mean()) for part in parts])


def test_monotone_where_noise_is_not():
    truth = planted(np.random.default_rng(3))
    log = logged(truth, 60, noise=0.8)
    rough = regression.regression(MODEL, log).importance
    smooth = regression.regression(MODEL, log, monotone=True).importance
    assert (np.diff(rough.weight[:3]) > 1e-3).any() or (np.diff(rough.activation) > 1e-3).any()
    assert (np.diff(smooth.weight[:3]) < 1e-6).all() and (np.diff(smooth.activation) < 1e-6).all()
    assert smooth.weight[3, 0] >= smooth.weight[3, 2] - 1e-6


def test_what_regression_refuses_and_says():
    truth = planted(np.random.default_rng(0))
    with pytest.raises(Refusal, match="has 14 rows to use of 28, and regression needs 20 of 5 steps"):
        regression.regression(MODEL, logged(truth, 28))
    with pytest.raises(Refusal, match="above 0 and up to 1"):
        regression.regression(MODEL, logged(truth, 100), settled=0.0)
    with pytest.raises(Refusal, match="has 2 rows to use of 100"):
        regression.regression(MODEL, logged(truth, 100), settled=1e-20)
    log = logged(truth, 100)
    same = log._replace(policies=np.repeat(log.policies[..., :1], 2, -1) // 2 * 2)
    model = MODEL._replace(bit_widths=(2, 4, 6), activation_bit_widths=(2, 4, 6), layers=LAYERS[:2] + LAYERS[4:])
    notes = regression.regression(model, same._replace(policies=same.policies[:, [0, 3]])).notes
    assert any("always drawn alike" in note for note in notes)


def test_decisions_are_those_that_joint_training_draws():
    units = regression.decisions(MODEL)
    assert [(u.rows, u.kind) for u in units] == [
        *(((row,), "w") for row in range(4)),
        *((rows, "a") for rows in ((0,), (1, 2), (3,))),
    ]
    assert units[3].candidates == (2, 4)
    couples = {frozenset(pair) for pair in regression.coupled(MODEL, PAIRS, units)}
    a, b, d = (0, 4), (1, 5), (3, 6)
    assert couples == {frozenset(p) for x, y in ((a, b), (b, d)) for p in itertools.product(x, y)}
