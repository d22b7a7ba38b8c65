"""Policies: uniform, checked against a layer table; policy.json in and out. No JAX."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax.costs import KINDS, human, saved_limits
from mpq_jax.files import read_json, write_json
from mpq_jax.layer_costs import check_channels
from mpq_jax.types import Bits, Layer, Policy, Refusal, Solution

FORMAT, VERSION = "mpq-policy", 1
MADE_BY = "python search.py --workdir … --budget …"


def mean_weight_bits(bits: Bits) -> float:
    """Weight bits of a layer; the mean over its output channels, which all have equally many weights."""
    return sum(bits.w) / len(bits.w) if isinstance(bits.w, Sequence) else bits.w


def text(bits: Bits) -> str:
    """ "W3A4"; "W2.50A4" for a mean over output channels."""
    return f"W{mean_weight_bits(bits):.2f}A{bits.a}" if isinstance(bits.w, Sequence) else f"W{bits.w}A{bits.a}"


def nearest(bits: int, candidates: Sequence[int]) -> int:
    """The candidate nearest to `bits`, the lower of two."""
    return min(candidates, key=lambda c: (abs(c - bits), c))


def uniform(
    layers: Sequence[Layer], w: int, a: int, bit_widths: Sequence[int] = (), activation_bit_widths: Sequence[int] = ()
) -> dict[str, Bits]:
    """Every searched layer at W{w}A{a}, or at its candidate nearest to it; fixed layers at theirs.

    bit_widths, activation_bit_widths: candidates of layers that have none of their own; (): any width.
    Tied layers share the nearest of the activation bits that all of them allow.
    Raises Refusal where tied layers allow none in common.
    """
    every_a = tuple(activation_bit_widths) or tuple(range(1, 33))
    shared = tied_candidates(layers, every_a)

    def bits(layer: Layer) -> Bits:
        if layer.bits is not None:
            return layer.bits
        own_w = layer.candidates("weight", bit_widths or (w,))
        return Bits(nearest(w, own_w), nearest(a, shared[layer.path]))

    return {layer.path: bits(layer) for layer in layers}


def tied_candidates(layers: Sequence[Layer], activation_bit_widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Activation candidates of each searched layer: of tied ones, those that all of them allow.

    Raises Refusal where tied layers allow none in common.
    """
    groups: dict[str, set[int]] = {}
    for layer in layers:
        if layer.searched and layer.tied is not None:
            own = set(layer.candidates("activation", activation_bit_widths))
            groups[layer.tied] = groups.get(layer.tied, own) & own
    result = {}
    for layer in layers:
        if layer.searched:
            candidates = layer.candidates("activation", activation_bit_widths)
            if layer.tied is not None:
                candidates = tuple(b for b in candidates if b in groups[layer.tied])
                if not candidates:
                    raise Refusal(
                        f"layer {layer.path!r} reads the same tensor as others (tied {layer.tied!r}) but they allow no "
                        "activation bits in common; give them common candidates, or untie them"
                    )
            result[layer.path] = candidates
    return result


def completed(
    policy: Policy, layers: Sequence[Layer], bit_widths: Sequence[int], activation_bit_widths: Sequence[int]
) -> dict[str, Bits]:
    """The policy with the fixed layers in it, its bits plain numbers. Raises Refusal as `validate` does."""
    plain = _plain(policy)
    validate(plain, layers, bit_widths, activation_bit_widths, "the policy")
    return {**{layer.path: layer.bits for layer in layers if layer.bits is not None}, **plain}


def _plain(policy: Policy) -> dict[str, Bits]:
    """Its bits as Python's numbers, those of output channels as a tuple."""
    return {
        path: Bits(tuple(int(b) for b in np.asarray(bits.w)) if np.ndim(bits.w) else int(bits.w), int(bits.a))
        for path, bits in policy.items()
    }


def validate(
    policy: Policy,
    layers: Sequence[Layer],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
    source: str,
) -> None:
    """Raises Refusal, naming the layer, unless the policy gives every layer allowed bits and no other layer any.

    Fixed layers may be left out; those in float may be, too.
    """
    table = {layer.path: layer for layer in layers}
    for path in policy:
        if path not in table:
            near = difflib.get_close_matches(path, table, n=1)
            hint = f" (the nearest is {near[0]!r})" if near else ""
            raise Refusal(
                f"{source} names layer {path!r}, which this model does not have{hint}; is it another model's?"
            )
    tied: dict[str, tuple[str, int]] = {}
    for layer in layers:
        bits = policy.get(layer.path)
        if bits is None:
            if layer.searched:
                raise Refusal(f"{source} has no bits for layer {layer.path!r}; is it another model's?")
            continue
        if layer.bits is not None and bits != layer.bits:
            raise Refusal(
                f"{source} gives layer {layer.path!r} {text(bits)}, but a rule fixes it at "
                f"{text(layer.bits)}; write [{layer.bits.w}, {layer.bits.a}]"
            )
        if layer.bits is None:
            allowed_w = layer.candidates("weight", bit_widths)
            allowed_a = layer.candidates("activation", activation_bit_widths)
            each = bits.w if isinstance(bits.w, Sequence) else (bits.w,)
            for kind, values, allowed in (("weight", each, allowed_w), ("activation", (bits.a,), allowed_a)):
                for value in values:
                    if value not in allowed:
                        raise Refusal(
                            f"{source} gives layer {layer.path!r} {value} {kind} bits; its candidates are "
                            f"{', '.join(map(str, allowed))}"
                        )
            if isinstance(bits.w, Sequence):
                try:
                    check_channels(layer, len(bits.w))
                except Refusal as refusal:
                    raise Refusal(f"{source}: {refusal}") from None
            if layer.tied is not None:
                first, a = tied.setdefault(layer.tied, (layer.path, bits.a))
                if a != bits.a:
                    raise Refusal(
                        f"{source} gives layers {first!r} and {layer.path!r} {a} and {bits.a} activation bits, but "
                        "they read the same tensor; give them the same"
                    )


def save_policy(path: str | Path, solution: Solution, importance_sha256: str) -> None:
    """Writes a policy.json, whole or not at all.

    "bits": path -> [w, a], or [[w of each output channel], a]. "bound" is null where nothing is proved ("status" is
    then "feasible", and "objective" the loss that the search measured on held-out data). importance_sha256: of the file
    that was searched, "" for none. Raises OSError where the file cannot be written.
    """
    write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "bits": {path: list(bits) for path, bits in _plain(solution.policy).items()},
            "objective": solution.objective,
            "bound": solution.bound,
            "gap": solution.gap,
            "status": solution.status,
            "solver": solution.solver,
            "seconds": round(solution.seconds, 4),
            "budgets": {name: {"used": used, "limit": limit} for name, (used, limit) in solution.used.items()},
            "importance_sha256": importance_sha256,
        },
    )


def replaced(path: str | Path, solution: Solution) -> str | None:
    """What is lost where the solution is saved over the file at `path`, in words; None where there is no other policy."""
    if not Path(path).exists():
        return None
    try:
        value = read_json(path, FORMAT, VERSION, MADE_BY)
        limits = saved_limits(value.get("budgets"), str(path))
    except Refusal:
        return "a file that is no whole policy.json"
    if value.get("bits") == json.loads(json.dumps(solution.policy)):
        return None
    within = [f"{name} {human(limit, KINDS[name].unit)}" for name, limit in limits.items() if name in KINDS]
    return f"another policy (within {', '.join(within)})" if within else "another policy"


def load_policy(
    path: str | Path, layers: Sequence[Layer], bit_widths: Sequence[int], activation_bit_widths: Sequence[int]
) -> dict[str, Bits]:
    """Reads and validates a policy.json; only "bits" is needed. Fixed layers that it leaves out are filled in.

    Raises Refusal for a file of another model, a damaged one, or bits that a layer cannot have.
    """
    value = read_json(path, FORMAT, VERSION, MADE_BY)
    entries = value.get("bits")
    if not isinstance(entries, dict):
        raise Refusal(f'{path}: "bits" must map layer paths to [weight bits, activation bits]; make it with: {MADE_BY}')
    policy = {name: _bits(path, name, entry) for name, entry in entries.items()}
    validate(policy, layers, bit_widths, activation_bit_widths, str(path))
    return {layer.path: policy.get(layer.path, layer.bits) for layer in layers}  # type: ignore[misc]


def _bits(path: str | Path, name: str, entry: Any) -> Bits:
    by_channel = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list)
    each = [*entry[0], entry[1]] if by_channel else entry
    if (
        not isinstance(each, list)
        or len(each) < 2
        or (len(each) > 2 and not by_channel)
        or not all(isinstance(b, int) and not isinstance(b, bool) for b in each)
    ):
        raise Refusal(
            f"{path} gives layer {name!r} {str(entry)[:80]}; write [weight bits, activation bits], e.g. [3, 4], or "
            "[[weight bits of each output channel], activation bits]"
        )
    return Bits(tuple(entry[0]) if by_channel else entry[0], entry[1])


def stack(policies: Sequence[Mapping[str, Bits]]) -> dict[str, Bits]:
    """Policies as one stack {path: Bits(int32 [P], int32 [P])}, NumPy.

    `w` is [P, C] for a layer that has weight bits per output channel in any of them. The layers are those of the first;
    raises KeyError where another lacks one of them.
    """

    def column(values: Sequence[Any]) -> np.ndarray:
        return np.stack(np.broadcast_arrays(*(np.asarray(value, np.int32) for value in values)))

    return {path: Bits(*(column([policy[path][k] for policy in policies]) for k in range(2))) for path in policies[0]}
