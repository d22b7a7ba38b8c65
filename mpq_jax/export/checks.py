"""What a packed file's metadata must hold before anything is computed from it: its checksum is no signature. NumPy alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax.export.bits import payload_bytes
from mpq_jax.layers import MAX_BITS
from mpq_jax.types import Refusal

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def parsed(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, layers by path) of a packed file. Raises Refusal, naming the layer, for what does not fit together."""
    again = "make it again with: python -m mpq_jax.export --workdir …"
    try:
        config, entries = json.loads(metadata["config"]), json.loads(metadata["layers"])
    except (KeyError, ValueError, RecursionError) as error:
        raise Refusal(f"{path} has damaged metadata ({type(error).__name__}); {again}") from None
    if not isinstance(metadata.get("quantizer"), str) or not isinstance(config, dict) or not isinstance(entries, list):
        raise Refusal(f'{path} must have "quantizer", a "config" and "layers"; {again}')
    layers: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or entry["path"] in layers:
            raise Refusal(f"{path} has a layer without a path of its own; {again}")
        if wrong := _wrong(entry, tensors):
            raise Refusal(f"{path}, layer {entry['path']!r}: {wrong}; {again}")
        layers[entry["path"]] = entry
    return config, layers


def _wrong(entry: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with one layer's entry and tensors; None where nothing is."""
    path, shape = entry["path"], entry.get("shape")
    if not isinstance(entry.get("leaf"), str) or entry.get("layout") not in ("leaf", "product"):
        return '"leaf" must be a name and "layout" leaf or product'
    if not _counts(shape) or not _counts(entry.get("position")) or entry.get("dtype") not in _FLOATS:
        return f'"shape" and "position" must be lists of sizes, "dtype" one of {", ".join(_FLOATS)}'
    for name in ("activation_signed", "folded"):
        if not isinstance(entry.get(name, False), bool):
            return f'"{name}" must be true or false'
    if not _is_bits(entry.get("activation_bits", 32), 32):
        return '"activation_bits" must be from 1 to 32'
    plain = ("path", "leaf", "position", "shape", "layout", "dtype", "signed", "folded", "channel_axes")
    for name, value in entry.items():
        if name not in plain and not name.startswith("activation_") and not _is_number(value):
            return f'"{name}" must be a finite number'
    if "bits" not in entry and f"{path}.bits" not in tensors:
        weight = tensors.get(f"{path}.weight")
        return (
            None if weight is not None and list(weight.shape) == shape else "its weight is missing or of another shape"
        )
    return _wrong_codes(entry, tensors) or _wrong_decoding(entry, tensors)


def _wrong_codes(entry: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str | None:
    shape, bits = entry["shape"], _get(entry, tensors, "bits")
    elements, axes = math.prod(shape), entry.get("channel_axes", [])
    if bits.ndim > 1 or not bits.size or not all(_is_bits(b, MAX_BITS) for b in bits.ravel().tolist()):
        return f'"bits" must be from 1 to {MAX_BITS}, for the layer or each output channel'
    if bits.ndim:
        if not _counts(axes) or len(set(axes)) < len(axes) or any(axis >= len(shape) for axis in axes):
            return '"channel_axes" must be axes of the shape'
        if math.prod(shape[axis] for axis in axes) != len(bits):
            return "its bits are not as many as its output channels"
    codes = tensors.get(f"{entry['path']}.codes")
    if codes is None or codes.dtype != np.uint8 or codes.ndim != 1 or codes.nbytes != payload_bytes(bits, elements):
        return "its codes are missing, or not as many as its shape and bits say"
    return None if isinstance(entry.get("signed"), bool) else '"signed" must be true or false'


def _wrong_decoding(entry: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str | None:
    shape, widest = tuple(entry["shape"]), int(np.max(_get(entry, tensors, "bits")))
    if (table := _get(entry, tensors, "table")) is not None:
        fits = table.ndim in (1, 1 + len(shape)) and table.dtype.kind == "f" and len(table) >= 2**widest
        if not fits or not _broadcasts(table.shape[1:], shape) or entry["signed"]:
            return "its table does not fit its codes"
        return None
    for name in ("scale", "offset"):
        value = _get(entry, tensors, name)
        if value is None or value.dtype.kind not in "fiu" or not _broadcasts(value.shape, shape):
            return f'its "{name}" is missing, or does not fit its shape'
    return None


def _get(entry: dict[str, Any], tensors: Mapping[str, np.ndarray], name: str) -> Any:
    value = entry.get(name)
    return tensors.get(f"{entry['path']}.{name}") if value is None else np.asarray(value)


def _broadcasts(small: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array of shape `small` broadcasts to `shape`."""
    return len(small) <= len(shape) and all(a in (1, b) for a, b in zip(small[::-1], shape[::-1], strict=False))


def _counts(value: Any) -> bool:
    """A list of sizes whose product is no more than memory could ever hold."""
    whole = (
        isinstance(value, list) and len(value) <= 32 and all(type(item) is int and 0 <= item < 2**40 for item in value)
    )
    return whole and math.prod(value) < 2**40


def _is_bits(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # false for NaN
