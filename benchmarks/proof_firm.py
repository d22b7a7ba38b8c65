"""How firm the proof's accuracies are: fine-tuned once more, failures, either statistics, more steps."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import proof_paper
from benchmarks.proof_accuracy import CONTESTANTS, DEFAULT, SEEDS, measured_budgets
from benchmarks.proof_lines import BUDGETS, best_uniform, digest, keeps_own
from benchmarks.proof_statistics import Runs, cell, interval, table

FAR = 0.02  # a fine-tuning that ends so far below the median of its seed and budget has failed


def rounding(runs: Runs, net: str) -> str:
    """What fine-tuning the same policies again with sums in another order changed, of the lines "rounding"."""
    apart = [
        100 * (accuracy - lines[f"finetuned {key}"]["test_accuracy"])
        for (own, _), lines in runs.items()
        for key, accuracy in lines.get("rounding", {"test_accuracy": {}})["test_accuracy"].items()
        if own == net and f"finetuned {key}" in lines
    ]
    if len(apart) < 5:
        return ", ".join(f"{one:+.2f}" for one in sorted(apart)) + " points"
    sizes = np.abs(apart)
    return f"{np.median(sizes):.2f} points in the median, {np.sort(sizes)[-2]:.2f} and {sizes.max():.2f} at most"


def failed(runs: Runs, net: str) -> str:
    """Contestants' fine-tunings that ended FAR below the median of their seed and budget: how many of how many, and which.

    Random and uniform policies are left out, of which some are as bad as that.
    """
    found, count = [], 0
    for (own, seed), lines in runs.items():
        for budget in BUDGETS if own == net else ():
            ended: dict[str, tuple[float, list[str]]] = {}
            for name in CONTESTANTS:
                one = lines.get(f"chosen {budget} {name}")
                if one and name != "random" and (line := lines.get(f"finetuned {digest(one['policy'])}")):
                    ended.setdefault(digest(one["policy"]), (line["test_accuracy"], []))[1].append(name)
            median = np.median([accuracy for accuracy, _ in ended.values()]) if len(ended) > 2 else np.nan
            count += len(ended)
            found += [
                f"{' and '.join(CONTESTANTS[name] for name in names)}, seed {seed}, {budget} ({100 * (accuracy - median):+.1f})"
                for accuracy, names in ended.values()
                if median - accuracy > FAR
            ]
    return f"{len(found)} of {count}" + (f": {'; '.join(found)}" if found else "")


def either_table(runs: Runs, names: Mapping[str, str]) -> str:
    """How far the two statistics of the same fine-tuned weights are apart: test accuracies in points, a row a net."""
    rows = []
    for net, shown in names.items():
        found = [
            line
            for lines in runs.values()
            for line in lines.values()
            if line["net"] == net and line["key"].startswith("finetuned ") and "running" in line
        ]
        if not found:
            continue
        apart = [100 * (line["running"]["test_accuracy"] - line["test_accuracy"]) for line in found]
        own = [keeps_own(line) for line in found]
        better = [difference if is_own else -difference for difference, is_own in zip(apart, own, strict=True)]
        rows.append(
            [
                shown,
                str(len(found)),
                str(sum(own)),
                f"{np.median(np.abs(apart)):.2f}",
                f"{np.max(np.abs(apart)):.2f}",
                str(sum(abs(one) > 1 for one in apart)),
                f"{np.mean(better):+.2f}",
                f"{np.min(better):+.2f}",
            ]
        )
    head = ["fine-tunings", "kept those of training", "apart, median", "largest", "more than 1 point"]
    return table(["", *head, "the kept minus the other, mean", "smallest"], rows)


def crossing(runs: Runs, better: Runs, net: str) -> dict[str, str]:
    """Comparisons with the default that its interval tells apart with one of two statistics alone, on the same runs.

    better: the runs' lines with the statistics that are kept. "crossing": which; "count": of how many; "opposite": how many
    are told apart with both, one way and the other.
    """
    same = {run: {key: runs[run][key] for key in lines} for run, lines in better.items()}
    names = {"best uniform": "the best uniform policy", **CONTESTANTS}
    found, count, opposite = [], 0, 0
    for budget, (name, text) in itertools.product(measured_budgets(better, net), names.items()):
        both = [proof_paper.paired(each, net, budget, DEFAULT, name) for each in (same, better)]
        if name == DEFAULT or len(both[0]) < SEEDS:
            continue
        count += 1
        (mean, half), (other, other_half) = (interval(values) for values in both)
        outside, other_outside = abs(mean) > half, abs(other) > other_half
        opposite += int(outside and other_outside and mean * other < 0)
        if outside != other_outside:
            found.append(f"{text} at {budget} ({' and '.join(cell(values, 2, 100, sign=True) for values in both)})")
    return {"crossing": "; ".join(found) or "none", "count": str(count), "opposite": str(opposite)}


def longer_table(runs: Runs, net: str, budget: str) -> str:
    """Test accuracies after the usual and after longer fine-tuning, of the runs that have both."""

    def long(lines: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        best = best_uniform(lines, budget)
        name = f"uniform {best[0]}" if name == "best uniform" and best else name
        one = lines.get(f"chosen {budget} {name}")
        return one and lines.get(f"longer {digest(one['policy'])}")

    rows = []
    own = {run: lines for run, lines in runs.items() if run[0] == net and long(lines, "best uniform")}
    for name, text in {"best uniform": "the best uniform policy", **CONTESTANTS}.items():
        both = {run: lines for run, lines in own.items() if long(lines, name)}
        if not both:
            continue
        level = [100 * long(lines, name)["test_accuracy"] for lines in both.values()]
        ahead = [
            long(lines, name)["test_accuracy"] - long(lines, "best uniform")["test_accuracy"] for lines in both.values()
        ]
        usual = proof_paper.paired(both, net, budget, name, "best uniform")
        rows.append([text, str(len(both)), cell(usual, 2, 100, sign=True), cell(ahead, 2, 100, sign=True), cell(level)])
    return table(
        ["", "seeds", "minus best uniform, 200 steps", "the same, 1,000 steps", "test accuracy, %, 1,000 steps"], rows
    )


def statistics_table(runs: Runs, net: str, budget: str) -> str:
    """What either statistics give after longer fine-tuning: a row a contestant, seed and order of the batches."""
    rows = []
    for (own, seed), lines in runs.items():
        for name, text in CONTESTANTS.items():
            policy = lines.get(f"chosen {budget} {name}", {}).get("policy")
            for order in (0, 1):
                found = policy and lines.get(f"statistics {digest(policy)} {order}")
                if own == net and found:
                    cells = [
                        form.format(scale * found[word][field])
                        for word in ("restated", "running")
                        for form, scale, field in (
                            ("{:.4f}", 1, "train_loss"),
                            ("{:.4f}", 1, "loss"),
                            ("{:.2f}", 100, "accuracy"),
                        )
                    ]
                    rows.append([f"{text}, seed {seed}, order {order + 1}", *cells])
    fields = ("training loss", "validation loss", "validation accuracy, %")
    return table(["", *(f"{word}: {field}" for word in ("measured anew", "of training") for field in fields)], rows)


def values(runs: Runs, better: Runs, names: Mapping[str, str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables. better: the runs' lines with the statistics that are kept."""
    found = {"either": either_table(runs, names)}
    for net in names:
        found[f"rounding {net}"] = rounding(runs, net)
        found[f"failed {net}"] = failed(runs, net)
        found[f"longer {net}"] = longer_table(runs, net, "W2A3")
        found[f"kept longer {net}"] = longer_table(better, net, "W2A3")
        found[f"statistics {net}"] = statistics_table(runs, net, "W2A3")
        found |= {f"{word} {net}": text for word, text in crossing(runs, better, net).items()}
    return found
