"""Joint training of some bit-widths only: the step sizes of the others are interpolated between those that were trained.

Over bits, the logarithm of a learned step size is nearly a straight line: a bit more halves the spacing of the levels, as
long as the range stays. Lines through 2, 4 and 6 bits meet the step sizes trained at 3 and 5 within 2 % in the median; over
the logarithm of the largest code, 2^(b-1) - 1 for weights, they are up to three times as far off (docs/results.md).
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq_jax import flax_seam
from mpq_jax.layers import leaf_paths
from mpq_jax.policy import nearest
from mpq_jax.types import Layer, QuantizedModel, Refusal


def trained_on(model: QuantizedModel, widths: Sequence[int]) -> QuantizedModel:
    """The model with these widths as candidates, of weights and activations: what joint training draws its rows from.

    A layer with candidates of its own keeps those nearest to `widths`, as uniform rows take them.
    Raises Refusal for widths that the model has not, for a choice without its narrowest and its widest (nothing is
    extrapolated), and for a quantizer with leaves that are no positive numbers to interpolate.
    """
    every = sorted({*model.bit_widths, *model.activation_bit_widths})
    if not set(widths) <= set(every) or not {every[0], every[-1]} <= set(widths):
        raise Refusal(
            f"joint.bit_widths {tuple(widths)} must be some of {tuple(every)}, with {every[0]} and {every[-1]} among them: "
            "the others are interpolated"
        )
    if any(tensor.state for tensor in (model.quantizer.weight, model.quantizer.activation)):
        raise Refusal(f"joint.bit_widths: the levels of {model.quantizer.name} cannot be interpolated; leave it out")

    def some(candidates: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({nearest(b, candidates) for b in widths}))

    def narrowed(layer: Layer) -> Layer:
        if not layer.searched:
            return layer
        return layer._replace(
            weight_bit_widths=some(layer.candidates("weight", model.bit_widths)),
            activation_bit_widths=some(layer.candidates("activation", model.activation_bit_widths)),
        )

    return model._replace(
        layers=tuple(narrowed(layer) for layer in model.layers),
        bit_widths=some(model.bit_widths),
        activation_bit_widths=some(model.activation_bit_widths),
    )


def filled_in(model: QuantizedModel, trained: QuantizedModel, params: Any) -> Any:
    """`params` with the trained leaves of every quantizer interpolated at the widths that were not trained.

    log leaf is linear in bits between neighbouring trained widths. trained: of `trained_on`. What was trained stays as
    it is, to the bit, so that filling in twice is filling in once.
    """
    flat = dict(flax_seam.flatten(params))
    layers = {layer.path: layer for layer in trained.layers}
    for spec in model.specs.values():
        for kind in spec.names:
            held = spec.weight_bit_widths if kind == "weight" else spec.activation_bit_widths
            for path in leaf_paths(spec, model.quantizer, kind, "leaves").values():
                leaf = np.array(flat[path])
                for number, layer in enumerate(spec.paths):
                    known = getattr(layers[layer], f"{kind}_bit_widths")
                    if known is not None:
                        position = np.unravel_index(number, spec.stack) if spec.stack else ()
                        leaf[position] = _interpolated(leaf[position], held, known)
                flat[path] = jnp.asarray(leaf)
    return flax_seam.unflatten(flat)


def _interpolated(values: np.ndarray, held: Sequence[int], known: Sequence[int]) -> np.ndarray:
    """[K, ...] positive: exp of the line, over bits, through the logarithms of the `known` widths' values."""
    result = values.copy()
    rows = values.reshape(len(held), -1)
    logs = np.log(rows[[held.index(b) for b in known]].astype(np.float64))
    for at, bits in enumerate(held):
        if bits not in known and known[0] < bits < known[-1]:
            line = [np.interp(bits, known, column) for column in logs.T]
            result[at] = np.exp(line).reshape(values.shape[1:])
    return result
