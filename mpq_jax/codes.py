"""Products of integer codes, with the scales multiplied in after: what integer arithmetic computes.

x_hat = s_a (c_a + o_a) and w_hat = s_w (c_w + o_w), so  sum x_hat w_hat = s_a s_w sum (c_a + o_a)(c_w + o_w):
the sum is one of whole numbers wherever the offsets are 0, or 1/2 (then of doubled codes and halved scales).
"""

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
    total = contraction(*(pair if side == 0 else pair[::-1]))
    scale = output_scale(w_step, (primitive, params, side), channel_axes, total.ndim) * x_step
    return total.astype(jnp.float32) * scale


def largest_sum(codes: np.ndarray, largest: int, channel_axes: Sequence[int]) -> int:
    """The largest |sum| that a product with these whole numbers (a weight's) can come to, inputs up to `largest`.

    For each output channel the sum of |numbers|, times `largest`; the largest of these. Every partial sum is within it.
    """
    axes = tuple(i for i in range(codes.ndim) if i not in channel_axes)
    return int(np.abs(codes.astype(np.int64)).sum(axis=axes).max() * largest)
