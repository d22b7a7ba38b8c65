"""importance.json in and out, and what can be said of a table without a model: repair, totals, reversal. No JAX."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax.files import read_json, write_json
from mpq_jax.types import Bits, Importance, Interaction, Layer, Policy, Refusal

FORMAT, VERSION = "mpq-importance", 1
MADE_BY = "python train.py --config … --workdir …"
Outlier = tuple[str, str, int]
Refuse = Callable[[str], Refusal]  # what is wrong -> the Refusal that says it of the file
# Above these, macs * 32 * 32 and params * 32 of a whole model leave int64.
MOST_MACS, MOST_PARAMS = 2**52, 2**57


# ---- in and out ---------------------------------------------------------------------------------------------------


def save_importance(path: str | Path, importance: Importance, about: Mapping[str, Any] | None = None) -> None:
    """Writes an importance.json, whole or not at all.

    about: what else is to be known of the table, plain JSON values; kept under "about", which no reader needs.
    Raises OSError where the file cannot be written, ValueError for numbers that are not finite.
    """
    value: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "criterion": importance.criterion,
        "alpha": None if importance.alpha is None else float(importance.alpha),
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
    if importance.interactions:
        value["interactions"] = [
            {"a": list(each.a), "b": list(each.b), "table": np.asarray(each.table).tolist()}
            for each in importance.interactions
        ]
    if about is not None:
        value["about"] = dict(about)
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
    """Reads an importance.json; the tables are float64, [L, Kw] and [L, Ka], or [L, Kw, Ka] for "pair".

    Raises Refusal, in one line, for anything that the format does not allow.
    """
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
    most = {"macs": MOST_MACS, "params": MOST_PARAMS, "inputs": MOST_PARAMS, "outputs": MOST_PARAMS}
    for name, limit in most.items():
        if sum(getattr(layer, name) or 0 for layer in layers) >= limit:
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
        interactions=_interactions(value.get("interactions", []), layers, widths, activation_widths, refuse),
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


def _widths(value: Any, name: str, refuse: Refuse) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(_is_count(b) and 1 <= b <= 32 for b in value)
        or len(set(value)) < len(value)
    ):
        raise refuse(f'"{name}" is {value!r}; it must list distinct integers from 1 to 32')
    return tuple(value)


def _layer_from_json(entry: Any, widths: Sequence[int], activation_widths: Sequence[int], refuse: Refuse) -> Layer:
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


def _interactions(
    entries: Any, layers: Sequence[Layer], widths: Sequence[int], activation_widths: Sequence[int], refuse: Refuse
) -> tuple[Interaction, ...]:
    """Terms of named pairs: both layers searched, two different decisions, each pair once, tables that fit."""
    if not isinstance(entries, list):
        raise refuse('"interactions" must be a list of {"a": [path, "w" or "a"], "b": …, "table": …}')
    searched = {layer.path for layer in layers if layer.searched}
    sizes = {"w": len(widths), "a": len(activation_widths)}
    found: dict[frozenset[tuple[str, str]], Interaction] = {}
    for number, entry in enumerate(entries):
        where = f"interactions[{number}]"
        if not isinstance(entry, dict) or set(entry) != {"a", "b", "table"}:
            raise refuse(f'{where} must have "a", "b" and "table", and nothing else')
        ends = []
        for name in ("a", "b"):
            end = entry[name]
            if not (isinstance(end, list) and len(end) == 2 and isinstance(end[0], str) and end[1] in ("w", "a")):
                raise refuse(f'{where}: "{name}" is {str(end)[:80]}; it must be [layer path, "w" or "a"]')
            if end[0] not in searched:
                raise refuse(f'{where}: "{name}" names {end[0]!r}, which is no searched layer')
            ends.append((end[0], end[1]))
        pair = frozenset(ends)
        if len(pair) < 2 or pair in found:
            what = "names one decision twice" if len(pair) < 2 else "repeats an earlier pair"
            raise refuse(f"{where} {what}: {ends[0]} and {ends[1]}")
        shape = (sizes[ends[0][1]], sizes[ends[1][1]])
        table = _table(entry["table"], f"{where}: table", shape, refuse, "bit-widths of a x of b")
        found[pair] = Interaction(ends[0], ends[1], table)
    return tuple(found.values())


def _table(
    value: Any, name: str, shape: tuple[int, ...], refuse: Refuse, axes: str = "searched layers x bit-widths"
) -> np.ndarray:
    def has(item: Any, lengths: tuple[int, ...]) -> bool:
        if not lengths:
            return _is_number(item)
        return isinstance(item, list) and len(item) == lengths[0] and all(has(i, lengths[1:]) for i in item)

    if not has(value, shape):
        found = "missing" if value is None else "not that"
        raise refuse(f'"{name}" must hold finite numbers in {" x ".join(map(str, shape))} ({axes}); it is {found}')
    return np.array(value, np.float64)


# ---- tables -------------------------------------------------------------------------------------------------------


def combined(importance: Importance, alpha: float | None = None) -> np.ndarray:
    """[L, Kw, Ka] float64: alpha * weight[l, i] + activation[l, j], or the pair table; interactions stand beside it.

    alpha: None means the table's own, or 1 where it has none.
    """
    if importance.pair is not None:
        return importance.pair
    assert importance.weight is not None and importance.activation is not None
    factor = alpha if alpha is not None else importance.alpha if importance.alpha is not None else 1.0
    return factor * importance.weight[:, :, None] + importance.activation[:, None, :]


def total(importance: Importance, policy: Policy, alpha: float | None = None) -> float:
    """The objective of a policy: its sum over the searched layers, and over the interactions."""
    table = combined(importance, alpha)

    def column(path: str, kind: str) -> int:
        if kind == "w":
            return importance.bit_widths.index(policy[path].w)
        return importance.activation_bit_widths.index(policy[path].a)

    searched = [layer.path for layer in importance.layers if layer.searched]
    alone = (table[row, column(path, "w"), column(path, "a")] for row, path in enumerate(searched))
    together = (each.table[column(*each.a), column(*each.b)] for each in importance.interactions)
    return math.fsum([*alone, *together])


def reversed_importance(importance: Importance, alpha: float | None = None) -> Importance:
    """The control that gives important layers fewer bits: the layer of rank r gets the row of rank L + 1 - r.

    Ranked by the mean of the combined row (alpha: as in `combined`); weight, activation and pair rows move together, and interactions go with
    the rows of their layers.
    """
    order = np.argsort(combined(importance, alpha).mean(axis=(1, 2)), kind="stable")
    source = np.empty_like(order)
    source[order] = order[::-1]

    paths = [layer.path for layer in importance.layers if layer.searched]
    new_home = {paths[row]: path for path, row in zip(paths, source, strict=True)}

    def moved(table: np.ndarray | None) -> np.ndarray | None:
        return None if table is None else table[source]

    return importance._replace(
        criterion=f"{importance.criterion} reversed",
        weight=moved(importance.weight),
        activation=moved(importance.activation),
        pair=moved(importance.pair),
        interactions=tuple(
            each._replace(a=(new_home[each.a[0]], each.a[1]), b=(new_home[each.b[0]], each.b[1]))
            for each in importance.interactions
        ),
    )


def spread(known: Mapping[int, float], every: Sequence[int]) -> np.ndarray:
    """[K] float64: one layer's harm over all bit-widths, from that at its own candidates.

    Bit-widths that a rule took from the layer repeat the largest: no reader may prefer them.
    """
    return np.array([known.get(bits, max(known.values())) for bits in every], np.float64)


def repair(importance: Importance) -> tuple[Importance, list[Outlier]]:
    """Isotonic regression over bit-widths: harm must not fall when bits are taken away.

    The nearest monotone row in least squares, over each layer's own candidates.
    Returns the repaired table and what was out of order: (path, "weight" or "activation", the bits whose value lay
    below that of the next wider candidate). Pair tables, and tables with interactions, whose parts have no order of
    their own, are returned as they are.
    """
    outliers: list[Outlier] = []
    if importance.weight is None or importance.activation is None or importance.interactions:
        return importance, outliers
    searched = [layer for layer in importance.layers if layer.searched]
    tables: Mapping[str, tuple[np.ndarray, Sequence[int]]] = {
        "weight": (importance.weight.copy(), importance.bit_widths),
        "activation": (importance.activation.copy(), importance.activation_bit_widths),
    }
    for kind, (table, widths) in tables.items():
        for row, layer in enumerate(searched):
            own = sorted(layer.candidates(kind, widths))
            columns = [widths.index(b) for b in own]
            values = table[row, columns]
            rising = np.flatnonzero(values[:-1] < values[1:])
            if len(rising):
                from scipy.optimize import isotonic_regression  # slow to import, seldom needed

                outliers += [(layer.path, kind, widths[columns[i]]) for i in rising]
                values = isotonic_regression(values, increasing=False).x
            table[row] = spread(dict(zip(own, values, strict=True)), widths)
    return importance._replace(weight=tables["weight"][0], activation=tables["activation"][0]), outliers
