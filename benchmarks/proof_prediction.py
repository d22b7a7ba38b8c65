"""Tables of the proof's document that say how well criteria predict measured losses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import proof_alpha
from benchmarks.proof_lines import COMBINED, PREDICTED, THIRDS
from benchmarks.proof_statistics import Runs, cell, of_runs, reliability, spearman, table

TWICE = 12  # policies that were fine-tuned twice, for an order to be asked of
# (name of a predictor, what it is)
PREDICTORS = {
    "learned": "learned step sizes, as published",
    "hawq": "HAWQ",
    "hawq_v2": "HAWQ-v2",
    "mpqco": "MPQCO",
    "output_fisher": "output-Fisher",
    "output_fisher_third": "output-Fisher, weights a third: the default",
    "learned_third": "learned step sizes, weights a third of the fitted",
    "one_at_a_time": "one layer at a time",
    "regression": "regression on joint training's random rows",
    "regression_pairwise": "the same, with pairs",
    "combined": "the default's table and regression on random rows, added",
    "sampled": "regression on sampled policies near the budget, divergence",
    "sampled_loss": "the same, of their loss",
    "sampled_pairwise": "the same, of their divergence, with pairs",
    "sampled_all": "the same, additive, policies all over",
    "constant": "control: constant",
    "constant_third": "control: constant, weights a third",
    "power_law": "control: power law",
    "initial": "control: initial statistics",
    "random": "control: random",
    "reversed": "control: reversed",
}


def tuned(lines: Mapping[str, Any], budget: str, key: str = "tuned") -> list[dict[str, Any]]:
    """The lines of the random policies that were fine-tuned, in the order of the policies. key: "repeat", once more."""
    found = []
    while f"{key} {budget} {len(found)}" in lines:
        found.append(lines[f"{key} {budget} {len(found)}"])
    return found


def drawn(lines: Mapping[str, Any], budget: str) -> Mapping[str, Any]:
    """The line of the random policies at a budget; a run of which accuracies alone were measured has none."""
    return lines.get(f"random {budget}", {"loss": [], "halves": []})


def predicted(lines: Mapping[str, Any], budget: str, name: str) -> list[float] | None:
    """What a table says of the random policies at a budget; None where that is not known."""
    if name in COMBINED:
        each = [predicted(lines, budget, part) for part in COMBINED[name]]
        return (
            None if any(one is None for one in each) else np.sum([one / np.std(one) for one in each], axis=0).tolist()
        )
    said = lines.get(f"predicted {budget} {name}", {}).get("values")
    return proof_alpha.third(lines, budget, THIRDS[name]) if said is None and name in THIRDS else said


def correlations(runs: Runs, net: str, budget: str, name: str, after: bool) -> list[float]:
    """Rank correlation of predicted harm and measured loss, a number a seed. after: a short fine-tuning."""
    found = []
    for (own, _), lines in runs.items():
        if own != net:
            continue
        losses = [one["loss"] for one in tuned(lines, budget)] if after else drawn(lines, budget)["loss"]
        said = predicted(lines, budget, name)
        if said and losses:
            found.append(spearman(said[: len(losses)], losses))
    return found


def of_others(runs: Runs, net: str, budget: str, after: bool) -> list[float]:
    """As `correlations`, of a table fitted to the losses measured in all *other* runs: what they have in common.

    A weight or an input of b bits has the entry c 4^-b, as the variance of rounding has; the c are least squares over the
    runs, in each of which the losses are centred and scaled. Fewer than three runs have none.
    """
    measured = {}
    for run, lines in runs.items():
        losses = [one["loss"] for one in tuned(lines, budget)] if after else drawn(lines, budget)["loss"]
        if run[0] == net and len(losses):
            bits = np.array(lines[f"random {budget}"]["policies"][: len(losses)], np.float64)
            measured[run] = 4.0 ** -bits.reshape(len(losses), -1), np.array(losses)
    found = []
    for run, (variances, losses) in measured.items():
        others = [pair for other, pair in measured.items() if other != run]
        if len(others) < 2:
            return []
        matrix = np.concatenate([x - x.mean(0) for x, _ in others])
        entries = np.linalg.lstsq(matrix, np.concatenate([stats.zscore(y) for _, y in others]), rcond=None)[0]
        found.append(spearman(variances @ entries, losses))
    return found


def joint_and_tuned(runs: Runs, net: str, budget: str) -> list[float]:
    """Rank correlation of the joint model's loss with that after a short fine-tuning, a number a seed."""

    def one(lines):
        found = [each["loss"] for each in tuned(lines, budget)]
        return spearman(drawn(lines, budget)["loss"][: len(found)], found) if found else None

    return of_runs(runs, net, one)


def spread(losses: Sequence[float]) -> float | None:
    """Widest minus narrowest."""
    return float(np.ptp(losses)) if len(losses) else None


def twice(lines: Mapping[str, Any], level: str) -> np.ndarray | None:
    """[N, 2]: losses of the random policies that were fine-tuned twice; None where they are few."""
    again = [one["loss"] for one in tuned(lines, level, "repeat")]
    once = [one["loss"] for one in tuned(lines, level)][: len(again)]
    return np.stack([once, again], -1) if len(again) >= TWICE else None


def of_the_mean(lines: Mapping[str, Any], level: str, name: str) -> float | None:
    """Rank correlation of a prediction with the mean loss of two fine-tunings. name: "joint" for the joint model's loss."""
    losses = twice(lines, level)
    said = drawn(lines, level)["loss"] if name == "joint" else predicted(lines, level, name)
    return None if losses is None or not said else spearman(said[: len(losses)], losses.mean(1))


def twice_table(runs: Runs, net: str) -> str:
    """Rank correlations with the mean loss of two fine-tunings of the same policies, a column a run and level.

    Ceiling: what the true mean would have with a measured one, the root of their reliability.
    """
    found = {
        (seed, level): losses
        for (own, seed), lines in runs.items()
        for level in PREDICTED
        if own == net and (losses := twice(lines, level)) is not None
    }
    rows = [
        ["one fine-tuning with the other", *(f"{spearman(*losses.T):.2f}" for losses in found.values())],
        ["ceiling", *(f"{np.sqrt(reliability(losses)):.2f}" for losses in found.values())],
    ]
    for name, text in {"joint": "the joint model's loss itself", **PREDICTORS}.items():
        cells = [of_the_mean(runs[net, seed], level, name) for seed, level in found]
        if any(one is not None for one in cells):
            rows.append([text, *("" if one is None else f"{one:.2f}" for one in cells)])
    heads = (f"seed {seed}, {level} ({len(losses)})" for (seed, level), losses in found.items())
    return table(["predicted by", *heads], rows)


def ceilings(runs: Runs, net: str) -> list[list[str]]:
    """Rows of the table: noise ceilings, and what the joint model's own loss predicts."""

    def before(budget):
        return of_runs(
            runs, net, lambda lines: reliability(halves) if (halves := drawn(lines, budget)["halves"]) else None
        )

    def after(budget):
        return of_runs(
            runs,
            net,
            lambda lines: reliability([one["halves"] for one in found]) if (found := tuned(lines, budget)) else None,
        )

    return [
        ["noise ceiling (reliability)", *(of_two(f(b), 3) for b in PREDICTED for f in (before, after))],
        [
            "the joint model's loss itself",
            *(x for b in PREDICTED for x in ("1", of_two(joint_and_tuned(runs, net, b)))),
        ],
    ]


def of_two(values: Sequence[float], digits: int = 2) -> str:
    """A cell of the tables of predictions, which show what two runs have at least; in brackets how many, but for three."""
    return cell(values, digits) + (f" ({len(values)})" if len(values) != 3 else "") if len(values) >= 2 else ""


def prediction_table(runs: Runs, net: str) -> str:
    head = ["predicted by", *(f"{b}: {what}" for b in PREDICTED for what in ("joint loss", "fine-tuned"))]
    rows = ceilings(runs, net)
    for name, text in PREDICTORS.items():
        cells = [of_two(correlations(runs, net, b, name, after)) for b in PREDICTED for after in (False, True)]
        if any(cells):
            rows.append([text, *cells])
    cells = [of_two(of_others(runs, net, b, after)) for b in PREDICTED for after in (False, True)]
    rows.append(["control: fitted to the other seeds' measured losses", *cells])
    return table(head, rows)


def cheaper_table(runs: Runs, net: str) -> str:
    """How few sampled policies will do. Passes: of 1,536 samples a policy, forward, beside joint training's."""
    rows = []
    for name, count in (*((f"sampled_{count}", count) for count in (30, 60, 120)), ("sampled", 240)):
        cells = [cell(correlations(runs, net, b, name, False)) for b in PREDICTED]
        rows.append([str(count), f"{count * 1536 / 3 / 54_000:.2f}", *cells])
    return table(["policies", "passes", *(f"{b}: joint loss" for b in PREDICTED)], rows)


def values(runs: Runs, nets: Sequence[str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables."""
    found = {}
    for net in nets:
        found[f"prediction {net}"] = prediction_table(runs, net)
        found[f"cheaper {net}"] = cheaper_table(runs, net)
        found[f"twice {net}"] = twice_table(runs, net)
        # Of single later runs fewer policies were drawn, for the noise of fine-tuning.
        seeds = of_runs(runs, net, lambda lines: len(drawn(lines, "W3A3")["loss"]) or None)
        found[f"seeds {net}"] = str(len(seeds))
        for budget in PREDICTED:
            joint = of_runs(runs, net, lambda lines, b=budget: spread(drawn(lines, b)["loss"]))
            after = of_runs(runs, net, lambda lines, b=budget: spread([one["loss"] for one in tuned(lines, b)]))
            found[f"spread {net} {budget}"] = cell(joint)
            found[f"tuned spread {net} {budget}"] = cell(after)
            for late, word in ((False, "joint"), (True, "tuned")):
                found[f"others {net} {budget} {word}"] = cell(of_others(runs, net, budget, late))
            found[f"joint-tuned {net} {budget}"] = cell(joint_and_tuned(runs, net, budget))
            for name in PREDICTORS:
                found[f"mean {net} {budget} {name}"] = cell(
                    of_runs(runs, net, lambda lines, b=budget, n=name: of_the_mean(lines, b, n))
                )
                for late, word in ((False, "joint"), (True, "tuned")):
                    found[f"rho {net} {budget} {name} {word}"] = cell(correlations(runs, net, budget, name, late))
    return found
