"""A small net whose layers are known."""

from flax import linen as nn


class Block(nn.Module):
    """A residual block whose first convolution and shortcut read the same tensor."""

    features: int

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(self.features, (3, 3), use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn1")(y))
        y = nn.Conv(self.features, (3, 3), feature_group_count=self.features, name="depthwise")(y)
        return nn.relu(y + nn.Conv(self.features, (1, 1), name="shortcut")(x))


class Net(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        x = block(6, name="block1")(x, train)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))
