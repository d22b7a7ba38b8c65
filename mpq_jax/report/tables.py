"""What a report holds, and its tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax import costs
from mpq_jax.types import Importance, Layer, Policy


class AccuracyRow(NamedTuple):
    """One line of the accuracy table: the mean over `runs` policies, measured on the test set.

    accuracy: 0 to 1; accuracy_std: the standard deviation over the policies, where there are several.
    """

    name: str
    accuracy: float
    accuracy_std: float | None
    runs: int
    loss: float
    bitops: int
    size_bytes: int
    note: str = ""


class Grid(NamedTuple):
    """A layer's float weights [N] and their integer codes [N] at one width: what figure 1 shows."""

    path: str
    bits: int
    step_size: float
    values: np.ndarray
    codes: np.ndarray


class Report(NamedTuple):
    """Everything a report shows.

    policies: name -> policy; "mixed" is the chosen one. used: budget name -> (used, limit, unit).
    indicators, initial: {"weight": [L, K], "activation": [L, K]} at the end and at the start of joint training.
    outliers: (path, kind, bits) that isotonic regression moved. depthwise_pairs: (depthwise, pointwise) paths.
    """

    title: str
    importance: Importance
    policies: Mapping[str, Policy]
    used: Mapping[str, tuple[Any, Any, str]]
    accuracy: Sequence[AccuracyRow]
    grids: Sequence[Grid]
    depthwise_pairs: Sequence[tuple[str, str]]
    indicators: Mapping[str, Any] | None
    initial: Mapping[str, Any] | None
    outliers: Sequence[tuple[str, str, int]]
    provenance: Mapping[str, str]


def percent(row: AccuracyRow) -> str:
    """ "91.25" or "90.10 ± 0.32"."""
    spread = f" ± {100 * row.accuracy_std:.2f}" if row.accuracy_std is not None and row.runs > 1 else ""
    return f"{100 * row.accuracy:.2f}{spread}"


def share(row: AccuracyRow, report: Report) -> str:
    """BitOps against the BitOps budget in per cent; empty without one, and for float, which is far beyond any."""
    limit = report.used.get("bitops", (0, 0, ""))[1]
    return f"{100 * row.bitops / limit:.1f}" if limit and row.bitops < 10 * limit else ""


def bits_text(layer: Layer, policy: Policy) -> str:
    """ "W3A4", "float"."""
    bits = policy.get(layer.path, layer.bits)
    assert bits is not None
    return "float" if bits.w > 16 else f"W{bits.w}A{bits.a}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def accuracy_markdown(report: Report) -> str:
    rows = [
        [
            row.name + (f" ({row.note})" if row.note else ""),
            percent(row),
            f"{row.loss:.4f}",
            costs.human(row.bitops, "BitOps"),
            share(row, report),
            costs.human(row.size_bytes, "bytes"),
        ]
        for row in report.accuracy
    ]
    return markdown_table(["policy", "test accuracy, %", "loss", "BitOps", "% of the budget", "size of weights"], rows)


def budgets_markdown(report: Report) -> str:
    rows = [
        [name, costs.human(used, unit), costs.human(limit, unit), f"{100 * used / limit:.2f}"]
        for name, (used, limit, unit) in report.used.items()
    ]
    return markdown_table(["budget", "used", "limit", "%"], rows)


def policy_markdown(report: Report) -> str:
    """One line a layer: parameters, MACs, bits in every policy, its share of the mixed policy's BitOps."""
    mixed, layers = report.policies["mixed"], report.importance.layers
    everything = costs.bitops(layers, mixed)
    rows = []
    for layer in layers:
        bits = layer.bits if layer.bits is not None else mixed[layer.path]
        part = 100 * costs.layer_bitops(layer, bits) / everything
        each = [bits_text(layer, policy) for policy in report.policies.values()]
        name = f"`{layer.path}`" + ("" if layer.searched else " (fixed)")
        rows.append([name, f"{layer.params:,}", f"{layer.macs:,}", *each, f"{part:.1f}"])
    return markdown_table(["layer", "weights", "MACs", *report.policies, "% of mixed BitOps"], rows)


def terminal_table(report: Report, width: int | None = None) -> str:
    """The accuracy table, achieved against asked, and the mixed policy's bits, at most `width` (60) columns wide."""
    width = max(40, min(width or 60, 100))
    name_width = min(max(len(row.name) for row in report.accuracy), width - 35)
    lines = [f"{'':{name_width}}  {'test acc, %':>14} {'BitOps':>9} {'%':>6}"]
    for row in report.accuracy:
        name = row.name if len(row.name) <= name_width else row.name[: name_width - 1] + "…"
        bitops = costs.human(row.bitops, "BitOps")
        lines.append(f"{name:{name_width}}  {percent(row):>14} {bitops:>9} {share(row, report):>6}")
    lines.append("")
    for name, (used, limit, unit) in report.used.items():
        lines.append(f"{name}: {costs.human(used, unit)} of {costs.human(limit, unit)} ({100 * used / limit:.2f} %)")
    lines.append("")
    mixed = report.policies["mixed"]
    for layer in report.importance.layers:
        text = bits_text(layer, mixed) + ("" if layer.searched else " fixed")
        path = layer.path if len(layer.path) <= width - 14 else "…" + layer.path[-(width - 15) :]
        lines.append(f"  {path:{width - 14}} {text}")
    return "\n".join(line.rstrip() for line in lines)
