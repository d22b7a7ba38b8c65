"""The page: one HTML file with everything in it. page.html, charts.html, page.css and page.js are its parts.

Nothing is loaded: the page's own policy forbids it, and lets run only the very style and script that are in the file.
Whatever comes from a run (names of layers above all) is data: the template engine escapes it.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from mpq_jax import costs
from mpq_jax.report import layer_charts, point_charts, tables, words
from mpq_jax.report.scales import CIVIDIS
from mpq_jax.report.tables import Report

SECTIONS = (
    ("accuracy", "Accuracy"),
    ("budgets", "Budgets"),
    ("bits", "Bits"),
    ("importance", "Importance"),
    ("frontier", "Frontier"),
    ("layers", "Layers"),
    ("made-with", "Made with"),
)
KEYS = {
    "chosen": "mixed, chosen",
    "best": "best policy, proven",
    "open": "best policy found, not proven",
    "equal": "uniform, weights and activations alike",
    "uniform": "other uniform policies",
}
FINE = 60  # more layers than this are drawn finely


class Row(NamedTuple):
    """A line of the accuracy table, as text."""

    name: str
    accuracy: str
    apart: str
    loss: str
    bitops: str
    share: str
    size: str
    chosen: bool


class LayerRow(NamedTuple):
    """A line of the table of layers, as text. bits: of each policy. part: percent of the mixed policy's BitOps."""

    path: str
    fixed: bool
    params: str
    macs: str
    bits: tuple[str, ...]
    part: str


class ImportanceRow(NamedTuple):
    """values: (text, whether it is the mixed policy's choice), one a bit-width."""

    number: int
    path: str
    values: tuple[tuple[str, bool], ...]


class ImportanceTable(NamedTuple):
    """The importance of one kind ("weight", "activation") as text: a row a layer, a column a width."""

    kind: str
    widths: tuple[int, ...]
    rows: tuple[ImportanceRow, ...]


def html(report: Report) -> str:
    """The whole page. Needs neither JAX nor matplotlib."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=words.printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(human=_human, number=words.number, percent=words.percent)
    style = _part("page.css") + _widths_of_plots(len(report.importance.layers))
    script = _part("page.js")
    parts = {"style": Markup(style), "script": Markup(script), "policy": content_policy(style, script)}
    text = environment.get_template("page.html").render(**_context(report), **parts)
    return text.lstrip() + "\n"


def content_policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows this style and this script, by their digests, and nothing else."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    allowed = "style-src 'sha256-{}'; script-src 'sha256-{}'".format(*digests)
    return f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"


def _part(name: str) -> str:
    return resources.files("mpq_jax.report").joinpath(name).read_text(encoding="utf-8")


def _widths_of_plots(layers: int) -> str:
    least, most = layer_charts.plot_width(layers)
    return f"\n:root {{ --layers-least: {least}px; --layers-most: {most}px; }}\n"


def _human(value: float, unit: str) -> str:
    return costs.human(value, unit) if math.isfinite(value) else words.number(value)


def _context(report: Report) -> dict[str, Any]:
    layers, uniform = report.importance.layers, words.row_of(report, "uniform")
    frontier = point_charts.frontier_chart(report) if report.curve else None
    drawn = {mark.kind for mark in frontier.marks} if frontier else set()
    return {
        "report": report,
        "verdict": words.verdict(report),
        "sections": SECTIONS,
        "ramp": CIVIDIS,
        "accuracy": point_charts.accuracy_chart(report)
        if any(row.accuracy is not None for row in report.accuracy)
        else None,
        "rows": _rows(report),
        "compared": uniform.name if uniform and uniform.accuracy is not None else "",
        "share_name": tables.share_name(report),
        "several": any(words.spread_of(row) is not None for row in report.accuracy),
        "means": any(row.runs > 1 for row in report.accuracy),
        "bits": layer_charts.bits_chart(report),
        "others": [name for name in report.policies if name != "mixed"],
        "has_fixed": not all(layer.searched for layer in layers),
        "by_channel": any(isinstance(bits.w, Sequence) for each in report.policies.values() for bits in each.values()),
        "heat": layer_charts.heat_map(report),
        "fine": len(layers) > FINE,
        "frontier": frontier,
        "keys": [(kind, text) for kind, text in KEYS.items() if kind in drawn],
        "curve_rows": _curve_rows(report),
        "layer_rows": _layer_rows(report),
        "importance_tables": [_importance_table(report, kind) for kind in ("weight", "activation")],
        "settings": list(_flat(report.config or {})),
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def _rows(report: Report) -> list[Row]:
    uniform = words.row_of(report, "uniform")
    return [
        Row(
            row.name + (f" ({row.note})" if row.note else ""),
            words.accuracy(row),
            words.points(words.right(row) - words.right(uniform)) if uniform and row is not uniform else "",
            f"{row.loss:.4f}" if math.isfinite(row.loss) else words.number(row.loss),
            _human(row.bitops, "BitOps"),
            tables.share(row, report),
            _human(row.size_bytes, "bytes"),
            row.name.split(" ")[0] == "mixed",
        )
        for row in report.accuracy
    ]


def _layer_rows(report: Report) -> list[LayerRow]:
    mixed, layers = report.policies["mixed"], report.importance.layers
    everything = costs.bitops(layers, mixed)
    rows = []
    for layer in layers:
        part = costs.layer_bitops(layer, tables.chosen_bits(layer, mixed)) / everything if everything else 0.0
        each = (tables.bits_text(tables.chosen_bits(layer, chosen)) for chosen in report.policies.values())
        counts = f"{layer.params:,}", f"{layer.macs:,}"
        rows.append(LayerRow(layer.path, not layer.searched, *counts, tuple(each), f"{100 * part:.1f}"))
    return rows


def _importance_table(report: Report, kind: str) -> ImportanceTable:
    table = report.importance
    widths = table.bit_widths if kind == "weight" else table.activation_bit_widths
    rows, values = [], iter(tables.importance_table(report, kind).tolist())
    for i, layer in enumerate(table.layers):
        if not layer.searched:
            continue
        bits = tables.chosen_bits(layer, report.policies["mixed"])
        mine = bits.w if kind == "weight" else bits.a
        chosen = set(mine) if isinstance(mine, Sequence) else {mine}
        may = layer_charts.offered(report, layer, kind)
        cells = zip(widths, next(values), strict=True)
        texts = tuple((words.number(value) if b in may else "not offered", b in chosen) for b, value in cells)
        rows.append(ImportanceRow(i + 1, layer.path, texts))
    return ImportanceTable(kind, widths, tuple(rows))


def _curve_rows(report: Report) -> list[Any]:
    if report.curve is None:
        return []
    chosen = [report.curve.chosen] if report.curve.chosen else []
    return sorted([*report.curve.best, *report.curve.uniform, *chosen], key=lambda point: point.cost)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("joint.steps", "300"), ... of nested settings."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)
