"""A net with a layer of every kind, and the products that it is made of."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpq_jax import products
from mpq_jax.quantized_model import quantize

BATCH = 2


class Dense(nn.Module):
    """One step of a scanned stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6, use_bias=False)(x)), None


class Net(nn.Module):
    """A layer of every kind."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="strided")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(6, (3, 3), strides=(2, 2), name="transposed")(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.scan(Dense, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="stack")(x, None)[0]
        shared = nn.Dense(6, name="shared")
        x = shared(nn.relu(shared(x)))
        return nn.Dense(3, name="head")(x.mean(1))


def opened():
    """(model, layer path -> the products it runs on BATCH images), from shapes alone."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    model = quantize(Net(), images, bit_widths=(2, 4, 6), rules=[("shared", "float"), ("grouped", "w2/4,a4/6")])
    variables = jax.eval_shape(Net().init, jax.random.key(0), images)
    return model, products.uses(model, variables, jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32), train=False)
