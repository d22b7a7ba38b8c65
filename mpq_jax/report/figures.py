"""The figures of a report. Each function draws on a new matplotlib Figure and returns it."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mpq_jax.report.tables import Grid, Report

# Okabe and Ito's colours, told apart by colour-blind eyes.
WEIGHT, ACTIVATION, GREY = "#0072B2", "#D55E00", "#999999"
matplotlib.use("Agg")


def _width(layers: int) -> float:
    return min(max(6.5, 0.3 * layers + 2), 18)


def _layer_axis(axes: Any, paths: list[str]) -> None:
    axes.set_xticks(range(len(paths)), paths, rotation=90, fontsize=8 if len(paths) < 30 else 6)
    axes.set_xlim(-0.6, len(paths) - 0.4)


def _shades(count: int) -> list[Any]:
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def bits_per_layer(report: Report) -> Figure:
    """Weight and activation bits of the mixed policy over the network; fixed layers in grey."""
    layers = [layer for layer in report.importance.layers if layer.params]
    mixed = report.policies["mixed"]
    figure = Figure(figsize=(_width(len(layers)), 4.2), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(layers))
    chosen = [layer.bits if layer.bits is not None else mixed[layer.path] for layer in layers]
    # A layer left in float would flatten all others.
    values = np.array([[min(b.w, 10), min(b.a, 10)] for b in chosen])
    for k, (name, colour) in enumerate((("weights", WEIGHT), ("activations", ACTIVATION))):
        colours = [colour if layer.searched else GREY for layer in layers]
        axes.bar(x + (k - 0.5) * 0.4, values[:, k], 0.38, color=colours, label=name)
    handles = [matplotlib.patches.Patch(color=c) for c in (WEIGHT, ACTIVATION, GREY)]
    axes.legend(handles, ["weights", "activations", "fixed"], ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.06))
    axes.set_yticks(range(0, int(values.max()) + 1))
    axes.set(ylabel="bits", title="Bits per layer, in execution order")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _layer_axis(axes, [layer.path for layer in layers])
    return figure


def importance_maps(report: Report) -> Figure:
    """Importance by layer and bit-width, weights above activations (or the pair table's mean over each)."""
    table = report.importance
    paths = [layer.path for layer in table.layers if layer.searched]
    if table.pair is not None:
        weight, activation = table.pair.mean(2), table.pair.mean(1)
    else:
        assert table.weight is not None and table.activation is not None
        weight, activation = table.weight, table.activation
    figure = Figure(figsize=(_width(len(paths)), 5.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, values, widths, name in (
        (panels[0], weight, table.bit_widths, "weights"),
        (panels[1], activation, table.activation_bit_widths, "activations"),
    ):
        positive = values[values > 0]
        norm = LogNorm(positive.min(), positive.max()) if len(positive) and positive.min() < positive.max() else None
        floor = positive.min() if len(positive) else 0
        image = axes.imshow(np.maximum(values, floor).T, aspect="auto", norm=norm, cmap="cividis", origin="lower")
        axes.set_yticks(range(len(widths)), [str(b) for b in widths])
        axes.set(ylabel=f"{name}, bits")
        figure.colorbar(image, ax=axes, label="importance", pad=0.01)
    panels[0].set_title("Importance by layer and bit-width (log colours)")
    _layer_axis(panels[1], paths)
    return figure


def weight_grids(report: Report) -> Figure:
    """The paper's figure 1: histograms of two layers at the same width, their grids, and how many weights each level has."""
    grids = list(report.grids)
    figure = Figure(figsize=(10, 3.2 * len(grids)), layout="constrained")
    panels = figure.subplots(len(grids), 2, squeeze=False)
    for (left, right), grid in zip(panels, grids, strict=True):
        left.hist(grid.values, bins=80, color=WEIGHT)
        levels, counts = code_counts(grid)
        for level in levels:
            left.axvline(level * grid.step_size, color=ACTIVATION, linewidth=0.8)
        left.set(title=f"{grid.path}: {grid.values.size:,} weights", xlabel="weight (lines: the grid)", ylabel="count")
        right.bar(levels, counts, color=WEIGHT)
        right.set(
            title=f"values on each level at {grid.bits} bits, step size {grid.step_size:.4g}",
            xlabel="integer code",
            ylabel="count",
        )
    return figure


def code_counts(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """(levels, counts): every level of the signed grid, and how many weights are on it."""
    levels = np.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1))
    return levels, np.array([(grid.codes == level).sum() for level in levels])


def depthwise_against_pointwise(report: Report) -> Figure:
    """The paper's figure 2: learned step sizes of each depthwise layer and the pointwise one behind it."""
    table, pairs = _indicators(report), report.depthwise_pairs
    rows = {layer.path: row for row, layer in enumerate(ly for ly in report.importance.layers if ly.searched)}
    widths = report.importance.bit_widths
    chosen = sorted({0, len(widths) // 2})
    figure = Figure(figsize=(max(6.5, 0.5 * len(pairs) + 3), 3.2 * len(chosen)), layout="constrained")
    x = np.arange(len(pairs))
    for axes, k in zip(figure.subplots(len(chosen), 1, squeeze=False)[:, 0], chosen, strict=True):
        for side, (name, colour) in enumerate((("depthwise", WEIGHT), ("pointwise", ACTIVATION))):
            values = [table["weight"][rows[pair[side]], k] for pair in pairs]
            axes.bar(x + (side - 0.5) * 0.4, values, 0.38, color=colour, label=name)
        axes.set(ylabel="weight step size", title=f"Depthwise against pointwise, {widths[k]} bits", xlabel="pair")
        axes.set_xticks(x, [str(i + 1) for i in x])
        axes.legend()
    return figure


def all_indicators(report: Report) -> Figure:
    """The paper's figure 4: every indicator over the layers, a line a bit-width; dashed where it started."""
    table = _indicators(report)
    paths = [layer.path for layer in report.importance.layers if layer.searched]
    figure = Figure(figsize=(_width(len(paths)), 6.4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, kind in zip(panels, ("weight", "activation"), strict=True):
        widths = report.importance.bit_widths if kind == "weight" else report.importance.activation_bit_widths
        for k, (bits, shade) in enumerate(zip(widths, _shades(len(widths)), strict=True)):
            axes.plot(table[kind][:, k], color=shade, marker="o", markersize=3, label=f"{bits} bits")
            if report.initial is not None:
                axes.plot(np.asarray(report.initial[kind])[:, k], color=shade, linestyle="--", linewidth=0.8)
        axes.set_yscale("log")
        axes.set(ylabel=f"{kind} step size")
        axes.grid(alpha=0.3)
    panels[0].legend(ncols=len(report.importance.bit_widths), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    panels[0].set_title("All indicators" + (" (dashed: where they started)" if report.initial is not None else ""))
    _layer_axis(panels[1], paths)
    return figure


def _indicators(report: Report) -> Mapping[str, np.ndarray]:
    source: Any = report.indicators or {"weight": report.importance.weight, "activation": report.importance.activation}
    return {kind: np.asarray(source[kind], float) for kind in ("weight", "activation")}
