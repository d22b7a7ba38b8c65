"""Models for tests that want few and quick compilations: dense layers only."""

from flax import linen as nn


class Dense(nn.Module):
    """[B, ...] -> logits [B, num_classes]: dense layers of the given widths, each with BatchNorm and ReLU behind, and one."""

    num_classes: int = 10
    features: tuple[int, ...] = (12,)

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, name=f"dense{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{i}")(x))
        return nn.Dense(self.num_classes, name="head")(x)


def dense(num_classes: int, features=(12,)) -> Dense:
    return Dense(num_classes, tuple(features))
