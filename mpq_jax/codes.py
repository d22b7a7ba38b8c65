"""Products of integer codes, with the scales multiplied in after: what integer arithmetic computes.

x_hat = s_a (c_a + o_a) and w_hat = s_w (c_w + o_w), so  sum x_hat w_hat = s_a s_w sum (c_a + o_a)(c_w + o_w):
the sum is one of whole numbers wherever the offsets are 0, or 1/2 (then of doubled codes and halved scales).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.types import Decoding, Refusal


def multiples(codes: Any, decoding: Decoding, what: str) -> tuple[Any, Any]:
    """(whole numbers, step) with  x_hat = step * numbers;  int32, the shape of the codes; step: of decoding.scale.

    Raises Refusal, naming `what`, for grids without a common step.
    """
    if decoding.table is not None:
        raise Refusal(
            f"{what} has levels from a table (LQ-Nets), which are no multiples of one step: integer arithmetic cannot "
            "run it; choose another quantizer, e.g. --quantizer lsq"
        )
    offset = np.unique(np.asarray(decoding.offset))
    if (offset == 0).all():
        return codes, decoding.scale
    if (offset == 0.5).all():
        return 2 * codes + 1, decoding.scale / 2
    raise Refusal(f"{what} has a grid with an offset of {offset[0]:g} steps; integer arithmetic here knows 0 and 1/2")


def output_channel_axes(primitive: str, params: Mapping[str, Any], side: int, weight_ndim: int, ndim: int) -> list[int]:
    """Axes of a product's output, of `ndim` axes, that are output channels: in the order of the weight's own.

    side: which operand the weight is.
    """
    if primitive == "conv_general_dilated":
        return [params["dimension_numbers"].out_spec[1]]
    contracting, batch = params["dimension_numbers"]
    count = weight_ndim - len(batch[side]) - len(contracting[side])
    first = len(batch[side]) if side == 0 else ndim - count
    return list(range(first, first + count))


def output_scale(
    scale: Any, product: tuple[str, Mapping[str, Any], int], channel_axes: Sequence[int], ndim: int
) -> Any:
    """The scale of a weight, [] or one an output channel in the weight's layout, shaped to broadcast with the output.

    product: primitive, parameters, and which operand the weight is. ndim: of the output.
    """
    if jnp.size(scale) == 1:
        return jnp.reshape(scale, ())
    shape = [1] * ndim
    for mine, theirs in zip(channel_axes, output_channel_axes(*product, jnp.ndim(scale), ndim), strict=True):
        shape[theirs] = jnp.shape(scale)[mine]
    return jnp.reshape(scale, shape)


def product_of_codes(
    primitive: str,
    params: Mapping[str, Any],
    side: int,
    channel_axes: Sequence[int],
    weight: tuple[Any, Decoding],
    activation: tuple[Any, Decoding],
    path: str,
    integers: bool = False,
) -> jax.Array:
    """A layer's output, float32, from the codes of both operands and their decodings.

    integers: int32 operands and an int32 sum. Else both are float32 numbers, and the sum is the same as long as no
    partial sum exceeds 2^24.
    """
    w, w_step = multiples(*weight, f"the weight of layer {path!r}")
    x, x_step = multiples(*activation, f"the input of layer {path!r}")
    dtype = jnp.int32 if integers else jnp.float32
    pair = (jnp.asarray(w, dtype), jnp.asarray(x, dtype))
    exact = {"preferred_element_type": dtype, "precision": jax.lax.Precision.HIGHEST}  # no TF32, no bfloat16 passes
    contraction = ops.contract(primitive, {**params, **exact}, "plain")
    if integers and primitive == "conv_general_dilated":
        contraction = functools.partial(_convolution, params)  # GPUs have none of int32, but the dot product
    total = contraction(*(pair if side == 0 else pair[::-1]))
    scale = output_scale(w_step, (primitive, params, side), channel_axes, total.ndim) * x_step
    return total.astype(jnp.float32) * scale


def _convolution(params: Mapping[str, Any], lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """`conv_general_dilated` with these parameters as dot products: the sum over the kernel's positions."""
    numbers, groups, batches = params["dimension_numbers"], params["feature_group_count"], params["batch_group_count"]
    x, k = jnp.transpose(lhs, numbers.lhs_spec), jnp.transpose(rhs, numbers.rhs_spec)  # [N, C, *in], [O, I, *window]
    edges = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *edges])
    window, strides, dilation = k.shape[2:], params["window_strides"], params["rhs_dilation"]
    sizes = [
        max(0, (n - (w - 1) * d - 1) // s + 1)
        for n, w, s, d in zip(x.shape[2:], window, strides, dilation, strict=True)
    ]
    # A group of channels or of samples meets its own part of the filters.
    outputs, samples, both = k.shape[0], x.shape[0] // batches, groups * batches  # one of the two is 1
    k = k.reshape(both, outputs // both, *k.shape[1:])  # [G, O / G, I, *window]
    total: Any = 0
    for at in np.ndindex(*window):
        first = [i * d if n else 0 for i, d, n in zip(at, dilation, sizes, strict=True)]
        last = [f + (n - 1) * s + 1 if n else 0 for f, n, s in zip(first, sizes, strides, strict=True)]
        seen = jax.lax.slice(x, (0, 0, *first), (*x.shape[:2], *last), (1, 1, *strides))
        seen = seen.reshape(batches, samples, groups, k.shape[2], *sizes)
        seen = jnp.moveaxis(seen, 2, 0).reshape(both, samples, k.shape[2], *sizes)
        total += jnp.einsum("gni...,goi->ngo...", seen, k[:, :, :, *at], preferred_element_type=x.dtype)
    out = numbers.out_spec
    return jnp.transpose(total.reshape(samples, outputs, *sizes), [out.index(i) for i in range(len(out))])


def largest_sum(codes: np.ndarray, largest: int, channel_axes: Sequence[int]) -> int:
    """The largest |sum| that a product with these whole numbers (a weight's) can come to, inputs up to `largest`.

    For each output channel the sum of |numbers|, times `largest`; the largest of these. Every partial sum is within it.
    """
    axes = tuple(i for i in range(codes.ndim) if i not in channel_axes)
    return int(np.abs(codes.astype(np.int64)).sum(axis=axes).max() * largest)
