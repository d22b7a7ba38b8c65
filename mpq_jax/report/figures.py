"""The figures of a report. Each function draws on a new matplotlib Figure and returns it.

A Figure made here belongs to no window: it is drawn by Agg, and the caller's own backend stays as it is. matplotlib is
imported inside the functions, since the terminal table needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_jax.policy import mean_weight_bits
from mpq_jax.report.scales import FLOAT
from mpq_jax.report.tables import Report, WeightGrid, chosen_bits, importance_table, searched_layers, searched_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind eyes; greys of two lightnesses for fixed layers.
WEIGHT, ACTIVATION = "#0072B2", "#D55E00"
FIXED_WEIGHT, FIXED_ACTIVATION = "#777777", "#BBBBBB"
LABELS_UP_TO = 16  # levels whose counts are written above the bars
LONGEST = 40  # characters of a path beside an axis; the tables have all of it


def _figure(layers: int, height: float, per_layer: float = 0.3) -> Figure:
    """A figure as wide as `layers` need, between 6.5 and 18 inches, that belongs to Agg alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(max(6.5, per_layer * layers + 2), 18), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(path: str) -> str:
    """A layer's name as matplotlib shows it: "$" would begin a formula."""
    return path.replace("$", r"\$")


def _layer_axis(axes: Any, paths: Sequence[str], margin: float = 0.5) -> None:
    """Names the layers below `axes`, and makes its figure higher where names are long: panels keep their height."""
    labels = [path if len(path) <= LONGEST else "…" + path[1 - LONGEST :] for path in paths]
    axes.set_xticks(
        range(len(paths)), [_plain(label) for label in labels], rotation=90, fontsize=8 if len(paths) < 30 else 7
    )
    figure = axes.get_figure()
    figure.set_figheight(figure.get_figheight() + 0.07 * max(0, max(map(len, labels), default=0) - 16))
    axes.set_xlim(-margin, len(paths) - 1 + margin)
    axes.set_xlabel("layer, in execution order")


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the panels, where it covers nothing."""
    figure.legend(handles, labels, ncols=min(len(labels), 6), loc="outside lower center", fontsize=8)


def _patches(colours: Sequence[str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour) for colour in colours]


def bits_per_layer(report: Report) -> Figure:
    """Weight and activation bits of the mixed policy over the network; fixed layers in grey, float ones at the top.

    Of bits per output channel the mean.
    """
    layers = report.importance.layers
    chosen = [chosen_bits(layer, report.policies["mixed"]) for layer in layers]
    bits = np.array([(mean_weight_bits(each), each.a) for each in chosen])
    top = int(max(bits[bits <= FLOAT], default=0)) + 1
    heights = np.where(bits > FLOAT, top, bits)
    figure = _figure(len(layers), 4.6)
    axes = figure.subplots()
    for k, (free, fixed) in enumerate(((WEIGHT, FIXED_WEIGHT), (ACTIVATION, FIXED_ACTIVATION))):
        colours = [free if layer.searched else fixed for layer in layers]
        axes.bar(np.arange(len(layers)) + (k - 0.5) * 0.4, heights[:, k], 0.38, color=colours)
    if (bits > FLOAT).any():
        axes.set_yticks(range(top + 1), [*map(str, range(top)), "float"])
    else:
        axes.set_yticks(range(top))
    axes.set(ylabel="bit-width, bits", title="Bits per layer of the mixed policy")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _layer_axis(axes, [layer.path for layer in layers], margin=0.6)
    names = {WEIGHT: "weights", ACTIVATION: "activations"}
    if not all(layer.searched for layer in layers):
        names |= {FIXED_WEIGHT: "weights, fixed", FIXED_ACTIVATION: "activations, fixed"}
    _legend(figure, _patches(list(names)), list(names.values()))
    return figure


def importance_maps(report: Report) -> Figure:
    """Importance by layer and bit-width, weights above activations (or the pair table's mean over the other)."""
    from matplotlib.colors import LogNorm

    table = report.importance
    paths = [layer.path for layer in searched_layers(report)]
    figure = _figure(len(paths), 6)
    panels = figure.subplots(2, 1, sharex=True)
    widths_of = {"weight": table.bit_widths, "activation": table.activation_bit_widths}
    for axes, (kind, widths) in zip(panels, widths_of.items(), strict=True):
        values = importance_table(report, kind)
        positive = values[values > 0]
        floor = positive.min() if len(positive) else 0.0
        # One value alone spans no logarithmic range.
        norm = LogNorm(floor, positive.max()) if len(positive) and floor < positive.max() else None
        image = axes.imshow(np.maximum(values, floor).T, aspect="auto", norm=norm, cmap="cividis", origin="lower")
        axes.set_yticks(range(len(widths)), [str(b) for b in widths])
        axes.set(ylabel=f"{kind} bit-width, bits", title=f"{kind} importance" if axes is not panels[0] else None)
        figure.colorbar(image, ax=axes, label="importance", pad=0.01)
    panels[0].set_title("Importance by layer and bit-width (colours on a log scale)\nweight importance")
    _layer_axis(panels[1], paths)
    return figure


def weight_grids(report: Report) -> Figure:
    """The paper's figure 1: histograms of two layers at the same width, their grids, and the values on each level."""
    figure = _figure(0, 3.6 * len(report.grids))
    figure.set_figwidth(11)
    panels = figure.subplots(len(report.grids), 2, squeeze=False)
    for (left, right), grid in zip(panels, report.grids, strict=True):
        levels, counts = code_counts(grid)
        left.hist(grid.values, bins=80, color=WEIGHT)
        for level in levels:
            left.axvline(
                (level + grid.offset) * grid.step_size, color=ACTIVATION, linewidth=0.8 if len(levels) < 40 else 0.3
            )
        left.set(
            title=f"{_plain(grid.path)}: {np.size(grid.values):,} weights, {grid.bits} bits",
            xlabel=f"float weight (lines: the grid, step size {grid.step_size:.3g})",
            ylabel="number of weights",
        )
        bars = right.bar(levels, counts, color=WEIGHT)
        if len(levels) <= LABELS_UP_TO:
            right.bar_label(bars, [f"{count:,}" for count in counts], fontsize=7, rotation=90, padding=2)
            right.set_xticks(levels)
            right.margins(y=0.25)  # room for the numbers
        right.set(title="Weights mapped to each level", xlabel="integer code", ylabel="number of weights")
    return figure


def code_counts(grid: WeightGrid) -> tuple[np.ndarray, np.ndarray]:
    """(levels, counts): every level of the signed grid, and how many weights are on it."""
    found, counts = np.unique(grid.codes, return_counts=True)
    low = min(-(2 ** (grid.bits - 1)), *found.tolist())
    high = max(2 ** (grid.bits - 1) - 1, *found.tolist())
    levels = np.arange(low, high + 1)
    on_level = dict(zip(found.tolist(), counts.tolist(), strict=True))
    return levels, np.array([on_level.get(level, 0) for level in levels.tolist()])


def depthwise_against_pointwise(report: Report) -> Figure:
    """The paper's figure 2: learned step sizes of each depthwise layer and of the pointwise one behind it."""
    pairs = searched_pairs(report)
    table, name = _indicators(report, "weight")
    rows = {layer.path: row for row, layer in enumerate(searched_layers(report))}
    widths = report.importance.bit_widths
    shown = sorted({0, len(widths) // 2, len(widths) - 1})
    figure = _figure(len(pairs), 2.6 * len(shown) + 0.6, per_layer=0.45)
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    x = np.arange(len(pairs))
    for axes, k in zip(panels, shown, strict=True):
        for side, colour in enumerate((WEIGHT, ACTIVATION)):
            axes.bar(x + (side - 0.5) * 0.4, [table[rows[pair[side]], k] for pair in pairs], 0.38, color=colour)
        axes.set(ylabel=name, title=f"Depthwise against pointwise at {widths[k]} bits")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[-1].set_xticks(x, [str(i + 1) for i in x])
    panels[-1].set_xlim(-0.6, len(pairs) - 0.4)
    panels[-1].set_xlabel("pair, in execution order (named under the figure)")
    _legend(figure, _patches([WEIGHT, ACTIVATION]), ["depthwise", "pointwise"])
    return figure


def all_indicators(report: Report) -> Figure:
    """The paper's figure 4: every indicator over the layers, a line a bit-width; dashed where it started."""
    import matplotlib

    paths = [layer.path for layer in searched_layers(report)]
    figure = _figure(len(paths), 7)
    panels = figure.subplots(2, 1, sharex=True)
    widths_of = {"weight": report.importance.bit_widths, "activation": report.importance.activation_bit_widths}
    everything = sorted(set(widths_of["weight"]) | set(widths_of["activation"]))
    shades = dict(zip(everything, matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(everything))), strict=True))
    lines: dict[int, Any] = {}
    for axes, (kind, widths) in zip(panels, widths_of.items(), strict=True):
        values, name = _indicators(report, kind)
        start = None if report.initial is None else np.asarray(report.initial[kind], float)
        for k, bits in enumerate(widths):
            (lines[bits],) = axes.plot(values[:, k], color=shades[bits], marker="o", markersize=3)
            if start is not None:
                # The marker is for a lone layer, which has no line.
                axes.plot(start[:, k], color=shades[bits], linestyle="--", linewidth=0.8, marker="x", markersize=3)
        if (values > 0).all():
            axes.set_yscale("log")
        axes.set(ylabel=name, title=f"{kind}s")
        axes.grid(alpha=0.3)
    started = " (dashed, crosses: where they started)" if report.initial is not None else ""
    figure.suptitle(f"All indicators{started}")
    _layer_axis(panels[1], paths)
    _legend(figure, [lines[bits] for bits in everything], [f"{bits} bits" for bits in everything])
    return figure


def _indicators(report: Report, kind: str) -> tuple[np.ndarray, str]:
    """([L, K], the axis label): the learned step sizes, or the importance table where there are none."""
    if report.indicators is None:
        return importance_table(report, kind), f"{kind} importance"
    unit = "weight units" if kind == "weight" else "activation units"
    return np.asarray(report.indicators[kind], float), f"step size, {unit}"
