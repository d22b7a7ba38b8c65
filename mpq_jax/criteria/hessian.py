"""Curvature of the float model's loss in one layer's weights or inputs: what HAWQ and HAWQ-v2 share.

A tensor is reached by adding a perturbation e = 0 to it inside the model's walk; the Hessian H in e is that of the
tensor. Products with it are forward mode over reverse mode, jvp(grad). H never exists as a matrix.

A perturbation, a direction, a mask are dicts: {leaf: [*stack, ...]} for weights, {(leaf, call): [*scans, ...]} for
inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.criteria import Measured, sites
from mpq_jax.interpret import Call
from mpq_jax.joint import Batch, Task
from mpq_jax.types import QuantizedModel, Refusal


class Estimate(NamedTuple):
    """value; its relative error (standard error of a mean, or residual of an eigenvalue); draws or iterations taken;
    whether the error came within what was asked for before draws ran out."""

    value: float
    error: float
    draws: int
    converged: bool


# ---- the loss in a perturbation -----------------------------------------------------------------------------------


def perturbed_loss(model: QuantizedModel, task: Task, kind: str) -> Callable[..., jax.Array]:
    """loss(e, variables, batch) -> []: the float model's, with e added to the weight operands, or to the inputs."""

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, e: Any) -> tuple[jax.Array, Any]:
        operands = [lhs, rhs]
        if e is not None:
            side = call.weight_side if kind == "weight" else 1 - call.weight_side
            if e.shape != operands[side].shape:
                raise Refusal(
                    f"the weights {call.leaf!r} are used in two shapes, {e.shape} and {operands[side].shape}, so that "
                    "their Hessian is not defined here; fix or exclude that layer by a rule, or take output_fisher"
                )
            operands[side] = operands[side] + e.astype(operands[side].dtype)
        return ops.contract(call.primitive, call.params, "smooth")(*operands), None

    def loss(e: Mapping[Any, Any], variables: Any, batch: Batch) -> jax.Array:
        outputs, _, _ = model.walk(variables, e, handler, task.inputs(batch), task.eval_kwargs)
        return task.loss(outputs, batch)

    return loss


def perturbation(model: QuantizedModel, task: Task, variables: Any, batch: Batch, kind: str) -> dict[Any, Any]:
    """Shapes and dtypes of a perturbation of every searched layer's weights, or inputs, for batches of this shape."""
    result: dict[Any, jax.ShapeDtypeStruct] = {}
    for (leaf, number), shapes in sites.call_shapes(model, task, variables, batch).items():
        spec, tensor = model.specs[leaf], getattr(shapes, kind)
        dtype = jnp.promote_types(tensor.dtype, jnp.float32)
        if kind == "activation":
            result[leaf, number] = jax.ShapeDtypeStruct(tensor.shape, dtype)
        elif leaf not in result:
            # Runs of the same layer share their weights, hence the perturbation.
            shape = tuple(n for d, n in enumerate(tensor.shape) if d not in spec.shared)
            result[leaf] = jax.ShapeDtypeStruct(shape, dtype)
    return result


def zeros(shapes: Any) -> Any:
    """The perturbation 0."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def mask_of(model: QuantizedModel, path: str, e: Mapping[Any, Any], kind: str) -> dict[Any, np.ndarray]:
    """1 where the perturbation is that of layer `path`, 0 elsewhere; broadcasts with e."""
    mine, position = sites.place(model, path)
    masks = {}
    for key, array in e.items():
        leaf = key if kind == "weight" else key[0]
        spec = model.specs[leaf]
        lead = np.zeros(spec.stack, np.float32)
        if leaf == mine:
            lead[position] = 1
        if kind == "activation":
            lead = np.expand_dims(lead, spec.shared)
        masks[key] = lead.reshape(lead.shape + (1,) * (array.ndim - lead.ndim))
    return masks


def hessian_product(loss: Callable[..., jax.Array], e: Any, v: Any, *arguments: Any) -> Any:
    """H v, H the Hessian of loss(e, *arguments) in e."""
    return jax.jvp(lambda e: jax.grad(loss)(e, *arguments), (e,), (v,))[1]


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two pytrees of the same shapes, []."""
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))


def masked(mask: Any, v: Any) -> Any:
    """v where the mask (of `mask_of`) is 1, else 0."""
    return jax.tree.map(lambda m, x: m.astype(x.dtype) * x, mask, v)


# ---- the table of both --------------------------------------------------------------------------------------------


def second_order(
    model: QuantizedModel,
    task: Task,
    variables: Any,
    batches: Sequence[Batch],
    criterion: str,
    curvature: Callable[[str], Mapping[str, Estimate]],
    uniform_activations: int,
    what: str,
    draws: str,
    passes: Callable[[Mapping[str, Estimate]], float],
) -> Measured:
    """weight[l, i] = c_l ||Q_i(W_l) - W_l||^2, and the same of the layer's inputs X_l (a sample's mean).

    curvature(kind) -> path -> c_l; below 0 it counts as 0, and is named. what, draws: the names of the
    curvature and of what it is estimated by, for notes.
    passes(estimates) -> forward-and-backward passes of one sample that they took.
    Raises Refusal where `uniform_activations` is no candidate of some layer.
    """
    # Refused here, before anything is measured.
    rows = np.zeros((len(sites.searched_paths(model)), len(model.bit_widths)))
    if uniform_activations:
        sites.uniform_activations(model, criterion, rows, uniform_activations)
    errors, samples = sites.mean_over(batches, jax.jit(sites.make_squared_errors(model, task)), variables)
    tables, notes, details, spent = {}, [], {}, samples / 3
    for kind in sites.KINDS[:1] if uniform_activations else sites.KINDS:
        estimates = curvature(kind)
        c = np.array([max(0.0, each.value) for each in estimates.values()])
        tables[kind] = c[:, None] * sites.layer_rows(model, kind, errors[kind])
        notes += _said(estimates, f"{what}, {kind}s", draws)
        details[kind] = {
            path: {**each._asdict(), "error": each.error if np.isfinite(each.error) else None}
            for path, each in estimates.items()
        }
        spent += passes(estimates)
    if uniform_activations:
        table = sites.uniform_activations(model, criterion, tables["weight"], uniform_activations)
    else:
        table = sites.importance(model, criterion, tables["weight"], tables["activation"])
    return Measured(table, spent, tuple(notes), {what: details})


def _said(estimates: Mapping[str, Estimate], what: str, name: str) -> list[str]:
    """Where draws stopped and why, and what was negative."""
    converged = [each for each in estimates.values() if each.converged]
    notes = []
    if converged:
        draws = sorted(each.draws for each in converged)
        worst = sites.percent([each.error for each in converged])
        notes.append(
            f"{what}: {len(converged)} of {len(estimates)} within the error asked for after {draws[0]} to {draws[-1]} "
            f"{name} (largest error {worst})"
        )
    for path, each in estimates.items():
        if not each.converged:
            notes.append(
                f"{what}: {path} stopped at the limit of {each.draws} {name}, error {sites.percent([each.error])}"
            )
        if each.value < 0:
            notes.append(f"{what}: {path} is negative ({each.value:.3g}) and counts as 0")
    return notes
