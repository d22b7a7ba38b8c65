"""Made importance tables, small enough to try every policy."""

import itertools

import numpy as np

from mpq_jax import Bits, Importance, Layer, costs
from mpq_jax.importance import total


def made(seed=0, layers=4, widths=(2, 3, 4), activation_widths=None, tied=False, pair=False, narrowed=False, alpha=1.3):
    """A random importance over `layers` searched layers, a fixed one before and one left in float behind."""
    rng = np.random.default_rng(seed)
    activation_widths = activation_widths or widths
    table = [Layer("first", 101, 5000, False, Bits(8, 8), inputs=30, outputs=40)]
    for i in range(layers):
        own = (
            {"weight_bit_widths": widths[1:], "activation_bit_widths": activation_widths[:2]}
            if narrowed and i == 1
            else {}
        )
        table.append(
            Layer(
                f"layer{i}",
                int(rng.integers(50, 5000)),
                int(rng.integers(1000, 90000)),
                True,
                tied="in" if tied and i < 2 else None,
                inputs=int(rng.integers(10, 900)),
                outputs=int(rng.integers(10, 900)),
                **own,
            )
        )
    table.append(Layer("last", 7, 70, False, Bits(32, 32), inputs=5, outputs=6))
    weight = -np.sort(-rng.random((layers, len(widths))), 1)
    activation = -np.sort(-rng.random((layers, len(activation_widths))), 1)
    three = rng.random((layers, len(widths), len(activation_widths)))
    return Importance(
        "made",
        tuple(widths),
        tuple(activation_widths),
        tuple(table),
        None if pair else weight,
        None if pair else activation,
        three if pair else None,
        None if pair else alpha,
    )


def every_policy(importance):
    """All allowed policies, one by one."""
    searched = [layer for layer in importance.layers if layer.searched]
    options = [
        [
            Bits(w, a)
            for w in ly.weight_bit_widths or importance.bit_widths
            for a in ly.activation_bit_widths or importance.activation_bit_widths
        ]
        for ly in searched
    ]
    for choice in itertools.product(*options):
        policy = {ly.path: bits for ly, bits in zip(searched, choice, strict=True)}
        groups = {}
        if all(groups.setdefault(ly.tied, policy[ly.path].a) == policy[ly.path].a for ly in searched if ly.tied):
            yield {ly.path: policy.get(ly.path, ly.bits) for ly in importance.layers}


def cost_by_hand(importance, policy, name):
    """What a policy costs, in plain Python integers; means as sums of bits."""
    layers = importance.layers
    if name == "bitops":
        return sum(ly.macs * policy[ly.path].w * policy[ly.path].a for ly in layers)
    if name == "size":
        return sum((ly.params * policy[ly.path].w + 7) // 8 for ly in layers)
    if name == "memory":
        return max(((ly.inputs + ly.outputs) * policy[ly.path].a + 7) // 8 for ly in layers)
    if name == "wbits":
        return sum(ly.params * policy[ly.path].w for ly in layers)
    assert name == "abits"
    return sum(ly.inputs * policy[ly.path].a for ly in layers)


def budgets_of(importance, *texts):
    return costs.parse_budgets(texts, importance.layers, importance.bit_widths, importance.activation_bit_widths)


def best_by_force(importance, budgets, alpha=None, allowed=lambda policy: True):
    """(objective, policies that reach it); objective None where nothing fits. Costs by hand."""
    best, winners = None, []
    for policy in every_policy(importance):
        if allowed(policy) and all(cost_by_hand(importance, policy, b.name) <= b.limit for b in budgets):
            value = total(importance, policy, alpha)
            if best is None or value < best - 1e-12:
                best, winners = value, [policy]
            elif value <= best + 1e-12:
                winners.append(policy)
    return best, winners
