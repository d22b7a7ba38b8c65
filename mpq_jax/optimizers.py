"""Optimizers: weights and step sizes (or whatever positive leaves a quantizer trains) each have their own."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpq_jax.layers import leaf_paths
from mpq_jax.types import QuantizedModel, Refusal

# No update takes a step size out of these: beyond them x / s or its square leaves float32. Nobody's grid is near them.
LEAST, MOST = 2.0**-40, 2.0**40


def within(update: jax.Array, s: jax.Array) -> jax.Array:
    """The update of s, cut where it would leave [LEAST, MOST]; an s that lies outside is moved no further out.

    Nor does one update take more than 1023 of 1024 parts away: s + (low - s) would round to 0 for a low far below s.
    """
    low, high = jnp.minimum(s, jnp.maximum(s / 1024, LEAST)), jnp.maximum(s, MOST)
    return jnp.where(s + update < low, low - s, jnp.where(s + update > high, high - s, update))


def log_space(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on log s instead of s: the gradient is s ds, and an update u becomes s (exp(u) - 1).

    Step sizes of different layers differ by orders of magnitude; in log space one learning rate is a relative change
    for all, and s stays positive.
    """

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        in_log = jax.tree.map(jnp.multiply, updates, params)
        moved, state = inner.update(in_log, state, jax.tree.map(jnp.log, params))
        return jax.tree.map(lambda u, s: within(s * jnp.expm1(u), s), moved, params), state

    return optax.GradientTransformation(lambda params: inner.init(jax.tree.map(jnp.log, params)), update)


def keep_positive() -> optax.GradientTransformation:
    """No step takes more than half of a value away: for optimizers that add to step sizes (the paper's SGD)."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(lambda u, s: within(jnp.maximum(u, -s / 2), s), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class SettlingState(NamedTuple):
    """updates_done: so far. settled_at: the update that the cool-down starts with; -1 before that is known.

    total: sum of the parameters since the window began. last: means of the window before. moved: root mean square of
    the differences of the last two windows' means; infinite before there are two.
    """

    inner: Any
    updates_done: jax.Array
    settled_at: jax.Array
    total: Any
    last: Any
    moved: jax.Array


def settling(
    inner: optax.GradientTransformation, tolerance: float, window: int, steps: int, first: int = 0
) -> optax.GradientTransformation:
    """Full rate until the parameters stand still, then a cosine to 0 over two windows: when is data's to say, not ours.

    At a constant rate parameters never come to rest, but jitter around where they settle; so the *means* over windows
    of `window` updates are compared: where two that follow each other differ by less than `tolerance` (root mean
    square over all parameters; in log space: relative differences), what is left is jitter. Windows are counted from
    update `first` on. The cool-down starts, at the latest, so that it ends with update `steps`.
    All that the test needs is part of the state, so that a run that was stopped goes on alike. Learning rates of
    `inner` must be constant.
    """
    cool_down = 2 * window

    def init(params: Any) -> SettlingState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SettlingState(inner.init(params), jnp.int32(0), jnp.int32(-1), zeros, zeros, jnp.float32(jnp.inf))

    def update(updates: Any, state: SettlingState, params: Any = None) -> tuple[Any, SettlingState]:
        now = state.updates_done
        in_window = (now - first) % window
        counts = now >= first
        total = jax.tree.map(
            lambda t, x: jnp.where(in_window == 0, 0, t) + jnp.where(counts, x, 0), state.total, params
        )
        ends = counts & (in_window == window - 1)
        mean = jax.tree.map(lambda t: t / window, total)
        squares = jax.tree.leaves(jax.tree.map(lambda m, old: jnp.square(m - old).sum(), mean, state.last))
        size = sum(x.size for x in jax.tree.leaves(params))
        second = now - first >= 2 * window - 1
        moved = jnp.where(ends & second, jnp.sqrt(sum(squares) / size), state.moved).astype(jnp.float32)
        last = jax.tree.map(lambda m, old: jnp.where(ends, m, old), mean, state.last)
        due = jnp.where(moved < tolerance, now + 1, jnp.where(now >= steps - cool_down, now, -1))
        settled_at = jnp.where(state.settled_at < 0, due, state.settled_at)
        done = jnp.where(settled_at < 0, 0, now - settled_at + 1) / (cool_down + 1)
        rate = (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1))) / 2
        scaled, inner_state = inner.update(updates, state.inner, params)
        scaled = jax.tree.map(lambda u: u * rate, scaled)
        return scaled, SettlingState(inner_state, now + 1, settled_at, total, last, moved)

    return optax.GradientTransformation(init, update)


def settled(optimizer_state: Any, window: int) -> bool:
    """Whether the cool-down of a `settling` within the optimizer is over."""
    names = ("updates_done", "settled_at")
    done, settled_at = (int(optax.tree_utils.tree_get(optimizer_state, name)) for name in names)
    return settled_at >= 0 and done - settled_at >= 2 * window


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
    """`step_sizes` for the quantizer's trained leaves, nothing for its state leaves, `weights` for all else.

    Of the pair (parameter tree, affine copies of the rows) that `joint.make_step` trains, {} for no such copies.
    """
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
    """step -> learning rate: linear warm-up to `peak`, then cosine to `end`, over `steps` optimizer steps."""
    if warmup:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end)
    return optax.cosine_decay_schedule(peak, max(steps, 1), end / peak if peak else 0.0)


def sgd(rate: Any, momentum: float, weight_decay: float, clip: float = 0.0) -> optax.GradientTransformation:
    """SGD with plain momentum and weight decay added to the gradient, as torch has it.

    rate: a number or a schedule. clip: the largest |gradient| of an element, before weight decay; 0: no clipping.
    """
    parts = [optax.clip(clip)] if clip else []
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.sgd(rate, momentum or None))


def weights_optimizer(name: str, rate: Any, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """What trains the weights: "sgd", or "adamw" (Loshchilov and Hutter 2019; momentum is its b1). Raises Refusal for others."""
    if name == "sgd":
        return sgd(rate, momentum, weight_decay)
    if name == "adamw":
        return optax.adamw(rate, b1=momentum, weight_decay=weight_decay)
    raise Refusal(f'optimizer {name!r} is not known; choose "sgd" or "adamw"')
