"""HAWQ (Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", 2019)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.criteria import Measured, hessian, sites
from mpq_jax.criteria.hessian import Estimate, hessian_product, mask_of, masked, perturbed_loss, zeros
from mpq_jax.criteria.sites import one_of, samples_of
from mpq_jax.joint import Batch, Task
from mpq_jax.types import QuantizedModel


def hawq(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    *,
    hessian_samples: int = 256,
    relative_error: float = 0.05,
    max_draws: int = 500,
    uniform_activations: int = 0,
    seed: int = 0,
) -> Measured:
    """weight[l, i] = lambda_l ||Q_i(W_l) - W_l||^2, lambda_l the largest eigenvalue of the Hessian in W_l.

    (The paper ranks layers by lambda_l over their weights; this is its table.) hessian_samples: how many of the
    samples in `batches` that Hessian is of, whole batches. Otherwise as in hawq_v2, the extension to activations too.
    """
    some = batches[: max(1, hessian_samples // samples_of(batches[0]))]
    used = sum(samples_of(batch) for batch in some)

    def curvature(kind: str) -> dict[str, Estimate]:
        return eigenvalues(model, task, variables, some, kind, tolerance=relative_error, most=max_draws, seed=seed)

    def passes(estimates: Mapping[str, Estimate]) -> float:
        return 2.0 * used * sum(each.draws for each in estimates.values())

    return hessian.second_order(
        model,
        task,
        variables,
        batches,
        "hawq",
        curvature,
        uniform_activations,
        "largest eigenvalue",
        "iterations",
        passes,
    )


def largest_eigenvalues(
    product: Callable[[Any], Any], start: Any, *, tolerance: float = 0.05, most: int = 500
) -> tuple[np.ndarray, Estimate]:
    """The largest eigenvalues of G symmetric matrices by power iteration. -> ([G], Estimate of their mean)

    product(v) -> H v, on pytrees of arrays [G, ...], each group with a matrix of its own. start: random, [G, ...].
    Ends when the mean residual |Hv - lambda v| is within `tolerance` of the mean |lambda|: some eigenvalue is then no
    further from lambda than the residual, and lambda's own error is of the residual's square. Where the largest in
    size is negative, the iteration goes on with H - lambda I, whose largest is that of H, shifted.
    """
    v, shift, taken = _normalised(start), jnp.zeros(jax.tree.leaves(start)[0].shape[0]), 0
    for _ in range(2):
        for _ in range(most):
            value, residual, following = _power_step(v, product(v), shift)
            taken += 1
            size, error = float(jnp.abs(value).mean()), float(residual.mean())
            converged = error <= tolerance * size
            if converged:
                break
            v = following
        # What is negative but next to nothing changes no mean.
        negative = value < -tolerance * size
        if not negative.any():
            break
        shift, v = jnp.where(negative, -value, 0.0), _where(negative, _normalised(start), v)
    value = np.asarray(value, np.float64)
    return value, Estimate(float(value.mean()), error / size if size else 0.0, taken, converged)


@jax.jit
def _power_step(v: Any, hv: Any, shift: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """-> (v'Hv [G], |Hv - (v'Hv) v| [G], the next v: (H + shift I) v, normalised)"""
    value = _group_dot(v, hv)
    residual = jax.tree.map(lambda h, x: h - _spread(value, x) * x, hv, v)
    following = jax.tree.map(lambda h, x: h + _spread(shift, x) * x, hv, v)
    norm = jnp.sqrt(_group_dot(following, following))
    # A matrix of zeros has no direction: stay.
    return value, jnp.sqrt(_group_dot(residual, residual)), _where(norm > 0, _normalised(following), v)


def _group_dot(a: Any, b: Any) -> jax.Array:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((x * y).reshape(x.shape[0], -1).sum(-1) for x, y in pairs)


def _spread(group: jax.Array, x: jax.Array) -> jax.Array:
    return group.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)


def _where(chosen: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(chosen.reshape((-1,) + (1,) * (x.ndim - 1)), x, y), a, b)


def _normalised(v: Any) -> Any:
    norm = jnp.sqrt(_group_dot(v, v))
    return jax.tree.map(lambda x: x / _spread(jnp.where(norm > 0, norm, 1), x), v)


def eigenvalues(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    kind: str,
    *,
    tolerance: float = 0.05,
    most: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Path -> largest eigenvalue of the Hessian of the mean loss in that layer's weights, over all batches.

    For inputs: that of one sample's loss in its own inputs, the mean over samples (as a trace's is).
    """
    per_sample = kind == "activation"
    loss = perturbed_loss(model, task, kind)
    like = one_of(jax.tree.map(lambda x: x[0], batches[0])) if per_sample else batches[0]
    shapes = hessian.perturbation(model, task, variables, like, kind)
    product = jax.jit(_sample_product(loss, shapes) if per_sample else _weight_product(loss, shapes))
    # Each part is one problem, or one problem a sample, over its batches.
    parts = [[batch] for batch in batches] if per_sample else [batches]
    result = {}
    for row, path in enumerate(sites.searched_paths(model)):
        mask = jax.device_put(mask_of(model, path, shapes, kind))
        found, sizes = [], []
        for number, part in enumerate(parts):
            groups = samples_of(part[0]) if per_sample else 1
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), number)
            start = _random_start(key, shapes, mask, groups)

            def apply(v: Any, mask: Any = mask, part: Sequence[Batch] = part) -> Any:
                return _mean_over_batches(lambda batch: product(variables, mask, v, batch), part)

            values, estimate = largest_eigenvalues(apply, start, tolerance=tolerance, most=most)
            found.append(estimate)
            sizes.append(len(values))
        result[path] = _joined(found, sizes)
    return result


# (variables, mask, v [G, ...], batch) -> H v [G, ...] of each group's own Hessian
HessianProduct = Callable[[Any, Any, Any, Batch], Any]


def _weight_product(loss: Callable[..., jax.Array], shapes: Any) -> HessianProduct:
    """G = 1: the Hessian of the batch's mean loss."""

    def product(variables: Any, mask: Any, v: Any, batch: Batch) -> Any:
        one = jax.tree.map(lambda x: x[0], v)
        return one_of(masked(mask, hessian_product(loss, zeros(shapes), one, variables, batch)))

    return product


def _sample_product(loss: Callable[..., jax.Array], shapes: Any) -> HessianProduct:
    """G = B: each sample's own."""

    def product(variables: Any, mask: Any, v: Any, batch: Batch) -> Any:
        def one(v: Any, sample: Any) -> Any:
            return masked(mask, hessian_product(loss, zeros(shapes), v, variables, one_of(sample)))

        return jax.vmap(one)(v, batch)

    return product


def _random_start(key: jax.Array, shapes: Any, mask: Any, groups: int) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    normal = [jax.random.normal(k, (groups, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return masked(mask, jax.tree.unflatten(tree, normal))


def _mean_over_batches(product: Callable[[Batch], Any], batches: Sequence[Batch]) -> Any:
    total, samples = None, sum(samples_of(batch) for batch in batches)
    for batch in batches:
        share = samples_of(batch) / samples
        part = jax.tree.map(lambda x, share=share: share * x, product(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def _joined(found: Sequence[Estimate], sizes: Sequence[int]) -> Estimate:
    shares = np.array(sizes) / sum(sizes)
    return Estimate(
        value=float(shares @ [each.value for each in found]),
        error=float(shares @ [each.error for each in found]),
        draws=max(each.draws for each in found),
        converged=all(each.converged for each in found),
    )
