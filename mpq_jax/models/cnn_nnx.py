"""A small convolutional network in flax.nnx: three convolutions and a classifier."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from mpq_jax.models.layers import he_normal_fan_out, scaled


class CNN(nnx.Module):
    """Three 3x3 convolutions (strides 1, 2, 2), BatchNorm and ReLU after each, mean, and the classifier `head`.

    [B, H, W, in_channels] -> float32 logits [B, num_classes].

    in_channels: of the image (NNX builds its parameters before it sees one).
    width: multiplies the channel counts 16, 32, 64.
    dtype: of the computation; parameters and statistics are float32.
    seed: of the initial parameters, where no `rngs` are given.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: float = 1.0,
        dtype: Dtype = jnp.float32,
        seed: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        rngs = nnx.Rngs(seed) if rngs is None else rngs
        c1, c2, c3 = (scaled(c, width) for c in (16, 32, 64))
        self.conv1, self.bn1 = _conv_norm(in_channels, c1, 1, dtype, rngs)
        self.conv2, self.bn2 = _conv_norm(c1, c2, 2, dtype, rngs)
        self.conv3, self.bn3 = _conv_norm(c2, c3, 2, dtype, rngs)
        self.head = nnx.Linear(c3, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nnx.relu(bn(conv(x), use_running_average=not train))
        return self.head(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)


def _conv_norm(inputs: int, outputs: int, stride: int, dtype: Dtype, rngs: nnx.Rngs) -> tuple[nnx.Conv, nnx.BatchNorm]:
    conv = nnx.Conv(
        inputs,
        outputs,
        (3, 3),
        strides=(stride, stride),
        padding=1,
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal_fan_out,
        rngs=rngs,
    )
    return conv, nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
