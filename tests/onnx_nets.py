"""Quantized networks for the tests of ONNX files."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.quantized_model import quantize
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
        return jnp.asarray(rng.standard_normal(x.shape) * np.sqrt(2 / max(np.prod(x.shape[:-1]), 1)), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def calibrated(model: Any, x: np.ndarray, **options: Any) -> tuple[QuantizedModel, Any]:
    quantized = quantize(model, x, **options)
    shapes = quantized.variables
    if shapes is None:
        shapes = jax.eval_shape(model.init, jax.random.key(0, impl="rbg"), x)
    variables = drawn(shapes)
    if "batch_stats" in variables:
        variables = normalised(quantized, variables, x)
    return quantized, jax.jit(quantized.calibrate)(variables, x)


def normalised(quantized: QuantizedModel, variables: Any, x: np.ndarray) -> Any:
    """With statistics near those of x: without them, a deep network tells no image from another.

    One step in training moves them a tenth of the way.
    """
    train = jax.jit(lambda v: quantized.apply(v, None, x, train=True, mutable=["batch_stats"])[1])
    moved, rng = train(variables), np.random.default_rng(1)

    def near(old, new):
        old, new = np.asarray(old), np.asarray(new)
        return jnp.asarray((new - 0.9 * old) / 0.1 * rng.uniform(0.8, 1.2, old.shape), old.dtype)

    return {**variables, "batch_stats": jax.tree.map(near, variables["batch_stats"], moved["batch_stats"])}


def policy_of(quantized: QuantizedModel, bits: Any) -> Policy:
    """bits: of every layer that is searched, or a function of its place; readers of one tensor have the first one's for it."""
    policy: dict[str, Bits] = {}
    shared: dict[str, int] = {}
    for i, layer in enumerate(quantized.layers):
        drawn = layer.bits or (Bits(*bits) if isinstance(bits, tuple) else bits(i))
        policy[layer.path] = drawn._replace(a=shared.setdefault(layer.tied or layer.path, drawn.a))
    return policy
