"""From numbers to places and colours: axes, their ticks, and a colour map. Pure functions, no drawing."""

import math
from collections.abc import Iterable
from typing import NamedTuple

# Nuñez, Anderton and Renslow's cividis (PLoS ONE 2018) at 33 even steps: read alike with and without colour blindness.
CIVIDIS = (
    *("#00224e", "#00285b", "#002e6a", "#053371", "#1a386f", "#273e6e", "#32436d", "#3b496c", "#434e6c"),
    *("#4b546c", "#535a6d", "#5a5f6e", "#61656f", "#686a71", "#6f7073", "#767676", "#7d7c78", "#848279"),
    *("#8c8878", "#938e78", "#9b9476", "#a39a74", "#aba072", "#b4a76f", "#bcae6c", "#c4b468", "#cdbb63"),
    *("#d5c25e", "#dec958", "#e7d150", "#f0d846", "#f9e03a", "#fee838"),
)
FLOAT = 16  # bits wider than this are float: their bar would flatten all others


class Tick(NamedTuple):
    """A place on an axis (per cent across, pixels down) and what is written there."""

    at: float
    text: str


class Scale(NamedTuple):
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """0 at `low`, 1 at `high`; beyond them where the value is."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if high == low:
            return 0.5
        return ((math.log(value) if self.log else value) - low) / (high - low)

    def back(self, share: float) -> float:
        """The value at a share of the axis: the inverse of `at`."""
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


def finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if math.isfinite(value)]


def scale_of(values: Iterable[float], ratio: float = 0.0, margin: float = 0.0) -> Scale:
    """The axis that holds the finite ones of the values.

    ratio: logarithmic where all are positive and the largest is so many times the smallest; 0: never. margin: free
    space at each end, as a share of the axis.
    """
    known = finite(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    log = low > 0 and bool(ratio) and high >= ratio * low
    if low == high:
        wide = abs(low) * 0.5 or 1.0
        return Scale(low - wide, high + wide, False)
    inner = Scale(low, high, log)
    return Scale(inner.back(-margin), inner.back(1 + margin), log)


def ticks(scale: Scale, most: int) -> list[float]:
    """Round values inside the axis, 2 to `most` of them where the axis has them."""
    if scale.log:
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [value for value in _decades(scale, steps) if scale.low <= value <= scale.high]
            if len(found) >= min(3, most):
                return found[:: -(-len(found) // most)]
    span = (scale.high - scale.low) / most
    size = 10.0 ** math.floor(math.log10(span)) if span > 0 else 1.0
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if size * factor >= span)
    first = math.ceil(scale.low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _decades(scale: Scale, steps: tuple[float, ...]) -> list[float]:
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    return [step * 10.0**power for power in powers for step in steps]


def colour(share: float) -> str:
    """The colour map at 0 (least) to 1 (most), between its steps in straight lines; shares beyond are cut."""
    place = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    first = min(int(place), len(CIVIDIS) - 2)
    below, above = (_rgb(CIVIDIS[first + k]) for k in range(2))
    mixed = (round(a + (place - first) * (b - a)) for a, b in zip(below, above, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))
