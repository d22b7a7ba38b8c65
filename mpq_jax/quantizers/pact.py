"""PACT: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085, 2018.

Weights as in DoReFa: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
Gradients", arXiv 1606.06160, 2016.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq_jax.numerics import decode, integer_range, narrow, round_straight_through, straight_through, wide
from mpq_jax.quantizers.starts import best_clip, check_start, same_spacing
from mpq_jax.types import Decoding, Init, Quantizer, TensorQuantizer, Values


def clip(x: jax.Array, a: jax.Array, signed: bool) -> jax.Array:
    """y = 0 below 0, x in [0, a), a above (PACT): dy/da is 1 where x >= a, else 0.

    signed (our extension): y = -a below -a; dy/da is -1 there.
    """
    low = -a if signed else jnp.zeros_like(a)
    return jnp.where(x >= a, a, jnp.where(x < low, low, x))


def pact(start: str = "statistics", *, rescale: bool = True, clip_penalty: float = 1e-4) -> Quantizer:
    """PACT's activations, with one leaf "clip" [K], the clipping level a; DoReFa's weights, without any.

    Activations: x_hat = round(y n / a) a / n with y = clip(x, 0, a) and n = 2^b - 1; the rounding is passed
        straight through. Inputs that can be negative (our extension) are clipped to [-a, a], n = 2^(b-1) - 1.
    Weights (DoReFa): w_hat = 2 round(n (tanh(w) / 2M + 1/2)) / n - 1 with M = max|tanh(w)|,
        n = 2^b - 1. Their grid is evenly spaced and has no zero.
    start: of a: "statistics", the a of least squared error; or "same", a spacing of 0.1 / b in every layer.
    rescale: multiply w_hat by M, so that it stands for w in the units of w. A normalisation layer behind takes any such
        factor out again; a layer without one (a classifier, a transformer's) needs it to do what it was trained for.
        False: as in the paper, w_hat in [-1, 1].
    clip_penalty: lambda of the loss term lambda a^2 (PACT), for every layer and row.
    Raises ValueError for another start.
    """
    check_start(start)
    activation = TensorQuantizer(
        leaves=("clip",),
        state=(),
        init=_init(start),
        fake_quant=_fake_quant,
        encode=_encode,
        decoding=_decoding,
        indicator=lambda values, bits, signed: values["clip"] / _top(bits, signed),
        fit=_fit,
        penalty=lambda values, bits, signed: clip_penalty * jnp.square(values["clip"]),
    )
    return Quantizer("pact", dorefa_weights(rescale), activation)


# ---- activations --------------------------------------------------------------------------------------------------


def _top(bits: jax.Array, signed: bool) -> jax.Array:
    """n, the largest code: 2^b - 1; for signed inputs 2^(b-1) - 1."""
    return integer_range(bits, signed, narrow=True)[1]


def _init(start: str) -> Init:
    def init(
        x: jax.Array, bit_widths: Sequence[int], signed: bool, channel_axes: Sequence[int]
    ) -> dict[str, jax.Array]:
        del channel_axes
        if start == "same":
            spacing = jnp.asarray([same_spacing(b) for b in bit_widths], jnp.float32)
            return {"clip": spacing * jax.vmap(lambda b: _top(b, signed))(jnp.asarray(bit_widths, jnp.int32))}
        return {"clip": best_clip(wide(x), bit_widths, lambda x, a, bits: _fake_quant(x, {"clip": a}, bits, signed))}

    return init


def _fake_quant(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    a, n = values["clip"], _top(bits, signed)
    y = clip(wide(x), a, signed)
    return narrow(straight_through(jnp.round(y * n / a) * (a / n), y), x.dtype)


def _encode(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    a, n = values["clip"], _top(bits, signed)
    return jnp.round(clip(wide(x), a, signed) * n / a).astype(jnp.int32)


def _decoding(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> Decoding:
    del x
    return Decoding(scale=values["clip"] / _top(bits, signed))


def _fit(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    """x_hat = code a / n at fixed codes: the squared error's own derivative. PACT's rule only ever raises a here."""
    codes = _encode(x, jax.lax.stop_gradient(values), bits, signed)
    return decode(codes, _decoding(x, values, bits, signed))


# ---- weights ------------------------------------------------------------------------------------------------------


def normalised(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tanh(w) / 2M + 1/2 in [0, 1], M = max|tanh(w)| []): what DoReFa rounds, and its scale."""
    t = jnp.tanh(wide(w))
    largest = jnp.abs(t).max()
    largest = jnp.where(largest > 0, largest, 1)
    return t / (2 * largest) + 0.5, largest


def dorefa_codes(u: jax.Array, bits: jax.Array) -> jax.Array:
    """round(u n) - 2^(b-1) for u in [0, 1], n = 2^b - 1: whole numbers of [-2^(b-1), 2^(b-1) - 1], derivative n."""
    half, _ = integer_range(bits, True)
    return round_straight_through(u * (2 * half - 1)) - half


def dorefa_weights(rescale: bool = True) -> TensorQuantizer:
    """DoReFa's weights: nothing to learn but the weights themselves.

    n / 2 is 2^(b-1) - 1/2, so 2 round(u n) / n - 1 = (code + 1/2) 2 / n: an evenly spaced grid with an offset of 1/2.
    """

    def decoding_of(largest: jax.Array, bits: jax.Array) -> Decoding:
        half, _ = integer_range(bits, True)
        factor = largest if rescale else jnp.ones_like(largest)
        return Decoding(scale=factor * 2 / (2 * half - 1), offset=0.5)

    def fake_quant(w: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
        u, largest = normalised(w)
        return narrow(decode(dorefa_codes(u, bits), decoding_of(largest, bits)), w.dtype)

    return TensorQuantizer(
        leaves=(),
        state=(),
        init=lambda w, bit_widths, signed, channel_axes: {},
        fake_quant=fake_quant,
        encode=lambda w, values, bits, signed: dorefa_codes(normalised(w)[0], bits).astype(jnp.int32),
        decoding=lambda w, values, bits, signed: decoding_of(normalised(w)[1], bits),
        indicator=None,
    )
