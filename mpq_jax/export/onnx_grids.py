"""The grids of a quantizer as ONNX nodes: QuantizeLinear and DequantizeLinear, or QONNX's Quant."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mpq_jax.export.encoding import Activation
from mpq_jax.export.graph import Node
from mpq_jax.export.onnx_products import Form, Laid
from mpq_jax.export.onnx_writer import Writer, helper, onnx
from mpq_jax.quantizers.qil import transform

QONNX = "qonnx.custom_op.general"


# ---- activations, seen from outside --------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Codes low … high, value = scale code. interval: of QIL's transformer, (centre, half width), where it is in use."""

    scale: np.float32
    low: int
    high: int
    interval: tuple[float, float] | None


def grid(w: Writer, node: Node, activation: Activation, path: str) -> Grid:
    """What QuantizeLinear needs to know of an activation's quantizer, found by asking it.

    Its codes at 4,001 places are compared with round(clip(x / scale)): whatever it is called, either they are the same
    or it is not written that way. Raises Refusal for a grid that has no such form.
    """
    decoding = activation.decoding(jnp.zeros(()))
    levels = 2**activation.bits
    if decoding.table is None and not np.any(np.asarray(decoding.offset)) and np.size(decoding.scale) == 1:
        scale = np.float32(np.asarray(decoding.scale).reshape(()))
        ends = np.asarray(activation.encode(jnp.asarray([-1e30, 1e30], jnp.float32)))
        low, high = int(ends[0]) if activation.signed else 0, int(ends[1])
        places = (np.linspace(-1.1 if activation.signed else 0, 1.1, 4001) * levels * scale).astype(np.float32)
        codes = np.asarray(activation.encode(jnp.asarray(places)))
        if _agree(codes, np.clip(places.astype(np.float64) / scale, low, high)):
            return Grid(scale, low, high, None)
        if set(activation.values) == {"centre", "half_width"}:
            centre, half = (jnp.float32(activation.values[name]) for name in ("centre", "half_width"))
            size = np.asarray(transform(jnp.asarray(places), centre, half), np.float64)
            if _agree(codes, np.sign(places) * size * high):
                return Grid(scale, low, high, (float(centre), float(half)))
    raise w.refuse(
        node,
        f"the input grid of {path!r} is not evenly spaced, which ONNX has no form for",
        "export the packed file or StableHLO, or train with --quantizer lsq",
    )


def _agree(codes: np.ndarray, unrounded: np.ndarray) -> bool:
    """Whether they are these numbers rounded, as far as float32 knows them."""
    return bool((np.abs(codes - unrounded) <= 0.5 + 1e-4 + 1e-6 * np.abs(unrounded)).all())


def _interval(w: Writer, x: str, found: Grid) -> str:
    """sign(x) clip(alpha |x| + beta, 0, 1) high: QIL's transformer, in the units of its codes."""
    assert found.interval is not None
    centre, half = (np.float32(n) for n in found.interval)
    alpha, beta = (w.constant(np.float32(v)) for v in (0.5 / half, -0.5 * centre / half + 0.5))
    size = w.emit("Add", w.emit("Mul", w.emit("Abs", x), alpha), beta)
    size = w.emit("Clip", size, w.constant(np.float32(0)), w.constant(np.float32(1)))
    size = w.emit("Mul", size, w.constant(np.float32(found.high)))
    return w.emit("Mul", size, w.emit("Sign", x))


# ---- standard ONNX ------------------------------------------------------------------------------------------------


class Type(NamedTuple):
    """An integer type of QuantizeLinear. opset: the first that has it."""

    element: Any
    low: int
    high: int
    opset: int


def _types() -> list[Type]:
    t = onnx.TensorProto
    found = []
    for bits, opset, signed, unsigned in (
        (2, 25, t.INT2, t.UINT2),
        (4, 21, t.INT4, t.UINT4),
        (8, 10, t.INT8, t.UINT8),
        (16, 21, t.INT16, t.UINT16),
    ):
        found.append(Type(unsigned, 0, 2**bits - 1, opset))
        found.append(Type(signed, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, opset))
    return found


def _type_of(w: Writer, node: Node, low: int, high: int, what: str, narrowest: int = 0) -> Type:
    """The narrowest type that holds low … high; of those that reach to `narrowest` at least."""
    for type_ in _types():
        holds = type_.low <= low and high <= type_.high and (type_.low < 0) == (low < 0)
        if holds and type_.high >= narrowest and w.opset >= type_.opset:
            return type_
    raise w.refuse(
        node,
        f"{what} has codes from {low} to {high}, for which QuantizeLinear of opset {w.opset} has no type",
        "use opset 21, which has 16 bits, or fewer bits" if w.opset < 21 else "use fewer bits, or QONNX",
    )


def _activation(w: Writer, node: Node, x: str, order: Sequence[int], activation: Activation, name: str) -> str:
    found = grid(w, node, activation, name)
    exact = any((found.low, found.high) == (t.low, t.high) and w.opset >= t.opset for t in _types())
    # onnxruntime 1.32 refuses, with optimisations on, a file with Clip before a 4-bit QuantizeLinear.
    type_ = _type_of(w, node, found.low, found.high, name, narrowest=0 if exact else 127)
    scale = w.constant(found.scale, f"{name}_scale")
    before = scale
    if found.interval is not None:
        x, before = _interval(w, x, found), w.constant(np.float32(1))
    elif (found.low, found.high) != (type_.low, type_.high):
        ends = (w.constant(np.float32(found.scale * n)) for n in (found.low, found.high))
        x = w.emit("Clip", x, *ends)
    zero = w.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(type_.element)))
    codes = w.emit("QuantizeLinear", x, before, zero, name=f"{name}_codes")
    assert node.product is not None
    w.codes[codes] = (node.product.path, tuple(order))
    return w.emit("DequantizeLinear", codes, scale, zero, name=name)


def _weight(w: Writer, node: Node, laid: Laid, name: str) -> str:
    codes, scale = laid.codes, laid.scale
    bits = int(np.max(laid.bits))
    if laid.offset.any():
        # scale (c + 1/2) = scale/2 (2 c + 1): odd codes, one bit wider.
        codes, scale, bits = 2 * codes + _doubled(w, node, laid, name), scale / 2, bits + 1
    type_ = _type_of(w, node, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, f"the weight of {name!r}")
    stored = codes.astype(helper.tensor_dtype_to_np_dtype(type_.element))
    attributes: dict[str, Any] = {"axis": laid.axis} if scale.ndim else {}
    return w.emit(
        "DequantizeLinear",
        w.constant(stored, f"{name}/weight_codes"),
        w.constant(np.asarray(scale, np.float32), f"{name}/weight_scale"),
        name=f"{name}/weight",
        **attributes,
    )


def _doubled(w: Writer, node: Node, laid: Laid, name: str) -> np.ndarray:
    twice = 2 * laid.offset
    if (twice != np.round(twice)).any():
        raise w.refuse(node, f"the weight of {name!r} has offsets {laid.offset}", "use the QONNX form, which holds any")
    shape = [-1 if i == laid.axis else 1 for i in range(laid.codes.ndim)]
    return twice.astype(np.int32).reshape(shape) if twice.ndim else twice.astype(np.int32)


STANDARD = Form(_activation, _weight)


# ---- QONNX --------------------------------------------------------------------------------------------------------


def _quant(w: Writer, x: str, scale: Any, zero: Any, bits: int, signed: bool, narrow: bool, name: str) -> str:
    return w.emit(
        "Quant",
        x,
        w.constant(np.asarray(scale, np.float32), f"{name}_scale"),
        w.constant(np.asarray(zero, np.float32)),
        w.constant(np.float32(bits)),
        name=name,
        domain=QONNX,
        signed=int(signed),
        narrow=int(narrow),
        rounding_mode="ROUND",
    )


def _quant_activation(w: Writer, node: Node, x: str, order: Sequence[int], activation: Activation, name: str) -> str:
    found = grid(w, node, activation, name)
    bits, narrow = activation.bits, found.low == -found.high
    if found.interval is None:
        return _quant(w, x, found.scale, 0, bits, found.low < 0, narrow, name)
    codes = _quant(w, _interval(w, x, found), 1, 0, bits, found.low < 0, narrow, f"{name}_codes")
    return w.emit("Mul", codes, w.constant(found.scale, f"{name}_scale"), name=name)


def _quant_weight(w: Writer, node: Node, laid: Laid, name: str) -> str:
    """Widths that differ from channel to channel: a Quant for each, since the node's runtime knows scalar widths only."""
    line = [-1 if i == laid.axis else 1 for i in range(laid.codes.ndim)]
    scale, offset = (part.reshape(line) if part.ndim else part for part in (laid.scale, laid.offset))
    values = ((laid.codes + offset) * scale).astype(np.float32)
    if isinstance(laid.bits, int):
        return _quant(
            w, w.constant(values, f"{name}/weight_values"), scale, -offset, laid.bits, True, False, f"{name}/weight"
        )
    parts, places = [], []
    for b in np.unique(laid.bits):
        own = np.flatnonzero(laid.bits == b)
        part = f"{name}/weight_{b}bit"
        at = [x.take(own, laid.axis) if x.ndim else x for x in (scale, offset)]
        x = w.constant(values.take(own, laid.axis), f"{part}_values")
        parts.append(_quant(w, x, at[0], -at[1], int(b), True, False, part))
        places.append(own)
    back = np.argsort(np.concatenate(places))
    joined = w.emit("Concat", *parts, axis=laid.axis)
    return w.emit("Gather", joined, w.integers(back.tolist()), name=f"{name}/weight", axis=laid.axis)


QUANT = Form(_quant_activation, _quant_weight)


def codes_record(w: Writer) -> str:
    """JSON: name of each QuantizeLinear's output -> [layer path, order], in the order of the layers.

    The output's axes are those of the layer's input in this order; neighbours may be joined into one.
    """
    return json.dumps({name: [path, list(order)] for name, (path, order) in w.codes.items()})
