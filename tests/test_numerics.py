"""Rounding, ranges and gradients: values against NumPy, gradients against what each is meant to be."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpq_jax import numerics
from mpq_jax.numerics import at_bits, integer_range
from mpq_jax.types import Decoding


def test_rounding_is_half_to_even_with_slope_one():
    x = np.array([-2.5, -1.5, -0.5, 0.49, 0.5, 1.5, 2.5, 3.7], np.float32)
    value, pull = jax.vjp(numerics.round_straight_through, jnp.asarray(x))
    np.testing.assert_array_equal(value, [-2, -2, -0.0, 0, 0, 2, 2, 4])
    up = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(pull(up)[0], up)
    np.testing.assert_array_equal(jax.jvp(numerics.round_straight_through, (x,), (up,))[1], up)


def test_a_value_with_anothers_slope():
    """The value is the first argument's, to the last bit; no gradient reaches it, all of the second's slope counts."""
    on_grid, x = jnp.float32(0.1) + jnp.float32([0.2, 0.7]), jnp.float32([0.3, -2.0])

    def function(on_grid, x):
        return numerics.straight_through(on_grid, jnp.sin(x)).sum()

    value = numerics.straight_through(on_grid, jnp.sin(x))
    np.testing.assert_array_equal(value, on_grid)
    of_grid, of_x = jax.grad(function, (0, 1))(on_grid, x)
    assert not of_grid.any()
    np.testing.assert_allclose(of_x, np.cos([0.3, -2.0]), rtol=1e-6)


@pytest.mark.parametrize("signed, narrow, low, high", [(True, False, -8, 7), (True, True, -7, 7), (False, True, 0, 15)])
def test_four_bits(signed, narrow, low, high):
    """All codes of 4 bits, counted; `narrow` is of signed ranges only."""
    q_n, q_p = integer_range(jnp.int32(4), signed, narrow)
    assert (-float(q_n), float(q_p)) == (low, high) and q_n.dtype == q_p.dtype == jnp.float32


def test_integer_range_and_selection():
    for bits in range(2, 17):
        assert [float(v) for v in integer_range(jnp.int32(bits), True)] == [2 ** (bits - 1), 2 ** (bits - 1) - 1]
        assert [float(v) for v in integer_range(jnp.int32(bits), False)] == [0, 2**bits - 1]
    values = jnp.array([10.0, 20.0, 30.0])
    assert float(at_bits(values, (2, 4, 8), jnp.int32(4))) == 20
    assert np.isnan(float(at_bits(values, (2, 4, 8), jnp.int32(3))))


def test_the_gradient_of_a_choice_is_in_its_own_place():
    """d values[k] / d values: 1 at k and 0 elsewhere, entries with channels too; a stack of bits at once."""
    values = jnp.arange(12.0).reshape(3, 4)
    chosen = jax.vmap(lambda bits: at_bits(values, (2, 4, 8), bits))(jnp.int32([8, 2, 4]))
    np.testing.assert_array_equal(chosen, np.asarray(values)[[2, 0, 1]])
    slope = jax.grad(lambda values: at_bits(values, (2, 4, 8), jnp.int32(4)).sum())(values)
    np.testing.assert_array_equal(slope, np.eye(3)[1][:, None] * np.ones((1, 4)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_wide_and_narrow(dtype):
    """float32 at least, float64 where it is; and back: what float16 cannot hold becomes its largest number."""
    with jax.enable_x64(True):
        x = jnp.asarray([1e5, -1e5, 0.1], dtype)
        assert numerics.wide(x).dtype == ("float64" if dtype == "float64" else "float32")
        back = numerics.narrow(jnp.asarray([1e5, -1e5, 0.1], jnp.float64), jnp.dtype(dtype))
    expected = [65504, -65504, 0.1] if dtype == "float16" else [1e5, -1e5, 0.1]
    np.testing.assert_array_equal(back, np.asarray(expected, getattr(ml_dtypes, dtype, dtype)))


def test_codes_and_what_they_stand_for():
    """scale * (code + offset); a table; a table of each channel, on the axes behind its first: code by code in Python."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 4, (3, 5)), rng.uniform(0.1, 1, 5)
    found = numerics.decode(jnp.asarray(codes), Decoding(jnp.float32(scale), 0.5))
    np.testing.assert_allclose(found, (codes + 0.5) * scale, rtol=1e-6)
    table = rng.normal(size=4)
    found = numerics.decode(jnp.asarray(codes), Decoding(table=jnp.float32(table)))
    np.testing.assert_allclose(found, [[table[c] for c in row] for row in codes], rtol=1e-6)
    table = rng.normal(size=(4, 1, 5))
    found = numerics.decode(jnp.asarray(codes), Decoding(table=jnp.float32(table)))
    expected = [[table[code, 0, channel] for channel, code in enumerate(row)] for row in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (1,), (1, 4), (3, 1), (2, 1, 4), (1, 1, 1), (2, 3, 4)])
def test_sums_are_the_adjoint_of_broadcasting(shape):
    """<broadcast(a), x> = <a, sum_to(x)> for every a."""
    rng = np.random.default_rng(1)
    x, a = rng.normal(size=(2, 3, 4)), rng.normal(size=shape)
    summed = np.asarray(numerics.sum_to(jnp.asarray(x), shape), np.float64)
    assert summed.shape == shape
    np.testing.assert_allclose((a * summed).sum(), (np.broadcast_to(a, x.shape) * x).sum(), rtol=1e-4)
