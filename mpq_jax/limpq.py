"""Indicators that LIMPQ's own PyTorch code learned (Tang et al. 2022), as an importance table of ours.

Its file is a pickle of {"weight": {"module.layer1.0.conv1": {"6": float, …}}, "act": {…}, "layer_name": […]}. A pickle
is a program; only the part of that program that builds dictionaries, lists, texts and numbers is run here.

A .csv says the same with the columns layer,tensor,bits,value (tensor: weight or act), one line a number; layers may
also be named by our paths there.
"""

import csv
import io
import math
import pickle
import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.config import Config
from mpq_jax.types import Importance, Layer, Refusal

MOST_BYTES = 64 * 2**20
# What builds plain values. Whatever is not here could import, call, or reach outside of the file.
_PLAIN = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "MEMOIZE",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "EMPTY_DICT",
        "DICT",
        "SETITEM",
        "SETITEMS",
        "EMPTY_LIST",
        "LIST",
        "APPEND",
        "APPENDS",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
    ]
)
ADVICE = "give the file that LIMPQ's importance_extractor.py writes, or a .csv with columns layer,tensor,bits,value"


class Indicators(NamedTuple):
    """weight, act: torch's layer name (without "module.") -> {bits: indicator}; layers in the order of the file."""

    weight: Mapping[str, Mapping[int, float]]
    act: Mapping[str, Mapping[int, float]]


# ---- files --------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Indicators:
    """Reads a pickle or a .csv. Raises Refusal for a file that is missing, too large, or holds anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist; {ADVICE}") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    if len(content) > MOST_BYTES:
        raise Refusal(f"{path} is larger than {MOST_BYTES >> 20} MiB, far more than indicators need; {ADVICE}")
    value = _from_csv(content, path) if path.suffix == ".csv" else unpickle(content, str(path))
    if not isinstance(value, dict):
        raise Refusal(f'{path} holds no dictionary with "weight" and "act"; {ADVICE}')
    return Indicators(*(_tensor(value.get(name), name, path) for name in ("weight", "act")))


def unpickle(content: bytes, source: str) -> Any:
    """The plain value that a pickle builds: dictionaries, lists, tuples, texts, numbers.

    Raises Refusal, before anything of it is run, for a pickle that is damaged or has any other operation.
    """
    try:
        for operation, argument, position in pickletools.genops(content):
            if operation.name not in _PLAIN:
                raise Refusal(
                    f"{source} is no plain pickle: {operation.name} at byte {position} could import or call something, "
                    f"and it is not run; {ADVICE}"
                )
            if "PUT" in operation.name and not 0 <= int(argument or 0) <= len(content):
                raise Refusal(f"{source} is a damaged pickle: it numbers more values than it has bytes; {ADVICE}")
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Refusal:
        raise
    except Exception:
        # pickle raises whatever a damaged stream leads it into: IndexError, KeyError, UnicodeDecodeError, …
        raise Refusal(f"{source} is no whole pickle; {ADVICE}") from None


class _PlainUnpickler(pickle.Unpickler):
    """A second lock behind the list of operations: nothing is ever looked up by name."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(str(pid))


def _from_csv(content: bytes, path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refusal(f"{path} is no .csv file ({error}); {ADVICE}") from None
    value: dict[str, dict[str, dict[str, float]]] = {"weight": {}, "act": {}}
    for number, row in enumerate(rows, start=2):
        layer, tensor, bits, text = (row.get(name) for name in ("layer", "tensor", "bits", "value"))
        if not layer or tensor not in value or bits is None or text is None:
            raise Refusal(
                f"{path}, line {number}: it must have layer,tensor,bits,value (tensor: weight or act); {ADVICE}"
            )
        try:
            indicator = float(text)
        except ValueError:
            raise Refusal(f"{path}, line {number}: {text!r} is no number; {ADVICE}") from None
        if bits in value[tensor].setdefault(layer, {}):
            raise Refusal(f"{path}, line {number}: {tensor} of {layer} at {bits} bits stands twice; keep one")
        value[tensor][layer][bits] = indicator
    return value


def _tensor(value: Any, name: str, path: Path) -> dict[str, dict[int, float]]:
    """{layer: {bits: indicator}} with names and widths in their plain form."""
    if not isinstance(value, dict) or not value:
        raise Refusal(f"{path} has no layers under {name!r}; {ADVICE}")
    result: dict[str, dict[int, float]] = {}
    for layer, entries in value.items():
        if not isinstance(layer, str) or not isinstance(entries, dict) or not entries:
            raise Refusal(f"{path}: {name!r} must map layer names to {{bits: indicator}}; {ADVICE}")
        plain = layer.removeprefix("module.")
        if plain in result:
            raise Refusal(f'{path}: {name!r} has layer {plain!r} twice, with and without "module."; keep one')
        own = result[plain] = {}
        for bits, indicator in entries.items():
            is_width = isinstance(bits, (int, str)) and re.fullmatch(r"[1-9]|[12][0-9]|3[0-2]", str(bits))
            is_number = not isinstance(indicator, bool) and isinstance(indicator, (int, float))
            if not is_width or not is_number or not abs(indicator) < 1e30:
                raise Refusal(f"{path}: {name!r} of {layer!r} has {_shown(bits)}: {_shown(indicator)}; {ADVICE}")
            own[int(bits)] = float(indicator)
    return result


def _shown(value: Any) -> str:
    """A number or a text; of anything else, which a file may nest without end, its type."""
    if isinstance(value, str):
        return repr(value[:40])
    small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**30)
    return repr(value) if small else type(value).__name__


# ---- tables -------------------------------------------------------------------------------------------------------


def to_importance(indicators: Indicators, config: Config, source: str) -> tuple[Importance, list[str]]:
    """The table of a config's searched layers, and the names in the file of layers that are not searched here.

    The config gives the layers, the candidates and the rules; alpha is not in such a file and stays open.
    Raises Refusal for layers of another model, searched layers without indicators, and candidates that the file lacks.
    """
    from mpq_jax import build

    layers = build.layer_table(config)
    paths = our_paths(config, [layer.path for layer in layers])
    searched = [layer for layer in layers if layer.searched]
    tables: dict[str, np.ndarray] = {}
    ignored: dict[str, None] = {}
    for name, widths, field in (
        ("weight", config.quantize.bit_widths, "weight_bit_widths"),
        ("act", config.quantize.activation_bit_widths or config.quantize.bit_widths, "activation_bit_widths"),
    ):
        found: dict[str, Mapping[int, float]] = {}
        for torch, entries in getattr(indicators, name).items():
            if torch not in paths:
                raise Refusal(
                    f"{source} has a layer {torch!r}, which {config.model.name} has not (its first is "
                    f"{next(iter(paths), layers[0].path)!r}); give the config of the model that they were learned on"
                )
            if paths[torch] in found:
                raise Refusal(f"{source} has {name!r} of layer {paths[torch]!r} under two names; keep one")
            found[paths[torch]] = entries
        tables[name] = np.array([_row(found, layer, widths, field, name, source) for layer in searched])
        here = {layer.path for layer in searched}
        ignored |= {torch: None for torch in getattr(indicators, name) if paths[torch] not in here}
    importance = Importance(
        criterion="learned (LIMPQ)",
        bit_widths=tuple(config.quantize.bit_widths),
        activation_bit_widths=tuple(config.quantize.activation_bit_widths or config.quantize.bit_widths),
        layers=layers,
        weight=tables["weight"],
        activation=tables["act"],
        rules=config.search.rules,
    )
    return importance, list(ignored)


def our_paths(config: Config, paths: list[str]) -> dict[str, str]:
    """Names that a file may use -> our paths: torch's, those of LIMPQ's MobileNetV1, and our own."""
    from mpq_jax import build

    try:
        names = build.torch_layer_names(config)
    except Refusal:  # a model without torch's naming
        names = {}
    for torch, path in list(names.items()):
        if found := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.conv_(dw|pw)", torch):
            names[f"features.stage{int(found[1]) + 1}.unit{int(found[2]) + 1}.{found[3]}_conv.conv"] = path
    return {**names, **{path: path for path in paths}}


def _row(
    found: Mapping[str, Mapping[int, float]], layer: Layer, widths: Any, field: str, name: str, source: str
) -> list[float]:
    """One layer's indicators at the candidates; where a rule takes a width from it, the file need not have it."""
    if layer.path not in found:
        raise Refusal(
            f"{source} has no {name!r} indicators of layer {layer.path!r}; fix that layer with a rule "
            f'(--quantize.rules "{re.escape(layer.path)}=8,8"), or give the file of this model'
        )
    own = getattr(layer, field) or tuple(widths)
    missing = [bits for bits in own if bits not in found[layer.path]]
    if missing:
        has = ",".join(str(bits) for bits in sorted(found[layer.path]))
        raise Refusal(
            f"{source} has no {name!r} indicator of layer {layer.path!r} at {missing[0]} bits, only at {has}; "
            f"search those: --quantize.bit_widths {has}"
        )
    worst = max(found[layer.path][bits] for bits in own)
    row = [found[layer.path].get(bits, worst) for bits in widths]
    assert all(math.isfinite(value) for value in row)
    return row
