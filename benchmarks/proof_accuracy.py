"""Tables of the proof's document that compare contestants' accuracies after fine-tuning, paired over seeds."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import proof_alpha, proof_paper
from benchmarks.proof_lines import BUDGETS, LEVELS, NAMES, best_uniform, result
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
    "combined": "the default's table and regression on random rows, added",
    "sampled": "regression on sampled policies",
    "sampled_pairwise": "the same with pairs",
    "evolution": "evolution (SPOS)",
    "gumbel": "DNAS",
    "edmips": "EdMIPS",
}

CONTROLS = ("best uniform", "random", "reversed", "initial", "constant", "power_law")


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


def against_table(runs: Runs, net: str, base: str, text_of_base: str, others: Collection[str] = ()) -> str:
    """A contestant minus each of the others (of all others, where none are named), paired, in points of test accuracy."""
    levels, rows = measured_budgets(runs, net), []
    for name, text in {"best uniform": "the best uniform policy", **CONTESTANTS}.items():
        if others and name not in others:
            continue
        found = [proof_paper.paired(runs, net, budget, base, name) for budget in levels]
        cells = [gain(values) if len(values) >= SEEDS else "" for values in found]
        if name != base and any(cells):
            rows.append([text, *cells])
    return table([f"{text_of_base} minus", *levels], rows)


def told_apart(runs: Runs, net: str) -> dict[str, str]:
    """Who is ahead of the default by more than one standard error, at which budget, and how many comparisons there are.

    Of contestants with SEEDS in common with it. "ahead", "behind": of it, with its accuracy minus theirs; "count": of all.
    """
    ahead, behind, count = [], 0, 0
    for budget, (name, text) in itertools.product(measured_budgets(runs, net), CONTESTANTS.items()):
        found = np.array(proof_paper.paired(runs, net, budget, DEFAULT, name))
        if name == DEFAULT or len(found) < SEEDS:
            continue
        count += 1
        error = found.std(ddof=1) / np.sqrt(len(found))
        behind += int(found.mean() > error)
        if found.mean() < -error:
            ahead.append(f"{text} at {budget} ({gain(found)})")
    return {"ahead": "; ".join(ahead) or "nobody", "behind": str(behind), "count": str(count)}


def uniform_ahead(runs: Runs, net: str) -> str:
    """How many standard errors the best uniform policy is ahead of the default, a number a budget of LEVELS."""
    found = [np.array(proof_paper.paired(runs, net, budget, "best uniform", DEFAULT)) for budget in LEVELS]
    told = [each.mean() / (each.std(ddof=1) / np.sqrt(len(each))) for each in found if len(each) >= SEEDS]
    return ", ".join(f"{one:.1f}" for one in told)


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
    """How far contestants are ahead over all budgets: of each other, on each net, of later runs and of unseen ones alone.

    Later: trained after seeds before had pointed to output-Fisher. Unseen: that had no part in choosing the default's alpha.
    """
    groups = {
        "lead": runs,
        "later": {run: lines for run, lines in runs.items() if run[1] >= FRESH[run[0]]},
        "unseen": {run: lines for run, lines in runs.items() if run[1] not in proof_alpha.CHOSEN_ON[run[0]]},
    }
    pairs = (
        *(("output_fisher", base, LEVELS) for base in ("learned", "regression")),
        ("output_fisher", "constant", proof_alpha.BITOPS),
        ("learned_third", "learned", proof_alpha.BITOPS),
        ("constant_third", "constant", proof_alpha.BITOPS),
        (DEFAULT, "output_fisher", proof_alpha.BITOPS),
    )
    values = {}
    for (which, own), (name, base, levels) in itertools.product(groups.items(), pairs):
        for group, where in ((nets, "both"), *(((net,), net) for net in nets)):
            for field, word in (("accuracy", ""), ("test_accuracy", " test")):
                gains = over_budgets(own, group, name, field, base, levels)
                values[f"{which} {where} {name} over {base}{word}"] = cell(gains, 2, 100, sign=True)
            values[f"{which} {where} {name} over {base} runs"] = str(len(gains))  # either field's
    return values


def of_the_default(runs: Runs, net: str) -> Runs:
    """The runs of a net in which the default was fine-tuned."""
    return {run: lines for run, lines in runs.items() if run[0] == net and result(lines, "W2A3", DEFAULT)}


def apart_table(runs: Runs, nets: Sequence[str]) -> str:
    """The default minus others, of the runs that its alpha was not chosen on, where there are others too."""
    rows = []
    for net in nets:
        if all(seed not in proof_alpha.CHOSEN_ON[net] for _, seed in of_the_default(runs, net)):
            continue
        own = {run: lines for run, lines in runs.items() if run[0] == net and run[1] not in proof_alpha.CHOSEN_ON[net]}
        seeds = ", ".join(str(seed) for _, seed in of_the_default(own, net))
        for name, text in {"best uniform": "the best uniform policy", **CONTESTANTS}.items():
            found = [proof_paper.paired(own, net, budget, DEFAULT, name) for budget in proof_alpha.BITOPS]
            if name != DEFAULT and len(found[0]) >= SEEDS:
                rows.append([f"{NAMES[net]} ({seeds})", text, *(gain(values) for values in found)])
    return table(["net (seeds)", "the default minus", *proof_alpha.BITOPS], rows)


def values(runs: Runs, nets: Sequence[str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables."""
    found = {"pooled": pooled_table(runs, nets), "apart": apart_table(runs, nets), **leads(runs, nets)}
    for net in nets:
        found[f"accuracy {net}"] = accuracy_table(runs, net)
        found[f"against {net}"] = against_table(runs, net, DEFAULT, "the default")
        found[f"learned against {net}"] = against_table(runs, net, "learned", CONTESTANTS["learned"], CONTROLS)
        found[f"uniform ahead {net}"] = uniform_ahead(runs, net)
        found |= {f"told {net} {word}": text for word, text in told_apart(runs, net).items()}
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
