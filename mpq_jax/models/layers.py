"""What the convolutional models share: convolutions padded as torch pads them, normalisation, the first layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

# He et al. 2015, "Delving Deep into Rectifiers", fan-out form.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# The fan-out of one group of a depthwise convolution is its k*k taps, which is what JAX calls its fan-in.
he_normal_depthwise = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def scaled(channels: int, width: float, divisor: int = 1) -> int:
    """`channels * width`, rounded to a multiple of `divisor`, at least one `divisor`, and not below 90 % of it."""
    wanted = channels * width
    found = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return found + divisor if found < 0.9 * wanted else found


def conv(features: int, size: int, stride: int, dtype: Dtype, name: str) -> nn.Conv:
    """A `size` x `size` convolution without bias, `size // 2` zeros on each side: torch's padding, not SAME."""
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal_fan_out,
        name=name,
    )


def norm(train: bool, dtype: Dtype, name: str, zero: bool = False) -> nn.BatchNorm:
    """BatchNorm with torch's epsilon and momentum (torch writes 0.1 for the weight of the *new* value).

    zero: start the scale at 0, so that a residual block starts as its shortcut.
    """
    start = nn.initializers.zeros if zero else nn.initializers.ones
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, scale_init=start, name=name
    )


class Stem(nn.Module):
    """First convolution and its normalisation: [B, H, W, C] -> [B, H', W', features]. The activation is the model's."""

    features: int
    size: int
    stride: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = conv(self.features, self.size, self.stride, self.dtype, "conv")(x)
        return norm(train, self.dtype, "bn")(x)


def classify(x: jax.Array, num_classes: int, dtype: Dtype) -> jax.Array:
    """Mean over positions and the classifier `head`: [B, H, W, C] -> float32 logits [B, num_classes]."""
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(num_classes, dtype=dtype, name="head")(x).astype(jnp.float32)
