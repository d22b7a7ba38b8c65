"""importance.json in and out, and what can be said of a table without a model: repair, totals, reversal. No JAX."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from mpq_jax.files import read_json, write_json
from mpq_jax.types import Bits, Importance, Layer, Policy, Refusal

FORMAT, VERSION = "mpq-importance", 1
MADE_BY = "python train.py --config … --workdir …"
Outlier = tuple[str, str, int]
# Above these, macs * 32 * 32 and params * 32 of a whole model leave int64.
MOST_MACS, MOST_PARAMS = 2**52, 2**57


# ---- in and out ---------------------------------------------------------------------------------------------------


def save_importance(path: str | Path, importance: Importance) -> None:
    """Writes an importance.json, whole or not at all."""
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "criterion": importance.criterion,
        "alpha": importance.alpha,
        "bit_widths": list(importance.bit_widths),
        "layers": [layer_to_json(layer) for layer in importance.layers],
    }
    if importance.rules:
        value["rules"] = list(importance.rules)
    if importance.activation_bit_widths != importance.bit_widths:
        value["activation_bit_widths"] = list(importance.activation_bit_widths)
    for name in ("weight", "activation", "pair"):
        table = getattr(importance, name)
        if table is not None:
            value[name] = np.asarray(table).tolist()
    write_json(path, value)


def layer_to_json(layer: Layer) -> dict[str, Any]:
    """One entry of "layers"."""
    value = {"path": layer.path, "params": layer.params, "macs": layer.macs, "searched": layer.searched}
    optional = ("bits", "tied", "inputs", "outputs", "weight_bit_widths", "activation_bit_widths", "channels")
    for name in optional:
        if (item := getattr(layer, name)) is not None:
            value[name] = list(item) if isinstance(item, tuple) else item
    return value


def load_importance(path: str | Path) -> Importance:
    """Reads an importance.json. Raises Refusal, in one line, for anything that the format does not allow."""
    value = read_json(path, FORMAT, VERSION, MADE_BY)

    def refuse(what: str) -> Refusal:
        return Refusal(f"{path}: {what}; make it again with: {MADE_BY}")

    widths = _widths(value.get("bit_widths"), "bit_widths", refuse)
    activation_widths = _widths(value.get("activation_bit_widths", list(widths)), "activation_bit_widths", refuse)
    entries = value.get("layers")
    if not isinstance(entries, list) or not entries:
        raise refuse('"layers" must be a list of layers')
    layers = tuple(_layer_from_json(entry, widths, activation_widths, refuse) for entry in entries)
    paths = [layer.path for layer in layers]
    if len(set(paths)) < len(paths):
        raise refuse(f"layer path {next(p for p in paths if paths.count(p) > 1)!r} stands twice")
    for name, limit in (("macs", MOST_MACS), ("params", MOST_PARAMS)):
        if sum(getattr(layer, name) for layer in layers) >= limit:
            raise refuse(f'the "{name}" of all layers add up to more than {limit}')
    searched = sum(layer.searched for layer in layers)
    if not searched:
        raise refuse("no layer is searched")
    shapes = {
        "weight": (searched, len(widths)),
        "activation": (searched, len(activation_widths)),
        "pair": (searched, len(widths), len(activation_widths)),
    }
    wanted = ("pair",) if "pair" in value else ("weight", "activation")
    if "pair" in value and ("weight" in value or "activation" in value):
        raise refuse('"pair" stands in place of "weight" and "activation", not beside them')
    tables = {name: _table(value.get(name), name, shapes[name], refuse) for name in wanted}
    alpha = value.get("alpha")
    if alpha is not None and not (_is_number(alpha) and alpha > 0):
        raise refuse(f'"alpha" is {alpha!r}; it must be null or a positive number')
    criterion = value.get("criterion")
    if not isinstance(criterion, str):
        raise refuse('"criterion" must be a name')
    rules = value.get("rules", [])
    if not isinstance(rules, list) or not all(isinstance(rule, str) for rule in rules):
        raise refuse('"rules" must be a list of texts such as "regex=w4+"')
    return Importance(
        criterion=criterion,
        bit_widths=widths,
        activation_bit_widths=activation_widths,
        layers=layers,
        weight=tables.get("weight"),
        activation=tables.get("activation"),
        pair=tables.get("pair"),
        alpha=None if alpha is None else float(alpha),
        rules=tuple(rules),
    )


def sha256(path: str | Path) -> str:
    """The digest of a file's bytes, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _widths(value: Any, name: str, refuse) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(_is_count(b) and 1 <= b <= 32 for b in value)
        or len(set(value)) < len(value)
    ):
        raise refuse(f'"{name}" is {value!r}; it must list distinct integers from 1 to 32')
    return tuple(value)


def _layer_from_json(entry: Any, widths, activation_widths, refuse) -> Layer:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise refuse(f'a layer without a "path": {str(entry)[:80]}')
    path = entry["path"]
    unknown = set(entry) - set(Layer._fields)
    if unknown:
        raise refuse(f"layer {path!r} has the unknown key {min(unknown)!r}")
    for name in ("params", "macs", "inputs", "outputs"):
        given = entry.get(name)
        if not (_is_count(given) or (given is None and name in ("inputs", "outputs"))):
            raise refuse(f'layer {path!r}: "{name}" is {given!r}; it must be a non-negative integer')
    channels = entry.get("channels")
    if channels is not None:
        whole = _is_count(channels) and channels > 0 and not any(entry[n] % channels for n in ("params", "macs"))
        if not whole:
            raise refuse(f'layer {path!r}: "channels" is {channels!r}; it must divide "params" and "macs"')
    if not isinstance(entry.get("searched"), bool):
        raise refuse(f'layer {path!r}: "searched" must be true or false')
    bits = entry.get("bits")
    if bits is not None:
        if not isinstance(bits, list) or len(bits) != 2 or not all(_is_count(b) and 1 <= b <= 32 for b in bits):
            raise refuse(f'layer {path!r}: "bits" is {bits!r}; it must be [weight bits, activation bits]')
        if entry["searched"]:
            raise refuse(f'layer {path!r} is searched and has fixed "bits"; it can only be one of both')
    elif not entry["searched"]:
        raise refuse(f'layer {path!r} is not searched and has no "bits"; a layer left in float has [32, 32]')
    if not isinstance(entry.get("tied"), (str, type(None))) or entry.get("tied") == "":
        raise refuse(f'layer {path!r}: "tied" must be a name')
    own = {}
    for name, every in (("weight_bit_widths", widths), ("activation_bit_widths", activation_widths)):
        if entry.get(name) is not None:
            own[name] = _widths(entry[name], f"{path}: {name}", refuse)
            if not set(own[name]) <= set(every):
                raise refuse(f'layer {path!r}: "{name}" {list(own[name])} must be among {list(every)}')
    return Layer(
        path=path,
        params=entry["params"],
        macs=entry["macs"],
        searched=entry["searched"],
        bits=None if bits is None else Bits(*bits),
        tied=entry.get("tied"),
        inputs=entry.get("inputs"),
        outputs=entry.get("outputs"),
        weight_bit_widths=own.get("weight_bit_widths"),
        activation_bit_widths=own.get("activation_bit_widths"),
        channels=channels,
    )


def _table(value: Any, name: str, shape: tuple[int, ...], refuse) -> np.ndarray:
    def has(item: Any, lengths: tuple[int, ...]) -> bool:
        if not lengths:
            return _is_number(item)
        return isinstance(item, list) and len(item) == lengths[0] and all(has(i, lengths[1:]) for i in item)

    if not has(value, shape):
        found = "missing" if value is None else "not that"
        raise refuse(
            f'"{name}" must hold finite numbers in {" x ".join(map(str, shape))} (searched layers x bit-widths); '
            f"it is {found}"
        )
    return np.array(value, np.float64)


# ---- tables -------------------------------------------------------------------------------------------------------


def combined(importance: Importance, alpha: float | None = None) -> np.ndarray:
    """[L, Kw, Ka] float64: alpha * weight[l, i] + activation[l, j], or the pair table.

    alpha: None means the table's own, or 1 where it has none.
    """
    if importance.pair is not None:
        return importance.pair
    assert importance.weight is not None and importance.activation is not None
    factor = alpha if alpha is not None else importance.alpha if importance.alpha is not None else 1.0
    return factor * importance.weight[:, :, None] + importance.activation[:, None, :]


def total(importance: Importance, policy: Policy, alpha: float | None = None) -> float:
    """The objective of a policy: its sum over the searched layers."""
    table = combined(importance, alpha)
    searched = [layer for layer in importance.layers if layer.searched]
    return math.fsum(
        table[
            row,
            importance.bit_widths.index(policy[ly.path].w),
            importance.activation_bit_widths.index(policy[ly.path].a),
        ]
        for row, ly in enumerate(searched)
    )


def reversed_importance(importance: Importance) -> Importance:
    """The control that gives important layers fewer bits: the layer of rank r gets the row of rank L + 1 - r.

    Ranked by the mean of the combined row; weight, activation and pair rows move together.
    """
    order = np.argsort(combined(importance).mean(axis=(1, 2)), kind="stable")
    source = np.empty_like(order)
    source[order] = order[::-1]

    def moved(table: np.ndarray | None) -> np.ndarray | None:
        return None if table is None else table[source]

    return importance._replace(
        criterion=f"{importance.criterion} reversed",
        weight=moved(importance.weight),
        activation=moved(importance.activation),
        pair=moved(importance.pair),
    )


def repair(importance: Importance) -> tuple[Importance, list[Outlier]]:
    """Isotonic regression over bit-widths: harm must not fall when bits are taken away.

    The nearest monotone row in least squares, over each layer's own candidates.
    Returns the repaired table and what was out of order: (path, "weight" or "activation", the bits whose value lay
    below that of the next wider candidate). Pair tables are returned as they are.
    """
    outliers: list[Outlier] = []
    if importance.weight is None or importance.activation is None:
        return importance, outliers
    searched = [layer for layer in importance.layers if layer.searched]
    tables: Mapping[str, tuple[np.ndarray, Sequence[int]]] = {
        "weight": (importance.weight.copy(), importance.bit_widths),
        "activation": (importance.activation.copy(), importance.activation_bit_widths),
    }
    for kind, (table, widths) in tables.items():
        for row, layer in enumerate(searched):
            own = getattr(layer, f"{kind}_bit_widths") or widths
            columns = [widths.index(b) for b in sorted(own)]
            values = table[row, columns]
            for i in range(len(columns) - 1):
                if values[i] < values[i + 1]:
                    outliers.append((layer.path, kind, widths[columns[i]]))
            table[row, columns] = isotonic_regression(values, increasing=False).x
            others = [k for k in range(len(widths)) if k not in columns]
            table[row, others] = table[row, columns].max()
    return importance._replace(weight=tables["weight"][0], activation=tables["activation"][0]), outliers
