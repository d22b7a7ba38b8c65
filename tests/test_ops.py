"""ops: values and gradients against JAX's own operations, alone and under vmap in every combination."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpq_jax import cpu_convolution, ops

NUMBERS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolution(strides=(1, 1), padding=((1, 1), (1, 1)), groups=1, lhs_dilation=(1, 1)):
    return {
        "window_strides": strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": (1, 1),
        "dimension_numbers": NUMBERS,
        "feature_group_count": groups,
        "batch_group_count": 1,
        "precision": None,
        "preferred_element_type": None,
    }


DOT = {"dimension_numbers": (((2,), (0,)), ((), ())), "precision": None, "preferred_element_type": None}
CASES = {
    "3x3": ("conv_general_dilated", convolution(), (2, 6, 5, 4), (3, 3, 4, 3)),
    "3x3 of few channels": ("conv_general_dilated", convolution(), (2, 9, 8, 1), (3, 3, 1, 5)),
    "image smaller than its kernel": ("conv_general_dilated", convolution(), (2, 2, 2, 4), (3, 3, 4, 3)),
    "result smaller than the kernel": ("conv_general_dilated", convolution((2, 2)), (2, 4, 5, 4), (3, 3, 4, 3)),
    "stride leaves rows over": (
        "conv_general_dilated",
        convolution((3, 2), ((0, 0), (1, 0))),
        (2, 8, 7, 2),
        (3, 4, 2, 3),
    ),
    "wide padding": ("conv_general_dilated", convolution(padding=((3, 2), (0, 4))), (2, 4, 5, 2), (2, 3, 2, 3)),
    "1x1 stride 2": ("conv_general_dilated", convolution((2, 2), ((0, 0), (0, 0))), (2, 6, 6, 4), (1, 1, 4, 5)),
    "transposed": ("conv_general_dilated", convolution(lhs_dilation=(2, 2)), (2, 4, 4, 3), (3, 3, 3, 2)),
    "grouped": ("conv_general_dilated", convolution(groups=2), (2, 5, 5, 4), (3, 3, 2, 6)),
    "depthwise": ("conv_general_dilated", convolution(groups=4), (2, 6, 5, 4), (3, 3, 1, 4)),
    "depthwise stride 2": ("conv_general_dilated", convolution((2, 2), groups=4), (2, 7, 6, 4), (3, 3, 1, 4)),
    "depthwise uneven padding": (
        "conv_general_dilated",
        convolution((2, 1), ((0, 1), (2, 0)), groups=4),
        (2, 7, 6, 4),
        (3, 2, 1, 4),
    ),
    "dot": ("dot_general", DOT, (2, 3, 4), (4, 5)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batched", list(itertools.product([False, True], repeat=2)))
def test_rows_equal_plain(case, batched):
    """Forward and both gradients; where both operands have a row axis, the plain operation runs in a Python loop."""
    primitive, params, lhs_shape, rhs_shape = CASES[case]
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.normal(size=((3, *lhs_shape) if batched[0] else lhs_shape)), jnp.float32)
    rhs = jnp.asarray(rng.normal(size=((3, *rhs_shape) if batched[1] else rhs_shape)), jnp.float32)
    axes = tuple(0 if b else None for b in batched)

    def loss(lhs, rhs):
        product = ops.contract(primitive, params, "rows")
        out = jax.vmap(product, axes)(lhs, rhs) if any(batched) else product(lhs, rhs)
        return jnp.sin(out).sum(), out

    def reference(lhs, rhs):
        product = ops.contract(primitive, params, "plain")
        rows = [product(lhs[i] if batched[0] else lhs, rhs[i] if batched[1] else rhs) for i in range(3)]
        out = jnp.stack(rows) if any(batched) else rows[0]
        return jnp.sin(out).sum(), out

    def with_gradients(function):
        return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(lhs, rhs)

    ((_, out), grads), ((_, expected), expected_grads) = with_gradients(loss), with_gradients(reference)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["3x3", "image smaller than its kernel", "1x1 stride 2", "depthwise", "grouped"])
def test_products_summed_in_a_wider_type(case):
    """bfloat16 operands, float32 results: gradients have the operands' type, and equal those of JAX's own operation."""
    primitive, params, lhs_shape, rhs_shape = CASES[case]
    params = {**params, "preferred_element_type": jnp.float32}
    rng = np.random.default_rng(5)
    lhs, rhs = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in (lhs_shape, rhs_shape))

    def gradients(kernels):
        def loss(lhs, rhs):
            return jnp.sin(ops.contract(primitive, params, kernels)(lhs, rhs)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)

    for mine, theirs in zip(gradients("rows"), gradients("plain"), strict=True):
        assert mine.dtype == theirs.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(mine), np.float32(theirs), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("case", ["3x3", "3x3 of few channels", "stride leaves rows over", "depthwise stride 2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_filter_gradients_of_a_few_samples_at_a_time(case, dtype, monkeypatch):
    """Summed over parts of the batch: the same as NumPy's sum over positions in float64."""
    primitive, params, (_, *image), rhs_shape = CASES[case]
    rng = np.random.default_rng(3)
    x, k = (jnp.asarray(rng.normal(size=s), dtype) for s in ((10, *image), rhs_shape))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # where the tests run on a GPU
    monkeypatch.setattr(cpu_convolution, "_COPIED", 1200)
    monkeypatch.setattr(cpu_convolution, "_MULTIPLIED", 1)
    y, to_filter = jax.vjp(lambda k: ops.contract(primitive, params)(x, k), k)
    dy = jnp.asarray(rng.normal(size=y.shape), dtype)
    assert "scan" in str(jax.make_jaxpr(to_filter)(dy))
    expected = np.zeros(rhs_shape)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), *params["padding"], (0, 0)))
    for i, j in np.ndindex(*rhs_shape[:2]):
        rows, columns = (
            s * np.arange(n) + at for s, n, at in zip(params["window_strides"], y.shape[1:3], (i, j), strict=True)
        )
        seen = padded[:, rows[:, None], columns]
        depthwise = params["feature_group_count"] > 1
        expected[i, j] = np.einsum("bpqc,bpqc->c" if depthwise else "bpqi,bpqo->io", seen, np.asarray(dy, np.float64))
    size = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(jax.jit(to_filter)(dy)[0], np.float64), expected, rtol=size, atol=size * 10)


def test_per_row_gradients():
    """vmap of grad, as criteria use it."""
    primitive, params, lhs_shape, rhs_shape = CASES["3x3"]
    lhs, rhs = jnp.ones((3, *lhs_shape)), jnp.linspace(-1, 1, 3 * np.prod(rhs_shape)).reshape(3, *rhs_shape)

    def gradient(kernels):
        def loss(rhs, lhs):
            return jnp.square(ops.contract(primitive, params, kernels)(lhs, rhs)).sum()

        return jax.jit(jax.vmap(jax.grad(loss)))(rhs, lhs)

    np.testing.assert_allclose(gradient("rows"), gradient("plain"), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["3x3", "depthwise stride 2", "dot"])
def test_smooth_kernels_differentiate_twice(case):
    """Hessian-vector products equal those of JAX's own operations, rows under vmap too."""
    primitive, params, lhs_shape, rhs_shape = CASES[case]
    rng = np.random.default_rng(4)
    lhs, rhs, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, *lhs_shape), rhs_shape, rhs_shape))

    def product(kernels, lhs):
        def loss(rhs):
            return jnp.sin(ops.contract(primitive, params, kernels)(lhs, rhs)).sum()

        return jax.jvp(jax.grad(loss), (rhs,), (v,))[1]

    smooth, plain = (jax.jit(jax.vmap(lambda x, k=k: product(k, x)))(lhs) for k in ("smooth", "plain"))
    np.testing.assert_allclose(smooth, plain, rtol=1e-3, atol=1e-3)


def test_rows_make_no_grouped_convolution():
    """What plain vmap makes of P kernels is one convolution in P groups; here there are P without groups."""
    primitive, params, lhs_shape, rhs_shape = CASES["3x3"]

    def groups(kernels):
        rows = jax.vmap(ops.contract(primitive, params, kernels))
        program = jax.jit(rows).lower(jnp.ones((3, *lhs_shape)), jnp.ones((3, *rhs_shape))).as_text()
        return re.findall(r"feature_group_count = (\d+)", program)

    assert groups("plain") == ["3"]
    assert set(groups("rows")) == {"1"}


def test_hessian_vector_product_with_plain_kernels():
    """jvp of grad through the plain operation, against finite differences of the gradient."""
    primitive, params, lhs_shape, rhs_shape = CASES["3x3"]
    rng = np.random.default_rng(2)
    lhs, rhs, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (lhs_shape, rhs_shape, rhs_shape))

    gradient = jax.jit(jax.grad(lambda r: jnp.square(ops.contract(primitive, params, "plain")(lhs, r)).sum()))
    product = jax.jit(lambda rhs: jax.jvp(gradient, (rhs,), (v,))[1])(rhs)
    difference = (gradient(rhs + 1e-2 * v) - gradient(rhs - 1e-2 * v)) / 2e-2
    np.testing.assert_allclose(product, difference, rtol=1e-2, atol=0.1)
