"""A C header of packed weights: arrays, shapes, scales, and a function that takes one code out."""

import re
from collections.abc import Sequence

import numpy as np

from mpq_jax.export.packed import File
from mpq_jax.types import Refusal

_UNPACK = """\
/* The code number `at` of a payload whose codes all have `bits` bits; `is_signed`: two's complement. */
static inline int32_t mpq_code(const uint8_t *payload, uint32_t bits, int is_signed, size_t at) {
  size_t first = at * bits;
  uint32_t code = 0;
  for (uint32_t i = 0; i < bits; i++) {
    size_t bit = first + i;
    code |= (uint32_t)((payload[bit >> 3] >> (bit & 7)) & 1u) << i;
  }
  if (is_signed && (code >> (bits - 1))) return (int32_t)code - (int32_t)(1u << bits);
  return (int32_t)code;
}

/* The same where each output channel has its own width: code `at` of channel `channel`, `each` codes a channel. */
static inline int32_t mpq_channel_code(const uint8_t *payload, const uint8_t *bits, int is_signed, size_t each,
                                       size_t channel, size_t at) {
  size_t first = 0;
  for (size_t c = 0; c < channel; c++) first += (size_t)bits[c] * each;
  uint32_t code = 0;
  for (uint32_t i = 0; i < bits[channel]; i++) {
    size_t bit = first + at * bits[channel] + i;
    code |= (uint32_t)((payload[bit >> 3] >> (bit & 7)) & 1u) << i;
  }
  if (is_signed && (code >> (bits[channel] - 1))) return (int32_t)code - (int32_t)(1u << bits[channel]);
  return (int32_t)code;
}
"""


def header(file: File) -> str:
    """The text of the header (C99). Per layer L: L_codes, L_bits, L_shape, L_scale, L_offset; value = scale (code + offset).

    Layers in float: L_weight. All other tensors are in the packed file. Raises Refusal for grids from a table.
    """
    parts = ["#ifndef MPQ_MODEL_H", "#define MPQ_MODEL_H", "#include <stddef.h>", "#include <stdint.h>", "", _UNPACK]
    names: dict[str, str] = {}
    for path, entry in file.layers.items():
        name = re.sub(r"\W+", "_", path).strip("_")
        while name in names.values() or not name or name[0].isdigit():
            name = f"layer_{name}"
        names[path] = name
        parts.append(f"/* {path}: shape {entry['shape']} */")
        parts.append(_array("uint32_t", f"{name}_shape", [str(n) for n in entry["shape"]]))
        bits = file.get(path, "bits")
        if bits is None:
            parts.append(_array("float", f"{name}_weight", _floats(file.tensors[f"{path}.weight"])))
            continue
        if file.get(path, "table") is not None:
            raise Refusal(
                f"layer {path!r} has levels from a table, which the C header has no form for; use the packed file"
            )
        parts.append(f"enum {{ {name}_signed = {int(entry['signed'])} }};")
        if bits.ndim:
            parts.append(_array("uint8_t", f"{name}_bits", [str(b) for b in bits]))
            parts.append(
                f"/* output channels are the axes {entry['channel_axes']} of the shape, first in the payload */"
            )
        else:
            parts.append(f"enum {{ {name}_bits = {bits} }};")
        for kind in ("scale", "offset"):
            parts.append(_array("float", f"{name}_{kind}", _floats(np.asarray(file.get(path, kind), np.float32))))
        parts.append(_array("uint8_t", f"{name}_codes", [str(b) for b in file.tensors[f"{path}.codes"]]))
    return "\n".join([*parts, "#endif", ""])


def _floats(values: np.ndarray) -> list[str]:
    return [float(v).hex() + "f" for v in np.ravel(values)]


def _array(kind: str, name: str, values: Sequence[str]) -> str:
    lines = [", ".join(values[i : i + 24]) for i in range(0, len(values), 24)] or ["0"]
    return f"static const {kind} {name}[{max(1, len(values))}] = {{\n  " + ",\n  ".join(lines) + "\n};"
