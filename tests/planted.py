"""A made net whose policies' losses are known, and logs of joint training as they would then be."""

import numpy as np

from mpq_jax import Bits, Layer, QuantizedModel
from mpq_jax.criteria.learned import RowLog

WIDTHS, ACTIVATIONS = (2, 3, 4, 6), (2, 4, 8)
LAYERS = (
    Layer("stem", 10, 10, False, Bits(8, 8)),
    Layer("a", 100, 10, True, inputs=50),
    Layer("b", 400, 10, True, tied="in", inputs=20),
    Layer("c", 90, 10, True, tied="in", inputs=20),
    Layer("d", 7, 10, True, weight_bit_widths=(2, 4), inputs=300),
)
MODEL = QuantizedModel(LAYERS, {}, (), WIDTHS, ACTIVATIONS, None, None, None, None, None)
PATHS = ("a", "b", "c", "d")


def draw(rng, count):
    """int [N, 4, 2], as joint training draws: tied layers together, candidates of their own."""
    bits = np.stack([rng.choice(WIDTHS, (count, 4)), rng.choice(ACTIVATIONS, (count, 4))], -1)
    bits[:, 3, 0] = rng.choice((2, 4), count)
    bits[:, 2, 1] = bits[:, 1, 1]
    return bits


def planted(rng, pairwise=False):
    """(weight [4, 4], activation [4, 3], {(path, kind), (path, kind): [K, K]}): log loss of each choice."""
    weight = rng.uniform(0.5, 2, (4, 1)) * 2.0 ** -np.arange(4)
    activation = rng.uniform(0.3, 1.5, (4, 1)) * 2.0 ** -np.arange(3)
    together = {}
    if pairwise:
        for a, b in ((("a", "w"), ("b", "w")), (("a", "w"), ("b", "a")), (("b", "a"), ("d", "a"))):
            sizes = [len(WIDTHS if kind == "w" else ACTIVATIONS) for _, kind in (a, b)]
            raw = rng.normal(0, 0.4, sizes)
            together[a, b] = raw - raw.mean(0) - raw.mean(1, keepdims=True) + raw.mean()
    return weight, activation, together


def log_loss(truth, bits):
    weight, activation, together = truth
    w, a = (np.searchsorted(widths, bits[..., k]) for k, widths in enumerate((WIDTHS, ACTIVATIONS)))
    rows = np.arange(4)
    result = weight[rows, w].sum(1) + activation[rows, a].sum(1)
    for (first, second), table in together.items():
        at = [(w if kind == "w" else a)[:, PATHS.index(path)] for path, kind in (first, second)]
        result = result + table[tuple(at)]
    return result


def logged(truth, count, seed=0, noise=0.01):
    """Two rows a step; each step's batch makes all its losses larger or smaller."""
    rng = np.random.default_rng(seed)
    bits = draw(rng, count)
    step = np.arange(count) // 2
    batch = rng.normal(0, 0.3, count)[step]
    loss = np.exp(log_loss(truth, bits) + batch - 1 + noise * rng.normal(size=count))
    return RowLog(step, bits, loss.astype(np.float32), np.exp(0.7 + batch).astype(np.float32))
