"""Costs: from the layer table and a text such as "bitops=W3A4" to a Budget, in exact integers. No JAX."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.files import read_json

# Whoever asks what something costs knows this file alone.
from mpq_jax.layer_costs import bitops as bitops
from mpq_jax.layer_costs import describe as describe
from mpq_jax.layer_costs import describe_text as describe_text
from mpq_jax.layer_costs import elements, layer_memory, layer_weight_bits, uniform_bits
from mpq_jax.layer_costs import human as human
from mpq_jax.layer_costs import layer_bitops as layer_bitops
from mpq_jax.layer_costs import layer_size as layer_size
from mpq_jax.layer_costs import size as size
from mpq_jax.types import Bits, Budget, Importance, Layer, Policy, Refusal

EXAMPLES = {
    "bitops": "bitops=W3A4, bitops=55.3G or bitops=76x",
    "size": "size=W3, size=8MB, size=256KB or size=12.2x",
    "latency": "latency=3ms (with --latency latency.json)",
    "memory": "memory=256KB",
    "wbits": "wbits=3.2",
    "abits": "abits=4",
}
# Digits of ASCII, and not so many that Python refuses to read them.
_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{1,18})?)"
_WIDTH = r"([1-9]|[12][0-9]|3[0-2])"
_BYTES = {"B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
Latency = Mapping[str, Mapping[tuple[int, int], float]]
MEASURE_LATENCY = "python -m mpq_jax.latency --config … --out latency.json"
MOST_MS = 1e12  # thirty years: no measurement, and sums stay far from overflow


# ---- budgets ------------------------------------------------------------------------------------------------------


def _layer_latency(latency: Latency) -> Callable[[Layer, Bits], float]:
    def cost(layer: Layer, bits: Bits) -> float:
        if layer.path not in latency:
            raise Refusal(f"the latency table has no layer {layer.path!r}; measure it with: {MEASURE_LATENCY}")
        found = latency[layer.path].get((bits.w, bits.a))
        if found is None:
            has = ", ".join(f"{w},{a}" for w, a in sorted(latency[layer.path]))
            raise Refusal(f'the latency table has no "{bits.w},{bits.a}" for layer {layer.path!r}; it has {has}')
        return found

    return cost


class _Kind(NamedTuple):
    """One kind of budget.

    cost(layer, bits), its unit, limit(text, layers) -> int | float | None (not understood). largest: the limit is on
    each layer, not on their sum. per(layers): what limits and sums are divided by when they are shown: a mean's weights.
    """

    cost: Callable[[Layer, Bits], Any]
    unit: str
    limit: Callable[[str, Sequence[Layer]], int | float | None]
    largest: bool = False
    per: Callable[[Sequence[Layer]], int] = lambda layers: 1


def _bitops_limit(text: str, layers: Sequence[Layer]) -> int | None:
    if found := re.fullmatch(f"W{_WIDTH}A{_WIDTH}", text):
        return bitops(layers, uniform_bits(layers, int(found[1]), int(found[2])))
    if found := re.fullmatch(_NUMBER + r"([KMGT])", text):
        return int(Fraction(found[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[found[2]])
    if (found := re.fullmatch(_NUMBER + "x", text)) and Fraction(found[1]):
        return int(sum(layer.macs for layer in layers) * 32 * 32 / Fraction(found[1]))
    return None


def _size_limit(text: str, layers: Sequence[Layer]) -> int | None:
    if found := re.fullmatch(f"W{_WIDTH}", text):
        return size(layers, uniform_bits(layers, int(found[1]), 32))
    if found := re.fullmatch(_NUMBER + r"(B|KB|MB|GB)", text):
        return int(Fraction(found[1]) * _BYTES[found[2]])
    if (found := re.fullmatch(_NUMBER + "x", text)) and Fraction(found[1]):
        return int(_all_params(layers) * 4 / Fraction(found[1]))
    return None


def _latency_limit(text: str, layers: Sequence[Layer]) -> float | None:
    del layers
    per_ms = {"ns": Fraction(1, 10**6), "us": Fraction(1, 10**3), "ms": Fraction(1), "s": Fraction(1000)}
    found = re.fullmatch(_NUMBER + r"(ns|us|ms|s)", text)
    return float(Fraction(found[1]) * per_ms[found[2]]) if found else None


def _bytes_limit(text: str, layers: Sequence[Layer]) -> int | None:
    del layers
    found = re.fullmatch(_NUMBER + r"(B|KB|MB|GB)", text)
    return int(Fraction(found[1]) * _BYTES[found[2]]) if found else None


def _mean_limit(per: Callable[[Sequence[Layer]], int]) -> Callable[[str, Sequence[Layer]], int | None]:
    def limit(text: str, layers: Sequence[Layer]) -> int | None:
        found = re.fullmatch(_NUMBER, text)
        return int(Fraction(found[1]) * per(layers)) if found and Fraction(found[1]) <= 32 else None

    return limit


def _all_params(layers: Sequence[Layer]) -> int:
    return sum(layer.params for layer in layers)


def _all_inputs(layers: Sequence[Layer]) -> int:
    return sum(elements(layer, "inputs") for layer in layers)


def _no_latency(layer: Layer, bits: Bits) -> float:
    raise Refusal("a latency budget needs a table of measured latencies; add --latency latency.json")


KINDS = {
    "bitops": _Kind(layer_bitops, "BitOps", _bitops_limit),
    "size": _Kind(layer_size, "bytes", _size_limit),
    "latency": _Kind(_no_latency, "ms", _latency_limit),
    "memory": _Kind(layer_memory, "bytes", _bytes_limit, largest=True),
    "wbits": _Kind(layer_weight_bits, "bits", _mean_limit(_all_params), per=_all_params),
    "abits": _Kind(
        lambda layer, bits: elements(layer, "inputs") * bits.a, "bits", _mean_limit(_all_inputs), per=_all_inputs
    ),
}


def check_text(text: str) -> None:
    """Refuses what cannot be a budget whatever the model: before any file is read or library imported."""
    name, equals, value = text.partition("=")
    if not equals or name not in EXAMPLES:
        raise Refusal(f"budget {text!r} is not understood; write {'; '.join(EXAMPLES.values())}")
    limit = KINDS[name].limit(value, (Layer("", 10**9, 10**9, True, inputs=10**9, outputs=10**9),))
    if limit is None or limit <= 0:
        raise Refusal(f"budget {text!r} is not understood; write {EXAMPLES[name]}")


def parse_budgets(
    texts: Sequence[str],
    layers: Sequence[Layer],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
    latency: Latency | None = None,
) -> list[Budget]:
    """Budgets from texts such as "bitops=W3A4"; `costs.EXAMPLES` has one of each form.

    Units: BitOps for one sample (bitops), bytes of packed kernels (size), ms (latency), bytes of one layer's input and
    output for one sample (memory), bits (wbits: the mean over weights; abits: over elements of the layers' inputs).
    bit_widths, activation_bit_widths: Kw and Ka candidates, the axes of the tables [L, Kw, Ka]. latency: `load_latency`.
    W3A4 is what the same model costs with every searched layer at W3A4, fixed layers at theirs. Limits in numbers are
    rounded down to whole units. Raises Refusal for anything else, and for two limits on the same cost.
    """
    if not texts:
        raise Refusal(f"no budget given; write --budget {EXAMPLES['bitops']}")
    budgets: list[Budget] = []
    for text in texts:
        check_text(text)
        name, _, value = text.partition("=")
        kind = KINDS[name]
        if name == "latency":
            if latency is None:
                raise Refusal(f"budget {text!r} needs a table of measured latencies; add --latency latency.json")
            kind = kind._replace(cost=_layer_latency(latency))
        if any(b.name == name for b in budgets):
            raise Refusal(f"two budgets limit {name}; keep the tighter one")
        limit = kind.limit(value, layers)
        if limit is None or limit <= 0:
            raise Refusal(f"budget {text!r} leaves nothing to spend; write {EXAMPLES[name]}")
        budgets.append(_budget(name, text, kind, limit, layers, bit_widths, activation_bit_widths))
    return budgets


def restore_budgets(
    limits: Mapping[str, int | float], importance: Importance, latency: Latency | None = None
) -> list[Budget]:
    """The budgets of a saved policy, from their limits; a latency budget needs its table, else it is left out."""
    kinds = {name: KINDS[name] for name in limits if name in KINDS and name != "latency"}
    if latency is not None and "latency" in limits:
        kinds["latency"] = KINDS["latency"]._replace(cost=_layer_latency(latency))
    layers, widths = importance.layers, (importance.bit_widths, importance.activation_bit_widths)
    budgets = []
    for name, kind in kinds.items():
        total = limits[name] * kind.per(layers)
        if name != "latency" and round(total) < 1:
            raise Refusal(
                f"the limit {limits[name]:g} of the budget {name} leaves nothing to spend; give it with --budget"
            )
        budgets.append(_budget(name, name, kind, total if name == "latency" else round(total), layers, *widths))
    return budgets


def saved_limits(budgets: Any, source: str) -> dict[str, int | float]:
    """Name -> limit from the "budgets" of a policy.json, which may have none. Raises Refusal for a damaged one."""
    if budgets is None:
        return {}
    limits = {}
    for name, entry in budgets.items() if isinstance(budgets, dict) else [("budgets", budgets)]:
        limit = entry.get("limit") if isinstance(entry, dict) else None
        if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 < limit <= 2**63:
            raise Refusal(f'{source}: "budgets" has no positive "limit" for {name!r}; mend it, or leave "budgets" out')
        limits[name] = limit
    return limits


def _budget(
    name: str,
    text: str,
    kind: _Kind,
    limit: int | float,
    layers: Sequence[Layer],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
) -> Budget:
    if limit >= 2**62:
        raise Refusal(f"budget {text!r} is more than any network spends, and more than is counted here; leave it out")
    searched = [layer for layer in layers if layer.searched]
    exact = name != "latency"
    table = np.zeros((len(searched), len(bit_widths), len(activation_bit_widths)), np.int64 if exact else np.float64)
    for row, layer in enumerate(searched):
        own_w = layer.candidates("weight", bit_widths)
        own_a = layer.candidates("activation", activation_bit_widths)
        for i, w in enumerate(bit_widths):
            for j, a in enumerate(activation_bit_widths):
                if w in own_w and a in own_a:
                    table[row, i, j] = kind.cost(layer, Bits(w, a))
    fixed = [kind.cost(layer, layer.bits) for layer in layers if layer.bits is not None]
    together = max([0, *fixed]) if kind.largest else add(fixed)
    return Budget(name, text, table, together, limit, kind.unit, kind.largest, kind.per(layers))


def add(terms: Iterable[int | float]) -> int | float:
    """The sum: exact for integers; for measured costs to 9 decimals (a picosecond), so that 0.1 + 0.2 is within 0.3."""
    terms = list(terms)
    return sum(terms) if all(isinstance(term, int) for term in terms) else round(math.fsum(terms), 9)


def used(budget: Budget, policy: Policy, importance: Importance) -> int | float:
    """What a policy spends of a budget, in the table's unit, fixed layers included: exact for counted costs.

    Raises Refusal for weight bits per output channel in a latency budget.
    """
    searched = [layer for layer in importance.layers if layer.searched]
    entries = [_entry(budget, row, layer, policy[layer.path], importance) for row, layer in enumerate(searched)]
    return max([budget.fixed, *entries]) if budget.largest else add([budget.fixed, *entries])


def _entry(budget: Budget, row: int, layer: Layer, bits: Bits, importance: Importance) -> int | float:
    if not isinstance(bits.w, Sequence):
        i, j = importance.bit_widths.index(bits.w), importance.activation_bit_widths.index(bits.a)
        return budget.table[row, i, j].item()
    check_by_channel([budget])
    return KINDS[budget.name].cost(layer, bits)


def check_by_channel(budgets: Iterable[Budget]) -> None:
    """Raises Refusal for a budget that cannot be told for weight bits per output channel: one of measured latencies."""
    for budget in budgets:
        if budget.name == "latency":
            raise Refusal(
                f"budget {budget.text} rests on measurements of whole layers, which say nothing of weight bits per "
                "output channel; use bitops, size, memory, wbits or abits budgets"
            )


def shown(budget: Budget, value: int | float) -> int | float:
    """A sum or limit of a budget as people read it: a mean where the budget is one."""
    return value if budget.per == 1 else float(Fraction(value) / budget.per)


def load_latency(path: str | Path) -> Latency:
    """Reads a latency.json: {"unit": "ms", "layers": {path: {"8,8": ms}}}; other keys say how it was measured.

    -> {path: {(weight bits, activation bits): ms}}. Raises Refusal for anything else.
    """
    value = read_json(path, "mpq-latency", 1, MEASURE_LATENCY)
    if value.get("unit") != "ms" or not isinstance(value.get("layers"), dict):
        raise Refusal(f'{path} must have "unit": "ms" and "layers": {{path: {{"8,8": 0.21}}}}')
    result: dict[str, dict[tuple[int, int], float]] = {}
    for layer, entries in value["layers"].items():
        result[layer] = {}
        for key, milliseconds in entries.items() if isinstance(entries, dict) else [("", None)]:
            found = re.fullmatch(f"{_WIDTH},{_WIDTH}", key)
            wrong = not isinstance(milliseconds, (int, float)) or isinstance(milliseconds, bool)
            number = -1 if wrong or milliseconds is None else milliseconds
            if not found or not 0 <= number <= MOST_MS:
                raise Refusal(
                    f'{path}, layer {layer!r}: {json.dumps(key)}: {milliseconds!r} is not "weight bits,activation bits": ms'
                )
            result[layer][int(found[1]), int(found[2])] = float(number)
    return result
