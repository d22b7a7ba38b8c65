"""Operands in front of their product: grids channel by channel in NumPy, codes, and what is measured on the way by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.numerics import at_bits, decode
from mpq_jax.operands import Operand, fake_quants, gathered, place_on_channels, tapped, with_state
from mpq_jax.quantizers import lq_nets, lsq, pact

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 5)
RNG = np.random.default_rng(0)
SHAPE, AXES = (3, 2, 4), (0, 2)  # of a weight, and its output channels' axes: 12 of them
CHANNELS = 12
W = RNG.normal(size=SHAPE)


def grid(x, step, bits):
    return np.round(np.clip(x / step, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * step


def operand(quantizer, x, leaves, bits, in_float=None, signed=True, axes=AXES):
    x, bits = jnp.asarray(x, jnp.float32), jnp.asarray(bits, jnp.int32)
    grid_bits = bits if in_float is None else jnp.where(in_float, WIDTHS[0], bits)
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}

    def place(leaf):
        return leaf if axes is None else place_on_channels(leaf, x, axes)

    chosen = {} if bits.ndim else {name: at_bits(leaf, WIDTHS, grid_bits) for name, leaf in leaves.items()}
    return Operand(quantizer, x, leaves, chosen, place, WIDTHS, bits, grid_bits, in_float, signed)


# ---- grids ----------------------------------------------------------------------------------------------------------


def test_entries_stand_on_their_channels():
    """Broadcast with the weight, entry c meets channel c, channels counted in the order of the weight's axes."""
    values = RNG.normal(size=(5, CHANNELS))
    placed = place_on_channels(jnp.asarray(values), W, AXES)
    assert placed.shape == (5, 3, 1, 4)
    meets = np.broadcast_to(placed[2], SHAPE)
    for c, (i, j) in enumerate(np.ndindex(3, 4)):
        np.testing.assert_allclose(meets[i, :, j], values[2, c], rtol=1e-6)
    assert place_on_channels(jnp.float32(3), W, AXES).shape == ()


@pytest.mark.parametrize("per_channel", [False, True])
def test_bits_of_each_channel(per_channel):
    """Each channel on a grid of its own, one step size a width or one a width and channel; codes decode to the same."""
    steps = RNG.uniform(0.1, 0.5, (3, CHANNELS) if per_channel else 3)
    bits = RNG.choice(WIDTHS, CHANNELS)
    mine = operand(lsq(per_channel=per_channel).weight, W, {"step_size": steps}, bits)
    expected = np.empty(SHAPE)
    for c, (i, j) in enumerate(np.ndindex(3, 4)):
        step = steps[WIDTHS.index(bits[c])]
        expected[i, :, j] = grid(W[i, :, j], step[c] if per_channel else step, bits[c])
    np.testing.assert_allclose(mine.on_grid(), expected, rtol=1e-5, atol=1e-6)
    codes, decoding = mine.encoded()
    assert codes.dtype == jnp.int32
    np.testing.assert_allclose(decode(codes, decoding), expected, rtol=1e-5, atol=1e-6)


def test_in_float_the_tensor_itself():
    """Whole, or where one layer of a stack is; the gradient is then 1."""
    steps = {"step_size": [0.5, 0.25, 0.1]}
    left = operand(lsq().weight, W, steps, 32, in_float=jnp.bool_(True))
    np.testing.assert_array_equal(left.on_grid(), np.float32(W))
    quantized = operand(lsq().weight, W, steps, 3, in_float=jnp.bool_(False))
    np.testing.assert_allclose(quantized.on_grid(), grid(W, 0.25, 3), atol=1e-6)
    assert float(tapped("error", {"weight": left, "activation": left}, None)) == 0


@pytest.mark.parametrize("bits", [4, np.where(np.arange(CHANNELS) == 5, 4, 3)], ids=["layer", "channel"])
def test_bits_that_are_no_candidate_show(bits):
    found = np.asarray(operand(lsq().weight, W, {"step_size": [0.5, 0.25, 0.1]}, bits).on_grid())
    wrong = np.isnan(found)
    expected = np.ones(SHAPE, bool) if np.ndim(bits) == 0 else (np.arange(CHANNELS) == 5).reshape(3, 1, 4)
    np.testing.assert_array_equal(wrong, np.broadcast_to(expected, SHAPE))


def test_grids_of_a_layer():
    """The functions that criteria take: any tensor at any candidate, with that width's own step size."""
    spec = types.SimpleNamespace(weight_bit_widths=WIDTHS, activation_bit_widths=(3, 5), signed=True)
    call = types.SimpleNamespace(channel_axes=AXES)
    steps, activation = RNG.uniform(0.1, 0.5, (3, CHANNELS)), np.array([0.3, 0.1])
    value = {"weight": {"step_size": jnp.float32(steps)}, "activation": {"step_size": jnp.float32(activation)}}
    of_weight, of_activation = fake_quants(spec, lsq(per_channel=True), call, jnp.float32(W), value)
    for k, bits in enumerate(WIDTHS):
        expected = grid(W, steps[k].reshape(3, 1, 4), bits)
        np.testing.assert_allclose(of_weight(jnp.float32(W), jnp.int32(bits)), expected, rtol=1e-5, atol=1e-6)
    for step, bits in zip(activation, (3, 5), strict=True):
        np.testing.assert_allclose(of_activation(jnp.float32(W), jnp.int32(bits)), grid(W, step, bits), atol=1e-6)


# ---- what is measured -----------------------------------------------------------------------------------------------


def both(quantizer, weight, activation, w, a):
    x = np.abs(RNG.normal(size=(16, 6))) * np.linspace(1, 3, 16)[:, None]  # no part of the batch like another
    return x, {
        "weight": operand(quantizer.weight, W, weight, w),
        "activation": operand(quantizer.activation, x, activation, a, signed=False, axes=None),
    }


def test_errors_by_hand():
    """mean (x_hat - x)^2 / mean x^2 of the weight and of an eighth of the batch's input; gradients to step sizes alone."""
    steps = {"step_size": [0.5, 0.25, 0.1]}
    x, operands = both(lsq(), steps, steps, 3, 2)
    x_hat = np.round(np.clip(x[:2] / 0.5, 0, 3)) * 0.5
    expected = np.square(grid(W, 0.25, 3) - W).mean() / np.square(W).mean()
    expected += np.square(x_hat - x[:2]).mean() / np.square(x[:2]).mean()
    np.testing.assert_allclose(tapped("error", operands, None), expected, rtol=1e-5)

    def error(w, leaf):
        moved = operand(lsq().weight, w, {"step_size": leaf}, 3)
        return tapped("error", {"weight": moved, "activation": operands["activation"]}, None)

    of_w, of_leaf = jax.grad(error, (0, 1))(jnp.float32(W), jnp.float32(steps["step_size"]))
    assert not of_w.any() and of_leaf[1] != 0 and not of_leaf[jnp.array([0, 2])].any()
    # A quantizer without trained leaves has no error to lower; a tensor of zeros one of 0.
    _, operands = both(pact(), {}, {"clip": [1.0, 1.0, 1.0]}, 3, 2)
    alone = tapped("error", {"weight": operands["weight"]} | {"activation": operands["activation"]}, None)
    weightless = operands["activation"]._replace(x=jnp.zeros((16, 6)))
    assert float(alone) > 0 == float(tapped("error", {"weight": operands["weight"], "activation": weightless}, None))


@pytest.mark.parametrize("samples", [2, 16])
@pytest.mark.parametrize(
    "options", [{}, {"ewgs": True}, {"power_of_two": True}, {"gradient_scale": False}, {"per_channel": True}]
)
def test_grid_and_error_in_one_pass_are_those_of_two(options, samples):
    """Values, and the gradients of a sum that takes both, to x and to the step sizes."""
    weight = lsq(**options).weight
    x, steps = RNG.normal(size=(16, 6)), RNG.uniform(0.1, 0.5, (3, 6) if options.get("per_channel") else 3)
    passed = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)

    def total(x, leaf, together):
        own = operand(weight, x, {"step_size": leaf}, 3, axes=(1,))
        x_hat, error = own.on_grid_with_error(samples) if together else (own.on_grid(), own.error(samples))
        return (x_hat * passed).sum() + 100 * error, (x_hat, error)

    arguments = jnp.float32(x), jnp.float32(steps)
    one, two = (jax.value_and_grad(total, (0, 1), has_aux=True)(*arguments, together) for together in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)
    assert one[1][1].any()


def test_penalties_by_hand():
    """PACT's on its clipping value of the bits in use; LSQ has none."""
    clips = {"clip": [3.0, 2.0, 1.5]}
    _, operands = both(pact(clip_penalty=0.25), {}, clips, 2, 5)
    np.testing.assert_allclose(tapped("penalty", operands, None), 0.25 * 1.5**2, rtol=1e-6)
    _, operands = both(lsq(), {"step_size": [1, 1, 1]}, {"step_size": [1, 1, 1]}, 2, 2)
    assert float(tapped("penalty", operands, None)) == 0


def test_state_moves_at_its_own_width_alone():
    """LQ-Nets' next basis stands in the row of the bits in use, and a count of 1; no row where channels have their own."""
    quantizer = lq_nets().activation
    x = jnp.asarray(np.abs(RNG.normal(size=(16, 6))), jnp.float32)
    leaves = {"basis": jnp.float32([[0.5, 1, 0, 0, 0], [0.2, 0.5, 1, 0, 0], [0.1, 0.2, 0.3, 0.4, 0.5]])}
    mine = operand(quantizer, x, leaves, 3, signed=False, axes=None)
    value = {"weight": leaves, "activation": leaves}
    found = tapped("state", {"activation": mine}, value)["activation"]["basis"]
    new, count = found
    np.testing.assert_array_equal(count, [0, 1, 0])
    expected = quantizer.update(x, {"basis": leaves["basis"][1]}, jnp.int32(3), False)["basis"]
    np.testing.assert_allclose(new[1], expected, rtol=1e-6)
    assert not new[jnp.array([0, 2])].any() and not np.allclose(new[1], leaves["basis"][1], atol=1e-6)
    apart = operand(lq_nets().weight, W, {"basis": np.zeros((3, 5, CHANNELS))}, np.full(CHANNELS, 3))
    new, count = tapped("state", {"weight": apart}, {"weight": apart.leaves})["weight"]["basis"]
    assert not new.any() and not count.any()


def test_sums_over_layers_and_means_over_runs():
    """A stacked leaf counts each layer, a repeated one the mean of its runs, a leaf called twice both calls."""
    specs = {
        "plain": types.SimpleNamespace(shared=()),
        "stacked": types.SimpleNamespace(shared=()),
        "again": types.SimpleNamespace(shared=(1,)),
    }
    taps = {
        ("plain", 0): {"error": jnp.float32(1)},
        ("plain", 1): {"error": jnp.float32(10)},
        ("stacked", 0): {"error": jnp.float32([100, 200])},
        ("again", 0): {"error": jnp.float32([[1000, 3000], [0, 0]])},
    }
    assert float(gathered("error", specs, lsq(), taps)) == 11 + 300 + 2000
    assert float(gathered("penalty", {}, lsq(), {})) == 0


def test_state_moves_to_the_mean_of_what_was_measured():
    """total / count where anything was measured; what no row used, and all other parameters, stay."""
    params = {"a": {"basis": jnp.float32([[1, 2], [3, 4]]), "kernel": jnp.ones(3)}}
    total, count = jnp.float32([[10, 20], [0, 0]]), jnp.float32([4, 0])
    after = with_state(params, {"a/basis": (total, count)})
    np.testing.assert_array_equal(after["a"]["basis"], [[2.5, 5], [3, 4]])
    np.testing.assert_array_equal(after["a"]["kernel"], 1)
    assert with_state(params, {}) is params
