"""Controls: tables that know little, against NumPy and SciPy by hand."""

import numpy as np
from planted import ACTIVATIONS, LAYERS, MODEL, WIDTHS, logged, planted
from scipy import stats

from mpq_jax import Importance
from mpq_jax.criteria import controls
from mpq_jax.criteria.learned import fit_alpha
from mpq_jax.importance import combined


def base(seed=0):
    rng = np.random.default_rng(seed)
    weight = np.exp(rng.normal(size=(4, 4)) - np.arange(4))
    weight[3, [1, 3]] = weight[3, [0, 2]].max()
    activation = np.exp(rng.normal(size=(4, 3)) - np.arange(3))
    return Importance("learned", WIDTHS, ACTIVATIONS, LAYERS, weight, activation, alpha=1.5)


def test_power_law_is_a_line_through_logarithms():
    table, learned = controls.power_law(base()), base()
    for kind, sizes in (("weight", [100, 400, 90, 7]), ("activation", [50, 20, 20, 300])):
        for column in range(len(WIDTHS if kind == "weight" else ACTIVATIONS)):
            # The last layer may not have the second and the fourth width.
            has = slice(0, 3 if kind == "weight" and column in (1, 3) else 4)
            x, y = np.log(sizes), np.log(getattr(learned, kind)[:, column])
            line = np.poly1d(np.polyfit(x[has], y[has], 1))
            mine = getattr(table, kind)[:, column]
            np.testing.assert_allclose(mine[has], np.exp(line(x[has])), rtol=1e-9)
    assert table.weight[3, 1] == table.weight[3, 3] == max(table.weight[3, [0, 2]])
    assert table.alpha == 1.5 and table.criterion == "power_law"
    one = base()._replace(layers=LAYERS[:2], weight=base().weight[:1], activation=base().activation[:1])
    np.testing.assert_allclose(controls.power_law(one).weight, one.weight)


def test_constant_is_the_geometric_mean():
    table, learned = controls.constant(base()), base()
    for column in range(4):
        has = slice(0, 3 if column in (1, 3) else 4)
        np.testing.assert_allclose(table.weight[:3, column], stats.gmean(learned.weight[has, column]))
    np.testing.assert_allclose(table.activation, np.tile(stats.gmean(learned.activation), (4, 1)))
    assert np.ptp(table.weight[:3], axis=0).max() < 1e-12


def test_alpha_of_a_control_is_fitted_where_there_is_a_log():
    log = logged(planted(np.random.default_rng(4)), 300)
    for control in (controls.power_law, controls.constant):
        table = control(base(), log)
        assert table.alpha == fit_alpha(table, log) != 1.5


def test_random_and_reversed():
    table, again, other = (controls.random(MODEL, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(table.weight, again.weight)
    assert not np.allclose(table.weight, other.weight) and table.weight.shape == (4, 4)
    np.testing.assert_allclose(table.weight[:3] / table.weight[:3, :1], np.tile([1, 0.5, 0.25, 0.0625], (3, 1)))
    factors = np.log(np.concatenate([controls.random(MODEL, s).activation[:, 0] * 4 for s in range(300)]))
    assert stats.kstest(factors, "norm").pvalue > 0.01
    learned, wrong = base(), controls.reversed_(base())
    order = np.argsort(combined(learned).mean((1, 2)))
    expected = learned.weight[order[::-1]]
    last = int(np.flatnonzero(order == 3)[0])  # may not have the second and the fourth width
    expected[last, [1, 3]] = expected[last, [0, 2]].max()
    np.testing.assert_array_equal(wrong.weight[order], expected)
    np.testing.assert_array_equal(wrong.activation[order], learned.activation[order[::-1]])
    assert (wrong.criterion, wrong.alpha) == ("reversed", 1.5)
