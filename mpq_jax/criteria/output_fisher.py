"""Output-Fisher sensitivity, as NVIDIA's ModelOpt scores layers: gradients of outputs, squared, meet their errors."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.criteria import Measured, probes, sites
from mpq_jax.joint import Batch, Task
from mpq_jax.types import QuantizedModel


def output_fisher(
    model: QuantizedModel, task: Task, variables: Any, batches: Sequence[Batch], alpha: float = 0.3333
) -> Measured:
    """weight[l, b] = 1/2 mean_n sum_i (dL_n/dY_i)^2 (dY_b,i)^2, dY_b = X (Q_b(W) - W) the change of layer l's output.

    activation[l, b]: the same with dY_b = (Q_b(X) - X) W. L_n is the loss of sample n. Without cross terms of outputs;
    ModelOpt leaves the factor out. With it the unit is that of the loss.
    variables: the float model's, with step sizes. alpha: kept in the table, the weights' factor in every sum over it: what
    fine-tuning leaves of their harm, for they move and make up for their grid, and inputs do not. A third is what losses
    after fine-tuning say (docs/results.md); 1 is the model as it is.
    """

    def statistic(gradient: jax.Array, error: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(gradient * error).sum()

    rows, error, samples = probes.mean_statistics(model, task, variables, batches, statistic, lambda x: x)
    table = sites.importance(model, "output_fisher", rows["weight"], rows["activation"])
    return probes.measured(model, table._replace(alpha=alpha), error, samples)
