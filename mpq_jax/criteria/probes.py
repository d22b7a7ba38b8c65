"""One backward pass that meets every layer's output gradient with its quantization errors, at every bit-width.

Beside each product Y = X * W stands a probe, an argument that changes nothing; its "gradient" is made to be a statistic
of dL/dY and of the errors  dY_b = X * (Q_b(W) - W)  or  (Q_b(X) - X) * W.  Layers that a scan runs again, or that are
called again, add theirs up, as gradients do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.criteria import Measured, sites
from mpq_jax.interpret import Call
from mpq_jax.joint import Batch, Task
from mpq_jax.numerics import wide
from mpq_jax.operands import fake_quants
from mpq_jax.quantized_model import learned_leaves
from mpq_jax.types import Importance, QuantizedModel

# (dL/dY, dY_b) -> []
Statistic = Callable[[jax.Array, jax.Array], jax.Array]


def make_probes(
    model: QuantizedModel, task: Task, statistic: Statistic
) -> Callable[[Any, Batch], dict[str, dict[str, jax.Array]]]:
    """probes(variables, batch) -> {"weight": {leaf: [B, *stack, K]}, "activation": {leaf: [B, *stack, K]}}.

    For each sample n alone, with L_n its loss and Y its outputs of the layer: the statistic at each bit-width.
    """
    leaves = sites.searched_leaves(model)

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        product = ops.contract(call.primitive, call.params, "smooth")
        out = product(lhs, rhs)
        if value is None:
            return out, None
        spec, side = leaves[call.leaf], call.weight_side

        def statistics(gradient: jax.Array, lhs: jax.Array, rhs: jax.Array, value: Any) -> dict[str, jax.Array]:
            operands = (lhs, rhs)
            weight, activation = operands[side], operands[1 - side]
            both = fake_quants(spec, model.quantizer, call, weight, value)
            places = (side, 1 - side)
            widths = (spec.weight_bit_widths, spec.activation_bit_widths)
            result = {}
            for kind, x, grid, at, held in zip(sites.KINDS, (weight, activation), both, places, widths, strict=True):
                errors = (grid(x, jnp.int32(b)) - x for b in held)
                moved = (product(error, rhs) if at == 0 else product(lhs, error) for error in errors)
                found = jnp.stack([statistic(wide(gradient), wide(each)) for each in moved])
                result[kind] = found.astype(dtypes[kind])
            return result

        values = {kind: value[kind] for kind in sites.KINDS}
        dtypes = {kind: value["probe"][kind].dtype for kind in sites.KINDS}
        return _probed(statistics)(out, value["probe"], (lhs, rhs, values)), None

    def loss(probe: Any, variables: Any, values: Mapping[str, Any], batch: Batch) -> jax.Array:
        values = {leaf: value | {"probe": probe[leaf]} for leaf, value in values.items()}
        outputs = model.walk(variables, values, handler, task.inputs(batch), task.eval_kwargs)[0]
        return task.loss(outputs, batch)

    def probes(variables: Any, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        values = {
            leaf: v for leaf, v in learned_leaves(model.specs, model.quantizer, variables).items() if leaf in leaves
        }
        nothing = {
            leaf: {kind: jnp.zeros((*spec.stack, len(getattr(spec, f"{kind}_bit_widths")))) for kind in sites.KINDS}
            for leaf, spec in leaves.items()
        }

        def one(sample: Any) -> Any:
            return jax.grad(loss)(nothing, variables, values, sites.one_of(sample))

        found = jax.vmap(one)(batch)
        return {kind: {leaf: found[leaf][kind] for leaf in leaves} for kind in sites.KINDS}

    return probes


def _probed(statistics: Callable[..., dict[str, jax.Array]]) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """(out, probe, operands) -> out; the probe's gradient is statistics(gradient of out, *operands)."""

    @jax.custom_vjp
    def probed(out: jax.Array, probe: Any, operands: Any) -> jax.Array:
        del probe, operands
        return out

    def forward(out: jax.Array, probe: Any, operands: Any) -> tuple[jax.Array, Any]:
        del probe
        return out, operands

    def backward(operands: Any, gradient: jax.Array) -> tuple[jax.Array, Any, None]:
        return gradient, statistics(gradient, *operands), None

    probed.defvjp(forward, backward)
    return probed


def mean_statistics(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    statistic: Statistic,
    of_sample: Callable[[jax.Array], jax.Array],
) -> tuple[dict[str, np.ndarray], float, int]:
    """({"weight": [L, K], "activation": [L, K]}, median relative standard error of an entry, samples).

    The mean over samples of of_sample(the sample's statistic).
    """
    probes = make_probes(model, task, statistic)

    @jax.jit
    def moments(variables: Any, batch: Batch) -> tuple[Any, Any]:
        each = jax.tree.map(of_sample, probes(variables, batch))
        return jax.tree.map(lambda x: x.mean(0), (each, jax.tree.map(jnp.square, each)))

    (mean, square), samples = sites.mean_over(batches, moments, variables)
    rows = {kind: sites.layer_rows(model, kind, mean[kind]) for kind in sites.KINDS}
    first, second = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (mean, square))
    known = first > 0
    spread = np.sqrt(np.maximum(second - first**2, 0)[known] / max(1, samples - 1)) / first[known]
    return rows, float(np.median(spread)) if known.any() else 0.0, samples


def measured(model: QuantizedModel, table: Importance, error: float, samples: int) -> Measured:
    """Measured, with what one pass and its products cost: each product counts as a forward pass does."""
    widths = len(model.bit_widths) + len(model.activation_bit_widths)
    note = f"{samples} samples; standard error of an entry {100 * error:.1f} % (median)"
    return Measured(table, samples * (2 + widths) / 3, (note,), {"samples": samples, "median_error": error})
