"""ResNet-8 and ResNet-20 for small images (He et al. 2015, arXiv 1512.03385, section 4.2).

A 3x3 stem, then three stages of n blocks with 16, 32 and 64 channels: 6n + 2 layers. Projection shortcuts (option B)
in place of the paper's zero-padded ones, so that every residual is a layer with bits of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mpq_jax.models.layers import Stem, classify, scaled
from mpq_jax.models.resnet import BasicBlock, Stage


class CifarResNet(nn.Module):
    """ResNet for small images of any size and channels: [B, H, W, C] -> float32 logits [B, num_classes].

    blocks: n, blocks in each stage (1 for ResNet-8, 3 for ResNet-20). width: multiplies every channel count.
    dtype: of the computation; parameters and statistics are float32.
    zero_init_last: start the last BatchNorm scale of each block at 0.
    """

    num_classes: int
    blocks: int
    width: float = 1.0
    dtype: Dtype = jnp.float32
    zero_init_last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        channels = [scaled(c, self.width) for c in (16, 32, 64)]
        x = nn.relu(Stem(channels[0], 3, 1, self.dtype, name="stem")(x, train))
        for i, c in enumerate(channels):
            stage = Stage(
                BasicBlock, self.blocks, c, 1 if i == 0 else 2, self.dtype, self.zero_init_last, name=f"stage{i + 1}"
            )
            x = stage(x, train)
        return classify(x, self.num_classes, self.dtype)
