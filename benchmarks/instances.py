"""Made search problems, from a seed: what `benchmarks/search.py` solves.

MACs, parameters and latencies are log-normal over layers (sigma 1.5); the importance of a layer is log-normal times
2^(-b u) with u uniform in 0.5 to 2, drawn anew for its weights and its activations; each limit lies at 15 to 50 % of
what its cost ranges over.
"""

from collections.abc import Sequence

import numpy as np

from mpq_jax import costs
from mpq_jax.types import Budget, Importance, Layer

SIGMA = 1.5


def instance(
    seed: int, layers: int, bit_widths: Sequence[int], names: Sequence[str]
) -> tuple[Importance, list[Budget]]:
    """A problem of `layers` x len(bit_widths)^2 choices with budgets on `names` (bitops, size, latency)."""
    rng = np.random.default_rng([seed, layers, len(bit_widths), len(names)])
    widths = np.array(bit_widths)

    def lognormal(median: float) -> np.ndarray:
        return median * rng.lognormal(0.0, SIGMA, layers)

    macs, params, milliseconds = lognormal(1e7), lognormal(1e5), lognormal(0.01)
    weight, activation = (
        lognormal(1.0)[:, None] * 2.0 ** (-widths * rng.uniform(0.5, 2.0, layers)[:, None]) for _ in range(2)
    )
    table = tuple(
        Layer(f"layer{i}", max(1, int(n)), max(1, int(m)), True)
        for i, (n, m) in enumerate(zip(params, macs, strict=True))
    )
    importance = Importance("made", tuple(bit_widths), tuple(bit_widths), table, weight, activation)
    # Wider is slower, by less than in proportion, and not evenly.
    latency = {
        layer.path: {
            (w, a): float(ms * (0.3 + 0.7 * w * a / 16) * rng.uniform(0.9, 1.1)) for w in bit_widths for a in bit_widths
        }
        for layer, ms in zip(table, milliseconds, strict=True)
    }
    loose = {"bitops": "bitops=1000000T", "size": "size=1000000GB", "latency": "latency=1000000s"}
    budgets = costs.parse_budgets([loose[name] for name in names], table, bit_widths, bit_widths, latency)
    limited = []
    for budget in budgets:
        least, most = (costs.add(end((1, 2)).tolist()) for end in (budget.table.min, budget.table.max))
        share = rng.uniform(0.15, 0.5)
        limit = least + share * (most - least)
        text = f"{budget.name} at {share:.0%} of its range"
        limited.append(budget._replace(limit=int(limit) if isinstance(least, int) else float(limit), text=text))
    return importance, limited
