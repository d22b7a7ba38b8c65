"""From configs to layer tables: LIMPQ's published costs, and the way from a parameter tree to a policy without files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mpq_jax import Bits, Refusal, build, costs
from mpq_jax import config as config_lib
from mpq_jax.criteria.learned import learned
from mpq_jax.importance import combined
from mpq_jax.quantized_model import quantize
from mpq_jax.search import solve

# Model: searched layers, their GMACs, G BitOps at W2A2 W3A3 W3A4 W4A4 W8A8 (first and last layer at 8 bits), weights,
# compression at W3 and W4: as the paper's settings give them at 224x224.
PUBLISHED = {
    "resnet18": (19, "1.6955", ("14.37", "22.85", "27.93", "34.71", "116.10"), 11_678_912, ("9.93", "7.66")),
    "resnet50": (52, "3.9691", ("23.56", "43.41", "55.31", "71.19", "261.71"), 25_502_912, ("9.40", "7.40")),
    "mobilenetv1": (26, "0.5569", ("2.987", "5.771", "7.442", "9.669", "36.40"), 4_209_088, ("7.59", "6.43")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_costs(name):
    """Every digit, found by tracing the config's model."""
    searched, gmacs, bitops, weights, compression = PUBLISHED[name]
    layers = build.layer_table(config_lib.load(f"configs/imagenet_{name}.py"))
    chosen = [layer for layer in layers if layer.searched]
    assert len(chosen) == searched and [ly.searched for ly in layers].count(False) == 2
    assert not layers[0].searched and not layers[-1].searched
    assert f"{sum(ly.macs for ly in chosen) / 1e9:.4f}" == gmacs
    assert sum(ly.params for ly in layers) == weights
    uniform = costs.describe(layers)["uniform"]

    def digits(value, like):
        return f"{value:.{len(like.partition('.')[2])}f}"

    found = [uniform[w]["bitops"] / 1e9 for w in ("W2A2", "W3A3", "W3A4", "W4A4", "W8A8")]
    assert tuple(digits(x, like) for x, like in zip(found, bitops, strict=True)) == bitops
    found = [uniform[w]["compression"] for w in ("W3A3", "W4A4")]
    assert tuple(digits(x, like) for x, like in zip(found, compression, strict=True)) == compression


def test_rules_and_ends_from_a_config():
    config = config_lib.Config(
        quantize=config_lib.Quantize(rules=("shortcut=float", "stage3=w4/6,a4"), ends="searched"),
    )
    table = {layer.path: layer for layer in build.layer_table(config)}
    assert table["stem/conv"].searched and table["head"].searched
    assert table["stage2/block1/shortcut_conv"].bits == Bits(32, 32)
    assert table["stage3/block1/conv1"].weight_bit_widths == (4, 6)
    assert table["stage3/block1/conv1"].activation_bit_widths == (4,)
    for settings, words in (
        ({"rules": ("stem",)}, 'no "="'),
        ({"ends": "8"}, "quantize.ends"),
        ({"start": "x"}, "start"),
    ):
        with pytest.raises(Refusal, match=words):
            build.layer_table(config_lib.Config(quantize=config_lib.Quantize(**settings)))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x = nn.relu(nn.Dense(6, name=f"dense{i}")(x))
        return x


def test_from_a_parameter_tree_to_a_policy():
    """No files: the step sizes in a tree are the table; narrowed layers never take what they may not."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    model = Layers()
    quantized = quantize(model, x, bit_widths=(2, 3, 4), rules=[("dense2", "w3/4,a2/3/4")])
    variables = quantized.calibrate(model.init(jax.random.key(0), x), x)
    importance = learned(quantized, variables)
    params = variables["params"]
    np.testing.assert_allclose(importance.weight[0], params["dense1"]["weight_step_size"], rtol=1e-6)
    np.testing.assert_allclose(importance.weight[1, 1:], params["dense2"]["weight_step_size"], rtol=1e-6)
    assert importance.weight[1, 0] == importance.weight[1].max()
    np.testing.assert_allclose(importance.activation[1], params["dense2"]["activation_step_size"], rtol=1e-6)
    budgets = costs.parse_budgets(["bitops=W3A3"], importance.layers, (2, 3, 4), (2, 3, 4))
    found = solve(importance, budgets)
    assert found.status == "optimal" and found.policy["dense2"].w >= 3
    assert np.isfinite(quantized.apply(variables, found.policy, x)).all()
    assert found.objective == pytest.approx(
        sum(combined(importance)[i, b.w - 2, b.a - 2] for i, b in enumerate(found.policy[f"dense{k}"] for k in (1, 2)))
    )
