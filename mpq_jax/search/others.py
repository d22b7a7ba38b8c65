"""What stands beside every answer: the best uniform policy that fits, and random ones of the same budget."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax import costs
from mpq_jax import policy as policies
from mpq_jax.importance import total
from mpq_jax.types import Bits, Budget, Importance


class _Unit(NamedTuple):
    """Bits that move together: of `kind` "w" or "a", in the layers `paths`, to any of `candidates`."""

    paths: tuple[str, ...]
    kind: str
    candidates: tuple[int, ...]


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
    back, none in most cases, where 200 tries in a row find no such policy: a budget above what the widest policy
    costs, or another budget that binds first.
    """
    rng = np.random.default_rng(seed)
    units = _units(importance)
    found: list[dict[str, Bits]] = []
    for _ in range(count):
        tries = (_towards(importance, budgets, units, rng, within) for _ in range(200))
        policy = next((policy for policy in tries if policy is not None), None)
        if policy is None:
            break
        found.append(policy)
    return found


def _units(importance: Importance) -> list[_Unit]:
    """One unit for the weights of each layer, one for the activations of each group of tied layers."""
    searched = [layer for layer in importance.layers if layer.searched]
    shared = policies.tied_candidates(importance.layers, importance.activation_bit_widths)
    groups: dict[tuple[str | None, str], list[str]] = {}
    for layer in searched:
        groups.setdefault((layer.tied, "" if layer.tied is not None else layer.path), []).append(layer.path)
    weights = [_Unit((ly.path,), "w", tuple(ly.weight_bit_widths or importance.bit_widths)) for ly in searched]
    return weights + [_Unit(tuple(paths), "a", shared[paths[0]]) for paths in groups.values()]


def _towards(
    importance: Importance, budgets: Sequence[Budget], units: list[_Unit], rng: np.random.Generator, within: float
) -> dict[str, Bits] | None:
    """One random walk: bits taken away while a budget is broken, then given back while all hold.

    None where it gets stuck below the first budget, or above any.
    """
    policy = policies.random(importance.layers, importance.bit_widths, importance.activation_bit_widths, rng)
    while True:
        down = not fits(policy, budgets, importance)
        if not down and costs.used(budgets[0], policy, importance) >= (1 - within) * budgets[0].limit:
            return policy
        for unit in rng.permutation(len(units)):
            moved = _moved(policy, units[unit], down)
            if moved is not None and (down or fits(moved, budgets, importance)):
                policy = moved
                break
        else:
            return None


def _moved(policy: dict[str, Bits], unit: _Unit, down: bool) -> dict[str, Bits] | None:
    """The policy with one unit at its next narrower or wider candidate; None where there is none."""
    now = getattr(policy[unit.paths[0]], unit.kind)
    options = [b for b in unit.candidates if (b < now if down else b > now)]
    if not options:
        return None
    bits = max(options) if down else min(options)
    return policy | {path: policy[path]._replace(**{unit.kind: bits}) for path in unit.paths}
