"""Writes report.md and its figures, each whole or not at all."""

from pathlib import Path

from mpq_jax.files import whole, write_text
from mpq_jax.report import tables
from mpq_jax.report.tables import Report


def write(report: Report, directory: str | Path) -> Path:
    """Writes <directory>/report.md and PNGs under <directory>/figures/. -> the path of report.md"""
    from mpq_jax.report import figures

    directory = Path(directory)
    drawn = {
        "bits": (figures.bits_per_layer, "Bits of weights and activations of every layer"),
        "importance": (figures.importance_maps, "Heat maps of the importance by layer and bit-width"),
    }
    if report.importance.pair is None or report.indicators is not None:
        drawn["indicators"] = (figures.all_indicators, "Step sizes of all layers at all bit-widths")
        if report.depthwise_pairs:
            drawn["depthwise"] = (figures.depthwise_against_pointwise, "Step sizes of depthwise and pointwise layers")
    if report.grids:
        drawn["grids"] = (figures.weight_grids, "Weight histograms of two layers with their grids")
    links = {}
    for name, (draw, alt) in drawn.items():
        figure = draw(report)
        with whole(directory / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110)
        links[name] = f"![{alt}](figures/{name}.png)"
    path = directory / "report.md"
    write_text(path, markdown(report, links))
    return path


def markdown(report: Report, links: dict[str, str]) -> str:
    """The whole report as Markdown; links: figure name -> image link."""
    alpha = report.importance.alpha
    outliers = [f"- `{path}`: {kind} at {bits} bits" for path, kind, bits in report.outliers]
    depthwise = links.get("depthwise") or "This network has no searched depthwise layer with a pointwise one behind it."
    pairs = [f"{i + 1}. `{a}`, `{b}`" for i, (a, b) in enumerate(report.depthwise_pairs)]
    blocks = [
        f"# {report.title}",
        "## Accuracy",
        "On the test set, read once. Every policy was fine-tuned alike.",
        tables.accuracy_markdown(report),
        "## Budgets",
        tables.budgets_markdown(report) if report.used else "The policy was given without a budget.",
        "## Bits per layer",
        links["bits"],
        tables.policy_markdown(report),
        "## Importance",
        f"Criterion: {report.importance.criterion}" + (f", alpha {alpha:g}." if alpha is not None else "."),
        links["importance"],
        links.get("indicators", ""),
        "### Depthwise against pointwise layers",
        depthwise,
        "\n".join(pairs),
        "### Weights and their grids",
        links.get("grids", "No layer has one grid for all its weights."),
        "### Outliers",
        "Harm that fell when bits were taken away, repaired by isotonic regression over bit-widths:"
        if outliers
        else "None: harm never fell when bits were taken away.",
        "\n".join(outliers),
        "## Made with",
        tables.markdown_table(["what", "value"], [[k, f"`{v}`"] for k, v in report.provenance.items()]),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"
