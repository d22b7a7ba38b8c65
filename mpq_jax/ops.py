"""Convolution and dot product whose rows run one by one under `vmap`.

XLA turns a convolution with P kernels (what plain `vmap` makes of it) into a grouped one, which on CPU is 20 times
slower than P convolutions. Here: rows one by one where both operands have a row axis; folded into the batch where the
kernel has none; on CPU the forms of cpu_convolution.py.

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

from mpq_jax import cpu_convolution

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
        at = cpu_convolution.geometry(params, lhs, rhs)
        if at is None:
            return product(lhs, rhs)
        if cpu_convolution.is_depthwise(params, lhs, rhs):
            smooth = functools.partial(cpu_convolution.depthwise, at, own=False)
            return (_depthwise_by_rows(at) if kernels == "rows" else smooth)(lhs, rhs)
        if params["feature_group_count"] == 1 and kernels == "rows":
            return _convolution_by_rows(at)(lhs, rhs)
        return product(lhs, rhs)

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


Gradient = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (the operand's shape and type, gradient, other operand)


def _by_rows(plain: Contraction) -> Contraction:
    """`plain` (bilinear) with rows one by one in the forward pass and in both gradients."""
    return _with_gradients(
        _rows_one_by_one(plain),
        lambda left, g, rhs: jax.linear_transpose(lambda x: plain(x, rhs), left)(g)[0],
        lambda right, g, lhs: jax.linear_transpose(lambda k: plain(lhs, k), right)(g)[0],
    )


def _convolution_by_rows(at: cpu_convolution.Geometry) -> Contraction:
    return _with_gradients(
        _rows_one_by_one(functools.partial(cpu_convolution.forward, at)),
        lambda left, g, k: cpu_convolution.input_gradient(at, left.shape[1:3], g, k).astype(left.dtype),
        lambda right, g, x: cpu_convolution.filter_gradient(at, right.shape[:2], x, g).astype(right.dtype),
    )


def _depthwise_by_rows(at: cpu_convolution.Geometry) -> Contraction:
    """The products go over all rows at once: only the sums of the filter gradient gain by going one by one."""
    return _with_gradients(
        functools.partial(cpu_convolution.depthwise, at),
        lambda left, g, k: cpu_convolution.depthwise_input_gradient(at, left.shape[1:3], g, k).astype(left.dtype),
        lambda right, g, x: cpu_convolution.depthwise_filter_gradient(at, right.shape[:2], x, g).astype(right.dtype),
    )


def _with_gradients(forward: Contraction, to_lhs: Gradient, to_rhs: Gradient) -> Contraction:
    """`forward` with these gradients, each with its rows one by one."""

    # custom_vmap has no transpose rule of its own, so each gradient is a custom_vmap too.
    @jax.custom_vjp
    def contraction(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return forward(lhs, rhs)

    def fwd(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return forward(lhs, rhs), (lhs, rhs)

    def bwd(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        lhs, rhs = residuals
        left, right = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals)
        of_lhs, of_rhs = (
            _rows_one_by_one(functools.partial(gradient_of, like))
            for gradient_of, like in ((to_lhs, left), (to_rhs, right))
        )
        return of_lhs(gradient, rhs), of_rhs(gradient, lhs)

    contraction.defvjp(fwd, bwd)
    return contraction
