"""Regression finds planted models; coupled layers of known networks; controls against NumPy by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge

from mpq_jax import Bits, Importance, Layer, QuantizedModel, Refusal, models
from mpq_jax.criteria import controls, regression
from mpq_jax.criteria.coupling import Pair, coupled_pairs, searched_pairs
from mpq_jax.criteria.learned import RowLog, fit_alpha
from mpq_jax.importance import combined, total
from mpq_jax.quantized_model import quantize

WIDTHS, ACTIVATIONS = (2, 3, 4, 6), (2, 4, 8)
LAYERS = (
    Layer("stem", 10, 10, False, Bits(8, 8)),
    Layer("a", 100, 10, True, inputs=50),
    Layer("b", 400, 10, True, tied="in", inputs=20),
    Layer("c", 90, 10, True, tied="in", inputs=20),
    Layer("d", 7, 10, True, weight_bit_widths=(2, 4), inputs=300),
)
MODEL = QuantizedModel(LAYERS, {}, (), WIDTHS, ACTIVATIONS, None, None, None, None, None)
PATHS = ("a", "b", "c", "d")
PAIRS = (Pair("a", "b", "neighbours"), Pair("b", "d", "residual"))


def draw(rng, count):
    """int [N, 4, 2], as joint training draws: tied layers together, candidates of their own."""
    bits = np.stack([rng.choice(WIDTHS, (count, 4)), rng.choice(ACTIVATIONS, (count, 4))], -1)
    bits[:, 3, 0] = rng.choice((2, 4), count)
    bits[:, 2, 1] = bits[:, 1, 1]
    return bits


def planted(rng, pairwise=False):
    """(weight [4, 4], activation [4, 3], {(path, kind), (path, kind): [K, K]}): log loss of each choice."""
    weight = rng.uniform(0.5, 2, (4, 1)) * 2.0 ** -np.arange(4)
    activation = rng.uniform(0.3, 1.5, (4, 1)) * 2.0 ** -np.arange(3)
    together = {}
    if pairwise:
        for a, b in ((("a", "w"), ("b", "w")), (("a", "w"), ("b", "a")), (("b", "a"), ("d", "a"))):
            sizes = [len(WIDTHS if kind == "w" else ACTIVATIONS) for _, kind in (a, b)]
            raw = rng.normal(0, 0.4, sizes)
            together[a, b] = raw - raw.mean(0) - raw.mean(1, keepdims=True) + raw.mean()
    return weight, activation, together


def log_loss(truth, bits):
    weight, activation, together = truth
    w, a = (np.searchsorted(widths, bits[..., k]) for k, widths in enumerate((WIDTHS, ACTIVATIONS)))
    rows = np.arange(4)
    result = weight[rows, w].sum(1) + activation[rows, a].sum(1)
    for (first, second), table in together.items():
        at = [(w if kind == "w" else a)[:, PATHS.index(path)] for path, kind in (first, second)]
        result = result + table[tuple(at)]
    return result


def logged(truth, count, seed=0, noise=0.01):
    """Two rows a step; each step's batch makes all its losses larger or smaller."""
    rng = np.random.default_rng(seed)
    bits = draw(rng, count)
    step = np.arange(count) // 2
    batch = rng.normal(0, 0.3, count)[step]
    loss = np.exp(log_loss(truth, bits) + batch - 1 + noise * rng.normal(size=count))
    return RowLog(step, bits, loss.astype(np.float32), np.exp(0.7 + batch).astype(np.float32))


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


# ---- coupled layers -----------------------------------------------------------------------------------------------


def pairs_of(name, **options):
    model = models.create(name, 10, **options)
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    quantized = quantize(model, x, train=False)
    variables = quantized.variables or jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    return quantized, coupled_pairs(quantized, variables, x, train=False)


def test_coupled_layers_of_a_residual_network():
    quantized, found = pairs_of("resnet8")
    neighbours = {(p.first, p.second) for p in found if p.kind == "neighbours"}
    residual = {(p.first, p.second) for p in found if p.kind == "residual"}
    blocks = [f"stage{i}/block1" for i in (1, 2, 3)]
    assert residual == {
        ("stem/conv", f"{blocks[0]}/conv2"),
        (f"{blocks[1]}/conv2", f"{blocks[1]}/shortcut_conv"),
        (f"{blocks[2]}/conv2", f"{blocks[2]}/shortcut_conv"),
    }
    ends = {0: ("stem/conv", f"{blocks[0]}/conv2"), 1: (f"{blocks[1]}/conv2", f"{blocks[1]}/shortcut_conv")}
    expected = {(f"{block}/conv1", f"{block}/conv2") for block in blocks} | {("stem/conv", f"{blocks[0]}/conv1")}
    for i, makers in ends.items():
        expected |= {(maker, f"{blocks[i + 1]}/{name}") for maker in makers for name in ("conv1", "shortcut_conv")}
    expected |= {(f"{blocks[2]}/{name}", "head") for name in ("conv2", "shortcut_conv")}
    assert neighbours == expected
    inner = searched_pairs(quantized, found)
    assert {p for p in found if "stem" not in p.first and p.second != "head"} == set(inner)


def test_coupled_layers_in_a_chain_and_in_a_scan():
    _, chain = pairs_of("cnn_nnx")
    assert chain == tuple(Pair(a, b, "neighbours") for a, b in itertools.pairwise(("conv1", "conv2", "conv3", "head")))
    options = {"depth": 2, "dim": 8, "heads": 2, "patch_size": 4}
    _, looped = pairs_of("vit", **options)
    _, scanned = pairs_of("vit", **options, scan=True)

    def renamed(path):
        for i in range(2):
            if path.endswith(f"[{i}]"):
                return path[:-3].replace("blocks/", f"block{i + 1}/")
        return path

    assert {(renamed(p.first), renamed(p.second), p.kind) for p in scanned} == set(looped)
    assert ("block1/mlp/fc2", "block2/attn/out", "residual") in set(looped)


# ---- controls -----------------------------------------------------------------------------------------------------


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
