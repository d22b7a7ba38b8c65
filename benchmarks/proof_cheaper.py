"""The table of cheaper joint trainings, from the lines of benchmarks.cheaper."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.proof_lines import digest
from benchmarks.proof_statistics import Runs, spearman, table

NAMES = {
    "full": "full: 300 steps, every row sees the batch",
    "again": "the same with other batches",
    "sixth": "50 steps",
    "slices": "slices of the batch",
    "slices half": "slices, 150 steps",
    "slices settled": "slices, until settled",
    "slices widths": "slices, 2, 4 and 6 bits",
    "slices widths half": "slices, 2, 4 and 6 bits, 150 steps",
    "slices widths settled": "slices, 2, 4 and 6 bits, until settled",
}
Line = Mapping[str, Any]


def objective(full: Line, alpha: float, bits: Any) -> float:
    """Of a policy in full's table: sum over layers of alpha * weight + activation, at the bits' columns."""
    columns, rows = np.array(bits) - 2, np.arange(len(bits))
    harm = alpha * np.array(full["weight"])[rows, columns[:, 0]] + np.array(full["activation"])[rows, columns[:, 1]]
    return float(harm.sum())


def regrets(full: Line, line: Line, which: str) -> list[float]:
    """Objective of the variant's policy over full's own, minus 1, at every budget.

    which: "full" (both tables with full's logged alpha: step sizes alone), "log" or "measured" (each its own alpha).
    """
    own = "log" if which == "full" else which
    alpha = full["alpha"][own]
    return [
        objective(full, alpha, bits) / objective(full, alpha, full["policies"][own][budget]) - 1
        for budget, bits in line["policies"][which].items()
    ]


def rank_correlation(full: Line, line: Line) -> float:
    """Of step sizes over layers: the mean over kinds and widths."""
    pairs = [
        spearman(np.array(full[kind])[:, k], np.array(line[kind])[:, k])
        for kind in ("weight", "activation")
        for k in range(len(full[kind][0]))
    ]
    return float(np.mean(pairs))


def differences(lines: Mapping[str, Line], line: Line) -> list[float]:
    """Validation loss of full's joint model at the variant's policies minus that at full's, alphas measured.

    Of the budgets where both were measured.
    """
    full = lines["full"]["policies"]["measured"]
    pairs = [(bits, full[budget]) for budget, bits in line["policies"]["measured"].items()]
    found = [tuple(lines.get(f"loss {digest(bits)}") for bits in pair) for pair in pairs]
    return [a["loss"] - b["loss"] for a, b in found if a and b]


def passes(line: Line, alpha: bool) -> float:
    """Over the training set, forward and backward; a forward pass alone, as of measuring alpha, is a third of one."""
    return (line["samples"] + alpha * line["alpha_samples"] / 3) / line["train"]


def mean_and_worst(values: list[float], scale: float, digits: int, sign: bool = False) -> str:
    if not values:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{scale * np.mean(values):{form}} ({scale * np.max(values):{form}})"


def cheaper_table(runs: Runs, net: str) -> str:
    """Means over seeds and the four budgets, in brackets the largest."""
    own = [lines for (of, _), lines in runs.items() if of == net]
    rows = []
    for name, text in NAMES.items():
        with_it = [lines for lines in own if name in lines]
        if not with_it:
            continue
        cells = [text, str(len(with_it))]
        cells += [f"{np.mean([passes(lines[name], alpha) for lines in with_it]):.2f}" for alpha in (False, True)]
        cells.append(f"{np.mean([rank_correlation(lines['full'], lines[name]) for lines in with_it]):.3f}")
        for which in ("full", "log", "measured"):
            found = [x for lines in with_it for x in regrets(lines["full"], lines[name], which)]
            cells.append(mean_and_worst(found, 100, 1))
        found = [x for lines in with_it for x in differences(lines, lines[name])]
        cells.append(mean_and_worst(found, 1, 3, sign=True))
        alphas = [lines[name]["alpha"] for lines in with_it]
        cells += [", ".join(f"{each[which]:.3g}" for each in alphas) for which in ("log", "measured")]
        rows.append(cells)
    head = [
        *("joint training", "seeds", "passes", "with alpha", "rank correlation"),
        *("regret, one alpha, %", "alpha of the log", "alpha measured", "loss", "alphas, log", "measured"),
    ]
    return table(head, rows)


def values(runs: Runs, nets: Iterable[str]) -> dict[str, str]:
    """{placeholder: text}."""
    found = {}
    for net in nets:
        found[f"joint {net}"] = cheaper_table(runs, net)
        own = [lines for (of, _), lines in runs.items() if of == net]
        for name in NAMES:
            with_it = [lines for lines in own if name in lines]
            for which in ("full", "log", "measured"):
                each = [x for lines in with_it for x in regrets(lines["full"], lines[name], which)]
                found[f"regret {net} {name} {which}"] = f"{100 * np.mean(each):.1f} %" if each else ""
            if with_it:
                shares = [passes(lines["full"], False) / passes(lines[name], True) for lines in with_it]
                found[f"share {net} {name}"] = f"1/{np.mean(shares):.1f}"
    return found
