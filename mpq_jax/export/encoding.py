"""One layer's two operands as integers: the codes of its weight, and the grid of its input."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.layers import LayerSpec, leaf_paths
from mpq_jax.operands import place_on_channels
from mpq_jax.types import Decoding, QuantizedModel, Refusal, TensorQuantizer


class Activation(NamedTuple):
    """The grid of a layer's input.

    values: the quantizer's leaves at this layer's bits, e.g. {"step_size": []}, NumPy.
    """

    quantizer: TensorQuantizer
    values: Mapping[str, Any]
    bits: int
    signed: bool

    def encode(self, x: Any) -> jax.Array:
        """Float to integer codes, int32, the shape of x."""
        return self.encoded(x)[0]

    def encoded(self, x: Any) -> tuple[jax.Array, Decoding]:
        """(codes, their decoding)."""
        return _encoded(self.quantizer, x, self.values, jnp.int32(self.bits), self.signed)

    def decoding(self, x: Any) -> Decoding:
        """What turns the codes of `encode` into values again."""
        return self.quantizer.decoding(x, self.values, jnp.int32(self.bits), self.signed)


class Weight(NamedTuple):
    """A layer's weight in the layout of its product: int32 codes and what they stand for."""

    codes: np.ndarray
    decoding: Decoding


def _at(
    model: QuantizedModel, spec: LayerSpec, kind: str, params: Mapping[str, Any], index: tuple[int, ...], bits: int
) -> dict[str, Any]:
    """The quantizer's leaves of one layer at one width."""
    widths = spec.weight_bit_widths if kind == "weight" else spec.activation_bit_widths
    paths = leaf_paths(spec, model.quantizer, kind)
    if missing := [path for path in paths.values() if path not in params]:
        raise Refusal(f"layer {spec.paths[0]!r} has no {missing[0]!r}: the model was never calibrated")
    values = {name: np.asarray(params[path])[index][widths.index(bits)] for name, path in paths.items()}
    for name, value in values.items():
        if not np.isfinite(value).all() or (name in getattr(model.quantizer, kind).leaves and not (value > 0).all()):
            raise Refusal(
                f"{name} of layer {spec.paths[0]!r} at {bits} bits is not positive and finite: it was never fitted; "
                "calibrate, or train again"
            )
    return values


def encode_activation(
    model: QuantizedModel, spec: LayerSpec, params: Mapping[str, Any], index: tuple[int, ...], bits: int
) -> Activation:
    """The grid of a layer's input at one width. index: of the layer in its leaf's stack. Raises Refusal as `encode_weight`."""
    return Activation(
        model.quantizer.activation, _at(model, spec, "activation", params, index, bits), bits, spec.signed
    )


@functools.partial(jax.jit, static_argnames=("quantizer", "signed"))
def _encoded(quantizer: TensorQuantizer, x: Any, values: Mapping[str, Any], bits: Any, signed: bool) -> Any:
    """(codes, their decoding), compiled once for all tensors of one shape: bits are data."""
    return quantizer.encode(x, values, bits, signed), quantizer.decoding(x, values, bits, signed)


def encode_weight(
    model: QuantizedModel,
    leaf: str,
    params: Mapping[str, Any],
    index: tuple[int, ...],
    bits: Any,
    operand: np.ndarray,
    channel_axes: Sequence[int],
) -> Weight:
    """The codes of a weight operand, int32 of its shape. bits: one width, or a sequence of one for each output channel.

    leaf: the parameter it comes from; index: of the layer in that leaf's stack, () where it is none. params: flat, with
    the quantizer's leaves. Each width's codes are made of the whole tensor and each channel takes those of its own, as in
    `apply`. Raises Refusal where the quantizer's leaves are missing, or not positive and finite.
    """
    spec, quantizer = model.specs[leaf], model.quantizer.weight
    by_width: dict[int, Weight] = {}
    for width in dict.fromkeys([bits] if isinstance(bits, int) else [int(b) for b in bits]):
        values = {
            name: place_on_channels(jnp.asarray(value), operand, channel_axes)
            for name, value in _at(model, spec, "weight", params, index, width).items()
        }
        codes, decoding = _encoded(quantizer, jnp.asarray(operand), values, jnp.int32(width), True)
        by_width[width] = Weight(np.asarray(codes), Decoding(*(None if x is None else np.asarray(x) for x in decoding)))
    if len(by_width) == 1:
        return next(iter(by_width.values()))
    return _mixed_channels(by_width, np.asarray(bits), operand, channel_axes)


def _mixed_channels(
    by_width: Mapping[int, Weight], bits: np.ndarray, operand: np.ndarray, channel_axes: Sequence[int]
) -> Weight:
    channel_shape = tuple(n if i in channel_axes else 1 for i, n in enumerate(operand.shape))
    own = bits.reshape(channel_shape)
    codes = np.select([own == b for b in by_width], [w.codes for w in by_width.values()])
    decodings = [w.decoding for w in by_width.values()]
    hits = [own == b for b in by_width]
    if decodings[0].table is None:
        scale = np.select(hits, [np.broadcast_to(d.scale, channel_shape) for d in decodings]).astype(np.float32)
        offset = np.select(hits, [np.broadcast_to(d.offset, channel_shape) for d in decodings]).astype(np.float32)
        return Weight(codes, Decoding(scale, offset))
    levels = max(len(d.table) for d in decodings)
    tables = []
    for d in decodings:
        table = d.table.reshape(len(d.table), *([1] * operand.ndim if d.table.ndim == 1 else d.table.shape[1:]))
        filled = np.pad(table, [(0, levels - len(table))] + [(0, 0)] * operand.ndim, mode="edge")
        tables.append(np.broadcast_to(filled, (levels, *channel_shape)))
    return Weight(codes, Decoding(table=np.select([h[None] for h in hits], tables)))
