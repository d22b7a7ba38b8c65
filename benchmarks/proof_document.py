"""docs/results.md and its figures from the lines of benchmarks.proof: every number in it is computed here.

python -m benchmarks.proof_document --collect runs/proof     gathers the runs' lines into docs/results/proof.jsonl
python -m benchmarks.proof_document                          writes docs/results.md and docs/results/*.png
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import proof_accuracy, proof_alpha, proof_cheaper, proof_firm, proof_paper, proof_prediction
from benchmarks.proof_lines import BUDGETS, NAMES, kept
from benchmarks.proof_statistics import Runs, spearman

LINES, DOCUMENT = Path("docs/results/proof.jsonl"), Path("docs/results.md")
CHEAPER = LINES.with_name("cheaper.jsonl")
# Of these cheaper joint trainings alone were measured: ResNet-8 and a ViT on digits, and ResNet-8 with batches of 30.
DIGITS = ("digits", "digits_vit", "digits_small")


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


# ---- document -----------------------------------------------------------------------------------------------------


def document(runs: Runs, cheaper: Runs) -> str:
    """docs/results.md."""
    nets = [net for net in NAMES if any(own == net for own, _ in runs)]
    template = (Path(__file__).parent / "proof_document.md").read_text()
    names = {net: NAMES[net] for net in nets}
    better = {run: kept(lines) for run, lines in runs.items()}
    better = {run: lines for run, lines in better.items() if any(key.startswith("finetuned ") for key in lines)}
    values = {
        **{f"kept {name}": value for name, value in proof_accuracy.values(better, nets).items()},
        **proof_prediction.values(runs, nets),
        **proof_accuracy.values(runs, nets),
        **proof_firm.values(runs, better, names),
        **proof_alpha.values(runs, names),
        **proof_paper.values(runs, names, tuple(BUDGETS)),
        **proof_cheaper.values(cheaper, (*names, *DIGITS)),
    }
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
