"""Joint training: one step runs a stack of policies (rows), and their gradients are summed.

Float training is a stack of one row without bits, fine-tuning a stack of one policy: there is no other training path.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpq_jax import flax_seam, parallel
from mpq_jax.numerics import wide
from mpq_jax.operands import with_state
from mpq_jax.row_policies import as_rows, concatenate, random_bits
from mpq_jax.tasks import Batch, Task, logits_of, random_streams
from mpq_jax.tasks import classification as classification  # also known by this name
from mpq_jax.types import Bits, QuantizedModel, Refusal


class Distill(NamedTuple):
    """Soft targets: (1 - weight) * loss + weight * KL(teacher || row).

    teacher: "widest" (in place: the row of the most bits teaches the others), or "given" (its logits come in the
    batch under "teacher").
    """

    weight: float
    teacher: str = "widest"


class TrainState(NamedTuple):
    """What a step takes and gives back.

    params: the parameter tree, the quantizer's leaves included. rows: per row [P, ...] copies of whatever each row keeps to
    itself: {"stats": the collections that training changes, "affine": flat parameters, {} unless asked for,
    "index": [P]}.
    optimizer: optax state. average: moving average of params, or None. step: int32 [].
    """

    params: Any
    rows: Mapping[str, Any]
    optimizer: Any
    average: Any
    step: jax.Array


# ---- state --------------------------------------------------------------------------------------------------------


def init_state(
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    rows: int,
    *,
    affine_per_row: bool = False,
    average: bool = False,
) -> TrainState:
    """The state before the first step.

    variables: calibrated ones, or the float model's for float training. rows: P, the rows that the step will run.
    affine_per_row: every row has its own scale and bias of each normalisation that keeps statistics.
    average: keep a moving average of the parameters, too.

    Raises Refusal for affine_per_row where no normalisation keeps statistics.
    """
    stats = {name: variables[name] for name in flax_seam.mutable_collections(variables)}
    affine = {}
    if affine_per_row:
        normalised = {path.rpartition("/")[0] for path in flax_seam.flatten(variables.get("batch_stats", {}))}
        flat = flax_seam.flatten(variables["params"])
        affine = {path: leaf for path, leaf in flat.items() if path.rpartition("/")[0] in normalised}
        if not affine:
            raise Refusal("affine_per_row needs normalisation layers with batch statistics; this model has none")
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * rows), {"stats": stats, "affine": affine})
    copies["index"] = jnp.arange(rows)  # a model without statistics has nothing else to count its rows by
    params = variables["params"]
    return TrainState(
        params=params,
        rows=copies,
        optimizer=optimizer.init((params, copies["affine"])),
        average=jax.tree.map(jnp.copy, params) if average else None,  # the step consumes both
        step=jnp.zeros((), jnp.int32),
    )


def row_variables(state: TrainState, row: int, averaged: bool = False) -> dict[str, Any]:
    """The variables of one row, for evaluation or to start fine-tuning from.

    row: from 0 on, or from the last on backwards (-1). averaged: take the moving average of the parameters, where there is
    one. Raises Refusal for a row that the state does not have.
    """
    rows = state.rows["index"].shape[0]
    if not -rows <= row < rows:
        raise Refusal(f"the state has {rows} rows, numbered from 0; there is no row {row}")
    params = state.average if averaged and state.average is not None else state.params
    one = jax.tree.map(lambda leaf: leaf[row], state.rows)
    return {"params": _with_affine(params, one["affine"]), **one["stats"]}


def _with_affine(params: Any, affine: Mapping[str, Any]) -> Any:
    return flax_seam.unflatten({**flax_seam.flatten(params), **affine}) if affine else params


# ---- the loss and the step ----------------------------------------------------------------------------------------


def joint_loss(
    model: QuantizedModel,
    task: Task,
    params: Any,
    rows: Mapping[str, Any],
    policies: Mapping[str, Bits] | None,
    batch: Batch,
    *,
    rngs: Mapping[str, jax.Array] | None = None,
    distill: Distill | None = None,
    error_weight: float = 0.0,
    task_weight: float | jax.Array = 1.0,
    sliced: bool = False,
    recompute: bool = False,
    layout: parallel.Layout | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Any, Any]]:
    """The sum of the rows' losses (LIMPQ algorithm 1), all rows under one `jax.vmap`; a single row goes without.

    params: the parameter tree, shared by all rows. rows: their own values [P, ...], as in `TrainState`.

    error_weight: lambda of a term  lambda * sum over layers of (mean (x_hat - x)^2 / mean x^2), of weights and of
    activations, that reaches the quantizer's leaves only. After a normalisation layer the task loss hardly depends on a
    step size that clips everything, and hardly at all at high bit-widths; this term tells the two directions apart.
    A quantizer's own penalty (PACT's on its clipping levels) is added for each row.

    task_weight: of the rows' own losses in the sum. rngs: streams of the model's call. distill: soft targets, see `Distill`.
    sliced: the batch's leaves are [P, B, ...]: each row sees samples of its own. Not with distillation in place, whose
        rows answer for the same samples.
    recompute: less memory and more time, see `QuantizedModel.apply`; the same numbers but for rounding.
    policies: a stack {path: Bits([P], [P])}, or None for the float model (the rows then differ in nothing).
    Returns (sum [], (losses [P], statistics after the batch [P, ...], moved)), with `moved` as `operands.TERMS` says of
    "state", summed over the rows; {} where the quantizer has no state.
    """
    mutable = list(rows["stats"])
    terms = () if policies is None else _terms(model, error_weight)

    per_row = 0 if sliced else None

    def forward(row, policy, batch):
        variables = {"params": _with_affine(params, row["affine"]), **row["stats"]}
        out: Any = model.apply(
            variables,
            policy,
            *task.inputs(batch),
            mutable=mutable,
            rngs=rngs,
            terms=terms,
            recompute=recompute,
            **task.train_kwargs,
        )
        outputs, *more = out if mutable or terms else (out,)
        return outputs, more[0] if mutable else {}, more[-1] if terms else {}

    count = rows["index"].shape[0]
    outputs, stats, measured = _over_rows(count, forward, (0, 0, per_row))(rows, policies, batch)
    losses = _over_rows(count, task.loss, (0, per_row))(outputs, batch)
    if distill is not None:
        losses = _distilled(distill, losses, logits_of(outputs), policies, batch, layout)
    total = task_weight * losses + error_weight * measured.get("error", 0.0) + measured.get("penalty", 0.0)
    moved = jax.tree.map(lambda x: x.sum(0), measured.get("state", {}))
    return total.sum(), (losses, stats, moved)


def _over_rows(count: int, function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """jax.vmap(function, in_axes) over `count` rows. One row alone is the same function: without an axis of one through all
    of the model, which is a fifth of the program to be compiled."""
    if count > 1:
        return jax.vmap(function, tuple(in_axes))

    def one(*arguments: Any) -> Any:
        own = [
            argument if axis is None else jax.tree.map(lambda x: x.reshape(x.shape[1:]), argument)
            for argument, axis in zip(arguments, in_axes, strict=True)
        ]
        # What the model returns may be a constant of Python's, which jax.vmap takes as well.
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), function(*own))

    return one


def _terms(model: QuantizedModel, error_weight: float) -> tuple[str, ...]:
    """What the loss and the step want of a forward pass, and no more."""
    both = (model.quantizer.weight, model.quantizer.activation)
    wanted = {
        "error": bool(error_weight) and any(tensor.leaves for tensor in both),
        "penalty": any(tensor.penalty for tensor in both),
        "state": any(tensor.update for tensor in both),
    }
    return tuple(term for term, want in wanted.items() if want)


def _distilled(distill: Distill, losses, outputs, policies, batch, layout):
    """Mixes in the divergence from the teacher; the widest row itself keeps its plain loss."""
    if distill.teacher == "given":
        teacher, is_teacher = batch["teacher"][None], jnp.zeros(losses.shape, bool)
    else:
        width = sum(bits.w + bits.a for bits in policies.values())
        (everyone, width), first = parallel.rows_everywhere((jax.lax.stop_gradient(outputs), width), layout)
        widest = jnp.argmax(width)
        teacher, is_teacher = everyone[widest][None], first + jnp.arange(losses.shape[0]) == widest
    target = jax.lax.stop_gradient(jax.nn.log_softmax(wide(teacher)))
    mine = jax.nn.log_softmax(wide(outputs))
    divergence = (jnp.exp(target) * (target - mine)).sum(-1)
    divergence = divergence.reshape(*losses.shape, -1).mean(-1)
    mixed = (1 - distill.weight) * losses + distill.weight * divergence
    return jnp.where(is_teacher, losses, mixed)


def slices(batch: Batch, rows: int) -> dict[str, jax.Array]:
    """[B, ...] -> [P, B // P, ...]: a slice of the batch for each of P rows; what is left over goes unused.

    Raises Refusal for a batch of fewer samples than rows.
    """
    samples = jax.tree.leaves(batch)[0].shape[0]
    if samples < rows:
        raise Refusal(
            f"a batch of {samples} samples has no slice for each of the {rows} rows; take at least "
            f"--joint.batch_size {rows}, or leave out joint.slices"
        )
    each = samples // rows
    return jax.tree.map(lambda x: x[: rows * each].reshape(rows, each, *x.shape[1:]), dict(batch))


def make_step(
    model: QuantizedModel,
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    random: int = 0,
    same_bits: bool = False,
    rows_at_a_time: int = 0,
    distill: Distill | None = None,
    error_weight: float = 0.0,
    error_steps: int = 0,
    average: float = 0.0,
    dropout: bool = False,
    sliced: bool = False,
    recompute: bool = False,
    trained: Collection[str] | None = None,
    layout: parallel.Layout | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """step(state, batch, key, fixed) -> (state, {"losses": [P], "policies": int32 [R, L, 2], "gradient_norm": []}).

    fixed: the stack of rows that stay from step to step (the uniform ones; the policy in fine-tuning), an argument of
        the step, so that other policies are no other program; None: one float row.
    random: R rows drawn anew each step from `key` and the state's step number.
    rows_at_a_time: map so many rows at once and accumulate (0: all). Must divide P (those of one device, in a layout). Not
        fewer than all with distillation in place, whose teacher is one of the rows.
    error_weight: as in joint_loss. error_steps: in the first steps there is nothing but that term. Where step sizes
        are far off, the task's gradients of early layers grow with every layer behind them and drown it.
    State leaves of the quantizer are moved on once a step: each row gives its value for the leaf of its own bits, and
    where several rows have the same bits the leaf takes the mean.
    average: decay of the moving average of the parameters (0: none).
    dropout: give the model the task's random streams each step (Linen; an NNX model carries its own).
    sliced: every row sees a slice of the batch (`slices`), no sample twice: a step costs one pass in place of P.
    recompute: as in joint_loss.
    trained: paths of the parameters that have gradients, "gradient_norm" being theirs; None: all, and the rows' affine
        copies. Of the others `optimizer` is told that their gradients are 0, without working them out.
    layout: of many devices; see parallel.py.
    The function is pure; compile it with `jax.jit(step, donate_argnums=0)`.

    Raises Refusal for a distillation that cannot be; the step does for a state that has a moving average where it has no
    `average`, or the other way round.
    """
    _check(distill, sliced)
    loss = functools.partial(
        joint_loss, model, task, distill=distill, error_weight=error_weight, recompute=recompute, layout=layout
    )
    in_place = distill is not None and distill.teacher != "given"
    gradients = _make_gradients(loss, error_steps if error_weight else 0, rows_at_a_time, in_place, trained)
    gradients = parallel.by_rows(gradients, layout)
    widths = model.bit_widths, model.activation_bit_widths

    def step(state: TrainState, batch: Batch, key: jax.Array, fixed: Mapping[str, Bits] | None = None):
        if (state.average is None) == bool(average):
            raise Refusal(
                "a moving average needs both make_step(…, average=0.9), its decay, and init_state(…, average=True); give both, "
                "or neither"
            )
        key_rows, key_dropout = jax.random.split(jax.random.fold_in(key, state.step))
        policies, metrics = fixed, {}
        if random:
            metrics["policies"] = random_bits(key_rows, model.layers, *widths, random, same_bits)
            drawn = as_rows(metrics["policies"], model.layers)
            policies = concatenate(fixed, drawn) if fixed is not None else drawn
        rngs = random_streams(task, key_dropout) if dropout else None
        own = slices(batch, state.rows["index"].shape[0]) if sliced else None
        grads, losses, stats, moved = gradients(state, policies, own, None if sliced else batch, rngs)
        metrics |= {"losses": losses, "gradient_norm": optax.global_norm(grads)}
        if trained is not None:
            grads = _with_zeros(grads[0], state)
        return _moved_on(state, optimizer, grads, stats, moved, average), metrics

    return step if layout is None else parallel.laid_out(step, layout)


def _check(distill: Distill | None, sliced: bool) -> None:
    if distill is None:
        return
    if not 0 <= distill.weight <= 1:
        raise Refusal(f"the weight of distillation is {distill.weight:g}; give a number from 0 to 1")
    if distill.teacher not in ("widest", "given"):
        raise Refusal(f'the teacher {distill.teacher!r} is not known; give "widest" or "given"')
    if sliced and distill.teacher == "widest":
        raise Refusal("distillation from the widest row needs rows that see the same samples; leave out sliced")


def _with_zeros(some: Mapping[str, jax.Array], state: TrainState):
    """Gradients of all parameters and affine copies: `some`, and zeros where that has none."""
    params = {path: some.get(path, jnp.zeros_like(leaf)) for path, leaf in flax_seam.flatten(state.params).items()}
    return flax_seam.unflatten(params), jax.tree.map(jnp.zeros_like, state.rows["affine"])


def _moved_on(state: TrainState, optimizer: optax.GradientTransformation, grads, stats, moved, average: float):
    """The state after an optimizer step. moved: the quantizer's state, as joint_loss returns it. -> TrainState"""
    trained = (state.params, state.rows["affine"])
    updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
    params, affine = optax.apply_updates(trained, updates)
    params = with_state(params, moved)
    averaged = optax.incremental_update(params, state.average, 1 - average) if average else state.average
    rows = {**state.rows, "stats": stats, "affine": affine}
    return TrainState(params, rows, optimizer_state, averaged, state.step + 1)


def _make_gradients(
    loss: Callable[..., Any], error_steps: int, rows_at_a_time: int, in_place: bool, trained: Collection[str] | None
):
    """gradients(state, policies, own, batch, rngs) -> as `_accumulated`. own: the rows' own samples, or None and a batch.

    loss: joint_loss, of a model. error_steps: without the task's gradients. in_place: one row teaches the others.
    trained: as in make_step; the gradients are then {path: gradient} and {}.
    """

    def gradients(state: TrainState, policies, own, batch, rngs):
        rows = state.rows["index"].shape[0]  # in a layout those of one device
        if in_place and rows_at_a_time not in (0, rows):
            raise Refusal(
                f"distillation from the widest row needs all {rows} rows at once, not {rows_at_a_time} at a time; leave "
                "out rows_at_a_time, or the distillation"
            )
        task_weight = jnp.where(state.step < error_steps, 0.0, 1.0) if error_steps else 1.0

        flat = {} if trained is None else flax_seam.flatten(state.params)
        affine = state.rows["affine"] if trained is None else {}
        shared = state.params if trained is None else {path: flat[path] for path in trained if path in flat}

        def of(moving, rows, policies, own):
            shared, affine = moving
            params = shared if trained is None else flax_seam.unflatten({**flat, **shared})
            rows = {**rows, "affine": {**rows["affine"], **affine}}
            samples = batch if own is None else own
            return loss(params, rows, policies, samples, rngs=rngs, task_weight=task_weight, sliced=own is not None)

        return _accumulated(of, (shared, affine), state.rows, policies, own, rows_at_a_time)

    return gradients


def _accumulated(loss, moving, rows, policies, own, rows_at_a_time: int):
    """Gradients of all rows at once, or of a few rows at a time, summed. own: the rows' own samples [P, ...], or None.

    moving: (parameters that all rows share, each row's own [P, ...]), of which gradients are taken.
    -> (gradients, losses [P], stats [P, ...], moved: as joint_loss returns it)
    """
    if not rows_at_a_time:
        grads, (losses, stats, moved) = jax.grad(loss, has_aux=True)(moving, rows, policies, own)
        return grads, losses, stats, moved
    count = jax.tree.leaves((rows, policies))[0].shape[0]
    if count % rows_at_a_time:
        fits = [n for n in range(1, count + 1) if count % n == 0]
        raise Refusal(f"rows_at_a_time={rows_at_a_time} does not divide the {count} rows; choose one of {fits}")
    shared, affine = moving

    def split(tree):
        return jax.tree.map(lambda x: x.reshape(count // rows_at_a_time, rows_at_a_time, *x.shape[1:]), tree)

    def body(total, part):
        affine, part_rows, part_policies, part_own = part
        (grads, own), (losses, stats, moved) = jax.grad(loss, has_aux=True)(
            (shared, affine), part_rows, part_policies, part_own
        )
        return jax.tree.map(jnp.add, total, grads), ((own, losses, stats), moved)

    parts = split((affine, rows, policies, own))
    grads, (stacked, moved) = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, shared), parts)
    own, losses, stats = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), stacked)
    return (grads, own), losses, stats, jax.tree.map(lambda x: x.sum(0), moved)
