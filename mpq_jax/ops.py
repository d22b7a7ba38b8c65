"""Convolution and dot product whose rows run one by one under `vmap`.

XLA turns a convolution with P kernels (what plain `vmap` makes of it) into a grouped one, which on CPU is 20 times
slower than P convolutions, and its depthwise convolution is 40 times slower than a sum of shifted products. Here:
rows one by one where both operands have a row axis; folded into the batch where the kernel has none; depthwise
convolutions on CPU as shifted products.

`kernels="smooth"` is for forward-mode and second derivatives of the network: JAX's own operations, and for depthwise
convolutions on CPU the shifted products. `kernels="plain"` gives JAX's own operations everywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

Kernels = Literal["rows", "smooth", "plain"]
Contraction = Callable[[jax.Array, jax.Array], jax.Array]  # (lhs, rhs) -> out
# What JAX's own functions take of these primitives' parameters.
FIELDS = {
    "dot_general": ("dimension_numbers", "precision", "preferred_element_type"),
    "conv_general_dilated": (
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
    ),
}


def contract(primitive: str, params: dict[str, Any], kernels: Kernels = "rows") -> Contraction:
    """The function (lhs, rhs) -> out of a "dot_general" or "conv_general_dilated" with these jaxpr parameters."""
    plain = _plain(primitive, params)
    if kernels == "plain":
        return plain
    product = _by_rows(plain) if kernels == "rows" else plain
    if primitive == "dot_general" or jax.default_backend() != "cpu":
        return product

    def convolution(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _depthwise(params, lhs, rhs) if _is_depthwise(params, lhs, rhs) else product(lhs, rhs)

    return convolution


def _plain(primitive: str, params: dict[str, Any]) -> Contraction:
    function = lax.dot_general if primitive == "dot_general" else lax.conv_general_dilated
    return functools.partial(function, **{name: params[name] for name in FIELDS[primitive]})


def _rows_one_by_one(function: Contraction) -> Contraction:
    """`function` of two arrays, with a batching rule: a loop where both have a row axis, else JAX's own rule."""

    @custom_vmap
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return function(a, b)

    @one.def_vmap
    def rule(axis_size: int, in_batched: list[bool], a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
        if all(in_batched):
            return jnp.stack([one(a[i], b[i]) for i in range(axis_size)]), True
        axes = tuple(0 if batched else None for batched in in_batched)
        return jax.vmap(function, axes)(a, b), True

    return one


def _by_rows(plain: Contraction) -> Contraction:
    """`plain` (bilinear) with rows one by one in the forward pass and in both gradients."""
    forward = _rows_one_by_one(plain)

    # custom_vmap has no transpose rule of its own, so each gradient is a custom_vmap too.
    @jax.custom_vjp
    def contraction(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return forward(lhs, rhs)

    def fwd(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return forward(lhs, rhs), (lhs, rhs)

    def bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        lhs, rhs = residuals
        left, right = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals)
        to_lhs = _rows_one_by_one(lambda g, r: jax.linear_transpose(lambda x: plain(x, r), left)(g)[0])
        to_rhs = _rows_one_by_one(lambda g, x: jax.linear_transpose(lambda r: plain(x, r), right)(g)[0])
        return to_lhs(gradient, rhs), to_rhs(gradient, lhs)

    contraction.defvjp(fwd, bwd)
    return contraction


def _is_depthwise(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> bool:
    """NHWC x HWIO, one input and one output channel a group, no dilation."""
    numbers = params["dimension_numbers"]
    return (
        lhs.ndim == 4
        and params["feature_group_count"] == lhs.shape[3] == rhs.shape[3] > 1
        and params["batch_group_count"] == 1
        and tuple(numbers.lhs_spec) == (0, 3, 1, 2)
        and tuple(numbers.rhs_spec) == (3, 2, 0, 1)
        and tuple(numbers.out_spec) == (0, 3, 1, 2)
        and all(d == 1 for d in (*params["lhs_dilation"], *params["rhs_dilation"]))
        and all(p >= 0 for pair in params["padding"] for p in pair)
    )


def _depthwise(params: dict[str, Any], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """y[b, h, w, c] = sum over i, j of x[b, s h + i, s w + j, c] k[i, j, 0, c]: shifted products."""
    kernel_h, kernel_w = rhs.shape[:2]
    stride_h, stride_w = params["window_strides"]
    x = jnp.pad(lhs, ((0, 0), *params["padding"], (0, 0)))
    out_h = (x.shape[1] - kernel_h) // stride_h + 1
    out_w = (x.shape[2] - kernel_w) // stride_w + 1

    def shifted(i: int, j: int) -> jax.Array:
        rows = slice(i, i + (out_h - 1) * stride_h + 1, stride_h)
        columns = slice(j, j + (out_w - 1) * stride_w + 1, stride_w)
        return x[:, rows, columns, :] * rhs[i, j, 0]

    y = sum(shifted(i, j) for i in range(kernel_h) for j in range(kernel_w))
    return jnp.asarray(y, params["preferred_element_type"] or lhs.dtype)
