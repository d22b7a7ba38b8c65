"""What agents see of a layer: by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tables import budgets_of, made

from mpq_jax.quantized_model import quantize
from mpq_jax.search import features
from mpq_jax.search.problem import build


def test_features_by_hand():
    """Depthwise, channels, stride, kernel, weights, positions of three layers, from a model; then min-max."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
            x = nn.relu(nn.Conv(6, (5, 5), strides=2, name="conv")(x))
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)).mean((1, 2))
            x = nn.relu(nn.DenseGeneral((2, 4), name="general")(x)).reshape(-1, 8)
            return nn.Dense(3, name="head")(x)

    image = jnp.zeros((1, 8, 8, 2))
    model = quantize(Net(), image)
    variables = jax.jit(Net().init)(jax.random.key(0, impl="rbg"), image)
    seen = features.layer_features(model, variables, (image,), {"train": False})
    assert seen["conv"] == (0, 4, 6, 2, 5, 600, 64)
    assert seen["depthwise"] == (1, 6, 6, 1, 3, 54, 16)
    assert seen["general"] == (0, 6, 8, 0, 1, 48, 1)
    importance = made(1, layers=3)
    paths = (("conv",), ("depthwise",), ("general",))
    problem = build(importance, budgets_of(importance, "bitops=W4A4"))._replace(paths=paths)
    rows = features.row_features(problem, model, variables, (image,), {"train": False})
    np.testing.assert_allclose(rows[:, 0], [0, 1, 0])
    np.testing.assert_allclose(rows[:, 1], [0, 1, 1])
    np.testing.assert_allclose(rows[:, 4], [1, 0.5, 0])
    np.testing.assert_allclose(rows[:, 7], [0, 0.5, 1])
    spreads = features.channel_spreads(problem, model, variables, (image,), {"train": False})
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64).reshape(-1, 6)
    variance = kernel.var(0)
    np.testing.assert_allclose(
        spreads[0], (variance - variance.min()) / (variance.max() - variance.min()), rtol=1e-4, atol=1e-6
    )
    assert [len(s) for s in spreads] == [6, 6, 8]
