"""Where the marks stand of a page's plots over the layers: bits, and the heat map of importance.

Across in per cent of the plot's width, down in pixels: so plots fit any width. charts.html turns them into SVG.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpq_jax.policy import mean_weight_bits
from mpq_jax.report import words
from mpq_jax.report.scales import FLOAT, Scale, Tick, colour, finite
from mpq_jax.report.tables import Report, bits_text, chosen_bits, importance_table, searched_layers
from mpq_jax.types import Bits, Layer

GUTTER = 46  # px: left of a plot, for the bits; page.css has it too
HEAD, PANEL, CELL = 22, 112, 20  # px: a panel's title, the height of its bars, of a cell of the heat map
NARROW, WIDE, LETTER = 326, 986, 7.2  # px: the width of a plot on a phone and on a desk, of a letter of a label
MOST_BANDS = 40


class Band(NamedTuple):
    """Neighbours whose paths begin alike. shown: "" always, "wide" on a desk only, "never"."""

    x: float
    width: float
    text: str
    shown: str


class Layers(NamedTuple):
    """The axis of layers in execution order: numbers below, bands of names under them."""

    numbers: tuple[Tick, ...]
    bands: tuple[Band, ...]


class Bar(NamedTuple):
    """A rectangle, in percent of the chart across and in its own units down."""

    x: float
    width: float
    y: float
    height: float


class Column(NamedTuple):
    """One layer. title: lines for the tip. bars: of weights, of activations."""

    x: float
    width: float
    title: str
    searched: bool
    bars: tuple[Bar, ...]


class Panel(NamedTuple):
    """The part of a chart between two heights, with the ticks of its own axis."""

    name: str
    top: float
    bottom: float
    ticks: tuple[Tick, ...]


class BitsChart(NamedTuple):
    """others: contestant -> a level line for each bar of each searched layer, where its bits are."""

    height: float
    panels: tuple[Panel, ...]
    columns: tuple[Column, ...]
    others: dict[str, tuple[Bar, ...]]
    axis: Layers


class Cell(NamedTuple):
    """colour: None where the layer has no such number. chosen: the mixed policy's bits. row, column: for arrow keys."""

    x: float
    width: float
    y: float
    colour: str | None
    chosen: bool
    row: int
    column: int
    title: str


class HeatPanel(NamedTuple):
    """The heat map of one kind, between two heights. legend: the texts under
    its colour bar, from least to most. note: what else is to be known."""

    name: str
    top: float
    bottom: float
    ticks: tuple[Tick, ...]
    legend: tuple[str, ...]
    note: str


class HeatMap(NamedTuple):
    """dot: the radius of the marks of what was chosen, px."""

    height: float
    panels: tuple[HeatPanel, ...]
    cells: tuple[Cell, ...]
    axis: Layers
    dot: int


# ---- the axis of layers --------------------------------------------------------------------------------------------


def layer_axis(layers: Sequence[Layer]) -> Layers:
    """The axis of layers: numbers, thinned out where there are many, and bands of layers whose paths begin alike."""
    count = len(layers)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count / step <= 12 or step == count)
    shown = [1, *range(step, count + 1, step)] if step > 1 else range(1, count + 1)
    numbers = tuple(Tick(100 * (n - 0.5) / count, str(n)) for n in dict.fromkeys(shown))
    return Layers(numbers, tuple(_band(name, group, count) for name, group in _bands(layers)))


def _bands(layers: Sequence[Layer]) -> list[tuple[str, list[int]]]:
    """(name, neighbours whose paths begin alike): at the first depth at which none of them holds most of the layers.

    None at all where that makes more bands than can be told apart.
    """
    found: list[tuple[str, list[int]]] = []
    for depth in range(1, 8):
        starts = [layer.path.split("/")[:depth] for layer in layers]
        groups = [list(group) for _, group in itertools.groupby(range(len(layers)), starts.__getitem__)]
        if len(groups) > MOST_BANDS:
            break
        found = [(starts[group[0]][-1], group) for group in groups]
        if max(map(len, groups)) <= max(2, len(layers) / 2):
            break
    return found


def _band(name: str, group: Sequence[int], count: int) -> Band:
    width, needed = len(group) / count, len(name) * LETTER + 8
    least, most = plot_width(count)
    narrow, wide = (width * (max(least, min(room, most)) - GUTTER) for room in (NARROW, WIDE))
    shown = "" if needed <= narrow else "wide" if needed <= wide else "never"
    return Band(100 * group[0] / count, 100 * width, name, shown)


def plot_width(layers: int) -> tuple[int, int]:
    """(least, most) px of a plot over layers, its gutter included: 150 of them stay apart, one does not fill the page."""
    return GUTTER + max(160, 4 * layers), GUTTER + max(200, 80 * layers)


# ---- bits ----------------------------------------------------------------------------------------------------------


def bits_chart(report: Report) -> BitsChart:
    """Weight and activation bits of the mixed policy as bars, of the others as lines; of bits per channel the mean."""
    layers = report.importance.layers
    everyone = {name: [chosen_bits(layer, chosen) for layer in layers] for name, chosen in report.policies.items()}
    mixed = everyone.pop("mixed")
    known = [w for bits in (mixed, *everyone.values()) for each in bits for w in _widths(each) if w <= FLOAT]
    top = max(math.ceil(max(known, default=1)), 2)
    has_float = any(w > FLOAT for bits in (mixed, *everyone.values()) for each in bits for w in _widths(each))
    rows = top + 1 if has_float else top
    panels = tuple(_bits_panel(k, name, top, rows) for k, name in enumerate(("weights", "activations")))
    columns = []
    for i, (layer, bits) in enumerate(zip(layers, mixed, strict=True)):
        bars = tuple(
            _bar(i, len(layers), width, rows, panel) for width, panel in zip(_widths(bits), panels, strict=True)
        )
        title = _bits_title(i, layer, {"mixed": bits} | {name: each[i] for name, each in everyone.items()})
        columns.append(Column(100 * i / len(layers), 100 / len(layers), title, layer.searched, bars))
    others = {
        name: tuple(
            _bar(i, len(layers), width, rows, panel)
            for i, each in enumerate(bits)
            if layers[i].searched
            for width, panel in zip(_widths(each), panels, strict=True)
        )
        for name, bits in everyone.items()
    }
    return BitsChart(panels[-1].bottom + 44, panels, tuple(columns), others, layer_axis(layers))


def _widths(bits: Bits) -> tuple[float, float]:
    return mean_weight_bits(bits), bits.a


def _bits_panel(k: int, name: str, top: int, rows: int) -> Panel:
    start = k * (HEAD + PANEL + 10) + HEAD
    step = 1 if top <= 4 else 2 if top <= 8 else 4
    marks = [Tick(start + PANEL * (1 - b / rows), str(b)) for b in range(0, top + 1, step)]
    if rows > top:
        marks.append(Tick(start, "float"))
    return Panel(name, start, start + PANEL, tuple(marks))


def _bar(i: int, count: int, bits: float, rows: int, panel: Panel) -> Bar:
    height = PANEL * min(bits if bits <= FLOAT else rows, rows) / rows
    slot = 100 / count
    filled = 0.72 if count <= 60 else 0.9
    return Bar(slot * (i + (1 - filled) / 2), slot * filled, panel.bottom - height, height)


def _bits_title(i: int, layer: Layer, bits: dict[str, Bits]) -> str:
    if not layer.searched:
        return f"{i + 1}  {layer.path}\n{bits_text(bits['mixed'])}, fixed"
    return "\n".join([f"{i + 1}  {layer.path}", *(f"{name}: {bits_text(each)}" for name, each in bits.items())])


# ---- importance ----------------------------------------------------------------------------------------------------


def offered(report: Report, layer: Layer, kind: str) -> tuple[int, ...]:
    """The widths that a layer may have."""
    table = report.importance
    return layer.candidates(kind, table.bit_widths if kind == "weight" else table.activation_bit_widths)


def heat_map(report: Report) -> HeatMap:
    """Importance of every searched layer at every bit-width, in the columns of the bits chart; chosen cells ringed."""
    table = report.importance
    panels: list[HeatPanel] = []
    cells: list[Cell] = []
    top, rows = float(HEAD), 0
    for kind, widths in (("weight", table.bit_widths), ("activation", table.activation_bit_widths)):
        values = importance_table(report, kind)
        # Of what may be chosen only: what may not has no meaning of its own.
        known = [
            value
            for layer, row in zip(searched_layers(report), values.tolist(), strict=True)
            for b, value in zip(widths, row, strict=True)
            if b in offered(report, layer, kind)
        ]
        scale = _heat_scale(finite(known))
        rising = sorted(widths, reverse=True)  # more bits upward, as in the bars
        y_of = {b: top + CELL * k for k, b in enumerate(rising)}
        cells += _cells(report, kind, widths, values, scale, y_of, rows)
        marks = tuple(Tick(y_of[b] + CELL / 2, str(b)) for b in rising)
        bottom = top + CELL * len(widths)
        panels.append(HeatPanel(f"{kind}s", top, bottom, marks, *_legend(scale, finite(known))))
        top, rows = bottom + HEAD + 10, rows + len(widths)
    dot = 4 if len(table.layers) <= 24 else 3 if len(table.layers) <= 60 else 2
    return HeatMap(panels[-1].bottom + 44, tuple(panels), tuple(cells), layer_axis(table.layers), dot)


def _heat_scale(known: Sequence[float]) -> Scale | None:
    """Logarithmic over the positive values where they span a factor of five; None where all are alike or none is known."""
    positive = [value for value in known if value > 0]
    if len(set(known)) < 2:
        return None
    if len(set(positive)) > 1 and max(positive) >= 5 * min(positive):
        return Scale(min(positive), max(positive), True)
    return Scale(min(known), max(known), False)


def _legend(scale: Scale | None, known: Sequence[float]) -> tuple[tuple[str, ...], str]:
    """(texts under the colour bar from least to most, what else is to be known)."""
    if scale is None:
        return (words.number(known[0]),) if known else (), "all alike" if known else "no finite number"
    shown = tuple(words.number(scale.back(share), 3) for share in (0, 0.5, 1))
    below = sum(value < scale.low for value in known)
    note = "log scale" if scale.log else "linear scale"
    return shown, note + (f"; {below} at or below 0, in the darkest colour" if below else "")


def _cells(
    report: Report,
    kind: str,
    widths: Sequence[int],
    values: np.ndarray,
    scale: Scale | None,
    y_of: Mapping[int, float],
    first_row: int,
) -> Iterator[Cell]:
    layers, row = report.importance.layers, -1
    falling = sorted(widths, reverse=True)
    for i, layer in enumerate(layers):
        if not layer.searched:
            continue
        row += 1
        mine = chosen_bits(layer, report.policies["mixed"])
        each = mine.a if kind == "activation" else mine.w
        for k, b in enumerate(widths):
            value, may = float(values[row, k]), b in offered(report, layer, kind)
            chosen = b in each if isinstance(each, Sequence) else b == each
            text = f"importance {words.number(value)}" if may else "not offered to this layer"
            yield Cell(
                x=100 * i / len(layers),
                width=100 / len(layers),
                y=y_of[b],
                colour=_fill(value, scale) if may else None,
                chosen=chosen,
                row=first_row + falling.index(b),
                column=i,
                title=f"{i + 1}  {layer.path}\n{kind}s at {b} bits{', chosen' if chosen else ''}\n{text}",
            )


def _fill(value: float, scale: Scale | None) -> str | None:
    if not math.isfinite(value):
        return None
    return colour(0.5 if scale is None else scale.at(max(value, scale.low)))
