"""LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020; as used by LIMPQ (Tang et al., ECCV 2022)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpq_jax.numerics import integer_range, narrow, round_straight_through, sum_to, wide
from mpq_jax.quantizers.starts import check_start, same_spacing
from mpq_jax.types import Decoding, Quantizer, TensorQuantizer, Values

EWGS_DELTA = 1e-3
# x, x_hat (None: worked out again), step_size, q_n, q_p, g
Residuals = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def fake_quant(
    x: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array, g: jax.Array, delta: float = 0.0
) -> jax.Array:
    """x_hat = round(clip(x / s, -Q_N, Q_P)) * s, with the gradients of LSQ (equations 1 to 5).

    x: [...]; step_size: broadcasts with x, positive (others have no gradients here); q_n, q_p, g: []. Returns x's shape and dtype.
    d x_hat / d x = 1 inside the range, else 0.
    d x_hat / d s = g * (round(x/s) - x/s inside, -Q_N below, Q_P above).
    delta: not 0, the rounding passes its gradient G on as  G (1 + delta sign(G) (v - round v)), v = x/s  (Lee et al.,
    "Network Quantization with Element-wise Gradient Scaling", CVPR 2021) in place of G: the straight-through estimator.
    One custom rule instead of a chain of small ones: both gradients come from one pass over x and x_hat, and nothing
    else is kept for it.
    """
    return narrow(_on_grid(x, step_size, q_n, q_p), x.dtype)


def _on_grid(x: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array) -> jax.Array:
    """x_hat, wide."""
    clipped = jnp.clip(wide(x) / step_size, -q_n, q_p)
    return jnp.round(clipped) * step_size


def _kept(
    x: jax.Array, x_hat: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array, g: jax.Array
) -> Residuals:
    # The product that x_hat goes to keeps it, too. Of narrower x_hat the difference to x is lost in its rounding.
    return x, x_hat if x_hat.dtype == wide(x_hat).dtype else None, step_size, q_n, q_p, g


def _forward(
    x: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array, g: jax.Array, delta: float
) -> tuple[jax.Array, Residuals]:
    x_hat = fake_quant(x, step_size, q_n, q_p, g, delta)
    return x_hat, _kept(x, x_hat, step_size, q_n, q_p, g)


def _backward(delta: float, residuals: Residuals, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    return _gradients(residuals, delta, gradient, lambda gradient, off: gradient)


def _gradients(
    residuals: Residuals, delta: float, gradient: jax.Array, more: Callable[[jax.Array, jax.Array], jax.Array]
) -> tuple[jax.Array | None, ...]:
    """The gradients of `fake_quant`'s arguments.

    more(G, x_hat - x): the gradient of x_hat for the step size; G is that for x, or zeros.
    In units of x, times 1 / s at the end: s d x_hat / d s = x_hat - x inside (without delta), x_hat outside. Divisions
    element by element, and whatever does not take G, XLA's CPU backend would do in the forward pass, and keep: a quarter of
    a step's memory. (With delta there is one.)
    """
    narrow_x, x_hat, step_size, q_n, q_p, g = residuals
    x = wide(narrow_x)
    if x_hat is None:
        x_hat = _on_grid(x, step_size, q_n, q_p)
    inside, off = (x >= -q_n * step_size) & (x <= q_p * step_size), x_hat - x
    if not delta:
        d_x, every = jnp.where(inside, gradient, 0), more(wide(gradient), off)
        total = jnp.where(inside, every * off, every * x_hat)
    else:
        # Each gradient by itself: the factor takes its sign.
        parts = [wide(gradient), more(jnp.zeros_like(off), off)]
        factors = [1 - delta * jnp.sign(part) * (off / step_size) for part in parts]
        d_x = jnp.where(inside, parts[0] * factors[0], 0)
        each = [part * jnp.where(inside, x_hat - x * f, x_hat) for part, f in zip(parts, factors, strict=True)]
        total = functools.reduce(jnp.add, each)
    d_step_size = sum_to(total, step_size.shape) * (g / step_size)
    return d_x.astype(narrow_x.dtype), d_step_size.astype(step_size.dtype), None, None, None


fake_quant.defvjp(_forward, _backward)


class Static(NamedTuple):
    """What `with_error` takes beside arrays. delta: of `fake_quant`."""

    delta: float
    samples: int
    error_scale: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def with_error(
    x: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array, g: jax.Array, static: Static
) -> tuple[jax.Array, jax.Array]:
    """(fake_quant of these arguments, error []).

    error: sum (x_hat - x)^2 / sum x^2 over the first `samples` of x's leading axis; its gradient reaches the step size
    alone, times g * error_scale. Both gradients come from one pass over x: two were an eighth of a joint step's program.
    """
    return _forward_with_error(x, step_size, q_n, q_p, g, static)[0]


def _forward_with_error(
    x: jax.Array, step_size: jax.Array, q_n: jax.Array, q_p: jax.Array, g: jax.Array, static: Static
) -> tuple[tuple[jax.Array, jax.Array], tuple[Residuals, jax.Array]]:
    x_hat = _on_grid(x, step_size, q_n, q_p)
    part = wide(x[: static.samples])
    power = jnp.square(part).sum()
    power = jnp.where(power > 0, power, part.size)
    error = jnp.square(x_hat[: static.samples] - part).sum() / power
    x_hat = narrow(x_hat, x.dtype)
    return (x_hat, error), (_kept(x, x_hat, step_size, q_n, q_p, g), power)


def _backward_with_error(
    static: Static, residuals: tuple[Residuals, jax.Array], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    kept, power = residuals
    gradient, of_error = gradients

    def more(gradient: jax.Array, off: jax.Array) -> jax.Array:
        both = gradient + (2 * static.error_scale * of_error / power) * off  # d error / d x_hat
        if static.samples == off.shape[0]:
            return both
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, off.shape, 0) < static.samples, both, gradient)

    return _gradients(kept, static.delta, gradient, more)


with_error.defvjp(_forward_with_error, _backward_with_error)


def weight_start(w: jax.Array, bits: int, channel_axes: tuple[int, ...] = ()) -> jax.Array:
    """s_b = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1) (LIMPQ's code). [] or, per output channel, [C]."""
    axes = tuple(i for i in range(w.ndim) if i not in channel_axes)
    mean, std = w.mean(axes), w.std(axes)
    return (jnp.maximum(jnp.abs(mean - 3 * std), jnp.abs(mean + 3 * std)) / 2 ** (bits - 1)).reshape(
        (-1,) if channel_axes else ()
    )


def activation_start(x: jax.Array, bits: int, signed: bool) -> jax.Array:
    """s_b = 2 mean|x| / sqrt(Q_P) (LSQ section 2.1; LIMPQ's code). []."""
    _, q_p = integer_range(jnp.int32(bits), signed)
    return 2 * jnp.abs(x).mean() / jnp.sqrt(q_p)


def _init(
    x: jax.Array,
    bit_widths: Sequence[int],
    signed: bool,
    channel_axes: Sequence[int],
    *,
    start: str,
    per_channel: bool,
    weight: bool,
) -> dict[str, jax.Array]:
    """{"step_size": [K], or [K, C] for a weight per output channel}."""
    channel_axes = tuple(channel_axes) if per_channel and weight else ()
    channels = math.prod(x.shape[i] for i in channel_axes)
    shape = (channels,) if channel_axes else ()
    x = wide(x)

    def one(bits: int) -> jax.Array:
        if start == "same":
            return jnp.full(shape, same_spacing(bits), x.dtype)
        s = weight_start(x, bits, channel_axes) if weight else activation_start(x, bits, signed)
        # A tensor of zeros has no spread; any positive number serves.
        return jnp.where(s > 0, s, same_spacing(bits)).astype(x.dtype)

    return {"step_size": jnp.stack([one(b) for b in bit_widths])}


def lsq(
    start: str = "statistics",
    *,
    per_channel: bool = False,
    power_of_two: bool = False,
    narrow: bool = False,
    gradient_scale: bool = True,
    ewgs: bool = False,
) -> Quantizer:
    """The LSQ quantizer, one leaf "step_size" for each tensor: [K], or [K, C] for weights per output channel.

    start: "statistics", or "same" (s_b = 0.1 / b in every layer).
    power_of_two: the step size in use is 2^round(log2 s), straight-through.
    narrow: weights use the symmetric range [-Q_P, Q_P].
    gradient_scale: multiply the step size's gradient by g = 1 / sqrt(Q_P * elements of x), elements counted over the
        batch as in LIMPQ's code (a batch in LSQ's paper leaves it out).
    ewgs: the EWGS gradient of rounding, with the paper's fixed delta of 1e-3, in place of the straight-through one.
    Raises ValueError for another start.
    """
    check_start(start)

    def in_use(step_size: jax.Array) -> jax.Array:
        return jnp.exp2(round_straight_through(jnp.log2(step_size))) if power_of_two else step_size

    def code_range(bits: jax.Array, signed: bool, weight: bool) -> tuple[jax.Array, jax.Array]:
        return integer_range(bits, signed, narrow and weight)

    delta = EWGS_DELTA if ewgs else 0.0

    def arguments(x: jax.Array, values: Values, bits: jax.Array, signed: bool, weight: bool) -> tuple[jax.Array, ...]:
        """step_size, q_n, q_p, g"""
        q_n, q_p = code_range(bits, signed, weight)
        step_size = in_use(values["step_size"])
        elements = x.size / step_size.size
        # In the step size's own type: in float64 a float32 root would differ between one row and many.
        g = 1 / jnp.sqrt(q_p.astype(step_size.dtype) * elements) if gradient_scale else jnp.ones_like(q_p)
        return step_size, q_n, q_p, g

    def run(x: jax.Array, values: Values, bits: jax.Array, signed: bool, weight: bool) -> jax.Array:
        return fake_quant(x, *arguments(x, values, bits, signed, weight), delta)

    def run_with_error(
        x: jax.Array, values: Values, bits: jax.Array, signed: bool, samples: int, weight: bool
    ) -> tuple[jax.Array, jax.Array]:
        # `fit` on the samples alone has a g of its own, by their elements.
        error_scale = math.sqrt(x.shape[0] / samples) if gradient_scale else 1.0
        return with_error(x, *arguments(x, values, bits, signed, weight), Static(delta, samples, error_scale))

    def encode(x: jax.Array, values: Values, bits: jax.Array, signed: bool, weight: bool) -> jax.Array:
        q_n, q_p = code_range(bits, signed, weight)
        v = wide(x) / in_use(values["step_size"])
        return jnp.round(jnp.clip(v, -q_n, q_p)).astype(jnp.int32)

    def decoding(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> Decoding:
        del x, bits, signed
        return Decoding(scale=in_use(values["step_size"]))

    def indicator(values: Values, bits: jax.Array, signed: bool) -> jax.Array:
        del bits, signed
        return in_use(values["step_size"]).mean()

    def tensor_quantizer(weight: bool) -> TensorQuantizer:
        return TensorQuantizer(
            leaves=("step_size",),
            state=(),
            init=functools.partial(_init, start=start, per_channel=per_channel, weight=weight),
            fake_quant=functools.partial(run, weight=weight),
            encode=functools.partial(encode, weight=weight),
            decoding=decoding,
            indicator=indicator,
            fit=functools.partial(run, weight=weight),
            with_error=functools.partial(run_with_error, weight=weight),
        )

    return Quantizer("lsq", tensor_quantizer(True), tensor_quantizer(False))
