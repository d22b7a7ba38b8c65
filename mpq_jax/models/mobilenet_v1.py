"""MobileNetV1 (Howard et al. 2017, arXiv 1704.04861): 13 depthwise-separable units.

Only the first unit of a resolution has a stride. Each unit is a 3x3 depthwise and a 1x1 pointwise convolution, both
with BatchNorm and ReLU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from mpq_jax.models.layers import Stem, classify, conv, he_normal_depthwise, norm, scaled

# (channels, stride) of each unit, for images of about 224x224 after a stem of stride 2.
UNITS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)


class Unit(nn.Module):
    """Depthwise 3x3 then pointwise 1x1 convolution: [B, H, W, C] -> [B, H', W', channels], H' = ceil(H / stride)."""

    channels: int
    stride: int = 1
    relu6: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        activation = nn.relu6 if self.relu6 else nn.relu
        depthwise = nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=(self.stride, self.stride),
            padding=1,
            feature_group_count=x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=he_normal_depthwise,
            name="depthwise",
        )
        x = activation(norm(train, self.dtype, "bn1")(depthwise(x)))
        x = conv(self.channels, 1, 1, self.dtype, "pointwise")(x)
        return activation(norm(train, self.dtype, "bn2")(x))


class MobileNetV1(nn.Module):
    """MobileNetV1: [B, H, W, C] -> float32 logits [B, num_classes].

    width: multiplies every channel count, rounded to multiples of 8.
    small_images: for 28x28 or 32x32 images: no stride in the stem nor in the last stage, 8-fold reduction in place of
        32-fold (28x28 ends at 4x4).
    stem_stride: 1 or 2, where only the stem's stride is to be chosen; None follows small_images.
    relu6: clip activations at 6, as timm's weights for this model were trained.
    dtype: of the computation; parameters and statistics are float32.
    """

    num_classes: int
    width: float = 1.0
    small_images: bool = False
    stem_stride: int | None = None
    relu6: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        stem_stride = (1 if self.small_images else 2) if self.stem_stride is None else self.stem_stride
        x = Stem(scaled(32, self.width, 8), 3, stem_stride, self.dtype, name="stem")(x, train)
        x = nn.relu6(x) if self.relu6 else nn.relu(x)
        for i, (channels, stride) in enumerate(UNITS):
            stride = 1 if self.small_images and channels == 1024 else stride
            unit = Unit(scaled(channels, self.width, 8), stride, self.relu6, self.dtype, name=f"unit{i + 1}")
            x = unit(x, train)
        return classify(x, self.num_classes, self.dtype)
