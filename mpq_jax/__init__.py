"""mpq_jax: mixed-precision quantization for JAX and Flax by learned layer-wise importance.

The public names, loaded on first use: search, costs and policies never import JAX.
"""

import importlib
from typing import Any

_HOME = {
    "Bits": "types",
    "Budget": "types",
    "Importance": "types",
    "Interaction": "types",
    "Layer": "types",
    "Policy": "types",
    "Quantizer": "types",
    "QuantizedModel": "types",
    "Refusal": "types",
    "Solution": "types",
}
__version__ = "0.1.0"
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"mpq_jax.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mpq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
