"""One tensor on several grids at once: x_hat = sum_k m_k Q_k(x), the form that several methods share.

Bits per output channel are one share of 1 a channel; DNAS and EdMIPS have shares that are learned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.types import TensorQuantizer


def on_grid(
    quantizer: TensorQuantizer,
    x: jax.Array,
    leaves: Mapping[str, jax.Array],
    bit_widths: Sequence[int],
    k: int,
    signed: bool,
    place: Callable[[jax.Array], jax.Array] = lambda value: value,
) -> jax.Array:
    """Q_k(x): the whole tensor at the k-th of `bit_widths`.

    leaves: the quantizer's learned leaves {name: [K, ...]}. place: shapes a leaf at one width to broadcast with x.
    """
    values = {name: place(leaf[k]) for name, leaf in leaves.items()}
    return quantizer.fake_quant(x, values, jnp.int32(bit_widths[k]), signed)


def mixture(
    quantizer: TensorQuantizer,
    x: jax.Array,
    leaves: Mapping[str, jax.Array],
    bit_widths: Sequence[int],
    shares: jax.Array,
    signed: bool,
    place: Callable[[jax.Array], jax.Array] = lambda value: value,
) -> jax.Array:
    """sum_k m_k Q_k(x), in x's shape and dtype. shares: m, [K, ...], m_k broadcasting with x."""
    total: Any = sum(
        shares[k] * on_grid(quantizer, x, leaves, bit_widths, k, signed, place) for k in range(len(bit_widths))
    )
    return total.astype(x.dtype)


def one_hot(bits: jax.Array, bit_widths: Sequence[int]) -> jax.Array:
    """Shares float32 [K, ...]: 1 at the width that `bits` (int32 [...], traced) is, all 0 for bits that are none."""
    widths = jnp.asarray(bit_widths, jnp.int32).reshape(-1, *(1,) * jnp.ndim(bits))
    return (widths == bits).astype(jnp.float32)
