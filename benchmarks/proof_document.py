"""docs/results.md and its figures from the lines of benchmarks.proof: every number in it is computed here.

python -m benchmarks.proof_document --collect runs/proof     gathers the runs' lines into docs/results/proof.jsonl
python -m benchmarks.proof_document                          writes docs/results.md and docs/results/*.png
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import proof_alpha, proof_cheaper, proof_paper
from benchmarks.proof_lines import BUDGETS, LEVELS, PREDICTED, THIRDS, best_uniform, result
from benchmarks.proof_statistics import Runs, cell, of_runs, reliability, spearman, table

LINES, DOCUMENT = Path("docs/results/proof.jsonl"), Path("docs/results.md")
CHEAPER = LINES.with_name("cheaper.jsonl")
NAMES = {"resnet8": "ResNet-8", "mobilenetv1": "MobileNetV1-0.25"}
DEFAULT = "output_fisher_third"
SEEDS = 3  # an accuracy is shown where so many seeds have it
# From this seed on, runs that were trained after the seeds before had pointed to output-Fisher.
FRESH = {"resnet8": 5, "mobilenetv1": 3}
# Of these cheaper joint trainings alone were measured: ResNet-8 and a ViT on digits, and ResNet-8 with batches of 30.
DIGITS = ("digits", "digits_vit", "digits_small")
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


def read(path: Path) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """{(net, seed): {key: line}} in the order of nets and seeds."""
    runs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for text in path.read_text().splitlines():
        one = json.loads(text)
        runs.setdefault((one["net"], one["seed"]), {})[one["key"]] = one
    return dict(sorted(runs.items(), key=lambda item: ([*NAMES, *DIGITS].index(item[0][0]), item[0][1])))


def collect(root: Path, path: Path) -> None:
    """All runs' lines in one file, net and seed added. Policies of the samples are left out: they are many."""
    gather(root, "cheaper.jsonl", path.with_name(CHEAPER.name))
    texts = []
    for file in sorted(root.glob("*/seed*/lines.jsonl")):
        where = {"net": file.parts[-3], "seed": int(file.parts[-2][4:])}
        if (table := file.with_name("importance.json")).exists():
            one = json.loads(table.read_text())
            layers = [layer["path"] for layer in one["layers"] if layer["searched"]]
            kept = {name: one[name] for name in ("bit_widths", "alpha", "weight", "activation")}
            texts.append(json.dumps({**where, "key": "indicators", "layers": layers, **rounded(kept)}))
        for text in file.read_text().splitlines():
            one = json.loads(text)
            if one["key"].startswith("samples "):
                one = {"key": one["key"], "count": len(one["loss"])}
            texts.append(json.dumps({**where, **rounded(one)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n")


def gather(root: Path, name: str, path: Path) -> None:
    """The runs' files of one name in one file, net and seed added."""
    texts = []
    for file in sorted(root.glob(f"*/seed*/{name}")):
        where = {"net": file.parts[-3], "seed": int(file.parts[-2][4:])}
        texts += [json.dumps({**where, **rounded(json.loads(text))}) for text in file.read_text().splitlines()]
    path.write_text("\n".join(texts) + "\n")


def rounded(value: Any) -> Any:
    """Floats to seven digits: what float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ---- prediction ---------------------------------------------------------------------------------------------------


def tuned(lines: Mapping[str, Any], budget: str, key: str = "tuned") -> list[dict[str, Any]]:
    """The lines of the random policies that were fine-tuned, in the order of the policies. key: "repeat", once more."""
    found = []
    while f"{key} {budget} {len(found)}" in lines:
        found.append(lines[f"{key} {budget} {len(found)}"])
    return found


def drawn(lines: Mapping[str, Any], budget: str) -> Mapping[str, Any]:
    """The line of the random policies at a budget; a run of which accuracies alone were measured has none."""
    return lines.get(f"random {budget}", {"loss": [], "halves": []})


def correlations(runs: Runs, net: str, budget: str, name: str, after: bool) -> list[float]:
    """Rank correlation of predicted harm and measured loss, a number a seed. after: a short fine-tuning."""
    found = []
    for (own, _), lines in runs.items():
        if own != net:
            continue
        losses = [one["loss"] for one in tuned(lines, budget)] if after else drawn(lines, budget)["loss"]
        said = lines.get(f"predicted {budget} {name}", {}).get("values")
        if said is None and name in THIRDS:
            said = proof_alpha.third(lines, budget, THIRDS[name])
        if said and losses:
            found.append(spearman(said[: len(losses)], losses))
    return found


def joint_and_tuned(runs: Runs, net: str, budget: str) -> list[float]:
    """Rank correlation of the joint model's loss with that after a short fine-tuning, a number a seed."""

    def one(lines):
        found = [each["loss"] for each in tuned(lines, budget)]
        return spearman(drawn(lines, budget)["loss"][: len(found)], found) if found else None

    return of_runs(runs, net, one)


def tuned_twice(runs: Runs, net: str, budget: str) -> list[float]:
    """Rank correlation of the losses after a short fine-tuning with those after one on other batches, a number a seed."""

    def one(lines):
        again = [each["loss"] for each in tuned(lines, budget, "repeat")]
        return spearman([each["loss"] for each in tuned(lines, budget)][: len(again)], again) if again else None

    return of_runs(runs, net, one)


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
    """A cell of the tables of predictions, which show what two runs have at least."""
    return cell(values, digits) if len(values) >= 2 else ""


def prediction_table(runs: Runs, net: str) -> str:
    head = ["predicted by", *(f"{b}: {what}" for b in PREDICTED for what in ("joint loss", "fine-tuned"))]
    rows = ceilings(runs, net)
    for name, text in PREDICTORS.items():
        cells = [of_two(correlations(runs, net, b, name, after)) for b in PREDICTED for after in (False, True)]
        if any(cells):
            rows.append([text, *cells])
    return table(head, rows)


def cheaper_table(runs: Runs, net: str) -> str:
    """How few sampled policies will do. Passes: of 1,536 samples a policy, forward, beside joint training's."""
    rows = []
    for name, count in (*((f"sampled_{count}", count) for count in (30, 60, 120)), ("sampled", 240)):
        cells = [cell(correlations(runs, net, b, name, False)) for b in PREDICTED]
        rows.append([str(count), f"{count * 1536 / 3 / 54_000:.2f}", *cells])
    return table(["policies", "passes", *(f"{b}: joint loss" for b in PREDICTED)], rows)


# ---- accuracy -----------------------------------------------------------------------------------------------------


def differences(runs: Runs, net: str, budget: str, name: str, seeds: int = SEEDS) -> list[float]:
    """Test accuracy minus the best uniform policy's, a number a seed; none where fewer than `seeds` have it."""
    found = proof_paper.paired(runs, net, budget, name, "best uniform")
    return found if len(found) >= seeds else []


def measured_budgets(runs: Runs, net: str) -> list[str]:
    """The budgets at which uniform policies were fine-tuned."""
    return [b for b in BUDGETS if of_runs(runs, net, lambda lines, b=b: best_uniform(lines, b))]


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
            ("output_fisher", "learned", LEVELS),
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


# ---- document -----------------------------------------------------------------------------------------------------


def document(runs: Runs, cheaper: Runs) -> str:
    """docs/results.md."""
    nets = [net for net in NAMES if any(own == net for own, _ in runs)]
    seeds = {net: len(of_runs(runs, net, lambda lines: len(drawn(lines, "W3A3")["loss"]) or None)) for net in nets}
    template = (Path(__file__).parent / "proof_document.md").read_text()
    names = {net: NAMES[net] for net in nets}
    values = proof_paper.values(runs, names, tuple(BUDGETS)) | proof_cheaper.values(cheaper, (*names, *DIGITS))
    values["pooled"] = pooled_table(runs, nets)
    values["alphas"] = proof_alpha.alpha_table(runs, names)
    values |= leads(runs, nets)
    for net in nets:
        values |= {
            f"prediction {net}": prediction_table(runs, net),
            f"cheaper {net}": cheaper_table(runs, net),
            f"accuracy {net}": accuracy_table(runs, net),
            f"against {net}": against_table(runs, net, DEFAULT, "the default"),
            f"learned against {net}": against_table(runs, net, "learned", CONTESTANTS["learned"]),
            f"seeds {net}": str(seeds[net]),
        }
        for budget in PREDICTED:
            losses = of_runs(
                runs, net, lambda lines, b=budget: float(np.ptp(found)) if (found := drawn(lines, b)["loss"]) else None
            )
            values[f"spread {net} {budget}"] = cell(losses)
            values[f"joint-tuned {net} {budget}"] = cell(joint_and_tuned(runs, net, budget))
            for name in PREDICTORS:
                for after, word in ((False, "joint"), (True, "tuned")):
                    values[f"rho {net} {budget} {name} {word}"] = cell(correlations(runs, net, budget, name, after))
        for budget in BUDGETS:
            for name in CONTESTANTS:
                gains = differences(runs, net, budget, name) or differences(runs, net, budget, name, 1)
                values[f"gain {net} {budget} {name}"] = cell(gains, 2, 100, sign=True)
                ahead = proof_paper.paired(runs, net, budget, DEFAULT, name)
                values[f"default over {net} {budget} {name}"] = cell(ahead, 2, 100, sign=True)
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", value or "not measured")
    if "{{" in template:
        raise ValueError(f"no value for {template[template.index('{{') :][:60]}")
    return template


def figure(runs: Runs, path: Path) -> None:
    """Predicted harm against measured loss, seed 0 of each net, at W3A3's level: published and sampled, each by rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    nets = [net for net in NAMES if (net, 0) in runs]
    names = ("learned", "constant", "sampled")
    figure, axes = plt.subplots(len(nets), len(names), figsize=(9, 3 * len(nets)), squeeze=False, sharey="row")
    for row, net in zip(axes, nets, strict=True):
        lines = runs[net, 0]
        losses = lines["random W3A3"]["loss"]
        for ax, name in zip(row, names, strict=True):
            values = lines[f"predicted W3A3 {name}"]["values"]
            ax.scatter(values, losses, s=10, color="#2a6f97")
            ax.set_title(f"{NAMES[net]}, {name}: rank correlation {spearman(values, losses):.2f}", fontsize=8)
            ax.set_xlabel("predicted harm", fontsize=8)
            ax.tick_params(labelsize=7)
        row[0].set_ylabel("validation loss, joint model", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, help="the root of benchmarks.proof's runs")
    arguments = parser.parse_args(argv)
    if arguments.collect:
        collect(arguments.collect, LINES)
    runs = read(LINES)
    DOCUMENT.write_text(document(runs, read(CHEAPER)))
    proof_paper.indicator_figure(runs, NAMES, LINES.parent / "indicators.png")
    figure(runs, LINES.parent / "prediction.png")
    print(DOCUMENT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
