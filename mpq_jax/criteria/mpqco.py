"""MPQCO (Chen et al., "Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization", 2021)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.criteria import Measured, probes, sites
from mpq_jax.joint import Batch, Task
from mpq_jax.types import QuantizedModel


def mpqco(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    *,
    uniform_activations: int = 0,
) -> Measured:
    """weight[l, b] = 1/(2N) sum_n <grad_W log p(y_n | x_n), Q_b(W_l) - W_l>^2: the empirical Fisher of the weights.

    The product with a weight gradient is one with an output gradient, <grad_W L, dW> = <dL/dY, X dW>: one backward pass
    a sample, vmapped, serves every layer and bit-width, and no weight gradient of a sample is ever formed.
    The published form has no activation table: `uniform_activations` gives all searched activations so many bits. With
    0, the same formula on the layer's inputs, <dL/dX, Q_b(X) - X>, makes one: an extension of ours. Unit: the loss.
    variables: the float model's, with step sizes. Raises Refusal where `uniform_activations` is no layer's candidate.
    """
    if uniform_activations:
        sites.uniform_activations(model, "mpqco", np.zeros((0, 0)), uniform_activations)

    def statistic(gradient: jax.Array, error: jax.Array) -> jax.Array:
        return (gradient * error).sum()

    rows, error, samples = probes.mean_statistics(
        model, task, variables, batches, statistic, lambda x: 0.5 * jnp.square(x)
    )
    if uniform_activations:
        table = sites.uniform_activations(model, "mpqco", rows["weight"], uniform_activations)
    else:
        table = sites.importance(model, "mpqco", rows["weight"], rows["activation"])
    return probes.measured(model, table, error, samples)
