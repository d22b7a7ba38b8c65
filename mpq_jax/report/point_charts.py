"""Where the marks stand of a page's frontier and of its accuracies. Across in per cent, down in pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mpq_jax import costs
from mpq_jax.report import words
from mpq_jax.report.curves import CurvePoint
from mpq_jax.report.scales import Tick, scale_of, ticks
from mpq_jax.report.tables import Report

CHART = 300  # px: the frontier's height
ROW = 32  # px: a contestant's


class Mark(NamedTuple):
    """A point of the frontier. kind: "best", "open" (not proven), "equal" and "uniform" (widths alike or not), "chosen"."""

    x: float
    y: float
    kind: str
    title: str
    label: str = ""


class FrontierChart(NamedTuple):
    """steps: a path in a square of 1000. bounds: what was proven, where it is less than what was found."""

    height: float
    marks: tuple[Mark, ...]
    steps: str
    bounds: tuple[Mark, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    limit: float | None


class Line(NamedTuple):
    """A row of the accuracy plot: a dot, and a whisker where there is a spread."""

    name: str
    y: float
    x: float | None
    low: float | None
    high: float | None
    text: str
    chosen: bool
    title: str


class AccuracyChart(NamedTuple):
    """Test accuracy of each contestant, a line each; across: the axis of accuracies."""

    height: float
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]


# ---- the frontier --------------------------------------------------------------------------------------------------


def frontier_chart(report: Report) -> FrontierChart:
    """Objective against cost of best, uniform and chosen policies; each axis logarithmic where its values allow it."""
    curve = report.curve
    assert curve is not None
    points = [*curve.best, *curve.uniform, *([curve.chosen] if curve.chosen else [])]
    points = [point for point in points if math.isfinite(point.cost) and math.isfinite(point.objective)]
    x = scale_of([point.cost for point in points], ratio=2, margin=0.05)
    y = scale_of([point.objective for point in points], ratio=10, margin=0.06)

    def place(cost: float, value: float) -> tuple[float, float]:
        return 100 * x.at(cost), CHART * (1 - y.at(value))

    marks, bounds = [], []
    for point in points:
        across, down = place(point.cost, point.objective)
        kind = "chosen" if point is curve.chosen else _kind(point.name, point.proven)
        label = point.name if kind in ("chosen", "equal") else ""
        marks.append(Mark(across, down, kind, _point_title(point.name, kind, point, curve.unit), label))
        bound = point.bound
        if kind == "open" and bound is not None and math.isfinite(bound) and (bound > 0 or not y.log):
            bounds.append(Mark(across, min(place(point.cost, bound)[1], CHART), "bound", ""))
    marks.sort(key=lambda mark: (mark.kind == "chosen", mark.x))  # the chosen one lies above the others
    limit = 100 * x.at(curve.limit) if x.low <= curve.limit <= x.high else None
    return FrontierChart(
        CHART + 26,
        tuple(marks),
        _steps([mark for mark in marks if mark.kind in ("best", "open")]),
        tuple(bounds),
        tuple(Tick(100 * x.at(value), words.tick(value, curve.unit)) for value in ticks(x, 5)),
        tuple(Tick(CHART * (1 - y.at(value)), words.number(value, 3)) for value in ticks(y, 7)),
        limit,
    )


def _kind(name: str, proven: bool) -> str:
    if not name:
        return "best" if proven else "open"
    w, _, a = name[1:].partition("A")
    return "equal" if w == a else "uniform"


def _point_title(name: str, kind: str, point: CurvePoint, unit: str) -> str:
    what = {
        "best": "best policy of this cost, proven",
        "open": "best policy found, not proven",
        "chosen": "mixed, chosen",
    }
    spent = words.cost(point.cost, unit)
    return f"{what.get(kind, f'uniform {name}')}\n{spent}\nimportance {words.number(point.objective)}"


def _steps(marks: Sequence[Mark]) -> str:
    """A path in a square of 1000: what is best at a cost stays so until a dearer policy is better."""
    if not marks:
        return ""
    places = [(10 * mark.x, 1000 * mark.y / CHART) for mark in marks]
    path = [f"M{places[0][0]:.2f} {places[0][1]:.2f}"]
    for across, down in places[1:]:
        path.append(f"H{across:.2f}V{down:.2f}")
    return "".join(path)


# ---- accuracy ------------------------------------------------------------------------------------------------------


def accuracy_chart(report: Report) -> AccuracyChart:
    """One row a contestant, in the order of the table; the axis holds all dots and whiskers."""
    ends = []
    for row in report.accuracy:
        reach = words.spread_of(row) or 0.0
        ends += [100 * (words.right(row) - reach), 100 * (words.right(row) + reach)]
    scale = scale_of(ends, margin=0.1)
    lines = []
    for k, row in enumerate(report.accuracy):
        spread, known = words.spread_of(row), math.isfinite(words.right(row))
        low: float | None = None
        high: float | None = None
        if known and spread is not None and math.isfinite(spread):
            low, high = (100 * scale.at(100 * (words.right(row) + side * spread)) for side in (-1, 1))
        title = f"{row.name}\n{words.measured(row)} on the test set\n{costs.human(row.bitops, 'BitOps')} BitOps"
        at = 100 * scale.at(100 * words.right(row)) if known else None
        chosen = row.name.split(" ")[0] == "mixed"
        lines.append(Line(row.name, 18 + ROW * k, at, low, high, words.accuracy(row), chosen, title))
    across = tuple(Tick(100 * scale.at(value), f"{value:g}") for value in ticks(scale, 5))
    return AccuracyChart(ROW * len(lines) + 28, tuple(lines), across)
