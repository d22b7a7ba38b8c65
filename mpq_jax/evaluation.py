"""A stack of rows on one batch without training: losses and right answers, and the batch's normalisation statistics."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import flax_seam
from mpq_jax.tasks import Batch, Task, random_streams
from mpq_jax.types import Bits, QuantizedModel


def make_evaluate(model: QuantizedModel, task: Task) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """evaluate(params, stats [P, ...], policies, batch) -> (loss sums [P], right [P], examples []).

    stats: the variables' other collections, a row each; {} where there are none.
    """

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

    A normalisation layer only ever shows m * old + (1 - m) * batch, with a momentum m of its own (`momenta`). Run from
    old = 0 it gives (1 - m) * batch. Statistics that are no such averages, or do not move, stay what they are: a frozen
    layer's, a spectral norm's.
    """
    rngs = random_streams(task, jax.random.key(0)) if dropout else None

    def updated(params: Any, stats: Any, policy: Any, inputs: Any, old: Any) -> Any:
        variables = {"params": params, **stats, "batch_stats": old}
        # All that training lets the model change: a counter beside the statistics, say.
        mutable = sorted({"batch_stats", *stats})
        _, new = model.apply(variables, policy, *inputs, mutable=mutable, rngs=rngs, **task.train_kwargs)
        return new["batch_stats"]

    def statistics(params: Any, stats: Any, policies: Mapping[str, Bits] | None, batch: Batch) -> Any:
        row = jax.tree.map(lambda x: x[0], stats)
        known = momenta(
            lambda params, row, inputs, old: updated(params, row, None, inputs, old), params, row, task.inputs(batch)
        )

        def one(stats: Any, policy: Any) -> Any:
            old = flax_seam.flatten(stats["batch_stats"])
            start = {name: x if known[name] is None else jnp.zeros_like(x) for name, x in old.items()}
            new = flax_seam.flatten(updated(params, stats, policy, task.inputs(batch), flax_seam.unflatten(start)))
            return flax_seam.unflatten(
                {name: x if (m := known[name]) is None else new[name] / (1 - m) for name, x in old.items()}
            )

        return jax.vmap(one)(stats, policies)

    return statistics


def momenta(updated: Callable[..., Any], params: Any, row: Any, inputs: Any) -> dict[str, float | None]:
    """{flat path in batch_stats: its momentum m}; None where a module's statistics are no averages with one, 0 <= m < 1.

    updated(params, row, inputs, old) -> the new batch_stats. Of the arguments shapes alone are looked at: m depends on no
    value, and is found with made ones, outside of whatever is being traced. From old = 0 and from old = 1 the results
    differ by m. A module whose statistics are used, not averaged, shows two functions to those behind it; where one is
    found, each that is in doubt is asked alone.
    """
    with jax.ensure_compile_time_eval():
        made, given, arguments = jax.tree.map(_made, (params, row, inputs))
        shapes = flax_seam.flatten(given["batch_stats"])
        run = jax.jit(lambda old: flax_seam.flatten(updated(made, given, arguments, flax_seam.unflatten(old))))
        modules: dict[str, list[str]] = {}
        for name in shapes:
            modules.setdefault(name.rpartition("/")[0], []).append(name)

        def asked(names: Collection[str]) -> dict[str, float | None]:
            low, high = (
                run({name: jnp.full_like(x, start if name in names else 1) for name, x in shapes.items()})
                for start in (0, 1)
            )
            return {name: _momentum(low[name], high[name]) for name in names}

        found = asked(shapes)
        doubtful = [names for names in modules.values() if any(found[name] is None for name in names)]
        for names in doubtful:
            found |= asked(names)
            if any(found[name] is None for name in names):
                found |= dict.fromkeys(names)
    return found


def _made(x: Any) -> Any:
    """An array of the shape and type of another: small numbers in no order, zeros where it holds none."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(x)), x.shape)
        return jnp.zeros(x.shape, x.dtype)
    return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype) / 8


def _momentum(low: jax.Array, high: jax.Array) -> float | None:
    """m, from the results of 0 and of 1; None where it is no number of all entries, or not in [0, 1)."""
    if not jnp.issubdtype(low.dtype, jnp.floating):
        return None
    kept = np.asarray(high, np.float64) - np.asarray(low, np.float64)
    momentum = round(float(kept.mean()), 6)  # as it was typed, but for rounding
    one = bool((np.abs(kept - momentum) < 1e-3 + 1e-5 * np.abs(low).max()).all())
    return momentum if one and 0 <= momentum < 1 else None
