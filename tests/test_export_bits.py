"""Packing bits: against Python's own integers, and what it takes in bytes."""

import math

import numpy as np
import pytest

from mpq_jax.export.bits import pack, payload_bytes, unpack


def by_hand(codes, widths):
    """One long integer, the first code in its lowest bits."""
    total, at = 0, 0
    for code, b in zip(codes, map(int, widths), strict=True):
        total |= (int(code) & ((1 << b) - 1)) << at
        at += b
    return total.to_bytes(math.ceil(at / 8), "little")


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_every_width_without_waste_and_back(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = np.random.default_rng(bits).integers(low, high, 37)
    codes[:2] = low, high - 1
    payload = pack(codes, bits)
    assert payload.tobytes() == by_hand(codes, [bits] * 37)
    assert payload.nbytes == payload_bytes(bits, 37) == math.ceil(37 * bits / 8)
    np.testing.assert_array_equal(unpack(payload, bits, 37, signed), codes)


def test_each_channel_at_its_own_width():
    bits = np.array([2, 7, 3, 16])
    codes = np.stack([np.random.default_rng(b).integers(-(2 ** (b - 1)), 2 ** (b - 1), 5) for b in bits])
    payload = pack(codes, bits)
    assert payload.tobytes() == by_hand(codes.ravel(), np.repeat(bits, 5))
    assert payload.nbytes == payload_bytes(bits, 20) == math.ceil(28 * 5 / 8)
    np.testing.assert_array_equal(unpack(payload, bits, 20, True), codes)


def test_no_codes_are_no_bytes():
    assert pack(np.zeros(0, int), 3).nbytes == 0
    assert unpack(np.zeros(0, np.uint8), 3, 0, True).shape == (0,)
