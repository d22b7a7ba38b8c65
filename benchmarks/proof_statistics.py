"""Statistics of the proof's document, and how cells and tables are written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Runs = Mapping[tuple[str, int], Mapping[str, Mapping[str, Any]]]  # {(net, seed): {key: line}}


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(stats.spearmanr(a, b)[0])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % t interval; nan for fewer than two values)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def reliability(halves: Sequence[Sequence[float]]) -> float:
    """Of the mean over both halves: the halves' rank correlation r, stepped up by Spearman and Brown, 2 r / (1 + r)."""
    r = spearman(*np.asarray(halves).T)
    return 2 * r / (1 + r)


def cell(values: Sequence[float], digits: int = 2, scale: float = 1.0, sign: bool = False) -> str:
    """ "0.31 ± 0.05" """
    if not len(values):
        return ""
    mean, half = interval(values)
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{scale * mean:{form}}" + ("" if np.isnan(half) else f" ± {scale * half:.{digits}f}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def of_runs(runs: Runs, net: str, function: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    values = [function(lines) for (own, _), lines in runs.items() if own == net]
    return [value for value in values if value is not None]
