"""Quantizers: one paper a file, each a function that returns a `Quantizer`."""

from mpq_jax.quantizers.lsq import lsq

QUANTIZERS = {"lsq": lsq}
__all__ = ["QUANTIZERS", "lsq"]
