"""HAWQ-v2 (Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", 2019)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mpq_jax.criteria import Measured, hessian, sites
from mpq_jax.criteria.hessian import Estimate, dot, hessian_product, mask_of, masked, perturbed_loss, zeros
from mpq_jax.joint import Batch, Task
from mpq_jax.types import QuantizedModel

# Fewer draws than this say nothing of their own error.
FEWEST_DRAWS = 10


def hawq_v2(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    *,
    relative_error: float = 0.05,
    max_draws: int = 500,
    uniform_activations: int = 0,
    seed: int = 0,
) -> Measured:
    """weight[l, i] = (trace(H_l) / n_l) ||Q_i(W_l) - W_l||^2, n_l the layer's weights; the trace by Hutchinson's method.

    variables: the float model's, with step sizes. The published form has no activation table: `uniform_activations`
    gives all searched activations so many bits. With 0, the same formula on the layer's inputs (one sample's inputs
    and loss, the mean over samples) makes an activation table: an extension of ours.
    Unit: twice the loss, since the expansion's factor 1/2 is left out as published.
    """
    shapes = sites.call_shapes(model, task, variables, batches[0])
    one = sites.samples_of(batches[0])

    def curvature(kind: str) -> dict[str, Estimate]:
        found = traces(
            model, task, variables, batches, kind, relative_error=relative_error, max_draws=max_draws, seed=seed
        )
        n = sites.elements(model, shapes, kind)
        # Of a whole batch's inputs, n counts those of one sample.
        per = {leaf: count / (one if kind == "activation" else 1) for leaf, count in n.items()}
        return {
            path: each._replace(value=each.value / per[sites.place(model, path)[0]]) for path, each in found.items()
        }

    def passes(estimates: Mapping[str, Estimate]) -> float:
        return 2.0 * one * sum(each.draws for each in estimates.values())

    return hessian.second_order(
        model, task, variables, batches, "hawq_v2", curvature, uniform_activations, "mean trace", "draws", passes
    )


def quadratic_draw(loss: Callable[..., jax.Array], e: Any, mask: Any, key: jax.Array, *arguments: Any) -> jax.Array:
    """v'Hv for a random vector v of signs where the mask is 1: its mean is the trace there (Hutchinson 1989). []

    H: of loss(e, *arguments) in e.
    """
    leaves, tree = jax.tree.flatten(e)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    v = masked(mask, jax.tree.unflatten(tree, signs))
    return dot(v, hessian_product(loss, e, v, *arguments))


def mean_of_draws(draw: Callable[[int], Any], relative_error: float, max_draws: int) -> Estimate:
    """The mean of draw(0), draw(1), ... until its relative standard error is `relative_error`, or of `max_draws`."""
    values: list[float] = []
    while True:
        values.append(float(draw(len(values))))
        n = len(values)
        if n < min(FEWEST_DRAWS, max_draws):
            continue
        mean = math.fsum(values) / n
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
        converged = error <= relative_error * abs(mean)
        if converged or n >= max_draws:
            return Estimate(mean, error / abs(mean) if mean else 0.0 if converged else math.inf, n, converged)


def traces(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    kind: str,
    *,
    relative_error: float = 0.05,
    max_draws: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Path -> trace of the Hessian of the mean loss in that layer's weights; or in its inputs, a sample's mean.

    Each draw takes the next of `batches` and a new vector: its spread holds the batches' too. (With equal batches the
    Hessian of the mean loss in the whole tensor of inputs has the mean of the samples' traces as its trace.)
    """
    loss = perturbed_loss(model, task, kind)
    shapes = hessian.perturbation(model, task, variables, batches[0], kind)

    @jax.jit
    def draw(variables: Any, mask: Any, key: jax.Array, i: jax.Array, batch: Batch) -> jax.Array:
        e = zeros(hessian.perturbation(model, task, variables, batch, kind))  # batches may differ in size
        return quadratic_draw(loss, e, mask, jax.random.fold_in(key, i), variables, batch)

    batches = jax.device_put(batches)
    result = {}
    for row, path in enumerate(sites.searched_paths(model)):
        mask = jax.device_put(mask_of(model, path, shapes, kind))
        key = jax.random.fold_in(jax.random.key(seed), row)

        def at(i: int, mask: Any = mask, key: jax.Array = key) -> jax.Array:
            return draw(variables, mask, key, np.uint32(i), batches[i % len(batches)])

        result[path] = mean_of_draws(at, relative_error, max_draws)
    return result
