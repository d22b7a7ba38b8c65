"""Sampled policies: the harm of bits, from what the joint model does with random policies near the budget.

  log D_n = c + sum_u effect_u[bits_n,u] + noise,   D_n = mean over samples of KL(float model's answer || policy n's)

Regression as in `regression`, but on rows that are measured after joint training: the step sizes have settled, all rows
see the same samples, and the policies lie where the search will look. docs/results.md compares the two. No labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import costs, flax_seam
from mpq_jax.criteria import Measured, sites
from mpq_jax.criteria.learned import RowLog
from mpq_jax.criteria.regression import FEWEST_ROWS, fitted
from mpq_jax.policy import stack
from mpq_jax.search.others import random_fitting, random_policies
from mpq_jax.search.problem import build
from mpq_jax.tasks import Batch, Task, logits_of, random_streams
from mpq_jax.types import Bits, Importance, Policy, QuantizedModel, Refusal

WITHIN = 0.05  # of the first budget: how near to it
ROWS = 4  # policies measured at once
BATCH = 256  # samples at least, that a batch's own statistics come from


def sampled(
    model: QuantizedModel,
    task: Task,
    variables: Mapping[str, Any],
    joint: Mapping[str, Any],
    batches: Sequence[Batch],
    *,
    policies: int = 240,
    near: Sequence[str] = (),
    rules: Sequence[str] = (),
    monotone: bool = False,
    seed: int = 0,
) -> Measured:
    """weight[l, i], activation[l, j]: additive effects on the log divergence, 0 at each layer's widest candidate.

    variables: the float model's. joint: the joint model's, with learned step sizes. Outputs are logits [..., classes].
    near: budgets such as ["bitops=W3A3"], of which all hold and the first is used up to 5 %; none: policies are drawn
    uniformly. rules: the search's own. Where fewer than 20 policies near them are found, uniform draws take their place.
    Raises Refusal for budgets that cannot be read.
    """
    table = _empty(model)._replace(rules=tuple(rules))
    drawn, remark = draw(table, policies, near, seed)
    harm = divergences(model, task, variables, joint, drawn, batches)
    paths = sites.searched_paths(model)
    bits = np.array([[each[path] for path in paths] for each in drawn], np.int32)
    log = RowLog(np.arange(len(drawn), dtype=np.int32), bits, harm, np.ones(len(drawn)))
    found = fitted(model, log, (), "sampled", monotone, 1.0)
    samples = sum(len(jax.tree.leaves(batch)[0]) for batch in batches)
    return found._replace(sample_passes=(len(drawn) + 1) * samples / 3, notes=(remark, *found.notes))


def _empty(model: QuantizedModel) -> Importance:
    layers = len(sites.searched_paths(model))
    zeros = (np.zeros((layers, len(widths))) for widths in (model.bit_widths, model.activation_bit_widths))
    return sites.importance(model, "sampled", *zeros)


def draw(table: Importance, count: int, near: Sequence[str], seed: int) -> tuple[list[dict[str, Bits]], str]:
    """(policies, in a line where they lie): `count` random ones, near the budgets where 20 or more are found there.

    Raises Refusal for fewer than 20, and for budgets that cannot be read.
    """
    if count < FEWEST_ROWS:
        raise Refusal(f"criteria.policies is {count}; give {FEWEST_ROWS} or more, 240 or so for a small network")
    if near:
        budgets = costs.parse_budgets(list(near), table.layers, table.bit_widths, table.activation_bit_widths)
        found = random_policies(table, budgets, count, seed=seed, within=WITHIN)
        if len(found) >= FEWEST_ROWS:
            share = "" if budgets[0].largest else f" {WITHIN:.0%} of"  # a limit on the largest layer only has to hold
            return found, f"{len(found)} random policies within{share} {', '.join(near)}"
    problem, rng = build(table, []), np.random.default_rng(seed)
    fixed = {layer.path: layer.bits for layer in table.layers if layer.bits is not None}
    drawn = (random_fitting(problem, rng) for _ in range(count))
    missed = f"; near {', '.join(near)} there are too few" if near else ""
    return [fixed | problem.policy(picks) for picks in drawn if picks is not None], (
        f"{count} random policies of all bit-widths{missed}"
    )


def divergences(
    model: QuantizedModel,
    task: Task,
    variables: Mapping[str, Any],
    joint: Mapping[str, Any],
    policies: Sequence[Mapping[str, Bits]],
    batches: Sequence[Batch],
) -> np.ndarray:
    """float64 [N]: mean over all samples of KL(float || policy), natural log, each batch with its own statistics."""
    stats = flax_seam.mutable_collections(joint)
    training = "batch_stats" in stats
    kwargs = task.train_kwargs if training else task.eval_kwargs
    rngs = random_streams(task, jax.random.key(0)) if training and model.variables is None else None

    def log_probabilities(outputs: Any) -> jax.Array:
        return jax.nn.log_softmax(logits_of(outputs).astype(jnp.float32))

    @jax.jit
    def harm(variables: Mapping[str, Any], joint: Mapping[str, Any], rows: Policy, batch: Batch) -> jax.Array:
        inputs = task.inputs(batch)
        teacher = log_probabilities(model.apply(variables, None, *inputs, **task.eval_kwargs))

        def row(policy: Policy) -> jax.Array:
            if training:
                outputs, _ = model.apply(joint, policy, *inputs, mutable=list(stats), rngs=rngs, **kwargs)
            else:
                outputs = model.apply(joint, policy, *inputs, **kwargs)
            mine = log_probabilities(outputs)
            return (jnp.exp(teacher) * (teacher - mine)).sum(-1).mean()

        return jax.vmap(row)(rows)

    joined = _joined(batches)
    sizes = [len(jax.tree.leaves(batch)[0]) for batch in joined]
    found = []
    for start in range(0, len(policies), ROWS):
        part = list(policies[start : start + ROWS])
        rows = jax.tree.map(jnp.asarray, stack(part + [part[-1]] * (ROWS - len(part))))
        values = [np.asarray(harm(variables, joint, rows, batch), np.float64) for batch in joined]
        found.append(np.average(values, axis=0, weights=sizes)[: len(part)])
    return np.concatenate(found)


def _joined(batches: Sequence[Batch]) -> list[Batch]:
    """Batches of at least BATCH samples, where there are so many; the last has what is left over, too."""
    size = len(jax.tree.leaves(batches[0])[0])
    group = max(1, -(-BATCH // size))
    starts = list(range(0, max(1, len(batches) - group + 1), group))
    stops = [*starts[1:], len(batches)]
    return [
        jax.tree.map(lambda *x: jnp.concatenate(x), *batches[start:stop])
        for start, stop in zip(starts, stops, strict=True)
    ]
