"""Policies as Qwix rules: which layers have one, the model run by them, and Qwix's numbers against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from made_models import dense

from mpq_jax import Bits, Refusal, flax_seam, models, policy
from mpq_jax.export.qwix_rules import device_widths, qwix_model, qwix_rules
from mpq_jax.quantized_model import quantize

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 4, 8)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)


def calibrated(module, x, **options):
    model = quantize(module, x, bit_widths=WIDTHS, **options)
    variables = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)
    return model, jax.jit(lambda variables, x: model.calibrate(variables, x))(variables, x)


def uniform(model, w, a, **others):
    return policy.uniform(model.layers, w, a, WIDTHS, WIDTHS) | others


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_which_layers_have_rules():
    """One rule a layer of equal bits of 8 or 4; all others by name, with a reason."""
    model = quantize(dense(3, (12, 13, 14, 15, 16)), IMAGES, bit_widths=WIDTHS, rules=(("dense4", "float"),))
    per_channel = tuple([2, 4] * 7)
    bits = {"dense1": Bits(4, 8), "dense2": Bits(per_channel, 4), "dense3": Bits(2, 2), "dense4": Bits(32, 32)}
    both = uniform(model, 4, 4, **bits)
    taken = qwix_rules(model, both, widths=(8, 4))
    assert {leaf: (rule.module_path, rule.weight_qtype, rule.act_qtype) for leaf, rule in taken.rules.items()} == {
        "dense0/kernel": ("dense0", "int8", "int8"),
        "head/kernel": ("head", "int8", "int8"),
    }
    assert list(taken.refused) == ["dense1", "dense2", "dense3", "dense4"]
    reasons = list(taken.refused.values())
    assert "4" in reasons[0] and "8" in reasons[0] and "channel" in reasons[1]
    assert reasons[2].startswith("2 bits") and reasons[3] == "left in float"
    assert taken.lines()[3] == "dense4: left in float"
    four = qwix_rules(model, both | {"dense1": Bits(4, 4)}, widths=(8, 4))
    assert four.rules["dense1/kernel"].weight_qtype == "int4"
    assert "int4" in qwix_rules(model, both | {"dense1": Bits(4, 4)}, widths=(8,)).refused["dense1"]


def test_policies_are_those_of_the_model():
    model = quantize(dense(3, (12, 13)), IMAGES, bit_widths=WIDTHS)
    own = {"dense1": Bits(np.int64(4), np.int64(4))}  # the ends are fixed
    assert len(qwix_rules(model, own, widths=(8, 4)).rules) == 3
    with pytest.raises(Refusal, match="3 weight bits; its candidates are 2, 4, 8"):
        qwix_rules(model, {"dense1": Bits(3, 3)}, widths=(8, 4))


def by_absmax(x, axis):
    """Codes of [-127, 127] and scales by Qwix's rule: the largest magnitude is 127.5 steps. float64."""
    scale = np.abs(x).max(axis, keepdims=True) / 127.5
    return np.clip(np.round(x / scale), -127, 127), scale


def test_a_dense_layer_in_numpy():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)), jnp.float32)
    model, variables = calibrated(dense(7, ()), x, ends=None)
    found = qwix_model(model, dense(7, ()), variables, {"head": Bits(8, 8)}, x)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    (left, row), (right, column) = by_absmax(np.asarray(x, np.float64), 1), by_absmax(kernel, 0)
    expected = (left @ right) * row * column + np.asarray(variables["params"]["head"]["bias"])
    np.testing.assert_allclose(found.module.apply(found.variables, x), expected, rtol=0, atol=1e-5)
    assert found.provider == "ptq"
    codes = flax_seam.flatten(found.variables["params"])["head/kernel"].array.qvalue
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, right)


NETS = {
    "resnet8": models.create("resnet8", 5, width=0.25),
    "vit": models.create("vit", 5, dim=12, depth=1, heads=3),
}


@pytest.mark.parametrize("name", NETS)
def test_near_ours_at_8_bits(name):
    """All layers taken; Qwix's outputs are within 4 % of the float model's and 6 % of ours, in the Euclidean norm."""
    module = NETS[name]
    model, variables = calibrated(module, IMAGES)
    eight = uniform(model, 8, 8)
    found = qwix_model(model, module, variables, eight, IMAGES, train=False)
    assert len(found.taken.rules) == len(model.layers) and not found.taken.refused
    theirs = np.asarray(jax.jit(found.module.apply)(found.variables, IMAGES))
    real, ours = (
        np.asarray(jax.jit(lambda v, x, p=p: model.apply(v, p, x, train=False))(variables, IMAGES))
        for p in (None, eight)
    )
    assert 0 < relative(theirs, real) < 0.04
    assert 0 < relative(theirs, ours) < 0.06


def test_scanned_blocks_keep_their_float_parameters():
    """Under nn.scan all blocks share a rule, hence their bits; the codes are made in each call."""
    module = models.create("vit", 5, dim=12, depth=2, heads=3, scan=True)
    model, variables = calibrated(module, IMAGES)
    mixed = uniform(model, 8, 8) | {"blocks/mlp/fc1[1]": Bits(2, 8)}
    found = qwix_model(model, module, variables, mixed, IMAGES)
    assert found.provider == "qt" and list(found.taken.refused) == ["blocks/mlp/fc1[0]", "blocks/mlp/fc1[1]"]
    real = np.asarray(jax.jit(module.apply)(variables, IMAGES))
    assert 0 < relative(np.asarray(jax.jit(found.module.apply)(found.variables, IMAGES)), real) < 0.04


class Standardized(nn.Module):
    """A dense layer, and one whose weight is worked out from its parameter."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="plain")(x))
        return Weighted(name="weighted")(x)


class Weighted(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (6, 4))
        return x @ (kernel - kernel.mean(0))


def test_layers_that_qwix_does_not_find_are_listed():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
    model, variables = calibrated(Standardized(), x, ends=None)
    found = qwix_model(model, Standardized(), variables, uniform(model, 8, 8), x)
    assert list(found.taken.rules) == ["plain/kernel"]
    assert "did not find" in found.taken.refused["weighted"]
    out, real = found.module.apply(found.variables, x), Standardized().apply(variables, x)
    assert 0 < relative(np.asarray(out), np.asarray(real)) < 0.04


def test_four_bits_lower_where_the_device_has_them():
    """Rules of int4 become int4 products of the program for a GPU; a device without such products is told of."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 24)), jnp.float32)
    model, variables = calibrated(dense(7, (16,)), x, ends=None)
    four = uniform(model, 4, 4)
    assert 8 in device_widths()
    if 4 not in device_widths():
        with pytest.raises(Refusal, match="no product of int4"):
            qwix_model(model, dense(7, (16,)), variables, four, x)
    found = qwix_model(model, dense(7, (16,)), variables, four, x, widths=(8, 4), train=False)
    program = jax.export.export(jax.jit(found.module.apply), platforms=["cuda"])(found.variables, x).mlir_module()
    assert "tensor<16x7xi4>" in program
    codes = [
        leaf.array.qvalue for leaf in flax_seam.flatten(found.variables["params"]).values() if hasattr(leaf, "how")
    ]
    assert [c.dtype for c in codes] == [jnp.int4, jnp.int4]


def test_nnx_model_takes_the_rules():
    module = models.create("cnn_nnx", 5, width=0.25)
    model = quantize(module, IMAGES, bit_widths=WIDTHS, train=False)
    eight = uniform(model, 8, 8, conv2=Bits(2, 2))
    taken = qwix_rules(model, eight, widths=(8,))
    assert list(taken.refused) == ["conv2"]
    provider = qwix.PtqProvider(list(taken.rules.values()))
    under = qwix.quantize_model(module, provider, IMAGES, train=False)
    assert not provider.get_unused_rules()
    assert 0 < relative(np.asarray(under(IMAGES, train=False)), np.asarray(module(IMAGES, train=False))) < 0.04
    with pytest.raises(Refusal, match="no Linen model"):
        qwix_model(model, module, model.variables, eight, IMAGES)
