"""Quantized networks for the tests of ONNX files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.quantize import quantize
from mpq_jax.types import Bits, Policy, QuantizedModel


def drawn(shapes: Any, seed: int = 0) -> Any:
    """Variables of these shapes: kernels of unit gain; statistics, scales and biases that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("scale", "var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        if name.endswith(("bias", "mean")):
            return jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(max(np.prod(x.shape[:-1]), 1)), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def calibrated(model: Any, x: np.ndarray, **options: Any) -> tuple[QuantizedModel, Any]:
    quantized = quantize(model, x, **options)
    shapes = quantized.variables
    if shapes is None:
        shapes = jax.eval_shape(model.init, jax.random.key(0, impl="rbg"), x)
    return quantized, jax.jit(quantized.calibrate)(drawn(shapes), x)


def policy_of(quantized: QuantizedModel, bits: Any) -> Policy:
    """bits: of every layer that is searched, or a function of its place."""
    return {
        layer.path: layer.bits or (Bits(*bits) if isinstance(bits, tuple) else bits(i))
        for i, layer in enumerate(quantized.layers)
    }
