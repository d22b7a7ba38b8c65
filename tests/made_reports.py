"""Reports of made networks, searched for real, and a page taken apart."""

from html.parser import HTMLParser

import numpy as np

from mpq_jax import Bits, Importance, Layer, costs, report
from mpq_jax.search import best_uniform, solve

VOID = {"meta", "link", "input", "br", "img", "hr"}


def staged(i):
    return f"stage{i // 12 + 1}/block{i % 12 // 2 + 1}/conv{i % 2 + 1}"


def searched(count, name=staged, widths=(2, 3, 4, 6), activation_widths=None, pair=False, budgets=("bitops=W3A4",)):
    """A whole report of `count` searched layers between a fixed one and one in float; accuracies are made up."""
    rng = np.random.default_rng(count)
    activation_widths = activation_widths or widths
    layers = (
        Layer("stem/conv", 864, 10**6, False, Bits(8, 8)),
        *(Layer(name(i), 1000 + 37 * i, 10**5 * (1 + i % 5), True) for i in range(count)),
        Layer("head", 640, 6400, False, Bits(32, 32)),
    )
    weight, activation = (
        np.sort(np.exp(rng.normal(size=(count, len(each)))))[:, ::-1] for each in (widths, activation_widths)
    )
    tables = {"weight": weight, "activation": activation, "alpha": 1.7}
    if pair:
        tables = {"weight": None, "activation": None, "pair": weight[:, :, None] * activation[:, None, :]}
    table = Importance("regression", widths, activation_widths, layers, **tables)
    limits = costs.parse_budgets(budgets, layers, widths, activation_widths)
    solution = solve(table, limits)
    uniform, policy = best_uniform(table, limits)
    policies = {f"uniform {uniform}": policy, "mixed": solution.policy}
    rows = [report.AccuracyRow("float", 0.7321, None, 1, 1.1, 10**9, 4 * sum(ly.params for ly in layers))]
    rows += [
        report.AccuracyRow(key, accuracy, None, 1, 1.2, costs.bitops(layers, each), costs.size(layers, each))
        for (key, each), accuracy in zip(policies.items(), (0.7, 0.72), strict=True)
    ]
    return report.Report(
        title=f"net of {count}",
        importance=table,
        policies=policies,
        used={b.name: (*solution.used[b.name], b.unit) for b in limits},
        accuracy=rows,
        grids=[],
        depthwise_pairs=[],
        indicators=None,
        initial=None,
        outliers=[],
        provenance={"jax": "1.2.3"},
        config={"seed": 0, "joint": {"steps": 300, "weights": "still"}},
        test_samples=10_000,
        solution=solution._asdict(),
        curve=report.curve(table, limits, solution.policy),
    )


class Element:
    """tag, attributes, text (all of it, of its children too), children, parent."""

    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children, self.own = tag, attributes, parent, [], []

    def __getitem__(self, name):
        return self.attributes[name]

    @property
    def text(self):
        return "".join(each if isinstance(each, str) else each.text for each in self.own)

    @property
    def classes(self):
        return (self.attributes.get("class") or "").split()

    def all(self, tag=None, of=None):
        """Elements below this one, in order: of a tag, of a class."""
        for child in self.children:
            if (tag is None or child.tag == tag) and (of is None or of in child.classes):
                yield child
            yield from child.all(tag, of)

    def one(self, name):
        """The element with that id."""
        (found,) = [each for each in self.all() if each.attributes.get("id") == name]
        return found


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.root = self.open = Element("document", {}, None)

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, dict(attrs), self.open)
        self.open.children.append(element)
        self.open.own.append(element)
        if tag not in VOID:
            self.open = element

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.tag == tag, f"</{tag}> closes <{self.open.tag}>"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.own.append(data)


def taken_apart(text):
    """The root Element of a page. Fails where a tag is not closed by its own."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open is reader.root, f"<{reader.open.tag}> stays open"
    return reader.root


def rows_of(table):
    """[[text of each cell] of each line of the body]."""
    (body,) = table.all("tbody")
    return [[" ".join(cell.text.split()) for cell in row.children] for row in body.children]


def table_named(page, words):
    """The table whose caption has these words."""
    (found,) = [table for table in page.all("table") if words in next(table.all("caption")).text]
    return found
