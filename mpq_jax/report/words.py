"""What a page says in words: numbers as text, and the answer to "is it better than uniform, and what does it cost"."""

import math
import re
from typing import Any, NamedTuple

from mpq_jax import costs
from mpq_jax.importance import total
from mpq_jax.report.tables import AccuracyRow, Report

# Control characters, halves of surrogate pairs and changes of the writing direction: none may come in by a layer's name.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


class Figure(NamedTuple):
    """One number of the first screen."""

    label: str
    value: str
    note: str


class Verdict(NamedTuple):
    """headline: the answer in one sentence. lines: how sure it is. figures: what it costs."""

    headline: str
    lines: tuple[str, ...]
    figures: tuple[Figure, ...]


# ---- numbers as text -----------------------------------------------------------------------------------------------


def printable(value: Any) -> Any:
    """Text without what a page cannot show; other values, and text that is markup already, as they are."""
    return _UNPRINTABLE.sub("\ufffd", value) if type(value) is str else value


def number(value: float, digits: int = 4) -> str:
    """To so many significant digits; "not a number", "∞" and "−∞" in words and signs."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}".replace("-", "−")


def cost(value: float, unit: str) -> str:
    """As costs.human, with the unit that it leaves out: "90.06 M BitOps"."""
    if not math.isfinite(value):
        return number(value)
    return costs.human(value, unit) + (" BitOps" if unit == "BitOps" else "")


def tick(value: float, unit: str) -> str:
    """For an axis: without the zeros behind the point."""
    text = costs.human(value, unit)
    return re.sub(r"\.?0+(?= |$)", "", text, count=1) if "." in text else text


def percent(share: float, digits: int = 2) -> str:
    """0.8776 -> "87.76"."""
    return f"{100 * share:.{digits}f}" if math.isfinite(share) else number(share)


def right(row: AccuracyRow) -> float:
    """The accuracy, 0 to 1; not a number where the task calls nothing right."""
    return math.nan if row.accuracy is None else row.accuracy


def accuracy(row: AccuracyRow) -> str:
    """ "87.76", "88.00 ± 1.23"; "–" where the task calls nothing right."""
    if row.accuracy is None:
        return "–"
    spread = spread_of(row)
    return percent(row.accuracy) + (f" ± {percent(spread)}" if spread is not None else "")


def measured(row: AccuracyRow) -> str:
    """The accuracy with its unit: "87.76 %"; the loss where the task calls nothing right: "a loss of 1.2345"."""
    if row.accuracy is None:
        return f"a loss of {number(row.loss, 5)}"
    return accuracy(row) + (" %" if math.isfinite(row.accuracy) else "")


def points(difference: float) -> str:
    """A difference of accuracies with its sign, in percentage points: "+1.20", "−0.45"."""
    return f"{100 * difference:+.2f}".replace("-", "−") if math.isfinite(difference) else number(difference)


def spread_of(row: AccuracyRow) -> float | None:
    """The standard deviation over the policies of a row, where there are several."""
    return row.accuracy_std if row.runs > 1 else None


# ---- the first screen ----------------------------------------------------------------------------------------------


def row_of(report: Report, kind: str) -> AccuracyRow | None:
    """The row of "mixed", "uniform", "random" or "float"; None where there is none."""
    return next((row for row in report.accuracy if row.name.split(" ")[0] == kind), None)


def standard_error(report: Report, first: AccuracyRow, second: AccuracyRow) -> float | None:
    """How far chance moves the difference of two accuracies (one standard error); None where it is not known.

    From the spread over policies where both rows have one: sqrt(s1² / n1 + s2² / n2). Otherwise that of two samples of
    the test set, sqrt(p1 (1 - p1) / n + p2 (1 - p2) / n): both were measured on the same samples, so the true one is
    smaller, as a rule.
    """
    spreads = [spread_of(row) for row in (first, second)]
    if all(spread is not None for spread in spreads):
        pairs = zip(spreads, (first, second), strict=True)
        return math.sqrt(sum(spread**2 / row.runs for spread, row in pairs if spread is not None))
    if not report.test_samples or not all(0 <= right(row) <= 1 for row in (first, second)):
        return None
    return math.sqrt(sum(right(row) * (1 - right(row)) for row in (first, second)) / report.test_samples)


def verdict(report: Report) -> Verdict:
    """Is it better than uniform, and what does it cost."""
    mixed, uniform = row_of(report, "mixed"), row_of(report, "uniform")
    if mixed is None:
        headline, lines = _predicted(report)
    elif uniform is None:
        headline = f"The mixed policy reaches {measured(mixed)} on the test set; no uniform policy stands beside it."
        lines = []
    else:
        headline, lines = _measured(report, mixed, uniform)
    return Verdict(headline, tuple(lines), tuple(_figures(report, mixed)))


def _measured(report: Report, mixed: AccuracyRow, uniform: AccuracyRow) -> tuple[str, list[str]]:
    if mixed.accuracy is None or uniform.accuracy is None:
        headline, certain = _losses(mixed, uniform)
        return headline, [*_spends(mixed, uniform), *([certain] if certain else [])]
    apart = mixed.accuracy - uniform.accuracy
    error = standard_error(report, mixed, uniform)
    both = f"{measured(mixed)} against {measured(uniform)}"
    if not math.isfinite(apart):
        return f"The mixed policy and {uniform.name} cannot be compared: {both}.", []
    size = f"{abs(100 * apart):.2f} points"
    if error is not None and abs(apart) < 2 * error:
        headline = f"No clear difference: mixed and {uniform.name} lie {size} apart, {both}."
    elif apart == 0:
        headline = f"The mixed policy is as accurate as {uniform.name}: {both}."
    else:
        headline = f"The mixed policy is {size} {'more' if apart > 0 else 'less'} accurate than {uniform.name}: {both}."
    return headline, [*_spends(mixed, uniform), _sure(report, mixed, uniform, error)]


def _losses(mixed: AccuracyRow, uniform: AccuracyRow) -> tuple[str, str]:
    """The answer where a task has a loss alone, and how sure it is."""
    both = f"{measured(mixed)} against {number(uniform.loss, 5)}"
    if not math.isfinite(mixed.loss - uniform.loss):
        return f"The mixed policy and {uniform.name} cannot be compared: {both}.", ""
    if mixed.loss == uniform.loss:
        return f"The mixed policy is as good as {uniform.name}: {both}.", ""
    which = "less" if mixed.loss < uniform.loss else "more"
    headline = f"The mixed policy loses {which} than {uniform.name}: {both}."
    return headline, "One measurement of each: how far chance moves the difference is not known."


def _spends(mixed: AccuracyRow, uniform: AccuracyRow) -> list[str]:
    spends = [
        f"{100 * ours / theirs:.1f} % of its {name}"
        for name, ours, theirs in (
            ("BitOps", mixed.bitops, uniform.bitops),
            ("size", mixed.size_bytes, uniform.size_bytes),
        )
        if theirs
    ]
    return [f"Against {uniform.name} it takes {' and '.join(spends)}."] if spends else []


def _sure(report: Report, mixed: AccuracyRow, uniform: AccuracyRow, error: float | None) -> str:
    if error is None:
        return "One measurement of each: how far chance moves the difference is not known."
    if spread_of(mixed) is not None and spread_of(uniform) is not None:
        return f"Standard error of the difference over the policies of both rows: {100 * error:.2f} points."
    return (
        f"Test set of {report.test_samples:,}: drawing other samples moves such a difference by about "
        f"±{100 * error:.2f} points (one standard error, at most). Another seed of the training would move it too."
    )


def _predicted(report: Report) -> tuple[str, list[str]]:
    """Without a measurement: what the importance table says."""
    told = "Nothing was fine-tuned or measured: this is what the importance table predicts."
    values = {name: objective(report, name) for name in report.policies}
    ours = values.pop("mixed", None)
    beside = next((name for name in values if name.startswith("uniform")), None)
    theirs = values[beside] if beside else None
    if ours is None or theirs is None:
        return "Nothing has been measured yet.", [told]
    both = f"{number(ours)} against {number(theirs)}"
    if not theirs or ours >= theirs:
        return f"The table predicts no less harm from the mixed policy than from {beside}: {both}.", [told]
    less = f"{100 * (theirs - ours) / abs(theirs):.1f} % less harm"
    return f"The table predicts {less} from the mixed policy than from {beside}: {both}.", [told]


def objective(report: Report, name: str) -> float | None:
    """The importance of one of the report's policies; None for bits that the table has no number for."""
    try:
        return total(report.importance, report.policies[name])
    except (KeyError, ValueError):
        return None


def _figures(report: Report, mixed: AccuracyRow | None) -> list[Figure]:
    layers, chosen = report.importance.layers, report.policies["mixed"]
    bitops = mixed.bitops if mixed else costs.bitops(layers, chosen)
    size = mixed.size_bytes if mixed else costs.size(layers, chosen)
    floats = sum(layer.macs for layer in layers) * 1024, 4 * sum(layer.params for layer in layers)
    found = []
    if mixed:
        plain = row_of(report, "float")
        found.append(
            Figure(
                "Test loss" if mixed.accuracy is None else "Test accuracy",
                measured(mixed).removeprefix("a loss of "),
                f"float {measured(plain).removeprefix('a loss of ')}" if plain else "",
            )
        )
    for label, unit, value, whole in (("BitOps", "BitOps", bitops, floats[0]), ("Weights", "bytes", size, floats[1])):
        times = f"{whole / value:.1f}× fewer than float" if value else ""
        note = times.replace("fewer", "smaller") if unit == "bytes" else times
        found.append(Figure(label, costs.human(value, unit), note))
    for name, (used, limit, unit) in report.used.items():
        found.append(Figure(f"{name} budget used", f"{percent(used / limit)} %", f"limit {costs.human(limit, unit)}"))
    if report.solution and report.solution.get("status"):
        proved = report.solution["status"] == "optimal"
        note = (
            "proven: none within the budgets has less importance" if proved else "nothing better was found; not proven"
        )
        found.append(Figure("Search", "optimal" if proved else str(report.solution["status"]), note))
    return found
