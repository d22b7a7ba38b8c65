"""Codes of any width as a row of bytes without waste. NumPy alone."""

import math

import numpy as np


def pack(codes: np.ndarray, bits: int | np.ndarray) -> np.ndarray:
    """uint8 [ceil(all bits / 8)]: the codes one after another, each its lowest bits, lowest bit first.

    codes: integers [N]; or [C, n] with bits [C], each row at its own width. Negative ones in two's complement.
    """
    rows = [codes.ravel()] if np.ndim(bits) == 0 else list(codes)
    widths = np.broadcast_to(bits, len(rows))
    flat = [((row[:, None] >> np.arange(b)) & 1).astype(np.uint8).ravel() for row, b in zip(rows, widths, strict=True)]
    return np.packbits(np.concatenate(flat) if flat else np.zeros(0, np.uint8), bitorder="little")


def unpack(payload: np.ndarray, bits: int | np.ndarray, count: int, signed: bool) -> np.ndarray:
    """The codes again, int32 [count]; with bits [C] int32 [C, count / C]. signed: the highest bit counts negative."""
    widths = [int(bits)] if np.ndim(bits) == 0 else [int(b) for b in np.asarray(bits)]
    each = count // len(widths)
    stream = np.unpackbits(payload, bitorder="little")
    rows, start = [], 0
    for b in widths:
        row = stream[start : start + each * b].reshape(each, b).astype(np.int32) @ (1 << np.arange(b, dtype=np.int32))
        rows.append(row - ((row >> (b - 1)) << b) if signed else row)
        start += each * b
    return np.stack(rows).astype(np.int32) if np.ndim(bits) else rows[0].astype(np.int32)


def payload_bytes(bits: int | np.ndarray, count: int) -> int:
    """ceil(bits / 8) of `count` codes; bits [C]: each width for count / C of them."""
    total = int(bits) * count if np.ndim(bits) == 0 else int(np.sum(bits)) * (count // len(np.asarray(bits)))
    return math.ceil(total / 8)
