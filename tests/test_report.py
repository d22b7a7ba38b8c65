"""The report: numbers against hand counts, links, figures, and nothing half-written."""

import itertools
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq_jax import Bits, Importance, Layer, report
from mpq_jax.report import figures, page, tables
from mpq_jax.report.write import markdown

DRAWN = ("bits_per_layer", "importance_maps", "all_indicators", "depthwise_against_pointwise", "weight_grids")


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
        grids.append(report.WeightGrid(path, 3, 0.5, values, np.clip(np.round(values / 0.5), -4, 3).astype(int)))
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
        provenance={"jax": "1.2.3", "command": "train.py | tee log\n"},
    )


LINKS = {"bits": "", "importance": ""}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A directory with a whole report in it."""
    return report.write(made(), tmp_path_factory.mktemp("old")).parent


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, depthwise", [(1, False), (52, True)])
def test_written_whole(tmp_path, layers, depthwise):
    """Every link is relative and leads to a PNG that can be opened; no other file is left; nothing leads outside."""
    path = report.write(made(layers, depthwise), tmp_path)
    text = path.read_text()
    links = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(", text)) == (5 if depthwise else 4)
    for link in links:
        with Image.open(tmp_path / link) as image:
            image.load()
            assert image.format == "PNG" and image.size[0] > 500 and len(np.unique(np.asarray(image))) > 10
    assert files(tmp_path) == {"report.md", "report.html", *links} and path == tmp_path / "report.md"
    assert ("no searched depthwise layer" in text) != depthwise
    assert "://" not in text


@pytest.mark.parametrize("name", [*DRAWN, "html"])
def test_nothing_half_written(old, tmp_path, monkeypatch, name):
    """Where one figure or the page fails, nothing of the new report is written, and an earlier report stays."""

    def broken(_):
        raise RuntimeError("no ink")

    def quick(_):
        return figures._figure(1, 1)

    before = {file: (old / file).read_bytes() for file in files(old)}
    assert len(before) == 7
    for each in DRAWN:
        monkeypatch.setattr(figures, each, broken if each == name else quick)
    monkeypatch.setattr(page, "html", broken if name == "html" else page.html)
    for directory in (tmp_path, old):
        with pytest.raises(RuntimeError, match="no ink"):
            report.write(made()._replace(title="another"), directory)
    assert files(tmp_path) == set()
    assert {file: (old / file).read_bytes() for file in files(old)} == before


def test_light_imports(tmp_path):
    """The terminal table needs neither JAX nor matplotlib; drawing leaves the caller's backend alone."""
    code = """
import sys, mpq_jax.report
assert not {"jax", "flax", "matplotlib"} & set(sys.modules)
import matplotlib
matplotlib.use("svg")
from tests.test_report import figures, made
figures.bits_per_layer(made()).savefig(sys.argv[1])
assert matplotlib.get_backend() == "svg" and "jax" not in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "bits.png")], check=True, timeout=60, cwd=root)
    assert (tmp_path / "bits.png").stat().st_size > 0


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_numbers(old):
    """Shares, percentages and bits in the Markdown, counted by hand."""
    one = made()
    text = (old / "report.md").read_text()
    assert "| random (mean of 3) | 88.00 ± 1.23 | 0.3100 | 123.00 K | 98.4 | 4.00 KB |" in text
    assert "| bitops | 121.00 K | 125.00 K | 96.80 | 121,000 of 125,000 |" in text
    assert "| size | 3.81 KB | 4.00 KB | 95.21 | 3,900 of 4,096 |" in text
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
    assert "| jax | `1.2.3` |" in text and r"| command | `train.py \| tee log` |" in text


def test_tables_are_whole(old):
    """Every table has as many cells in each of its lines as in its header."""
    text = (old / "report.md").read_text()
    counts = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in text.splitlines() if line.startswith("|")]
    # In the order of the report: accuracy, budgets, policy, provenance.
    assert [(k, len(list(group))) for k, group in itertools.groupby(counts)] == [(6, 6), (5, 4), (6, 9), (2, 4)]


@pytest.mark.parametrize(
    "used, shown",
    [
        ({"bitops": (1, 125000, "BitOps"), "size": (1, 4096, "bytes")}, "98.8"),  # 123456 of 125000
        ({"size": (1, 4096, "bytes"), "bitops": (1, 125000, "BitOps")}, "97.7"),  # 4000 of 4096
        ({"latency": (1.5, 2.0, "ms"), "size": (1, 8000, "bytes")}, "50.0"),
        ({"latency": (1.5, 2.0, "ms")}, ""),
        ({}, ""),
    ],
)
def test_share_of_the_first_budget(used, shown):
    one = made()._replace(used=used)
    assert tables.share(one.accuracy[1], one) == shown
    text = markdown(one, LINKS)
    assert f"| {shown} | 3.91 KB |" in text
    text += report.terminal_table(one)
    assert ("without a budget" in text) == (not used) and ("1.500 ms of 2.000 ms (75.00 %)" in text) == (
        "latency" in used
    )


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_counts_per_level(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.clip(np.random.default_rng(bits).normal(size=500).round(), low, high).astype(np.int32)
    grid = report.WeightGrid("a", bits, 0.5, codes * 0.5, codes)
    levels, counts = figures.code_counts(grid)
    np.testing.assert_array_equal(counts, np.bincount(codes - low, minlength=2**bits))
    assert levels.tolist() == list(range(low, high + 1)) and counts.sum() == 500
    beyond = grid._replace(codes=np.array([low - 1, high + 2, 0]))
    levels, counts = figures.code_counts(beyond)
    assert levels[0] == low - 1 and levels[-1] == high + 2 and counts.sum() == 3


# ---- what the figures show -----------------------------------------------------------------------------------------


def test_bars_show_the_policy():
    """The heights of the bars are the bits, float one above the widest and named; fixed layers are grey."""
    one = made()
    (axes,) = figures.bits_per_layer(one).axes
    heights = [[bar.get_height() for bar in group] for group in axes.containers]
    mixed = [one.policies["mixed"][layer.path] for layer in one.importance.layers]
    assert heights == [[9 if b[k] == 32 else b[k] for b in mixed] for k in range(2)]
    assert axes.get_yticklabels()[9].get_text() == "float"
    colours = [[bar.get_facecolor() for bar in group] for group in axes.containers]
    for row in colours:
        assert [len(set(c[:3])) == 1 for c in row] == [not layer.searched for layer in one.importance.layers]


def test_names_are_no_formulas(tmp_path):
    """matplotlib takes what stands between two "$" for mathematics."""
    one = made()
    layers = [layer._replace(path=f"mix$a_$b{i}^") for i, layer in enumerate(one.importance.layers)]
    renamed = {old.path: new.path for old, new in zip(one.importance.layers, layers, strict=True)}
    policies = {name: {renamed[path]: bits for path, bits in p.items()} for name, p in one.policies.items()}
    named = one._replace(
        importance=one.importance._replace(layers=tuple(layers)),
        policies=policies,
        grids=tuple(grid._replace(path="mix$a_$b^") for grid in one.grids),
    )
    for draw in (figures.bits_per_layer, figures.importance_maps, figures.weight_grids):
        draw(named).savefig(tmp_path / "f.png")


def test_figures_show_their_tables():
    """Heat maps hold the importance, lines the indicators (dashed: the start), bars the pairs, lines the grids."""
    one = made()
    maps = [axes for axes in figures.importance_maps(one).axes if axes.images]
    for axes, values in zip(maps, (one.importance.weight, one.importance.activation), strict=True):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), values.T)
        assert axes.images[0].norm.__class__.__name__ == "LogNorm"
    for axes, kind in zip(figures.all_indicators(one).axes, ("weight", "activation"), strict=True):
        for style, source in (("-", one.indicators), ("--", one.initial)):
            drawn = [line.get_ydata() for line in axes.lines if line.get_linestyle() == style]
            np.testing.assert_allclose(np.transpose(drawn), source[kind])
        assert axes.get_yscale() == "log"
    for k, axes in enumerate(figures.depthwise_against_pointwise(one).axes):
        heights = [group[0].get_height() for group in axes.containers]
        np.testing.assert_allclose(heights, [one.indicators["weight"][row][k] for row in (0, 1)])
    left, right, *_ = figures.weight_grids(one).axes
    assert [line.get_xdata()[0] for line in left.lines] == [level * 0.5 for level in range(-4, 4)]
    counts = Counter(one.grids[0].codes.tolist())
    assert [text.get_text() for text in right.texts] == [str(counts[level]) for level in range(-4, 4)]


@pytest.mark.parametrize("draw", [figures.bits_per_layer, figures.importance_maps, figures.all_indicators])
@pytest.mark.parametrize("layers", [1, 58])
def test_labels_do_not_overlap(draw, layers):
    """Names of up to 60 layers stand side by side, long ones too, inside the picture, and leave room for the panels."""
    one = made(layers)
    longer = {ly.path: f"encoder/transformer/attention/of/{ly.path}/projection" for ly in one.importance.layers}
    table = one.importance._replace(layers=tuple(ly._replace(path=longer[ly.path]) for ly in one.importance.layers))
    mixed = {longer[path]: bits for path, bits in one.policies["mixed"].items()}
    figure = draw(one._replace(importance=table, policies={"mixed": mixed}))
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    boxes = [label.get_window_extent() for label in panels[-1].get_xticklabels()]
    assert len(boxes) == layers + (2 if draw is figures.bits_per_layer else 0)
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes)) and min(box.y0 for box in boxes) > 0
    assert all(axes.get_window_extent().height > 100 for axes in panels)
    assert all(axes.get_ylabel() for axes in panels) and panels[-1].get_xlabel()


def test_without_indicators(tmp_path):
    """The importance table takes their place; a pair table has no such lines; a pair with a fixed layer is left out."""
    one = made()._replace(indicators=None, initial=None)
    values = np.transpose([line.get_ydata() for line in figures.all_indicators(one).axes[0].lines])
    np.testing.assert_allclose(values, one.importance.weight)
    pair = np.random.default_rng(1).random((5, 3, 3))
    table = one.importance._replace(weight=None, activation=None, pair=pair, alpha=None)
    weight = figures.importance_maps(one._replace(importance=table)).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(weight).T, [[np.mean(pair[i, j]) for j in range(3)] for i in range(5)])
    text = report.write(one._replace(importance=table), tmp_path).read_text()
    assert "indicators.png" not in text and "depthwise.png" not in text and "no one number" in text
    fixed = made()._replace(depthwise_pairs=[("stem/conv", "unit0/depthwise")])
    assert "no searched depthwise layer" in markdown(fixed, LINKS)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_tables_without_a_logarithm(value):
    """Equal, zero or negative importance is drawn all the same."""
    one = made()._replace(indicators=None, initial=None)
    table = one.importance._replace(weight=np.full((5, 3), value), activation=np.full((5, 3), value))
    for draw in (figures.importance_maps, figures.all_indicators):
        figure = draw(one._replace(importance=table))
        figure.canvas.draw()
        assert figure.axes[0].get_yscale() == ("log" if value > 0 and draw is figures.all_indicators else "linear")


# ---- the terminal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 100, 60, 40, 20])
def test_terminal_table(monkeypatch, width):
    """Fits; has every layer; leaves out loss, then size, before it cuts a name."""
    monkeypatch.setenv("COLUMNS", "60")
    text = report.terminal_table(made(52), width)
    assert max(map(len, text.splitlines())) <= max(width or 60, 40)
    assert "88.00 ± 1.23" in text and "96.80 %" in text and "98.4" in text
    assert sum(line.strip().endswith(("A3", "A8 fixed", "float fixed")) for line in text.splitlines()) == 54
    wide, narrow = width == 100, (width or 60) <= 40
    assert ("0.3100" in text) == wide and ("4.00 KB\n" in text) != narrow and ("random (mean of 3) " in text) != narrow


def test_terminal_table_of_long_names():
    """Cut names keep the table within its columns; the end of a path stays."""
    one = made()
    long = one._replace(accuracy=[row._replace(name=row.name * 9) for row in one.accuracy])
    layers = tuple(ly._replace(path="a/" * 40 + ly.path) for ly in one.importance.layers)
    mixed = {"a/" * 40 + path: bits for path, bits in one.policies["mixed"].items()}
    long = long._replace(importance=one.importance._replace(layers=layers), policies={"mixed": mixed})
    lines = report.terminal_table(long, 60).splitlines()
    assert max(map(len, lines)) == 60
    assert any(re.match(r"  ….*/unit0/depthwise +W3A3$", line) for line in lines)


def test_percent():
    one = made()
    assert [tables.percent(row) for row in one.accuracy] == ["93.21", "90.00", "88.00 ± 1.23", "91.00"]
