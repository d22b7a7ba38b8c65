"""What a report holds, and its tables."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax import costs, policy
from mpq_jax.report.curves import Curve
from mpq_jax.types import Bits, Importance, Layer, Policy


class AccuracyRow(NamedTuple):
    """One line of the accuracy table: the mean over `runs` policies, measured on the test set.

    accuracy: top-1, 0 to 1, or None where the task calls nothing right; accuracy_std: the standard deviation over the policies, where there are several.
    bitops: for one sample; size_bytes: of all packed kernels.
    """

    name: str
    accuracy: float | None
    accuracy_std: float | None
    runs: int
    loss: float
    bitops: int
    size_bytes: int
    note: str = ""


class WeightGrid(NamedTuple):
    """A layer's float weights [N] and their integer codes [N] at one width: what figure 1 shows.

    A code stands for step_size * (code + offset).
    """

    path: str
    bits: int
    step_size: float
    values: np.ndarray
    codes: np.ndarray
    offset: float = 0.0


class Report(NamedTuple):
    """Everything a report shows.

    policies: name -> policy; "mixed" is the chosen one. used: budget name -> (used by "mixed", limit, unit).
    grids: layers at the same width, for figure 1.
    indicators, initial: {"weight": [L, K], "activation": [L, K]} at the end and at the start of joint training;
    without them the importance table takes their place.
    outliers: (path, kind, bits) that isotonic regression moved. depthwise_pairs: (depthwise, pointwise) paths.
    config: the run's settings, nested. test_samples: that the accuracies were measured on.
    solution: "objective", "bound", "status" and "solver" of the search, as policy.json has them.
    curve: the frontier; where there is none, no_curve says why.
    accuracy may be empty: then nothing was measured, and the page shows what the importance predicts.
    """

    title: str
    importance: Importance
    policies: Mapping[str, Policy]
    used: Mapping[str, tuple[Any, Any, str]]
    accuracy: Sequence[AccuracyRow]
    grids: Sequence[WeightGrid]
    depthwise_pairs: Sequence[tuple[str, str]]
    indicators: Mapping[str, Any] | None
    initial: Mapping[str, Any] | None
    outliers: Sequence[tuple[str, str, int]]
    provenance: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    test_samples: int | None = None
    solution: Mapping[str, Any] | None = None
    curve: Curve | None = None
    no_curve: str = "The frontier was not asked for."


# ---- what the tables and the figures share -------------------------------------------------------------------------


def searched_layers(report: Report) -> list[Layer]:
    """The layers that the importance table has rows for, in its order."""
    return [layer for layer in report.importance.layers if layer.searched]


def searched_pairs(report: Report) -> list[tuple[str, str]]:
    """The depthwise and pointwise pairs of which both layers are searched: the others have no indicators."""
    searched = {layer.path for layer in searched_layers(report)}
    return [(a, b) for a, b in report.depthwise_pairs if a in searched and b in searched]


def chosen_bits(layer: Layer, chosen: Policy) -> Bits:
    """A layer's bits in a policy; a fixed layer's are its own."""
    return layer.bits if layer.bits is not None else chosen[layer.path]


def bits_text(bits: Bits) -> str:
    """ "W3A4", "float"; "W2.50A4" for a mean over output channels."""
    return "float" if policy.mean_weight_bits(bits) > 16 else policy.text(bits)


def importance_table(report: Report, kind: str) -> np.ndarray:
    """[L, K] of "weight" or "activation"; of a pair table, the mean over the other's bit-widths."""
    table = report.importance
    if table.pair is not None:
        return np.asarray(table.pair, float).mean(2 if kind == "weight" else 1)
    return np.asarray(table.weight if kind == "weight" else table.activation, float)


def percent(row: AccuracyRow) -> str:
    """ "91.25" or "90.10 ± 0.32"."""
    spread = f" ± {100 * row.accuracy_std:.2f}" if row.accuracy_std is not None and row.runs > 1 else ""
    return "–" if row.accuracy is None else f"{100 * row.accuracy:.2f}{spread}"


def share(row: AccuracyRow, report: Report) -> str:
    """What a row costs of the first budget that it can be held against (BitOps or size), in per cent; "" without one."""
    for name, (_, limit, _) in report.used.items():
        cost = {"bitops": row.bitops, "size": row.size_bytes}.get(name)
        if cost is not None and limit:
            return f"{100 * cost / limit:.1f}"
    return ""


def share_name(report: Report) -> str:
    """What `share` is of: "bitops", "size", or "" where there is no such budget."""
    return next((name for name, (_, limit, _) in report.used.items() if name in ("bitops", "size") and limit), "")


# ---- Markdown ------------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "--:") -> str:
    """A Markdown table. align: of all columns but the first; bars and line ends in a cell would break its row."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def accuracy_markdown(report: Report) -> str:
    """One line a row of the comparison: accuracy, loss, BitOps, share of the budget, size."""
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
    of = f"% of the {share_name(report)} budget" if share_name(report) else "% of a budget"
    return markdown_table(["policy", "test accuracy, %", "loss", "BitOps", of, "size of weights"], rows)


def budgets_markdown(report: Report) -> str:
    """Achieved against asked for each budget: rounded for people, and exact."""
    rows = [
        [name, costs.human(used, unit), costs.human(limit, unit), f"{100 * used / limit:.2f}", f"{used:,} of {limit:,}"]
        for name, (used, limit, unit) in report.used.items()
    ]
    return markdown_table(["budget", "used", "limit", "% used", "exactly"], rows)


def policy_markdown(report: Report) -> str:
    """One line a layer: parameters, MACs, bits in every policy, its share of the mixed policy's BitOps."""
    mixed, layers = report.policies["mixed"], report.importance.layers
    everything = costs.bitops(layers, mixed)
    rows = []
    for layer in layers:
        part = 100 * costs.layer_bitops(layer, chosen_bits(layer, mixed)) / everything if everything else 0.0
        each = [bits_text(chosen_bits(layer, chosen)) for chosen in report.policies.values()]
        name = f"`{layer.path}`" + ("" if layer.searched else " (fixed)")
        rows.append([name, f"{layer.params:,}", f"{layer.macs:,}", *each, f"{part:.1f}"])
    return markdown_table(["layer", "weights", "MACs", *report.policies, "% of mixed BitOps"], rows)


# ---- the terminal --------------------------------------------------------------------------------------------------


def terminal_table(report: Report, width: int | None = None) -> str:
    """The accuracy table, achieved against asked, and the mixed policy's bits, as plain text.

    width: columns, at least 40; None for the terminal's own, 60 where there is no terminal. What does not fit is left
    out in the order loss, size; then names are cut.
    """
    width = max(40, min(width or shutil.get_terminal_size((60, 24)).columns, 100))
    lines = [*_accuracy_lines(report, width), ""]
    for name, (used, limit, unit) in report.used.items():
        lines.append(f"{name}: {costs.human(used, unit)} of {costs.human(limit, unit)} ({100 * used / limit:.2f} %)")
    mixed, layers = report.policies["mixed"], report.importance.layers
    texts = [bits_text(chosen_bits(layer, mixed)) + ("" if layer.searched else " fixed") for layer in layers]
    room = min(width - 4 - max(map(len, texts), default=0), max((len(layer.path) for layer in layers), default=0))
    lines += [*([""] if report.used else []), "bits of the mixed policy:"]
    for layer, text in zip(layers, texts, strict=True):
        # The end of a path tells more than its beginning.
        path = layer.path if len(layer.path) <= room else "…" + layer.path[len(layer.path) - room + 1 :]
        lines.append(f"  {path:{room}}  {text}")
    return "\n".join(line.rstrip() for line in lines)


def _accuracy_lines(report: Report, width: int) -> list[str]:
    """The accuracy table in at most `width` columns."""
    of = share_name(report)
    columns: dict[str, list[str]] = {
        "policy": [row.name for row in report.accuracy],
        "accuracy": ["test acc, %", *(percent(row) for row in report.accuracy)],
        "loss": ["loss", *(f"{row.loss:.4f}" for row in report.accuracy)],
        "bitops": ["BitOps", *(costs.human(row.bitops, "BitOps") for row in report.accuracy)],
        "share": [f"% {of}" if of == "size" else "%", *(share(row, report) for row in report.accuracy)],
        "size": ["size", *(costs.human(row.size_bytes, "bytes") for row in report.accuracy)],
    }
    if not of:
        del columns["share"]
    names = columns.pop("policy")
    longest = max(map(len, names), default=0)
    for dropped in ("loss", "size", None):
        used = sum(1 + max(map(len, cells)) for cells in columns.values())
        if dropped is None or longest + used <= width:
            break
        del columns[dropped]
    room = min(longest, width - used)
    shown = ["", *(name if len(name) <= room else name[: room - 1] + "…" for name in names)]
    right = [[f"{cell:>{max(map(len, cells))}}" for cell in cells] for cells in columns.values()]
    return [" ".join([f"{name:{room}}", *cells]) for name, *cells in zip(shown, *right, strict=True)]
