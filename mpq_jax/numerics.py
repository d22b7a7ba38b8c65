"""Rounding, ranges and gradients that every quantizer is written with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mpq_jax.types import Decoding


@jax.custom_jvp
def round_straight_through(x: jax.Array) -> jax.Array:
    """Rounds half to even; its derivative is 1 everywhere (the straight-through estimator)."""
    return jnp.round(x)


@round_straight_through.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.round(primals[0]), tangents[0]


@jax.custom_jvp
def straight_through(on_grid: jax.Array, smooth: jax.Array) -> jax.Array:
    """The value of `on_grid`, to the last bit, with the derivative of `smooth` (same shape and dtype)."""
    del smooth
    return on_grid


@straight_through.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[0], tangents[1]


def wide(x: jax.Array) -> jax.Array:
    """x in float32 at least: step sizes and codes are never computed in bfloat16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x in `dtype`. In float16 what lies beyond its largest number becomes that number, not infinity: the top of a grid
    may lie a little above the largest value that was quantized."""
    if dtype == jnp.float16:
        x = jnp.clip(x, jnp.finfo(dtype).min, jnp.finfo(dtype).max)
    return x.astype(dtype)


def integer_range(bits: jax.Array, signed: bool, narrow: bool = False) -> tuple[jax.Array, jax.Array]:
    """Q_N and Q_P, float32 [], such that codes lie in [-Q_N, Q_P] (Esser et al. 2020, section 2).

    bits: int32 [], may be traced. Signed: 2^(b-1) and 2^(b-1) - 1; unsigned: 0 and 2^b - 1.
    narrow: leaves out -2^(b-1), so that the signed range is symmetric.
    """
    one = jnp.int32(1)
    bits = jnp.asarray(bits, jnp.int32)
    if signed:
        half = (one << (bits - 1)).astype(jnp.float32)
        return half - 1 if narrow else half, half - 1
    full = (one << bits).astype(jnp.float32)
    return jnp.zeros_like(full), full - 1


def at_bits(values: jax.Array, bit_widths: Sequence[int], bits: jax.Array) -> jax.Array:
    """The entries of `values` [*S, K, ...] that belong to `bits` (int32 [*S], traced), as a sum under a one-hot mask.

    A sum, not a gather: its gradient is a mask, cheap under `vmap` over rows. Bits that are not in `bit_widths` give NaN,
    so that a policy that was never validated cannot pass for a result.
    """
    hit = jnp.asarray(bit_widths, jnp.int32) == jnp.expand_dims(bits, -1)
    masked = jnp.where(hit.reshape(*hit.shape, *[1] * (values.ndim - hit.ndim)), values, 0)
    chosen, known = masked.sum(jnp.ndim(bits)), hit.any(-1)
    return jnp.where(known.reshape(*known.shape, *[1] * (chosen.ndim - known.ndim)), chosen, jnp.nan)


def decode(codes: jax.Array, decoding: Decoding) -> jax.Array:
    """Integer codes back to the values they stand for; codes: int [...]. Returns the shape of the codes."""
    if decoding.table is None:
        return (codes + decoding.offset) * decoding.scale
    if decoding.table.ndim == 1:
        return decoding.table[codes]
    return jnp.take_along_axis(decoding.table, codes[None], axis=0)[0]


def sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums x over the axes along which `shape` was broadcast to x's shape."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1), keepdims=True)
