"""Optimizers: weights and step sizes (or whatever positive leaves a quantizer trains) each have their own."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpq_jax.layers import leaf_paths
from mpq_jax.types import QuantizedModel

# No update takes a step size out of these: beyond them x / s or its square leaves float32. Nobody's grid is near them.
LEAST, MOST = 2.0**-40, 2.0**40


def within(update: jax.Array, s: jax.Array) -> jax.Array:
    """The update of s, cut where it would leave [LEAST, MOST]; an s that lies outside is moved no further out."""
    low, high = jnp.minimum(s, LEAST), jnp.maximum(s, MOST)
    return jnp.where(s + update < low, low - s, jnp.where(s + update > high, high - s, update))


def log_space(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on log s instead of s: the gradient is s ds, and an update u becomes s (exp(u) - 1).

    Step sizes of different layers differ by orders of magnitude; in log space one learning rate is a relative change
    for all, and s stays positive.
    """

    def update(updates, state, params=None):
        in_log = jax.tree.map(jnp.multiply, updates, params)
        moved, state = inner.update(in_log, state, jax.tree.map(jnp.log, params))
        return jax.tree.map(lambda u, s: within(s * jnp.expm1(u), s), moved, params), state

    return optax.GradientTransformation(lambda params: inner.init(jax.tree.map(jnp.log, params)), update)


def keep_positive() -> optax.GradientTransformation:
    """No step takes more than half of a value away: for optimizers that add to step sizes (the paper's SGD)."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, s: within(jnp.maximum(u, -s / 2), s), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def quantizer_leaves(model: QuantizedModel, which: str) -> frozenset[str]:
    """Paths of the quantizer's leaves in the parameter tree: "leaves", trained by gradients, or "state", which are not."""
    return frozenset(
        path
        for spec in model.specs.values()
        for kind in spec.names
        for path in leaf_paths(spec, model.quantizer, kind, which).values()
    )


def partition(
    model: QuantizedModel, weights: optax.GradientTransformation, step_sizes: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`step_sizes` for the quantizer's trained leaves, nothing for its state leaves, `weights` for all else."""
    trained, state = quantizer_leaves(model, "leaves"), quantizer_leaves(model, "state")

    def label(path: Iterable[Any], _: Any) -> str:
        # The tree is (params, affine): the first key is the position in that pair.
        keys = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in list(path)[1:])
        return "step_sizes" if keys in trained else "state" if keys in state else "weights"

    return optax.partition(
        {"weights": weights, "step_sizes": step_sizes, "state": optax.set_to_zero()},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


def schedule(peak: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> Callable[[Any], Any]:
    """Linear warm-up to `peak`, then cosine to `end`, over `steps` optimizer steps."""
    if warmup:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    return optax.cosine_decay_schedule(peak, max(steps, 1), end / peak if peak else 0.0)


def sgd(rate: Any, momentum: float, weight_decay: float, clip: float = 0.0) -> optax.GradientTransformation:
    """SGD with Nesterov's momentum off, weight decay added to the gradient (torch's), gradients clipped by value."""
    parts = [optax.clip(clip)] if clip else []
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.sgd(rate, momentum or None))
