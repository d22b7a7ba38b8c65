"""The report: numbers against hand counts, links, figures, and nothing half-written."""

import re

import numpy as np
import pytest
from PIL import Image

from mpq_jax import Bits, Importance, Layer, report
from mpq_jax.report import figures, tables


def made(layers=5, depthwise=True):
    rng = np.random.default_rng(0)
    table = (Layer("stem/conv", 144, 1000, False, Bits(8, 8)),)
    table += tuple(
        Layer(f"unit{i // 2}/{'pointwise' if i % 2 else 'depthwise'}", 100 * (i + 1), 2000 * (i + 1), True)
        for i in range(layers)
    )
    table += (Layer("head", 640, 640, False, Bits(32, 32)),)
    widths = (2, 3, 4)
    weight, activation = (np.sort(rng.random((layers, 3)))[:, ::-1] + 0.01 for _ in range(2))
    mixed = {layer.path: layer.bits or Bits(2 + i % 3, 3) for i, layer in enumerate(table)}
    uniform = {layer.path: layer.bits or Bits(3, 3) for layer in table}
    grids = []
    for path in ("unit0/depthwise", "unit1/pointwise"):
        values = rng.normal(size=500)
        grids.append(report.Grid(path, 3, 0.5, values, np.clip(np.round(values / 0.5), -4, 3).astype(int)))
    rows = [
        report.AccuracyRow("float", 0.9321, None, 1, 0.2, sum(ly.macs for ly in table) * 1024, 40000),
        report.AccuracyRow("uniform W3A3", 0.9, None, 1, 0.3, 123456, 4000),
        report.AccuracyRow("random (mean of 3)", 0.88, 0.0123, 3, 0.31, 123000, 4100),
        report.AccuracyRow("mixed", 0.91, None, 1, 0.25, 121000, 3900),
    ]
    return report.Report(
        title="made",
        importance=Importance("learned", widths, widths, table, weight, activation, alpha=0.8),
        policies={"uniform W3A3": uniform, "mixed": mixed},
        used={"bitops": (121000, 125000, "BitOps"), "size": (3900, 4096, "bytes")},
        accuracy=rows,
        grids=grids,
        depthwise_pairs=[("unit0/depthwise", "unit0/pointwise")] if depthwise else [],
        indicators={"weight": weight.tolist(), "activation": activation.tolist()},
        initial={"weight": (weight * 1.2).tolist(), "activation": (activation * 0.9).tolist()},
        outliers=[("unit0/depthwise", "weight", 3)],
        provenance={"jax": "1.2.3"},
    )


@pytest.mark.parametrize("layers, depthwise", [(2, False), (52, True)])
def test_written_whole(tmp_path, layers, depthwise):
    """Every link leads to a PNG that can be opened; no other file is left."""
    path = report.write(made(layers, depthwise), tmp_path)
    text = path.read_text()
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(links) == (5 if depthwise else 4)
    for link in links:
        with Image.open(tmp_path / link) as image:
            assert image.format == "PNG" and image.size[0] > 500
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")} == {"report.md", *links}
    assert ("no searched depthwise layer" in text) != depthwise


def test_numbers(tmp_path):
    """Shares, percentages and bits in the Markdown, counted by hand."""
    one = made()
    text = report.write(one, tmp_path).read_text()
    assert "| random (mean of 3) | 88.00 ± 1.23 | 0.3100 | 123.00 K | 98.4 | 4.00 KB |" in text
    assert "| bitops | 121.00 K | 125.00 K | 96.80 |" in text and "| size | 3.81 KB | 4.00 KB | 95.21 |" in text
    mixed = one.policies["mixed"]
    bitops = {ly.path: ly.macs * mixed[ly.path].w * mixed[ly.path].a for ly in one.importance.layers}
    for layer in one.importance.layers:
        (line,) = [row for row in text.splitlines() if row.startswith(f"| `{layer.path}`")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{layer.params:,}" and cells[2] == f"{layer.macs:,}"
        bits = mixed[layer.path]
        assert cells[4] == ("float" if bits.w == 32 else f"W{bits.w}A{bits.a}")
        assert float(cells[5]) == pytest.approx(100 * bitops[layer.path] / sum(bitops.values()), abs=0.06)
    assert "`unit0/depthwise`: weight at 3 bits" in text and "alpha 0.8" in text


def test_counts_per_level():
    grid = made().grids[0]
    levels, counts = figures.code_counts(grid)
    np.testing.assert_array_equal(counts, np.bincount(grid.codes + 4, minlength=8))
    assert levels.tolist() == list(range(-4, 4)) and counts.sum() == 500


def test_bars_show_the_policy():
    """The heights of the bars are the bits, float cut at ten."""
    one = made()
    (axes,) = figures.bits_per_layer(one).axes
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    mixed = [one.policies["mixed"][layer.path] for layer in one.importance.layers]
    assert heights == [[min(b[k], 10) for b in mixed] for k in range(2)]


def test_pair_table_and_no_budget(tmp_path):
    one = made()
    pair = np.random.default_rng(1).random((5, 3, 3))
    table = one.importance._replace(weight=None, activation=None, pair=pair, alpha=None)
    text = report.write(one._replace(importance=table, indicators=None, initial=None, used={}), tmp_path).read_text()
    assert "without a budget" in text and "indicators.png" not in text


def test_nothing_half_written(tmp_path, monkeypatch):
    def broken(_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(figures, "importance_maps", broken)
    with pytest.raises(RuntimeError):
        report.write(made(), tmp_path)
    assert not (tmp_path / "report.md").exists()
    assert all(not p.name.startswith(".") for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("width", [None, 60, 40])
def test_terminal_table(width):
    text = report.terminal_table(made(52), width)
    assert max(map(len, text.splitlines())) <= (width or 60)
    assert "88.00 ± 1.23" in text and "96.80 %" in text
    assert sum(line.strip().endswith(("A3", "A8 fixed", "float fixed")) for line in text.splitlines()) == 54
    assert tables.percent(made().accuracy[0]) == "93.21"
