"""A stack of rows on one batch without training: losses and right answers, and the batch's normalisation statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.tasks import Batch, Task, random_streams
from mpq_jax.types import Bits, QuantizedModel


def make_evaluate(model: QuantizedModel, task: Task) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """evaluate(variables [P, ...] in all but params, policies, batch) -> (loss sums [P], right [P], examples [])."""

    def evaluate(
        params: Any, stats: Any, policies: Mapping[str, Bits] | None, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def row(stats: Any, policy: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            outputs = model.apply({"params": params, **stats}, policy, *task.inputs(batch), **task.eval_kwargs)
            right, count = task.correct(outputs, batch)
            return task.loss(outputs, batch) * count, right, count

        # The float model without statistics has nothing to map over: one row.
        mapped = jax.tree.leaves((stats, policies))
        losses, right, count = jax.vmap(row, axis_size=len(mapped[0]) if mapped else 1)(stats, policies)
        return losses, right, count[0]

    return evaluate


def make_batch_statistics(model: QuantizedModel, task: Task, dropout: bool = False) -> Callable[..., Any]:
    """statistics(params, stats [P, ...], policies, batch) -> the batch's own normalisation statistics [P, ...].

    A normalisation layer only ever shows m * old + (1 - m) * batch, with a momentum m of its own. Running it from
    old = 0 and from old = 1 gives both m and the batch's statistics, whatever the model.
    """

    rngs = random_streams(task, jax.random.key(0)) if dropout else None

    def statistics(params: Any, stats: Any, policies: Mapping[str, Bits] | None, batch: Batch) -> Any:
        def row(stats: Any, policy: Any) -> Any:
            def updated(old: Any) -> Any:
                variables = {"params": params, **stats, "batch_stats": old}
                _, new = model.apply(
                    variables, policy, *task.inputs(batch), mutable=["batch_stats"], rngs=rngs, **task.train_kwargs
                )
                return new["batch_stats"]

            zeros = jax.tree.map(jnp.zeros_like, stats["batch_stats"])
            ones = jax.tree.map(jnp.ones_like, stats["batch_stats"])
            from_zero, from_one = updated(zeros), updated(ones)
            return jax.tree.map(lambda low, high: low / (1 - (high - low)), from_zero, from_one)

        return jax.vmap(row)(stats, policies)

    return statistics
