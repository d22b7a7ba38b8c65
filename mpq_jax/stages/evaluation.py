"""Rows measured after training: their normalisation statistics, and losses and accuracies on a whole split."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import data, parallel
from mpq_jax.stages.run import Run, train_batches
from mpq_jax.types import Bits


def rows_of(variables: Mapping[str, Any], count: int) -> Any:
    """`count` copies [P, ...] of the collections that training changes."""
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    return jax.tree.map(lambda x: jnp.stack([x] * count), stats)


def reestimated(run: Run, params: Any, stats: Any, policies: Mapping[str, Bits] | None) -> Any:
    """stats [P, ...] with normalisation statistics measured anew for each row's policy.

    The mean over `statistics_batches` training batches of each batch's own statistics.
    """
    if "batch_stats" not in stats:
        return stats
    batches = train_batches(run, run.config.joint.batch_size, "statistics")(0)
    total = None
    placed = parallel.place(run.layout, (params, stats, policies))
    for _ in range(run.config.statistics_batches):
        new = run.statistics(*placed, parallel.place_batch(run.layout, next(batches)))
        new = parallel.whole(run.layout, new)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    return {**stats, "batch_stats": jax.tree.map(lambda x: x / run.config.statistics_batches, total)}


def with_statistics(run: Run, variables: Mapping[str, Any], policies: Mapping[str, Bits]) -> Any:
    """stats [1, ...] of a row after its training: those it was trained to, or `reestimated`, whichever loses less in training.

    Both are of about as many samples, and differ by a few percent. At few bits that can be a lot: what most pixels of a
    channel have in common (a background) may lie where rounding turns, and all of them go over to the next code.
    """
    own = rows_of(variables, 1)
    anew = reestimated(run, variables["params"], own, policies)
    if anew is own:
        return own

    both = [parallel.place(run.layout, (variables["params"], stats, policies)) for stats in (own, anew)]
    losses = np.zeros(2)
    batches = train_batches(run, run.config.joint.batch_size, "statistics")(0)
    for _ in range(run.config.statistics_batches):
        batch = parallel.place_batch(run.layout, next(batches))
        losses += [np.asarray(run.evaluate(*placed, batch)[0], np.float64)[0] for placed in both]
    return own if losses[0] <= losses[1] else anew


def evaluate(
    run: Run,
    params: Any,
    stats: Any,
    policies: Mapping[str, Bits] | None,
    split: str,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(mean losses [P], accuracies [P]) of P rows on a split: all of it, or its first `limit` examples.

    Accuracies are not numbers where the run's task calls nothing right.
    """
    losses: Any = 0.0
    right: Any = 0
    examples = 0
    index, count = parallel.block(run.layout)
    size = parallel.up_to(run.layout, run.config.eval_batch_size)
    placed = parallel.place(run.layout, (params, stats, policies))
    for batch in data.eval_batches(run.dataset, split, size, limit=limit, process_index=index, process_count=count):
        loss, correct, valid = run.evaluate(*placed, parallel.place_batch(run.layout, batch))
        losses, right, examples = (
            losses + np.asarray(loss, np.float64),
            right + np.asarray(correct),
            examples + int(valid),
        )
    return losses / examples, right / examples
