"""One tensor on several grids: against NumPy, each grid rounded by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.mixture import mixture, on_grid, one_hot
from mpq_jax.quantizers import lsq

WIDTHS = (2, 4, 5)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 2, 4))


def grid(x, step, bits, signed):
    """float64; step broadcasts with x."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.round(np.clip(x / step, low, high)) * step


def per_channel(leaf):
    return leaf.reshape(1, 2, 1)


@pytest.mark.parametrize("signed", [True, False])
def test_each_grid_by_hand(signed):
    steps = RNG.uniform(0.1, 0.5, (3, 2))
    leaves = {"step_size": jnp.asarray(steps, jnp.float32)}
    for k, bits in enumerate(WIDTHS):
        found = on_grid(lsq().weight, jnp.float32(X), leaves, WIDTHS, k, signed, per_channel)
        np.testing.assert_allclose(found, grid(X, steps[k].reshape(1, 2, 1), bits, signed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shares", [(3,), (3, 1, 2, 1)], ids=["of the tensor", "of each channel"])
def test_a_mixture_is_the_sum_and_its_shares_have_the_grids_as_slope(shares):
    steps, m, up = RNG.uniform(0.1, 0.5, 3), RNG.dirichlet(np.ones(3), shares[1:]), RNG.normal(size=X.shape)
    m = np.moveaxis(m, -1, 0)
    leaves = {"step_size": jnp.asarray(steps, jnp.float32)}
    grids = [grid(X, step, bits, True) for step, bits in zip(steps, WIDTHS, strict=True)]
    found, pull = jax.vjp(
        lambda m: mixture(lsq().weight, jnp.float32(X), leaves, WIDTHS, m, True), jnp.asarray(m, jnp.float32)
    )
    np.testing.assert_allclose(found, sum(m[k] * grids[k] for k in range(3)), rtol=1e-5, atol=1e-6)
    # dL/dm_k = sum of dL/dx_hat Q_k(x) over what the share is of.
    axes = (0, 1, 2) if len(shares) == 1 else (0, 2)
    expected = np.stack([(up * q).sum(axes) for q in grids]).reshape(m.shape)
    np.testing.assert_allclose(pull(jnp.asarray(up, jnp.float32))[0], expected, rtol=1e-4, atol=1e-5)


def test_the_type_of_the_tensor_is_kept():
    leaves = {"step_size": jnp.float32([0.5, 0.25, 0.125])}
    x = jnp.asarray(X, jnp.bfloat16)
    assert mixture(lsq().weight, x, leaves, WIDTHS, jnp.float32([0.2, 0.3, 0.5]), True).dtype == jnp.bfloat16


def test_one_hot():
    """Rows of the identity; none for a width that is no candidate."""
    bits = np.array([[5, 2, 4], [4, 3, 16]])
    found = jax.jit(lambda bits: one_hot(bits, WIDTHS))(jnp.asarray(bits, jnp.int32))
    expected = np.array([[[float(b == w) for b in row] for row in bits] for w in WIDTHS])
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.float32 and not found[:, 1, 1:].any()
    np.testing.assert_array_equal(one_hot(jnp.int32(4), WIDTHS), [0, 1, 0])
