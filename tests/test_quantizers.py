"""Quantizers: one table of properties over all variants; LSQ against the paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.numerics import at_bits, integer_range
from mpq_jax.quantizers import lsq

VARIANTS = {
    "lsq": lsq(),
    "lsq same start": lsq("same"),
    "lsq per channel": lsq(per_channel=True),
    "lsq power of two": lsq(power_of_two=True),
    "lsq narrow": lsq(narrow=True),
    "lsq unscaled": lsq(gradient_scale=False),
}
KINDS = [("weight", True), ("activation", True), ("activation", False)]


def tensor(signed, seed=0, shape=(4, 5, 6)):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(x if signed else np.maximum(x, 0))


def at(values, widths, bits, ndim, channels):
    """The values at one bit-width, shaped to broadcast (channels on the last axis)."""
    chosen = {k: at_bits(v, widths, jnp.int32(bits)) for k, v in values.items()}
    return {k: v.reshape([1] * (ndim - 1) + [channels]) if v.ndim else v for k, v in chosen.items()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind, signed", KINDS)
def test_properties(name, kind, signed):
    """Codes lie in the range, decode(encode) is fake_quant, it is idempotent, and more bits err less."""
    quantizer = getattr(VARIANTS[name], kind)
    x, widths = tensor(signed), (2, 3, 4, 8)
    values = quantizer.init(x, widths, signed, (2,))
    assert all(np.all(np.asarray(v) > 0) and v.shape[0] == len(widths) for v in values.values())
    errors = []
    for bits in widths:
        one = at(values, widths, bits, x.ndim, x.shape[-1])
        codes = np.asarray(quantizer.encode(x, one, jnp.int32(bits), signed))
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if name == "lsq narrow" and kind == "weight":
            low += 1
        assert codes.min() >= low and codes.max() <= high
        x_hat = quantizer.fake_quant(x, one, jnp.int32(bits), signed)
        np.testing.assert_array_equal(x_hat, quantizer.decode(codes, one))
        again = quantizer.fake_quant(x_hat, one, jnp.int32(bits), signed)
        np.testing.assert_array_equal(x_hat, again)
        errors.append(float(jnp.square(x_hat - x).mean()))
        assert quantizer.indicator(one, jnp.int32(bits), signed).shape == ()
        assert float(quantizer.indicator(one, jnp.int32(bits), signed)) > 0
    if name != "lsq same start":  # 0.1 / b clips more, not less, with more bits on a unit normal
        assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_traced_bits_compile_once(name):
    quantizer, x, widths = VARIANTS[name].weight, tensor(True), (2, 3, 4)
    values = quantizer.init(x, widths, True, (2,))
    traces = []

    @jax.jit
    def run(bits):
        traces.append(1)
        chosen = {k: at_bits(v, widths, bits) for k, v in values.items()}
        return quantizer.fake_quant(x, chosen, bits, True)

    outs = [np.asarray(run(jnp.int32(b))) for b in widths]
    assert len(traces) == 1
    assert all(len(np.unique(out)) > 1 for out in outs)


def lsq_float64(x, s, q_n, q_p, upstream):
    """LSQ equations 1 to 3 and section 2.2 in NumPy float64: x_hat, dL/dx, dL/ds for dL/dx_hat = upstream."""
    v = x / s
    x_hat = np.round(np.clip(v, -q_n, q_p)) * s
    d_s = np.where(v < -q_n, -q_n, np.where(v > q_p, q_p, np.round(v) - v))
    inside = (v >= -q_n) & (v <= q_p)
    g = 1 / np.sqrt(q_p * x.size)
    return x_hat, upstream * inside, g * np.sum(upstream * d_s)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_equals_the_paper_in_float64(bits, signed):
    from mpq_jax.quantizers import lsq as module  # noqa: F401
    from mpq_jax.quantizers.lsq import fake_quant

    rng = np.random.default_rng(bits)
    x, upstream = rng.normal(size=(7, 11)), rng.normal(size=(7, 11))
    s = 0.37
    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    expected = lsq_float64(x, s, q_n, q_p, upstream)
    with jax.enable_x64(True):

        def loss(x, s):
            g = 1 / jnp.sqrt(q_p * x.size)
            x_hat = fake_quant(x, s, jnp.float64(q_n), jnp.float64(q_p), g)
            return (x_hat * upstream).sum(), x_hat

        (_, x_hat), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(jnp.asarray(x), jnp.asarray(s))
        for mine, paper in zip((x_hat, *grads), expected, strict=True):
            assert mine.dtype == jnp.float64
            np.testing.assert_allclose(mine, paper, rtol=1e-10, atol=1e-10)


def test_lsq_step_size_gradient_by_finite_differences():
    """Between two rounding points x_hat is linear in s at fixed codes: there the true derivative is the code."""
    x = jnp.array([0.26, 0.9, -1.3, 5.0], jnp.float32)  # codes at s = 0.5, 3 bits: 1, 2, -3, 3
    quantizer = lsq(gradient_scale=False).weight

    def total(s):
        return quantizer.fake_quant(x, {"step_size": s}, jnp.int32(3), True).sum()

    codes = np.asarray(quantizer.encode(x, {"step_size": jnp.float32(0.5)}, jnp.int32(3), True))
    np.testing.assert_array_equal(codes, [1, 2, -3, 3])
    difference = (total(jnp.float32(0.501)) - total(jnp.float32(0.499))) / 0.002
    np.testing.assert_allclose(difference, codes.sum(), rtol=1e-3)
    # LSQ's rule is the code minus x/s where x is not clipped: the straight-through part of d x_hat / d s.
    expected = codes.sum() - np.asarray(x[:3]).sum() / 0.5
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(0.5)), expected, rtol=1e-5)


def test_starts_equal_limpq():
    """methods of LIMPQ's code, recomputed in NumPy."""
    w = np.random.default_rng(1).normal(0.1, 0.5, (3, 3, 4, 8)).astype(np.float32)
    a = np.abs(w)
    widths = (2, 4, 6)
    mean, std = w.astype(np.float64).mean(), w.astype(np.float64).std()
    expected_w = [max(abs(mean - 3 * std), abs(mean + 3 * std)) / 2 ** (b - 1) for b in widths]
    expected_a = [2 * np.abs(a).mean() / np.sqrt(2**b - 1) for b in widths]
    np.testing.assert_allclose(
        lsq().weight.init(jnp.asarray(w), widths, True, (3,))["step_size"], expected_w, rtol=1e-5
    )
    found = lsq().activation.init(jnp.asarray(a), widths, False, ())["step_size"]
    np.testing.assert_allclose(found, expected_a, rtol=1e-5)
    same = lsq("same").weight.init(jnp.asarray(w), widths, True, (3,))["step_size"]
    np.testing.assert_allclose(same, [0.1 / b for b in widths], rtol=1e-6)
    per_channel = lsq(per_channel=True).weight.init(jnp.asarray(w), widths, True, (3,))["step_size"]
    mean, std = w.mean((0, 1, 2)), w.std((0, 1, 2))
    expected = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 2
    np.testing.assert_allclose(per_channel[0], expected, rtol=1e-4)


def test_power_of_two():
    quantizer = lsq(power_of_two=True).weight
    x_hat = quantizer.fake_quant(jnp.array([0.3, 0.7]), {"step_size": jnp.float32(0.3)}, jnp.int32(4), True)
    np.testing.assert_array_equal(x_hat, [0.25, 0.75])


def test_integer_range_and_selection():
    for bits in range(2, 17):
        assert [float(v) for v in integer_range(jnp.int32(bits), True)] == [2 ** (bits - 1), 2 ** (bits - 1) - 1]
        assert [float(v) for v in integer_range(jnp.int32(bits), False)] == [0, 2**bits - 1]
    values = jnp.array([10.0, 20.0, 30.0])
    assert float(at_bits(values, (2, 4, 8), jnp.int32(4))) == 20
    assert np.isnan(float(at_bits(values, (2, 4, 8), jnp.int32(3))))
