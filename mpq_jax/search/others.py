"""What stands beside every answer: the best uniform policy that fits, and random ones of the same budget."""

from collections.abc import Sequence

import numpy as np

from mpq_jax import costs
from mpq_jax import policy as policies
from mpq_jax.importance import total
from mpq_jax.types import Bits, Budget, Importance


def fits(policy: dict[str, Bits], budgets: Sequence[Budget], importance: Importance) -> bool:
    """Whether every budget holds, exactly."""
    return all(costs.used(budget, policy, importance) <= budget.limit for budget in budgets)


def best_uniform(
    importance: Importance, budgets: Sequence[Budget], alpha: float | None = None
) -> tuple[str, dict[str, Bits]] | None:
    """("W3A3", policy): of all WiAj that fit, the one of least importance (of equals, the one with more bits).

    None where not even the narrowest fits.
    """
    found = []
    for w in importance.bit_widths:
        for a in importance.activation_bit_widths:
            policy = policies.uniform(importance.layers, w, a, importance.bit_widths, importance.activation_bit_widths)
            if _ties_hold(policy, importance) and fits(policy, budgets, importance):
                found.append((total(importance, policy, alpha), -(w + a), -w, f"W{w}A{a}", policy))
    return min(found)[3:] if found else None


def _ties_hold(policy: dict[str, Bits], importance: Importance) -> bool:
    seen: dict[str, int] = {}
    return all(
        seen.setdefault(layer.tied, policy[layer.path].a) == policy[layer.path].a
        for layer in importance.layers
        if layer.searched and layer.tied is not None
    )


def random_policies(
    importance: Importance, budgets: Sequence[Budget], count: int, seed: int = 0, within: float = 0.02
) -> list[dict[str, Bits]]:
    """Up to `count` random policies that fit and use at least (1 - within) of the first budget.

    Drawn uniformly, then moved by random single changes towards the budget, so that no layer is favoured. Fewer come
    back where the budget leaves no such policy within 200 tries each.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        for _ in range(200):
            policy = _towards(importance, budgets, rng, within)
            if policy is not None:
                found.append(policy)
                break
    return found


def _towards(importance: Importance, budgets, rng: np.random.Generator, within: float) -> dict[str, Bits] | None:
    """One random walk: changes that overshoot less, or use more while all fits; None where it gets stuck."""
    layers = importance.layers
    widths, activation_widths = importance.bit_widths, importance.activation_bit_widths
    policy = policies.random(layers, widths, activation_widths, rng)
    units = _movable(importance)
    for _ in range(40 * len(units)):
        ratios = [costs.used(b, policy, importance) / b.limit for b in budgets]
        if max(ratios) <= 1 and ratios[0] >= 1 - within:
            return policy
        paths, kind = units[rng.integers(len(units))]
        every = sorted(widths if kind == "w" else activation_widths)
        now = getattr(policy[paths[0]], kind)
        down = max(ratios) > 1
        options = [b for b in every if (b < now if down else b > now)]
        if not options:
            continue
        bits = max(options) if down else min(options)
        moved = policy | {path: policy[path]._replace(**{kind: bits}) for path in paths}
        if not _allowed(moved, importance) or (not down and not fits(moved, budgets, importance)):
            continue
        policy = moved
    return None


def _movable(importance: Importance) -> list[tuple[list[str], str]]:
    groups: dict[str, list[str]] = {}
    for layer in importance.layers:
        if layer.searched:
            groups.setdefault(layer.tied or f"\0{layer.path}", []).append(layer.path)
    weights = [([layer.path], "w") for layer in importance.layers if layer.searched]
    return weights + [(paths, "a") for paths in groups.values()]


def _allowed(policy: dict[str, Bits], importance: Importance) -> bool:
    return all(
        policy[ly.path].w in (ly.weight_bit_widths or importance.bit_widths)
        and policy[ly.path].a in (ly.activation_bit_widths or importance.activation_bit_widths)
        for ly in importance.layers
        if ly.searched
    )
