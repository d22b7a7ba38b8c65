"""QIL: Jung et al., "Learning to Quantize Deep Networks by Optimizing Quantization Intervals with Task Loss", CVPR 2019."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq_jax.numerics import integer_range, narrow, round_straight_through, wide
from mpq_jax.quantizers.starts import best_clip, check_start, same_spacing
from mpq_jax.types import Decoding, Quantizer, TensorQuantizer, Values


def transform(x: jax.Array, centre: jax.Array, half_width: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
    """|w'| = clip(alpha |x| + beta, 0, 1)^gamma with alpha = 0.5 / d and beta = -0.5 c / d + 0.5 (the transformer).

    0 below c - d (pruned), 1 above c + d (clipped). x: [...]; the others: []. Returns x's shape, in [0, 1].
    The derivatives are those of the power inside the interval and 0 outside.
    """
    alpha, beta = 0.5 / half_width, -0.5 * centre / half_width + 0.5
    u = alpha * jnp.abs(x) + beta
    inside = (u > 0) & (u < 1)
    if gamma is None:
        return jnp.where(inside, u, jnp.where(u >= 1, 1, 0).astype(u.dtype))
    # Where the power is not used its argument is 1/2: the derivatives of 0^gamma are not finite.
    return jnp.where(inside, jnp.where(inside, u, 0.5) ** gamma, jnp.where(u >= 1, 1, 0).astype(u.dtype))


def qil(start: str = "statistics", *, rescale: bool = True) -> Quantizer:
    """QIL: leaves "centre" c and "half_width" d [K] for weights and activations, "gamma" [K] for weights; all positive.

    x_hat = sign(x) round(|w'| q) / q with |w'| by `transform`, the rounding passed straight through; q = 2^(b-1) - 1 for
    weights, 2^b - 1 for activations with gamma = 1. Activations that can be negative (our extension) are quantized as
    weights are, with gamma = 1.
    start: "statistics": c = d, half the clipping level of least squared error, so that nothing is pruned, and gamma 1;
        "same": c = d with a spacing of 0.1 / b in every layer.
    rescale: multiply x_hat by c + d, the interval's upper end, so that it stands for x in the units of x. A
        normalisation layer behind takes any such factor out again; a layer without one needs it to do what it was
        trained for. False: as in the paper, x_hat in [-1, 1].
    Raises ValueError for another start.
    """
    check_start(start)

    def tensor_quantizer(weight: bool) -> TensorQuantizer:
        return TensorQuantizer(
            leaves=("centre", "half_width", "gamma") if weight else ("centre", "half_width"),
            state=(),
            init=functools.partial(_init, start=start, weight=weight),
            fake_quant=functools.partial(_fake_quant, rescale=rescale),
            encode=_encode,
            decoding=functools.partial(_decoding, rescale=rescale),
            indicator=lambda values, bits, signed: 2 * values["half_width"] / _levels(bits, signed),
            fit=functools.partial(_fake_quant, rescale=True),
        )

    return Quantizer("qil", tensor_quantizer(True), tensor_quantizer(False))


def _levels(bits: jax.Array, signed: bool) -> jax.Array:
    """q, the number of steps from 0 to 1."""
    return integer_range(bits, signed, narrow=True)[1]


def _init(
    x: jax.Array,
    bit_widths: Sequence[int],
    signed: bool,
    channel_axes: Sequence[int],
    *,
    start: str,
    weight: bool,
) -> dict[str, jax.Array]:
    del channel_axes
    x, widths = wide(x), jnp.asarray(bit_widths, jnp.int32)

    def interval(top: jax.Array) -> dict[str, jax.Array]:
        return {"centre": top / 2, "half_width": top / 2}

    if start == "same":
        spacing = jnp.asarray([same_spacing(b) for b in bit_widths], x.dtype)
        top = spacing * jax.vmap(lambda bits: _levels(bits, signed))(widths)
    else:
        top = best_clip(x, bit_widths, lambda x, t, bits: _fake_quant(x, interval(t), bits, signed, rescale=True))
    values = interval(top)
    return {**values, "gamma": jnp.ones_like(top)} if weight else values


def _codes(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    """Whole numbers of [-q, q] in floating point; their derivative is that of sign(x) |w'| q."""
    x = wide(x)
    size = transform(x, values["centre"], values["half_width"], values.get("gamma"))
    return round_straight_through(size * _levels(bits, signed)) * jnp.sign(x)


def _decoding(x: jax.Array, values: Values, bits: jax.Array, signed: bool, rescale: bool) -> Decoding:
    del x
    top = values["centre"] + values["half_width"] if rescale else jnp.ones_like(values["centre"])
    return Decoding(scale=top / _levels(bits, signed))


def _fake_quant(x: jax.Array, values: Values, bits: jax.Array, signed: bool, rescale: bool) -> jax.Array:
    codes = _codes(x, values, bits, signed)
    return narrow(codes * _decoding(x, values, bits, signed, rescale).scale, x.dtype)


def _encode(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    return _codes(x, values, bits, signed).astype(jnp.int32)
