"""How much the loss rises when one tensor at a time is quantized: what the other criteria approximate."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mpq_jax.criteria import Measured, sites
from mpq_jax.importance import spread
from mpq_jax.joint import Batch, Task
from mpq_jax.types import Bits, Layer, Policy, QuantizedModel, Refusal

OTHERS = ("float", "widest")


def one_at_a_time(
    model: QuantizedModel, task: Task, variables: Any, batches: Sequence[Batch], *, others: str = "float"
) -> Measured:
    """weight[l, i] = L(weights of layer l at b_i, all else as it is) - L(all as it is); activation[l, j] alike.

    others: all else in "float", or at the "widest" candidates (fixed layers at theirs). L is the mean loss over
    `batches`, in evaluation mode; entries may be negative. Unit: the loss.
    Raises Refusal for another word.
    """
    if others not in OTHERS:
        raise Refusal(f"criteria.others {others!r} is not known; choose one of {', '.join(OTHERS)}")

    @jax.jit
    def loss(variables: Any, policy: Policy, batch: Batch) -> jax.Array:
        outputs = model.apply(variables, policy, *task.inputs(batch), float_bits=True, **task.eval_kwargs)
        return task.loss(outputs, batch)

    base = {layer.path: _as_it_is(layer, model, others) for layer in model.layers}

    def mean_loss(path: str = "", **bits: int) -> float:
        policy = base | ({path: base[path]._replace(**bits)} if path else {})
        return float(sites.mean_over(batches, lambda batch: loss(variables, _traced(policy), batch))[0])

    reference = mean_loss()
    weight, activation = [], []
    for layer in model.layers:
        if layer.searched:
            own_w, own_a = _candidates(layer, model)
            weight.append(spread({b: mean_loss(layer.path, w=b) - reference for b in own_w}, model.bit_widths))
            rises = {b: mean_loss(layer.path, a=b) - reference for b in own_a}
            activation.append(spread(rises, model.activation_bit_widths))
    evaluations = 1 + sum(len(own) for layer in model.layers if layer.searched for own in _candidates(layer, model))
    samples = sum(sites.samples_of(batch) for batch in batches)
    return Measured(
        sites.importance(model, "one_at_a_time", np.array(weight), np.array(activation)),
        evaluations * samples / 3,
        (f"{evaluations} losses over {samples} samples; {others} elsewhere, loss {reference:.4f}",),
        {"samples": samples, "losses": evaluations, "reference": reference},
    )


def _candidates(layer: Layer, model: QuantizedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return layer.candidates("weight", model.bit_widths), layer.candidates("activation", model.activation_bit_widths)


def _as_it_is(layer: Layer, model: QuantizedModel, others: str) -> Bits:
    if others == "float":
        return Bits(32, 32)
    return layer.bits or Bits(*(max(own) for own in _candidates(layer, model)))


def _traced(policy: dict[str, Bits]) -> dict[str, Bits]:
    """Bits as arrays: any policy is the same program."""
    return {path: Bits(np.int32(bits.w), np.int32(bits.a)) for path, bits in policy.items()}
