"""Step sizes of widths that were not trained: between their neighbours, against the formula; who is trained at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from made_models import Dense

from mpq_jax import Refusal, flax_seam, row_policies
from mpq_jax.criteria.learned import learned
from mpq_jax.fewer_widths import filled_in, trained_on
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)


class Scanned(nn.Module):
    """Three equal layers, one leaf."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(nn.Dense(6, name="up")(x)), None

        x = nn.Dense(6, name="first")(x)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, name="head")(stack(name="layers")(x, None)[0])


def made(model, quantizer=None, **options):
    """(model, params with leaves drawn at random)"""
    quantized = quantize(model, X, quantizer=quantizer or lsq(), ends=None, tie_activations=False, **options)
    variables = quantized.calibrate(model.init(jax.random.key(0), X), X)
    rng = np.random.default_rng(1)
    flat = {
        path: jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)
        for path, leaf in flax_seam.flatten(variables["params"]).items()
    }
    return quantized, flax_seam.unflatten(flat)


def test_a_straight_line_of_logarithms_over_bits():
    quantized, params = made(Dense(3, (6,)), lsq(per_channel=True), bit_widths=(2, 3, 4, 5, 8))
    filled = filled_in(quantized, trained_on(quantized, (2, 4, 8)), params)
    before, after = flax_seam.flatten(params), flax_seam.flatten(filled)
    for path, leaf in before.items():
        s, new = np.asarray(leaf, np.float64), np.asarray(after[path])
        if "step_size" not in path:
            np.testing.assert_array_equal(new, s)
            continue
        for k in (0, 2, 4):
            np.testing.assert_array_equal(new[k], s[k].astype(np.float32))
        np.testing.assert_allclose(new[1], np.sqrt(s[0] * s[2]), rtol=1e-6)  # 3 bits, half way
        np.testing.assert_allclose(new[3], s[2] ** 0.75 * s[4] ** 0.25, rtol=1e-6)  # 5 bits, a quarter of the way
    again = filled_in(quantized, trained_on(quantized, (2, 4, 8)), filled)
    jax.tree.map(np.testing.assert_array_equal, filled, again)


def test_the_table_is_interpolated_as_the_leaves_are():
    quantized, params = made(Dense(3, (6,)), bit_widths=(2, 3, 4, 5, 6), rules=[("dense0", "w3/4/6,a2/5/6")])
    trained = trained_on(quantized, (2, 4, 6))
    own = {layer.path: (layer.weight_bit_widths, layer.activation_bit_widths) for layer in trained.layers}
    # dense0 may have neither 2-bit weights nor 4-bit activations: the nearest that it has are trained.
    assert own == {"dense0": ((3, 4, 6), (2, 5, 6)), "head": ((2, 4, 6), (2, 4, 6))}
    raw, table = (learned(quantized, {"params": each}) for each in (params, filled_in(quantized, trained, params)))
    np.testing.assert_array_equal(table.weight[0], raw.weight[0])
    np.testing.assert_array_equal(table.activation[0], raw.activation[0])
    for kind in ("weight", "activation"):
        s = getattr(raw, kind)[1]
        wanted = [s[0], np.sqrt(s[0] * s[2]), s[2], np.sqrt(s[2] * s[4]), s[4]]
        np.testing.assert_allclose(getattr(table, kind)[1], wanted, rtol=1e-6)


def test_layers_of_one_leaf_have_candidates_of_their_own():
    rules = [(r"layers/up\[1\]", "w2/3/4/6,a2/3/4/6"), ("layers/up", "w2/3/6,a2/3/6"), ("first|head", "float")]
    quantized, params = made(Scanned(), bit_widths=(2, 3, 4, 6), rules=rules)
    filled = filled_in(quantized, trained_on(quantized, (2, 4, 6)), params)
    old, new = (np.asarray(tree["layers"]["up"]["weight_step_size"], np.float64) for tree in (params, filled))
    np.testing.assert_allclose(new[1, 1], np.sqrt(old[1, 0] * old[1, 2]), rtol=1e-6)
    # The others have 3 as the nearest to 4: trained, and so left alone.
    for own in (0, 1, 3):
        np.testing.assert_array_equal(new[[0, 2], own], old[[0, 2], own])


def test_rows_are_drawn_from_what_is_trained():
    quantized, _ = made(Dense(3, (6,)), bit_widths=(2, 3, 4, 5, 6), activation_bit_widths=(3, 4, 8))
    trained = trained_on(quantized, (2, 4, 8))
    widths = trained.bit_widths, trained.activation_bit_widths
    assert widths == ((2, 4, 6), (3, 4, 8))
    drawn = row_policies.random_rows(jax.random.key(0), trained.layers, *widths, 200)
    assert {int(b) for bits in drawn.values() for b in bits.w} == {2, 4, 6}
    assert {int(b) for bits in drawn.values() for b in bits.a} == {3, 4, 8}


@pytest.mark.parametrize("widths", [(2, 4), (4, 6), (2, 7, 6), ()])
def test_widths_that_leave_something_to_extrapolate(widths):
    quantized, _ = made(Dense(3, (6,)), bit_widths=(2, 3, 4, 5, 6))
    with pytest.raises(Refusal, match=r"some of \(2, 3, 4, 5, 6\), with 2 and 6 among them"):
        trained_on(quantized, widths)


def test_levels_without_a_spacing():
    quantized = quantize(Dense(3, (6,)), X, quantizer=lq_nets(), bit_widths=(2, 3, 4), ends=None)
    with pytest.raises(Refusal, match="lq_nets cannot be interpolated"):
        trained_on(quantized, (2, 4))
