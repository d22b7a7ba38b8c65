"""Start values that quantizers share."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

STARTS = ("statistics", "same")
SAMPLE = 65_536  # elements of a tensor that a start value is found on
FRACTIONS = 64  # clipping levels that are tried: 1/100 of the largest value to all of it, evenly on a log scale


def check_start(start: str) -> None:
    """Raises ValueError for a start that does not exist."""
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, found {start!r}")


def same_spacing(bits: int) -> float:
    """0.1 / b, the spacing of every layer's grid where all start at the same value (LIMPQ)."""
    return 0.1 / bits


def sampled(x: jax.Array) -> jax.Array:
    """All elements of x, or SAMPLE of them drawn at random (the same ones every time): [N]."""
    x = x.ravel()
    return x if x.size <= SAMPLE else x[jax.random.randint(jax.random.key(0), (SAMPLE,), 0, x.size)]


# (x, clipping level, bits) -> x on the grid that ends at that level
OnGrid = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def best_clip(x: jax.Array, bit_widths: Sequence[int], on_grid: OnGrid) -> jax.Array:
    """[K]: for each bit-width the clipping level t of least mean (on_grid(x, t, bits) - x)^2, among FRACTIONS of them.

    A tensor of zeros has no scale; any positive number serves: 1.
    """
    top, x = jnp.abs(x).max(), sampled(x)
    levels = top * jnp.logspace(-2, 0, FRACTIONS, dtype=x.dtype)
    widths = jnp.asarray(bit_widths, jnp.int32)

    def errors(level: jax.Array) -> jax.Array:
        return jax.vmap(lambda bits: jnp.square(on_grid(x, level, bits) - x).mean())(widths)

    return jnp.where(top > 0, levels[jax.lax.map(errors, levels).argmin(0)], 1)
