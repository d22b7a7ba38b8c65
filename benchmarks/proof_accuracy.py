"""Tables of the proof's document that compare contestants' accuracies after fine-tuning, paired over seeds."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import proof_alpha, proof_paper
from benchmarks.proof_lines import BUDGETS, LEVELS, NAMES, best_uniform, digest, keeps_own, result
from benchmarks.proof_statistics import Runs, cell, of_runs, table

DEFAULT = "output_fisher_third"
SEEDS = 3  # an accuracy is shown where so many seeds have it
# From this seed on, runs that were trained after the seeds before had pointed to output-Fisher.
FRESH = {"resnet8": 5, "mobilenetv1": 3}
CONTESTANTS = {
    "random": "a random policy",
    "reversed": "control: reversed",
    "initial": "control: initial statistics",
    "constant": "control: constant",
    "constant_third": "control: constant, weights a third",
    "power_law": "control: power law",
    "learned": "learned, as published",
    "sliced": "the same with slices, as the default joint training has it",
    "hawq": "HAWQ",
    "hawq_v2": "HAWQ-v2",
    "mpqco": "MPQCO",
    "output_fisher": "output-Fisher",
    "output_fisher_third": "output-Fisher, weights a third: the default",
    "learned_third": "learned, weights a third of the fitted",
    "one_at_a_time": "one layer at a time",
    "regression": "regression on random rows",
    "regression_pairwise": "the same with pairs",
    "sampled": "regression on sampled policies",
    "sampled_pairwise": "the same with pairs",
    "evolution": "evolution (SPOS)",
    "gumbel": "DNAS",
    "edmips": "EdMIPS",
}


def differences(runs: Runs, net: str, budget: str, name: str) -> list[float]:
    """Test accuracy minus the best uniform policy's, a number a seed; none where fewer than SEEDS have it."""
    found = proof_paper.paired(runs, net, budget, name, "best uniform")
    return found if len(found) >= SEEDS else []


def measured_budgets(runs: Runs, net: str) -> list[str]:
    """The budgets at which contestants were fine-tuned, and uniform policies."""
    return [b for b in BUDGETS if any(proof_paper.paired(runs, net, b, name, "best uniform") for name in CONTESTANTS)]


def gain(values: Sequence[float]) -> str:
    """A cell of differences of accuracies, in points; in brackets their number where it is more than SEEDS."""
    return cell(values, 2, 100, sign=True) + (f" ({len(values)})" if len(values) > SEEDS else "")


def accuracy_table(runs: Runs, net: str) -> str:
    levels = measured_budgets(runs, net)
    head = ["", *levels]
    rows = []
    own = {seed: lines for (of, seed), lines in runs.items() if of == net}
    best = [[best_uniform(lines, b) for lines in own.values()] for b in levels]
    floats = [100 * lines["float"]["test_accuracy"] for lines in own.values() if "float" in lines]
    if floats:
        rows.append([f"float, % ({len(floats)} seeds)", *[cell(floats)] * len(levels)])
    rows.append(
        [
            "best uniform, %",
            *(cell([100 * one[1]["test_accuracy"] for one in each if one]) for each in best),
        ]
    )
    counts = [Counter(one[0].removeprefix("uniform ") for one in each if one) for each in best]
    rows.append(["its bits", *(", ".join(f"{n} x {bits}" for bits, n in each.most_common()) for each in counts)])
    for name, text in CONTESTANTS.items():
        cells = [gain(differences(runs, net, b, name)) for b in levels]
        if any(cells):
            rows.append([text, *cells])
    return table(head, rows)


def against_table(runs: Runs, net: str, base: str, text_of_base: str) -> str:
    """A contestant minus each of the others, paired, in points of test accuracy."""
    levels, rows = measured_budgets(runs, net), []
    for name, text in {"best uniform": "the best uniform policy", **CONTESTANTS}.items():
        found = [proof_paper.paired(runs, net, budget, base, name) for budget in levels]
        cells = [gain(values) if len(values) >= SEEDS else "" for values in found]
        if name != base and any(cells):
            rows.append([text, *cells])
    return table([f"{text_of_base} minus", *levels], rows)


def headroom(runs: Runs, net: str, budget: str) -> list[float]:
    """Test accuracy of the float model minus the best uniform policy's, a number a seed."""

    def one(lines: Mapping[str, Any]) -> float | None:
        best = best_uniform(lines, budget)
        return lines["float"]["test_accuracy"] - best[1]["test_accuracy"] if best and "float" in lines else None

    return of_runs(runs, net, one)


def over_budgets(
    runs: Runs, nets: Collection[str], name: str, field: str, base: str = "learned", levels: Sequence[str] = LEVELS
) -> list[float]:
    """A contestant's accuracy minus that of `base`, mean over `levels`; a number a run that has both at all of them."""
    found = []
    for (net, _), lines in runs.items():
        pairs = [(result(lines, b, name), result(lines, b, base)) for b in levels]
        if net in nets and all(one and other for one, other in pairs):
            found.append(float(np.mean([one[field] - other[field] for one, other in pairs if one and other])))
    return found


def pooled_table(runs: Runs, nets: Sequence[str]) -> str:
    """Contestants minus the published criterion over all budgets: validation accuracy a net and over both, and test accuracy."""
    groups = [(nets, "accuracy"), *(((net,), "accuracy") for net in nets), (nets, "test_accuracy")]
    rows = []
    for name, text in CONTESTANTS.items():
        found = [over_budgets(runs, group, name, field) for group, field in groups]
        cells = [cell(values, 2, 100, sign=True) if len(values) >= 3 else "" for values in found]
        if name != "learned" and all(len(over_budgets(runs, (net,), name, "accuracy")) >= 3 for net in nets):
            rows.append([text, str(len(found[0])), *cells])
    head = ["both nets, validation", *(f"{NAMES[net]}, validation" for net in nets), "both nets, test"]
    return table(["minus learned, as published", "runs", *head], rows)


def leads(runs: Runs, nets: Sequence[str]) -> dict[str, str]:
    """How far contestants are ahead over all budgets: of each other, on each net, and of later runs alone."""
    values = {}
    for field, word in (("accuracy", ""), ("test_accuracy", " test")):
        for name, base, levels in (
            *(("output_fisher", base, LEVELS) for base in ("learned", "regression", "mpqco")),
            ("output_fisher", "constant", proof_alpha.BITOPS),
            ("learned_third", "learned", proof_alpha.BITOPS),
            ("constant_third", "constant", proof_alpha.BITOPS),
            (DEFAULT, "output_fisher", proof_alpha.BITOPS),
        ):
            for group, where in ((nets, "both"), *(((net,), net) for net in nets)):
                gains = over_budgets(runs, group, name, field, base, levels)
                values[f"lead {where} {name} over {base}{word}"] = cell(gains, 2, 100, sign=True)
        for net in nets:
            later = {run: lines for run, lines in runs.items() if run[1] >= FRESH[net]}
            gains = over_budgets(later, (net,), "output_fisher", field)
            values[f"fresh {net} output_fisher{word}"] = cell(gains, 2, 100, sign=True)
    return values


def of_the_default(runs: Runs, net: str) -> Runs:
    """The runs of a net in which the default was fine-tuned."""
    return {run: lines for run, lines in runs.items() if run[0] == net and result(lines, "W2A3", DEFAULT)}


def apart_table(runs: Runs, nets: Sequence[str]) -> str:
    """The default minus others, of the runs that its alpha was not chosen on."""
    rows = []
    for net in nets:
        own = {run: lines for run, lines in runs.items() if run[0] == net and run[1] not in proof_alpha.CHOSEN_ON[net]}
        seeds = ", ".join(str(seed) for _, seed in of_the_default(own, net))
        for name, text in {"best uniform": "the best uniform policy", **CONTESTANTS}.items():
            found = [proof_paper.paired(own, net, budget, DEFAULT, name) for budget in proof_alpha.BITOPS]
            if name != DEFAULT and len(found[0]) >= SEEDS:
                rows.append([f"{NAMES[net]} ({seeds})", text, *(gain(values) for values in found)])
    return table(["net (seeds)", "the default minus", *proof_alpha.BITOPS], rows)


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


def rounding(runs: Runs) -> str:
    """What fine-tuning the same policies again with sums in another order changed, in points: of the lines "rounding"."""
    apart = [
        100 * (accuracy - lines[f"finetuned {key}"]["test_accuracy"])
        for lines in runs.values()
        for key, accuracy in lines.get("rounding", {"test_accuracy": {}})["test_accuracy"].items()
    ]
    return ", ".join(f"{one:+.2f}" for one in sorted(apart))


def values(runs: Runs, nets: Sequence[str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables."""
    found = {"pooled": pooled_table(runs, nets), "apart": apart_table(runs, nets), **leads(runs, nets)}
    for net in nets:
        found[f"accuracy {net}"] = accuracy_table(runs, net)
        found[f"against {net}"] = against_table(runs, net, DEFAULT, "the default")
        found[f"learned against {net}"] = against_table(runs, net, "learned", CONTESTANTS["learned"])
        found[f"longer {net}"] = longer_table(runs, net, "W2A3")
        found[f"statistics {net}"] = statistics_table(runs, net, "W2A3")
        same = of_the_default(runs, net)
        found[f"default seeds {net}"] = str(len(same))
        for budget in measured_budgets(runs, net):
            found[f"headroom {net} {budget}"] = cell(headroom(runs, net, budget), 2, 100, sign=True)
        for budget in BUDGETS:
            for name in CONTESTANTS:
                gains = proof_paper.paired(runs, net, budget, name, "best uniform")
                found[f"gain {net} {budget} {name}"] = cell(gains, 2, 100, sign=True)
                beside = proof_paper.paired(same, net, budget, name, "best uniform")
                found[f"beside {net} {budget} {name}"] = cell(beside, 2, 100, sign=True)
                ahead = proof_paper.paired(runs, net, budget, DEFAULT, name)
                found[f"default over {net} {budget} {name}"] = cell(ahead, 2, 100, sign=True)
    return found
