"""Quantizers: one paper a file, each a function that returns a `Quantizer`."""

from collections.abc import Callable

from mpq_jax.quantizers.lq_nets import lq_nets
from mpq_jax.quantizers.lsq import lsq
from mpq_jax.quantizers.pact import pact
from mpq_jax.quantizers.qil import qil
from mpq_jax.types import Quantizer

QUANTIZERS: dict[str, Callable[..., Quantizer]] = {"lsq": lsq, "pact": pact, "qil": qil, "lq_nets": lq_nets}
__all__ = ["QUANTIZERS", "lq_nets", "lsq", "pact", "qil"]
