"""Small quantized networks for the tests of exports, with normalisation statistics and policies that are not trivial."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq, pact, qil
from mpq_jax.types import Bits, Policy, QuantizedModel

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
IMAGES = np.random.default_rng(0).normal(size=(12, 6, 6, 2)).astype(np.float32)


class Case(NamedTuple):
    model: QuantizedModel
    variables: Any
    policy: Policy
    images: np.ndarray
    kwargs: dict[str, Any]


class Net(nn.Module):
    """Convolutions (strided, depthwise, a residual), BatchNorm, and a projection with two axes of output channels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        y = nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(6, (3, 3), strides=2, name="conv")(x))
        y = nn.relu(y + nn.Conv(6, (1, 1), strides=2, use_bias=False, name="shortcut")(x))
        y = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(y)).mean((1, 2))
        y = nn.relu(nn.DenseGeneral((2, 4), name="general")(y)).reshape(-1, 8)
        return nn.Dense(3, name="head")(y)


class Stack(nn.Module):
    """A scanned stack of two layers, and a transposed convolution before it, whose kernel is flipped on the way."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True, name="up")(x)).mean((1, 2))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + jnp.tanh(nn.Dense(4, name="dense")(x)), None

        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(3, name="head")(x)


class Tied(nn.Module):
    """An embedding that is both looked up and multiplied with: its table is needed in float as well."""

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(7, 8, name="embed")
        return embed.attend(nn.relu(nn.Dense(8, name="dense")(embed(tokens).mean(1))))


class Turned(nn.Module):
    """A kernel that is used twice, then turned round, and a recurrent cell, whose first step has a state of zeros."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x.mean(1).reshape(x.shape[0], 12)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (12, 12))
        x = nn.relu(nn.relu(x @ kernel) @ kernel.T)
        x = nn.RNN(nn.SimpleCell(4), name="cell")(x.reshape(x.shape[0], 3, 4))
        return nn.Dense(3, name="head")(x[:, -1])


class Half(nn.Module):
    """Parameters in float32, products in bfloat16, as mixed-precision training has it; a stack along another axis."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16, name="conv")(x)).mean((1, 2))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + jnp.tanh(nn.Dense(4, dtype=jnp.float32, name="dense")(x)), None

        blocks = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=5)
        x, _ = blocks(name="blocks")(x.astype(jnp.float32), None)
        return nn.Dense(3, dtype=jnp.bfloat16, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


QUANTIZERS = {
    "lsq": lsq(),
    "channels": lsq(per_channel=True),
    "pact": pact(),
    "qil": qil(),
    "lq_nets": lq_nets("same"),  # its statistics take long to compile
}


def drawn(shapes: Any, seed: int = 1) -> Any:
    """Variables of these shapes, by NumPy: statistics, biases and normalisation that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x  # NNX's keys of dropout
        if any(word in name for word in ("bias", "scale", "mean", "var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1])), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, dict(shapes))


def uneven(variables: Any, seed: int = 2) -> Any:
    """LQ-Nets' bases moved off the even grids that they start at, as training does it."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        moved = "basis" in jax.tree_util.keystr(path)
        return jnp.asarray(x * rng.uniform(0.8, 1.2, x.shape), x.dtype) if moved else x

    return jax.tree_util.tree_map_with_path(leaf, variables)


@functools.cache
def case(net: str = "net", quantizer: str = "lsq", by_channel: bool = False, seed: int = 0, **options: Any) -> Case:
    """net: "net", "stack", "tied", "turned", "half" or "nnx". by_channel: weight bits per output channel where a layer can have them."""
    images: np.ndarray = IMAGES
    if net == "tied":
        images = np.random.default_rng(0).integers(0, 7, (12, 5)).astype(np.int32)
    module: Any = {"net": Net, "stack": Stack, "tied": Tied, "turned": Turned, "half": Half}.get(
        net, lambda: Nnx(nnx.Rngs(0))
    )()
    kwargs = {} if net == "nnx" else {"train": False}
    chosen = QUANTIZERS[quantizer]
    # LQ-Nets' levels are worked out one by one: eight bits of them take seconds.
    narrow = quantizer == "lq_nets"
    widths = (2, 3, 4) if narrow else WIDTHS
    options = {"ends": None if narrow else Bits(8, 8), **options}
    model = quantize(module, images, bit_widths=widths, quantizer=chosen, **options, **kwargs)
    shapes = model.variables if net == "nnx" else jax.eval_shape(module.init, jax.random.key(0), images)
    variables = uneven(jax.jit(lambda v, x: model.calibrate(v, x, **kwargs))(drawn(shapes), images))
    rng = np.random.default_rng(seed)
    tied: dict[str, int] = {}

    def draw(layer):
        if layer.bits is not None:
            return layer.bits
        a = tied.setdefault(layer.tied or layer.path, int(rng.choice(widths)))
        if by_channel and layer.channels:
            return Bits(tuple(rng.choice(widths, layer.channels).tolist()), a)
        return Bits(int(rng.choice(widths)), a)

    return Case(model, variables, {layer.path: draw(layer) for layer in model.layers}, images, kwargs)
