"""ResNet-18, -34 and -50 (He et al. 2015, arXiv 1512.03385), laid out as torchvision's.

Padding, epsilon and momentum are torch's; bottlenecks have their stride on the 3x3 convolution ("v1.5"), so BitOps are
those that quantization papers print.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mpq_jax.models.layers import Stem, classify, conv, norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, H, W, C] -> [B, H', W', channels], H' = ceil(H / stride).

    The shortcut is a 1x1 convolution with BatchNorm where the shape changes (option B of the paper), else nothing.
    """

    channels: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    zero_init_last: bool = False

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = conv(self.channels, 3, self.stride, self.dtype, "conv1")(x)
        y = nn.relu(norm(train, self.dtype, "bn1")(y))
        y = conv(self.channels, 3, 1, self.dtype, "conv2")(y)
        y = norm(train, self.dtype, "bn2", self.zero_init_last)(y)
        return nn.relu(y + shortcut(x, self.channels, self.stride, train, self.dtype))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions beside a shortcut: [B, H, W, C] -> [B, H', W', 4 * channels]."""

    channels: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    zero_init_last: bool = False

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        out = self.channels * self.expansion
        y = conv(self.channels, 1, 1, self.dtype, "conv1")(x)
        y = nn.relu(norm(train, self.dtype, "bn1")(y))
        y = conv(self.channels, 3, self.stride, self.dtype, "conv2")(y)
        y = nn.relu(norm(train, self.dtype, "bn2")(y))
        y = conv(out, 1, 1, self.dtype, "conv3")(y)
        y = norm(train, self.dtype, "bn3", self.zero_init_last)(y)
        return nn.relu(y + shortcut(x, out, self.stride, train, self.dtype))


def shortcut(x: jax.Array, channels: int, stride: int, train: bool, dtype: Dtype) -> jax.Array:
    """`x` itself, or projected where the block changes its shape."""
    if stride == 1 and x.shape[-1] == channels:
        return x
    x = conv(channels, 1, stride, dtype, "shortcut_conv")(x)
    return norm(train, dtype, "shortcut_bn")(x)


class Stage(nn.Module):
    """`blocks` blocks at one resolution, named block1, block2, …; the first one has the stride."""

    block: type[BasicBlock] | type[BottleneckBlock]
    blocks: int
    channels: int
    stride: int
    dtype: Dtype = jnp.float32
    zero_init_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(self.channels, stride, self.dtype, self.zero_init_last, name=f"block{i + 1}")(x, train)
        return x


class ResNet(nn.Module):
    """ResNet for images of about 224x224: [B, H, W, C] -> float32 logits [B, num_classes].

    block: BasicBlock (18, 34) or BottleneckBlock (50). depths: blocks in each of the four stages.
    dtype: of the computation; parameters and statistics are float32.
    zero_init_last: start the last BatchNorm scale of each block at 0.
    """

    num_classes: int
    block: type[BasicBlock] | type[BottleneckBlock]
    depths: tuple[int, int, int, int]
    dtype: Dtype = jnp.float32
    zero_init_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(Stem(64, 7, 2, self.dtype, name="stem")(x, train))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, blocks in enumerate(self.depths):
            stage = Stage(
                self.block, blocks, 64 * 2**i, 1 if i == 0 else 2, self.dtype, self.zero_init_last, name=f"stage{i + 1}"
            )
            x = stage(x, train)
        return classify(x, self.num_classes, self.dtype)
