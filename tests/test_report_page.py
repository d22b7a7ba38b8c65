"""The page: whole in itself, well-formed, its numbers those of the report, its marks where the numbers say."""

import base64
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from made_reports import rows_of, searched, table_named, taken_apart

from mpq_jax import Bits, Layer, Refusal, costs, report
from mpq_jax.importance import total
from mpq_jax.report import curves, layer_charts, page, point_charts, scales, words

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>\u202e\x00\ud800]]>{{7*7}}-->"
LONG = "encoder/transformer/layers/self_attention/output_projection_with_a_long_name"


def not_finite():
    """Numbers that are none, in every place that has one."""
    one = searched(4)
    weight = one.importance.weight.copy()
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3] = math.nan, math.inf, -math.inf, 0.0
    activation = np.full_like(one.importance.activation, math.nan)
    rows = [row._replace(accuracy=math.nan, loss=math.inf) for row in one.accuracy]
    points = [each._replace(objective=math.nan, bound=-math.inf) for each in one.curve.best[:2]]
    return one._replace(
        importance=one.importance._replace(weight=weight, activation=activation),
        accuracy=rows,
        curve=one.curve._replace(best=(*points, *one.curve.best[2:])),
    )


REPORTS = {
    "one layer": lambda: searched(1),
    "150 layers": lambda: searched(150),
    "long names": lambda: searched(30, lambda i: f"{LONG}/{i}"),
    "names without folders": lambda: searched(45, lambda i: f"conv_{i}"),
    "evil": lambda: searched(3, lambda i: f"{EVIL}{i}")._replace(title=EVIL, provenance={EVIL: EVIL}),
    "pairs": lambda: searched(4, pair=True, activation_widths=(4, 8), budgets=("size=W3", "bitops=W3A8")),
    "not finite": not_finite,
    "a search alone": lambda: searched(6)._replace(accuracy=[], curve=None, no_curve="There is none: for <reasons>."),
    "no budget": lambda: searched(6)._replace(used={}, curve=None, solution=None, config=None),
}


@pytest.fixture(scope="module")
def made():
    """Name -> (report, its page, the page taken apart)."""
    found = {}
    for name, make in REPORTS.items():
        one = make()
        text = report.html(one)
        found[name] = one, text, taken_apart(text)
    return found


each_report = pytest.mark.parametrize("name", REPORTS)


# ---- the file ------------------------------------------------------------------------------------------------------


@each_report
def test_loads_nothing(made, name):
    """No address anywhere, and a policy that forbids all but this style and this script, by digests made here."""
    one, text, root = made[name]
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text.replace(EVIL, ""))
    for element in root.all():
        assert element.tag not in {"img", "iframe", "object", "embed", "base", "form", "use", "image"}
        for key, value in element.attributes.items():
            assert not key.startswith("on") and key not in ("style", "src", "srcset", "action")
            if key in ("href", "xlink:href"):
                assert value.startswith("#") or (element.tag == "link" and value == "data:,")
    (style,), (script,) = root.all("style"), root.all("script")
    metas = [meta for meta in root.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    (policy,) = metas
    digests = [base64.b64encode(hashlib.sha256(each.text.encode()).digest()).decode() for each in (style, script)]
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"
    assert [rules["style-src"], rules["script-src"]] == [f"'sha256-{digest}'" for digest in digests]
    # A policy holds from where it stands: nothing that it is about may come before.
    head = next(root.all("head"))
    assert [child.tag for child in head.children].index("style") > head.children.index(policy)


@each_report
def test_structure(made, name):
    """Ids once, references that lead somewhere, scopes and captions, one h1, labels for every control."""
    _, text, root = made[name]
    assert text.startswith("<!doctype html>") and next(root.all("html"))["lang"] == "en"
    ids = [element["id"] for element in root.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in root.all():
        for key in ("aria-labelledby", "aria-describedby", "href"):
            value = element.attributes.get(key, "")
            assert key != "href" or not value.startswith("#") or value[1:] in ids
            assert key == "href" or not value or value in ids
        for value in element.attributes.values():
            assert set(re.findall(r"url\(#(.+?)\)", value or "")) <= set(ids)
    assert [element.tag for element in root.all() if re.fullmatch("h[1-6]", element.tag)] == ["h1"] + ["h2"] * 7
    for table in root.all("table"):
        assert next(table.all("caption")).text.strip()
        lines = [row.children for row in table.all("tr")]
        assert {len(line) for line in lines} == {len(lines[0])}
        assert all(cell.attributes.get("scope") == "col" for cell in lines[0])
        assert all([cell.attributes.get("scope") for cell in line].count("row") == 1 for line in lines[1:])
    for control in root.all("input"):
        assert control.parent.tag == "label" and control.parent.text.strip()
        fieldset = control.parent.parent
        assert fieldset.tag == "fieldset" and next(fieldset.all("legend")).text
        assert "hidden" in fieldset.attributes, "without the script a control would do nothing"
    for field in root.all("svg", of="field"):
        assert field["role"] == "img" and field["aria-label"]
        assert all(mark.children[0].tag == "title" and mark.children[0].text for mark in field.all(of="mark"))
    assert not set(re.findall(r"class=\"([^\"]*)\"", text)) & {"None", "undefined"}
    assert not re.search(r"[=\"> ](nan|inf)[\"%< ]", text.lower()), "a number that is none has a word"


def test_names_are_data(made):
    """Whatever a layer is called, the page has the same elements; its name is to be read, less what cannot be shown."""
    _, text, root = made["evil"]
    plain = taken_apart(report.html(searched(3)))

    def tags(tree):
        """How many of each; the bands below the plots depend on the names."""
        return Counter(each.tag for each in tree.all() if each.tag not in ("svg", "text", "line"))

    assert tags(root) == tags(plain)
    shown = EVIL.translate({0x202E: 0xFFFD, 0: 0xFFFD, 0xD800: 0xFFFD})
    names = [bdi.text for bdi in table_named(root, "Layers in execution order").all("bdi")]
    assert names == ["stem/conv", *(f"{shown}{i}" for i in range(3)), "head"]
    assert next(root.all("h1")).text == shown == next(root.all("title")).text.removesuffix(": mixed-precision report")
    text.encode()  # no half of a surrogate pair is left


# ---- numbers -------------------------------------------------------------------------------------------------------


@each_report
def test_tables_are_the_report(made, name):
    """Accuracy, budgets, layers, importance, provenance and settings, compared with the report's own numbers."""
    one, _, root = made[name]
    if one.accuracy:
        for row, cells in zip(one.accuracy, rows_of(table_named(root, "Contestants")), strict=True):
            assert cells[0] == row.name
            known = math.isfinite(row.accuracy)
            assert cells[1] == (f"{100 * row.accuracy:.2f}" if known else "not a number")
            if known and not row.name.startswith("uniform"):
                assert float(cells[2].replace("−", "-")) == pytest.approx(100 * (row.accuracy - 0.7), abs=0.006)
            assert cells[3] == (f"{row.loss:.4f}" if math.isfinite(row.loss) else "∞")
    if one.used:
        for (key, (used, limit, _)), cells in zip(
            one.used.items(), rows_of(table_named(root, "spends of each budget")), strict=True
        ):
            assert cells[0] == key and float(cells[3]) == pytest.approx(100 * used / limit, abs=0.006)
            assert cells[5] == f"{used:,} of {limit:,}"
    mixed, layers = one.policies["mixed"], one.importance.layers
    bitops = [ly.macs * mixed[ly.path].w * mixed[ly.path].a for ly in layers]
    for i, (layer, cells) in enumerate(
        zip(layers, rows_of(table_named(root, "Layers in execution order")), strict=True)
    ):
        bits = mixed[layer.path]
        assert cells[0] == str(i + 1) and cells[-2:] == [f"{layer.params:,}", f"{layer.macs:,}"]
        assert cells[-4] == ("float" if bits.w == 32 else f"W{bits.w}A{bits.a}")
        assert float(cells[-3]) == pytest.approx(100 * bitops[i] / sum(bitops), abs=0.06)
    what = [one.importance.weight, one.importance.activation]
    if one.importance.pair is not None:
        what = [one.importance.pair.mean(2), one.importance.pair.mean(1)]
    for kind, values in zip(("weight", "activation"), what, strict=True):
        table = table_named(root, f"Importance of {kind}s")
        shown = [cells[2:] for cells in rows_of(table)]
        numbers = {"not a number": math.nan, "∞": math.inf, "−∞": -math.inf}
        read = [[numbers[cell] if cell in numbers else float(cell) for cell in row] for row in shown]
        np.testing.assert_allclose(read, values, rtol=6e-4)
        widths = getattr(one.importance, "bit_widths" if kind == "weight" else "activation_bit_widths")
        picked = [
            [k for k, cell in enumerate(row.children[2:]) if "picked" in cell.classes]
            for row in next(table.all("tbody")).children
        ]
        mine = [mixed[ly.path].w if kind == "weight" else mixed[ly.path].a for ly in layers if ly.searched]
        assert picked == [[widths.index(bits)] for bits in mine]
    if name != "evil":
        assert rows_of(table_named(root, "Versions")) == [[k, v] for k, v in one.provenance.items()]
    if one.config:
        assert rows_of(table_named(root, "config")) == [
            ["seed", "0"],
            ["joint.steps", "300"],
            ["joint.weights", "still"],
        ]


@each_report
def test_bars_are_the_bits(made, name):
    """One column a layer, in order, inside the plot; heights in the ratio of the bits; levels where the uniform one is."""
    one, _, root = made[name]
    layers, mixed = one.importance.layers, one.policies["mixed"]
    field = root.one("bits-plot")
    marks = list(field.all(of="mark"))
    assert len(marks) == len(layers)
    slot = 100 / len(layers)
    unit = {}
    for i, (layer, mark) in enumerate(zip(layers, marks, strict=True)):
        assert ("fixed" in mark.classes) != layer.searched
        bits = mixed[layer.path]
        for kind, width in (("weights", bits.w), ("activations", bits.a)):
            (bar,) = mark.all("rect", of=kind)
            left, wide = (float(bar[key].rstrip("%")) for key in ("x", "width"))
            assert i * slot - 0.01 <= left and left + wide <= (i + 1) * slot + 0.01
            if width <= 16:
                unit.setdefault(kind, float(bar["height"]) / width)
                assert float(bar["height"]) == pytest.approx(unit[kind] * width, abs=0.02)
            else:
                assert float(bar["height"]) == pytest.approx(layer_charts.PANEL, abs=0.02)
    (levels,) = field.all(of="levels")
    assert levels["data-contestant"] == next(iter(one.policies)) and "hidden" not in levels.attributes
    assert len(list(levels.all("rect"))) == 2 * sum(layer.searched for layer in layers)


@pytest.mark.parametrize("name", ["one layer", "150 layers", "pairs"])
def test_heat_map_is_the_table(made, name):
    """Colours as matplotlib's cividis gives them on a log scale of the same ends; marks on the chosen cells."""
    one, _, root = made[name]
    field = root.one("heat-plot")
    cells = {}
    for mark in field.all(of="mark"):
        cells.setdefault(int(mark["data-row"]), []).append(next(mark.all("rect")))
    values = one.importance.weight, one.importance.activation
    if one.importance.pair is not None:
        values = one.importance.pair.mean(2), one.importance.pair.mean(1)
    columns = np.concatenate([np.argsort(one.importance.bit_widths), np.argsort(one.importance.activation_bit_widths)])
    count = len(one.importance.bit_widths)
    for row, rects in cells.items():
        kind = int(row >= count)
        table = values[kind]
        # Rows count downwards, widths upwards.
        inside = row - kind * count
        k = columns[kind * count : kind * count + table.shape[1]][::-1][inside]
        log = np.log(table / table.min()) / np.log(table.max() / table.min())
        linear = (table - table.min()) / (table.max() - table.min())
        share = log if table.max() >= 5 * table.min() else linear
        for rect, at in zip(rects, share[:, k], strict=True):
            wanted = np.array(matplotlib.colormaps["cividis"](float(at)))[:3] * 255
            got = [int(rect["fill"][i : i + 2], 16) for i in (1, 3, 5)]
            np.testing.assert_allclose(got, wanted, atol=6)
    assert len(list(field.all(of="pick"))) == 2 * len(values[0])


def test_what_has_no_number_is_hatched(made):
    _, _, root = made["not finite"]
    kinds = [mark.children[1].classes for mark in root.one("heat-plot").all(of="mark")]
    titles = [mark.children[0].text for mark in root.one("heat-plot").all(of="mark")]
    assert sum("none" in each for each in kinds) == 3 + 16  # three weights, and all activations
    assert sum("not a number" in title for title in titles) == 1 + 16 and sum("∞" in title for title in titles) == 2
    narrow = searched(3)
    layers = tuple(
        ly._replace(weight_bit_widths=(4, 6)) if i == 1 else ly for i, ly in enumerate(narrow.importance.layers)
    )
    again = taken_apart(report.html(narrow._replace(importance=narrow.importance._replace(layers=layers))))
    titles = [mark.children[0].text for mark in again.one("heat-plot").all(of="mark")]
    assert sum("not offered" in title for title in titles) == 2


def test_frontier_is_the_search(made):
    """Marks stand as the logarithms of their costs and the objectives do; the chosen one and the limit among them."""
    one, _, root = made["long names"]
    marks = list(root.one("frontier-plot").all(of="mark"))
    curve = one.curve
    points = [*curve.best, *curve.uniform, curve.chosen]
    assert len(marks) == len(points)
    at = {}
    for mark in marks:
        spent, value = mark.children[0].text.split("\n")[1:]
        at[spent, value] = float(mark.parent["x"].rstrip("%")), float(mark.parent["y"])
    read = [at[words.cost(p.cost, curve.unit), f"importance {words.number(p.objective)}"] for p in points]
    # Two points fix an axis; all others must lie on it.
    for place, values in zip(
        np.array(read).T, (np.log([p.cost for p in points]), [p.objective for p in points]), strict=True
    ):
        slope, start = np.polyfit(values, place, 1)
        np.testing.assert_allclose(np.multiply(slope, values) + start, place, atol=0.02)
    assert all(0 <= x <= 100 and 0 <= y <= point_charts.CHART for x, y in read)
    assert curve.chosen.objective == pytest.approx(total(one.importance, one.policies["mixed"]))
    assert curve.chosen.cost == costs.bitops(one.importance.layers, one.policies["mixed"])
    # No uniform policy of at most a best one's cost has a lower objective.
    for best in curve.best:
        assert all(each.objective >= best.objective - 1e-9 for each in curve.uniform if each.cost <= best.cost)
    listed = rows_of(table_named(root, "Policies by their cost"))
    assert len(listed) == len(points) and [row[0] for row in listed].count("mixed") == 1


def test_frontier_left_out(made):
    """With its reason, escaped."""
    _, text, root = made["a search alone"]
    assert "There is none: for &lt;reasons&gt;." in text
    assert not [svg for svg in root.all("svg") if svg.attributes.get("id") == "frontier-plot"]
    one = searched(3)
    largest = one.importance._replace(
        layers=tuple(ly._replace(inputs=100, outputs=100) for ly in one.importance.layers)
    )
    budgets = costs.parse_budgets(["memory=1KB"], largest.layers, (2, 3, 4, 6), (2, 3, 4, 6))
    with pytest.raises(Refusal, match="not over memory"):
        report.curve(largest, budgets, one.policies["mixed"])
    with pytest.raises(Refusal, match="without a budget"):
        report.curve(largest, [], one.policies["mixed"])
    both = [*budgets, *costs.parse_budgets(["bitops=W3A3"], largest.layers, (2, 3, 4, 6), (2, 3, 4, 6))]
    found = report.curve(largest, both, one.policies["mixed"], count=4)
    assert found.budget == "bitops" and found.others == ("memory=1KB",)


def test_bits_per_channel():
    """Their mean is drawn; the table of importance has no number for them, and the page says so."""
    one = searched(2)
    path = one.importance.layers[1].path
    layers = tuple(
        ly._replace(channels=2, params=1000, macs=1000) if ly.path == path else ly for ly in one.importance.layers
    )
    policy = {**one.policies["mixed"], path: Bits((2, 6), 4)}
    table = one.importance._replace(layers=layers)
    budgets = costs.parse_budgets(["bitops=W3A4"], layers, (2, 3, 4, 6), (2, 3, 4, 6))
    found = report.curve(table, budgets, policy, count=4)
    assert found.chosen is None and "per output channel" in found.why
    root = taken_apart(
        report.html(one._replace(importance=table, policies={**one.policies, "mixed": policy}, curve=found))
    )
    assert rows_of(table_named(root, "Layers in execution order"))[1][-4] == "W4.00A4"
    marks = list(root.one("heat-plot").all(of="pick"))
    assert len(marks) == 2 + 1 + 2  # two widths of weights in the first layer
    assert "per output channel" in root.one("frontier").parent.text


# ---- the first screen ----------------------------------------------------------------------------------------------


def rows(mixed, uniform, spread=None, runs=1):
    made = [report.AccuracyRow("float", 0.9, None, 1, 0.1, 10**6, 4000)]
    if uniform is not None:
        made.append(report.AccuracyRow("uniform W3A3", uniform, spread, runs, 0.1, 2000, 500))
    return [*made, report.AccuracyRow("mixed", mixed, spread, runs, 0.1, 1000, 600)]


@pytest.mark.parametrize(
    "accuracy, samples, headline, line",
    [
        # sqrt((0.72 * 0.28 + 0.7 * 0.3) / 10000) = 0.00642
        (rows(0.72, 0.70), 10_000, "2.00 points more accurate than uniform W3A3: 72.00 % against 70.00 %", "±0.64"),
        (rows(0.70, 0.72), 10_000, "2.00 points less accurate", "±0.64"),
        (rows(0.71, 0.70), 10_000, "No clear difference: mixed and uniform W3A3 lie 1.00 points apart", "±0.64"),
        (rows(0.71, 0.70), 10**6, "1.00 points more accurate", "±0.06"),
        (rows(0.71, 0.70), None, "1.00 points more accurate", "chance moves the difference is not known"),
        # sqrt(0.012² / 3 * 2) = 0.0098
        (rows(0.71, 0.70, 0.012, 3), 10**6, "No clear difference", "0.98 points"),
        (rows(0.74, 0.70, 0.012, 3), None, "4.00 points more accurate", "over the policies of both rows"),
        (rows(0.7, 0.7), None, "as accurate as", "not known"),
        (rows(0.7, None), 100, "no uniform policy stands beside it", ""),
        (rows(math.nan, 0.7), 100, "cannot be compared: not a number against 70.00 %", ""),
    ],
)
def test_verdict(accuracy, samples, headline, line):
    one = searched(2)._replace(accuracy=accuracy, test_samples=samples)
    found = words.verdict(one)
    assert headline in found.headline and line in " ".join(found.lines)
    if len(accuracy) == 3 and math.isfinite(accuracy[2].accuracy):
        assert found.lines[0] == "Against uniform W3A3 it takes 50.0 % of its BitOps and 120.0 % of its size."
    root = taken_apart(report.html(one))
    assert next(root.all(of="headline")).text == found.headline
    tiles = {next(tile.all("dt")).text: tile.text for tile in next(root.all("dl")).children}
    macs = sum(ly.macs for ly in one.importance.layers)
    assert f"{macs * 1024 / 1000:.1f}× fewer than float" in tiles["BitOps"]


def test_verdict_of_a_search_alone(made):
    one, _, _ = made["a search alone"]
    found = words.verdict(one)
    ours, theirs = (
        total(one.importance, policy) for policy in (one.policies["mixed"], next(iter(one.policies.values())))
    )
    assert f"{100 * (1 - ours / theirs):.1f} % less harm" in found.headline and "Nothing was" in found.lines[0]
    same = one._replace(policies={**one.policies, "mixed": next(iter(one.policies.values()))})
    assert "no less harm" in words.verdict(same).headline
    assert (
        "Nothing has been measured" in words.verdict(one._replace(policies={"mixed": one.policies["mixed"]})).headline
    )


# ---- axes and colours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(1, 1000), (3, 7), (0.001, 0.0015), (-4, 9), (87.5, 88.3), (5e7, 2.6e8), (2, 2)])
def test_ticks(low, high):
    """Inside the axis, rising, round, and neither one nor a crowd."""
    for ratio in (0, 2):
        axis = scales.scale_of([low, high, math.nan, math.inf], ratio=ratio, margin=0.05)
        assert axis.low <= low and high <= axis.high and axis.log == (ratio == 2 and low > 0 and high >= 2 * low)
        found = scales.ticks(axis, 5)
        assert found == sorted(set(found)) and 2 <= len(found) <= 6
        assert all(axis.low <= value <= axis.high * (1 + 1e-9) for value in found)
        assert all(f"{value:.2e}" == f"{float(f'{value:.1e}'):.2e}" or abs(value) > 80 for value in found)
        for value in found:
            assert axis.back(axis.at(value)) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert scales.ticks(scales.scale_of([]), 5)[0] == 0


def test_colours():
    """Within 6 of 255 of matplotlib's cividis everywhere; beyond the ends as at the ends."""
    shares = np.linspace(0, 1, 101)
    ours = [[int(scales.colour(share)[i : i + 2], 16) for i in (1, 3, 5)] for share in shares]
    np.testing.assert_allclose(ours, matplotlib.colormaps["cividis"](shares)[:, :3] * 255, atol=6)
    assert scales.colour(-1) == scales.colour(0) and scales.colour(7) == scales.colour(1)


def luminance(text):
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme):
    """WCAG AA in both themes: 4.5 for text, 3 for marks and the edges of controls."""
    style = (Path(page.__file__).parent / "page.css").read_text()
    pairs = re.findall(r"--([a-z]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", style)
    colours = {name: both[theme] for name, *both in pairs}
    assert len(colours) == 10
    for ground in (colours["paper"], colours["raised"]):
        for text in ("ink", "muted", "accent"):
            assert contrast(colours[text], ground) >= 4.5, text
        for mark in ("weights", "activations", "uniform", "edge", "accent"):
            assert contrast(colours[mark], ground) >= 3, mark
    # All colours of the style are among these, so that no other text has another.
    rest = re.sub(r"light-dark\(.*?\)", "", style)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", rest)) == {"#ffffff", "#101418"}


# ---- where it comes from -------------------------------------------------------------------------------------------


def test_light(tmp_path):
    """A page needs neither JAX nor matplotlib; importing the report brings no template engine along either."""
    code = """
import sys
for name in ("jax", "flax", "matplotlib"):
    sys.modules[name] = None
sys.path.insert(0, "tests")
import mpq_jax.report
assert "jinja2" not in sys.modules
from made_reports import searched
print(len(mpq_jax.report.html(searched(3))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0 and int(done.stdout) > 30_000, done.stderr


def test_size_of_a_page(made):
    """150 layers make a page that can be sent by mail."""
    assert len(made["150 layers"][1].encode()) < 1_000_000


@pytest.mark.parametrize("count, shown", [(1, 1), (12, 12), (13, 7), (52, 11), (150, 8)])
def test_numbers_below_layers(count, shown):
    """At most about a dozen, the first among them, each under its own layer; bands do not overlap."""
    layers = [Layer(f"a{i // 3}/b", 1, 1, True) for i in range(count)]
    axis = layer_charts.layer_axis(layers)
    assert len(axis.numbers) == shown and axis.numbers[0].text == "1"
    assert all(tick.at == pytest.approx(100 * (int(tick.text) - 0.5) / count) for tick in axis.numbers)
    if axis.bands:
        ends = [(band.x, band.x + band.width) for band in axis.bands]
        assert ends[0][0] == 0 and ends[-1][1] == pytest.approx(100)
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(ends))
    assert bool(axis.bands) == (-(-count // 3) <= layer_charts.MOST_BANDS)


def test_points_of_a_curve_have_their_proofs():
    one = searched(5)
    assert all(point.proven and point.bound == pytest.approx(point.objective) for point in one.curve.best)
    open_ = one._replace(
        curve=one.curve._replace(best=tuple(p._replace(proven=False, bound=0.5) for p in one.curve.best))
    )
    chart = point_charts.frontier_chart(open_)
    assert {mark.kind for mark in chart.marks} >= {"open", "chosen"} and len(chart.bounds) == len(one.curve.best)
    assert isinstance(one.curve, curves.Curve) and json.dumps(one.curve.limit)
