"""The paper's own experiments from the proof's lines: layers alone, indicators, the reversed table, seconds of search."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.proof_lines import best_uniform, result
from benchmarks.proof_statistics import Runs, cell, of_runs, spearman, table


def alone_table(runs: Runs, net: str) -> str:
    """Step sizes and what the joint model loses when one layer alone is at few bits."""
    rows = []
    for (own, seed), lines in runs.items():
        if own != net or "alone" not in lines:
            continue
        one = lines["alone"]
        of = {(row["path"], row["bits"]): row for row in one["rows"]}
        for path in dict.fromkeys(row["path"] for row in one["rows"]):
            cells = [str(seed), of[path, 4]["kind"], path]
            for bits in (4, 2):
                row = of[path, bits]
                cells += [
                    f"{row['weight']:.4f}",
                    f"{row['activation']:.3f}",
                    f"{100 * (one['accuracy'] - row['accuracy']):.2f}",
                ]
            rows.append(cells)
    columns = [
        f"{what}, {bits} bits" for bits in (4, 2) for what in ("step size of w", "of a", "accuracy lost, points")
    ]
    return table(["seed", "kind", "layer", *columns], rows) if rows else ""


def alone_correlation(runs: Runs, net: str, bits: int, kind: str) -> list[float]:
    """Rank correlation, over the layers, of a step size with the rise of the loss; a number a seed."""

    def one(lines):
        rows = [row for row in lines.get("alone", {"rows": []})["rows"] if row["bits"] == bits]
        return spearman([row[kind] for row in rows], [row["loss"] for row in rows]) if rows else None

    return of_runs(runs, net, one)


# ---- indicators ---------------------------------------------------------------------------------------------------


def off_the_line(runs: Runs, net: str, kind: str, over: str) -> list[float]:
    """Median |log(s_hat / s)| at 3 and 5 bits, s_hat on the line through 2, 4 and 6; a number a seed.

    over: what the line is drawn over: "bits", or "codes", the logarithm of the largest code.
    """

    def one(lines: Mapping[str, Any]) -> float | None:
        if "indicators" not in lines:
            return None
        widths = np.array(lines["indicators"]["bit_widths"])
        codes = 2.0 ** (widths - (kind == "weight")) - 1
        axis = widths if over == "bits" else np.log(codes)
        known = np.isin(widths, (2, 4, 6))
        logs = np.log(lines["indicators"][kind])
        off = [np.interp(axis[~known], axis[known], row[known]) - row[~known] for row in logs]
        return float(np.median(np.abs(off)))

    return of_runs(runs, net, one)


def indicator_figure(runs: Runs, names: Mapping[str, str], path: Path) -> None:
    """Step sizes by layer and width, seed 0 of each net, as in the paper's figure of its indicators."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    nets = [net for net in names if "indicators" in runs.get((net, 0), {})]
    figure, axes = plt.subplots(len(nets), 2, figsize=(11, 3.2 * len(nets)), squeeze=False)
    for row, net in zip(axes, nets, strict=True):
        one = runs[net, 0]["indicators"]
        for ax, kind in zip(row, ("weight", "activation"), strict=True):
            for k, bits in enumerate(one["bit_widths"]):
                ax.plot([each[k] for each in one[kind]], marker="o", markersize=3, linewidth=1, label=f"{bits} bits")
            ax.set_yscale("log")
            ax.set_xticks(range(len(one["layers"])), one["layers"], rotation=90, fontsize=6)
            ax.set_title(f"{names[net]}: step sizes of {kind}s", fontsize=8)
            ax.tick_params(axis="y", labelsize=7)
        row[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the reversed table -------------------------------------------------------------------------------------------


def paired(runs: Runs, net: str, budget: str, one: str, other: str) -> list[float]:
    """Test accuracy of `one` minus that of `other`, contestants' names; a number a seed that has both."""

    def found(lines: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        if name == "best uniform":
            best = best_uniform(lines, budget)
            return best and best[1]
        return result(lines, budget, name)

    def difference(lines: Mapping[str, Any]) -> float | None:
        a, b = found(lines, one), found(lines, other)
        return a["test_accuracy"] - b["test_accuracy"] if a and b else None

    return of_runs(runs, net, difference)


def reversed_table(runs: Runs, names: Mapping[str, str], budgets: Sequence[str]) -> str:
    """What giving the important layers the unimportant ones' bits costs, in points."""
    pairs = [("learned", "reversed"), ("learned", "best uniform"), ("reversed", "best uniform")]
    rows = []
    for net, name in names.items():
        for budget in budgets:
            both = {run: ls for run, ls in runs.items() if all(result(ls, budget, name) for name in pairs[0])}
            values = [paired(both, net, budget, *pair) for pair in pairs]
            if any(values):
                rows.append([name, budget, str(len(values[0])), *(cell(v, 2, 100, sign=True) for v in values)])
    return table(["net", "budget", "seeds", *(" - ".join(pair) for pair in pairs)], rows)


# ---- seconds ------------------------------------------------------------------------------------------------------


def times_table(runs: Runs, net: str) -> str:
    """Passes over the training set and seconds, means over seeds 0 to 2 (one GPU), of what stands before the solver."""
    rows = []
    own = [lines for (of, seed), lines in runs.items() if of == net and seed < 3]
    keys = [key for key in dict.fromkeys(key for lines in own for key in lines) if key.startswith("criterion ")]
    for key in keys:
        found = [lines[key] for lines in own if key in lines]
        seconds, passes = (float(np.mean([one[name] for one in found])) for name in ("seconds", "passes"))
        if seconds >= 1:
            rows.append([key.removeprefix("criterion "), f"{passes:.2f}", f"{seconds:.1f}"])
    found = [lines["chosen W2A3 evolution"] for lines in own if "seconds" in lines.get("chosen W2A3 evolution", {})]
    if found:
        rows.append(["evolution, a budget", "", f"{np.mean([one['seconds'] for one in found]):.1f}"])
    return table(["", "passes", "seconds"], rows)


def solver_seconds(runs: Runs, net: str) -> list[float]:
    """CPU seconds of one exact search, over budgets."""
    lines = runs[net, 0]
    return [one["cpu_seconds"] for key, one in lines.items() if key.startswith("solve ")]


def values(runs: Runs, names: Mapping[str, str], budgets: Sequence[str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables."""
    found = {"reversed": reversed_table(runs, names, budgets)}
    for net in names:
        found[f"times {net}"] = times_table(runs, net)
        solve = solver_seconds(runs, net)
        found[f"solver {net}"] = f"{1000 * min(solve):.0f} to {1000 * max(solve):.0f} ms" if solve else ""
        for kind in ("weight", "activation"):
            for over in ("bits", "codes"):
                off = off_the_line(runs, net, kind, over)
                found[f"line {net} {kind} {over}"] = f"{100 * np.mean(off):.1f} %" if off else ""
        found[f"alone {net}"] = alone_table(runs, net)
        for bits in (4, 2):
            for kind in ("weight", "activation"):
                found[f"alone {net} {bits} {kind}"] = cell(alone_correlation(runs, net, bits, kind))
    return found
