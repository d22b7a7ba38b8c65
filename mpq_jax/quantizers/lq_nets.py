"""LQ-Nets: Zhang et al., "LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks", ECCV 2018.

Levels are sums of a learned basis v in R^b: level(e) = sum_k e_k v_k. A basis is padded to the largest bit-width of its
layer and masked, so that bits are data. Shapes within this file: C channels (1 for activations), N elements of each,
B padded length of a basis, 2^B levels.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpq_jax.numerics import decode, narrow, straight_through, wide
from mpq_jax.quantizers.starts import best_clip, check_start, same_spacing, sampled
from mpq_jax.types import Decoding, Quantizer, TensorQuantizer, Values

MOVING_AVERAGE = 0.9
EPSILON = 1e-4  # of the least squares, for each element
ALTERNATIONS = 20  # of codes and least squares at the start
MAX_BITS = 8  # every level is in a table


def lq_nets(start: str = "statistics") -> Quantizer:
    """LQ-Nets: one state leaf "basis", [K, B] for activations, [K, B, C] for weights (one an output channel).

    e_k in {0, 1} for activations, {-1, +1} for weights and for activations that can be negative (our extension). Every
    value goes to its nearest level; codes are the numbers sum_k 2^k [e_k = 1]. Gradients: straight through for weights;
    for activations up to the top level, none above (below the lowest one either, where they can be negative). No
    gradient moves the basis: `update` does, once a training step (the paper's quantization error minimization).
    start: "statistics": from the even grid of least squared error, codes and least squares alternate 20 times;
        "same": an even grid with a spacing of 0.1 / b in every layer.
    Raises ValueError for another start.
    """
    check_start(start)

    def tensor_quantizer(weight: bool) -> TensorQuantizer:
        return TensorQuantizer(
            leaves=(),
            state=("basis",),
            init=functools.partial(_init, start=start, weight=weight),
            fake_quant=functools.partial(_fake_quant, weight=weight),
            encode=_encode,
            decoding=lambda x, values, bits, signed: Decoding(table=_table(values["basis"], bits, signed)),
            indicator=_indicator,
            update=_update,
        )

    return Quantizer("lq_nets", tensor_quantizer(True), tensor_quantizer(False), max_bits=MAX_BITS)


# ---- levels, codes, least squares ---------------------------------------------------------------------------------


def code_signs(codes: jax.Array, bits: jax.Array, size: int, signed: bool) -> jax.Array:
    """[..., B]: the e_k of integer codes [...], in {0, 1} or, signed, {-1, +1}; 0 for k >= bits (the mask)."""
    k = jnp.arange(size)
    ones = (codes[..., None] >> k) & 1
    return jnp.where(k < bits, 2 * ones - 1 if signed else ones, 0).astype(jnp.float32)


def level_table(basis: jax.Array, bits: jax.Array, signed: bool) -> jax.Array:
    """[2^B, C] from a basis [B, C]: the level of every code. Codes that differ in masked bits only share theirs."""
    signs = code_signs(jnp.arange(2 ** basis.shape[0]), bits, basis.shape[0], signed)
    # A sum, not a matrix product: no device may round it to fewer bits.
    return jnp.where(signs[:, :, None] == 0, 0, signs[:, :, None] * basis).sum(1)


def nearest_codes(x: jax.Array, levels: jax.Array, bits: jax.Array) -> jax.Array:
    """int32 [C, N]: the code of the level nearest to each x [C, N] (the lower of two); levels: [2^B, C]."""
    order = jnp.argsort(levels, axis=0)
    ordered = jnp.take_along_axis(levels, order, axis=0)
    thresholds = (ordered[1:] + ordered[:-1]) / 2
    place = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"))(thresholds.T, x)
    return jnp.take_along_axis(order.T, place, axis=1) & ((1 << bits) - 1)


def least_squares(x: jax.Array, basis: jax.Array, bits: jax.Array, signed: bool) -> jax.Array:
    """v* = (B'B + eps N I)^-1 (B'x + eps N v), [B, C], with the codes B [N, B] of x under the basis v now.

    x: [C, N]; basis: [B, C]. The term eps N v (the authors' code has one too) leaves directions that the codes do not
    determine, such as a code bit that is never set, where they were. Computed as v + (B'B/N + eps I)^-1 B'(x - Bv)/N:
    what float32 rounds off is then small beside the change, not beside v.
    """
    levels = level_table(basis, bits, signed)
    codes = nearest_codes(x, levels, bits)
    signs = code_signs(codes, bits, basis.shape[0], signed).astype(x.dtype)
    rest = x - jnp.take_along_axis(levels.T, codes, axis=1)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    gram = product("cnb,cnd->cbd", signs, signs) / x.shape[1] + EPSILON * jnp.eye(basis.shape[0], dtype=x.dtype)
    right = product("cnb,cn->cb", signs, rest) / x.shape[1]
    return basis + jax.vmap(lambda g, r: jax.scipy.linalg.solve(g, r, assume_a="pos"))(gram, right).T


class _Rows(NamedTuple):
    """A tensor's elements by channel, and the way back. x: [C, N]; basis: [B, C]."""

    x: jax.Array
    basis: jax.Array
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def back(self, rows: jax.Array) -> jax.Array:
        return jnp.moveaxis(rows.reshape(self.shape), range(len(self.axes)), self.axes)


def _rows(x: jax.Array, basis: jax.Array) -> _Rows:
    """basis: [B], or [B, ...] with the rank of x behind and the channels' axes as long as x's, the others 1."""
    axes = tuple(i for i, n in enumerate(basis.shape[1:]) if n > 1)
    moved = jnp.moveaxis(wide(x), axes, range(len(axes)))
    channels = math.prod(x.shape[i] for i in axes)
    return _Rows(moved.reshape(channels, -1), basis.reshape(basis.shape[0], channels), axes, moved.shape)


# ---- the quantizer's functions ------------------------------------------------------------------------------------


def _table(basis: jax.Array, bits: jax.Array, signed: bool) -> jax.Array:
    """[2^B, ...] from a basis [B, ...]."""
    levels = level_table(basis.reshape(basis.shape[0], -1), bits, signed)
    return levels.reshape(levels.shape[0], *basis.shape[1:])


def _encode(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    rows = _rows(x, values["basis"])
    return rows.back(nearest_codes(rows.x, level_table(rows.basis, bits, signed), bits))


def _fake_quant(x: jax.Array, values: Values, bits: jax.Array, signed: bool, weight: bool) -> jax.Array:
    fixed, basis = jax.lax.stop_gradient((x, values["basis"]))
    table = _table(basis, bits, signed)
    on_grid = narrow(decode(_encode(fixed, {"basis": basis}, bits, signed), Decoding(table=table)), x.dtype)
    on_grid = jnp.where(jnp.isnan(fixed), fixed, on_grid)  # which has no nearest level
    if weight:
        return straight_through(on_grid, x)
    low, top = narrow(table.min(0), x.dtype), narrow(table.max(0), x.dtype)
    smooth = jnp.where(x > top, top, x)
    return straight_through(on_grid, jnp.where(x < low, low, smooth) if signed else smooth)


def _indicator(values: Values, bits: jax.Array, signed: bool) -> jax.Array:
    """The mean gap between neighbouring levels, (top - lowest) / (2^b - 1), mean over channels."""
    reach = jnp.abs(values["basis"]).sum(0).mean() * (2 if signed else 1)
    return reach / ((1 << bits) - 1)


def _update(x: jax.Array, values: Values, bits: jax.Array, signed: bool) -> dict[str, jax.Array]:
    """v <- 0.9 v + 0.1 v* (moving average), with v* by `least_squares`."""
    rows = _rows(x, values["basis"])
    new = MOVING_AVERAGE * rows.basis + (1 - MOVING_AVERAGE) * least_squares(rows.x, rows.basis, bits, signed)
    return {"basis": new.reshape(values["basis"].shape)}


def _even(top: jax.Array, bits: jax.Array, size: int) -> jax.Array:
    """[B, C]: the basis of the even grid whose levels end at top [C], v_k = top 2^k / (2^b - 1), signed or not."""
    k = jnp.arange(size)[:, None]
    return jnp.where(k < bits, top * 2.0**k / ((1 << bits) - 1), 0)


def _on_even_grid(x: jax.Array, top: jax.Array, bits: jax.Array, signed: bool) -> jax.Array:
    """The level nearest to x on the even grid that ends at top."""
    spacing = top * (2 if signed else 1) / ((1 << bits) - 1)
    if signed:
        return jnp.clip((jnp.floor(x / spacing) + 0.5) * spacing, -top, top)
    return jnp.clip(jnp.round(x / spacing) * spacing, 0, top)


def _init(
    x: jax.Array,
    bit_widths: Sequence[int],
    signed: bool,
    channel_axes: Sequence[int],
    *,
    start: str,
    weight: bool,
) -> dict[str, jax.Array]:
    size, widths = max(bit_widths), jnp.asarray(bit_widths, jnp.int32)
    axes = tuple(channel_axes) if weight else ()
    channels = math.prod(x.shape[i] for i in axes)
    x = wide(x) if weight else sampled(wide(x))
    x = jnp.moveaxis(x, axes, range(len(axes))).reshape(channels, -1)
    if start == "same":
        one_top = [same_spacing(b) * (2**b - 1) / (2 if signed else 1) for b in bit_widths]
        tops = jnp.broadcast_to(jnp.asarray(one_top, x.dtype), (channels, len(bit_widths)))
    else:
        on_grid = functools.partial(_on_even_grid, signed=signed)
        tops = jax.vmap(lambda x: best_clip(x, bit_widths, on_grid))(x)

    def one(bits: jax.Array, top: jax.Array) -> jax.Array:
        even = _even(top, bits, size)
        if start == "same":
            return even
        basis = jax.lax.fori_loop(0, ALTERNATIONS, lambda _, v: least_squares(x, v, bits, signed), even)
        return jnp.where(jnp.abs(x).max(1) > 0, basis, even)  # a channel of zeros keeps a grid

    bases = jax.vmap(one)(widths, tops.T)
    return {"basis": bases if weight else bases[..., 0]}
