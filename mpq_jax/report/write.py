"""Writes report.html, report.md and its figures, each whole or not at all."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpq_jax.files import whole, write_text
from mpq_jax.report import figures, page, tables
from mpq_jax.report.tables import Report

NO_DEPTHWISE = "This network has no searched depthwise layer with a searched pointwise one behind it."


def write(report: Report, directory: str | Path) -> Path:
    """Writes <directory>/report.html, report.md and PNGs under figures/. -> the path of report.md

    All is drawn before anything is written, and report.md is last: where a figure fails, an earlier report stays.
    """
    directory = Path(directory)
    images, links = {}, {}
    for name, (draw, alt) in _drawings(report).items():
        buffer = io.BytesIO()
        draw(report).savefig(buffer, format="png", dpi=110)
        images[name] = buffer.getvalue()
        links[name] = f"![{alt}](figures/{name}.png)"
    text, whole_page = markdown(report, links), page.html(report)
    for name, image in images.items():
        with whole(directory / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    write_text(directory / "report.html", whole_page)
    path = directory / "report.md"
    write_text(path, text)
    return path


def _drawings(report: Report) -> dict[str, tuple[Callable[[Report], Any], str]]:
    """Figure name -> (the function that draws it, the alternative text)."""
    drawings: dict[str, tuple[Callable[[Report], Any], str]] = {
        "bits": (
            figures.bits_per_layer,
            "Bars: weight and activation bits of every layer in the mixed policy, in execution order",
        ),
        "importance": (
            figures.importance_maps,
            "Heat maps: importance of every searched layer at every bit-width, weights above activations",
        ),
    }
    if report.indicators is not None or report.importance.pair is None:
        what = "step sizes" if report.indicators is not None else "importance"
        drawings["indicators"] = (figures.all_indicators, f"Lines: {what} over the layers, one line for each bit-width")
        if tables.searched_pairs(report):
            drawings["depthwise"] = (
                figures.depthwise_against_pointwise,
                f"Bars: {what} of each depthwise layer beside the pointwise layer behind it, at several bit-widths",
            )
    if report.grids:
        drawings["grids"] = (
            figures.weight_grids,
            "Histograms: float weights of "
            + " and ".join(grid.path for grid in report.grids)
            + " with their grids, and the number of weights mapped to each level",
        )
    return drawings


def markdown(report: Report, links: Mapping[str, str]) -> str:
    """The whole report as Markdown; links: figure name -> image link."""
    blocks = [
        f"# {report.title}",
        *_accuracy(report),
        "## Budgets",
        tables.budgets_markdown(report) if report.used else "The policy was given without a budget.",
        "## Bits per layer",
        links["bits"],
        tables.policy_markdown(report),
        *_importance(report, links),
        "### Depthwise against pointwise layers",
        *_depthwise(report, links),
        "### Weights and their grids",
        links.get("grids", "No layer has one grid for all its weights."),
        "### Outliers",
        *_outliers(report),
        "## Made with",
        tables.markdown_table(
            ["what", "value"], [[k, f"`{v.strip()}`"] for k, v in report.provenance.items()], align="---"
        ),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _accuracy(report: Report) -> list[str]:
    several = "± is the standard deviation over the policies of a row; its other numbers are means."
    first = "Where a row is a mean over several policies, the tables below show the first of them."
    mean = any(row.runs > 1 for row in report.accuracy)
    return [
        "## Accuracy",
        "On the test set, read once. Every policy was fine-tuned alike.",
        tables.accuracy_markdown(report),
        f"{several} {first}" if mean else "",
    ]


def _importance(report: Report, links: Mapping[str, str]) -> list[str]:
    alpha = report.importance.alpha
    return [
        "## Importance",
        f"Criterion: {report.importance.criterion}" + (f", alpha {alpha:.4g}." if alpha is not None else "."),
        "The heat maps show the mean over the other's bit-widths." if report.importance.pair is not None else "",
        links["importance"],
        links.get("indicators", ""),
    ]


def _depthwise(report: Report, links: Mapping[str, str]) -> list[str]:
    pairs = tables.searched_pairs(report)
    if not pairs:
        return [NO_DEPTHWISE]
    if "depthwise" not in links:
        return ["A table of pairs of bit-widths has no one number a layer to compare."]
    return [links["depthwise"], "\n".join(f"{i + 1}. `{a}`, `{b}`" for i, (a, b) in enumerate(pairs))]


def _outliers(report: Report) -> list[str]:
    if not report.outliers:
        return ["None: harm never fell when bits were taken away."]
    return [
        "Harm that fell when bits were taken away, repaired by isotonic regression over bit-widths:",
        "\n".join(f"- `{path}`: {kind} at {bits} bits" for path, kind, bits in report.outliers),
    ]
