"""The site: it builds without a warning, its links lead somewhere, and what it says of the program is so."""

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import mpq_jax
from mpq_jax import config as config_lib
from mpq_jax import costs
from mpq_jax.commands import export, search_options, train
from mpq_jax.types import Bits

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *(p for p in sorted(DOCS.rglob("*.md")) if "_" not in p.relative_to(DOCS).parts[0][:1])]
EXTENSION = runpy.run_path(str(DOCS / "_ext" / "plain_docstrings.py"))
SETTINGS = runpy.run_path(str(DOCS / "_ext" / "config_reference.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(folder / "trees")]
    environment = {k: v for k, v in os.environ.items() if k != "MPQ_DOCS_RUN"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, str(DOCS), str(folder / "html")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Links(HTMLParser):
    """What a page has: ids to point at, links, and files that it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])
        elif tag in ("script", "img", "iframe") and given.get("src"):
            self.loads.add(given["src"])
        elif tag == "link" and "stylesheet" in (given.get("rel") or "") and given.get("href"):
            self.loads.add(given["href"])


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path.resolve(): Links(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        outside = [src for src in page.loads if "//" in src.partition("?")[0]]
        assert not outside, (path, outside)
        for link in page.links | page.loads:
            file, anchor = urldefrag(link.partition("?")[0] if link in page.loads else link)
            if "//" in file or file.startswith("mailto:"):
                continue
            target = (path.parent / unquote(file)).resolve() if file else path
            if not target.is_file():
                broken.append((path.name, link, "no such file"))
            elif anchor and target in pages and unquote(anchor) not in pages[target].ids:
                broken.append((path.name, link, "no such place"))
    assert not broken


def test_every_public_name_has_its_place(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    there = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    assert {f"mpq_jax.{name}" for name in mpq_jax.__all__ if name != "__version__"} <= there


def test_the_pages_of_the_commands_and_settings_are_the_programs_own(site):
    commands = " ".join((site / "reference" / "commands.html").read_text().split())
    for word in ("--float-only", "--frontier", "--c-header", "--rounds", "--evolution.population"):
        assert word in commands
    page = (site / "reference" / "config.html").read_text()
    assert all(f">{key}<" in page for key in config_lib.options(config_lib.Config()))


def test_the_table_of_settings_has_the_defaults_and_the_comments():
    text = SETTINGS["config_reference"]((ROOT / "mpq_jax" / "config.py").read_text())
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.*) \|$", text, re.M)
    shown = {key: default for key, default, _ in rows}
    for key, (_, value) in config_lib.options(config_lib.Config()).items():
        assert ast.literal_eval(shown.pop(key)) == value, key
    assert set(shown) == set(config_lib.to_json(config_lib.Config())) - {"seed"} - {
        key for key in config_lib.options(config_lib.Config()) if "." not in key
    }
    said = {key: comment for key, _, comment in rows}
    assert said["joint.average"] == "decay of the moving average of the parameters; 0: none"
    assert said["model.weights"].endswith("or an orbax checkpoint's folder")
    assert said["statistics_batches"].endswith(
        "too few miss what a channel that is almost always dead does when it is not"
    )


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_pages_outside_of_the_site_link_to_what_is_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, anchor = urldefrag(link)
        if "//" in link:
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every command of ours that a page shows."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.splitlines():
                if re.match(r"python (train|search)\.py|python -m mpq_jax\.export|mpq-\w+ ", line):
                    found.append((page.name, line.partition(" #")[0]))
    return found


def test_every_command_that_is_shown_is_understood():
    shown = commands()
    assert len(shown) > 25
    for page, line in shown:
        if "…" in line or " C " in line or line.endswith(" C"):
            continue  # a form, with places to fill in; S is a seed
        words = shlex.split(re.sub(r" \[([^]]*)\]", r" \1", line))
        name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        parse = {"train.py": train.parse, "search.py": search_options.parse, "mpq_jax.export": export.parse}[name]
        assert parse(["0" if word == "S" else word for word in rest]), (page, line)


def python_blocks(page: Path, after: str = "") -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", page.read_text().partition(after)[2] if after else page.read_text(), re.M | re.S
    )


def test_the_example_of_ones_own_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks(DOCS / "own_model.md", after="### A whole example"):
        exec(compile(block, "own_model.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.startswith("optimal {'first': Bits(w=8, a=8), 'middle': Bits(")
    assert names["found"].used["bitops"][0] <= names["found"].used["bitops"][1]
    assert names["logits"].shape == (512, 4)
    assert mpq_jax.load_importance("importance.json").layers == names["table"].layers
    # By the rules of the last block: the head in float, the first fixed, the others with candidates.
    assert "('first', Bits(w=8, a=8)), ('middle', None), ('late', None), ('head', Bits(w=32, a=32))" in out


def test_a_latency_table_from_a_csv_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["layer,weight_bits,activation_bits,ms", "stem,8,8,0.5", "conv,4,8,0.25", "conv,8,8,0.75"]
    Path("board.csv").write_text("\n".join(lines) + "\n")
    (block,) = python_blocks(DOCS / "howto" / "own_hardware.md")
    exec(block, {})
    assert costs.load_latency("latency.json") == {
        "stem": {Bits(8, 8): 0.5},
        "conv": {Bits(4, 8): 0.25, Bits(8, 8): 0.75},
    }


def test_figures_in_the_explanation_are_those_that_were_measured():
    results, measured = ((DOCS / name).read_text() for name in ("results.md", "measured.md"))
    short = measured.partition("## Is it better than uniform?")[2].partition("\n## ")[0]
    for explained, source, least in (((DOCS / "method.md").read_text(), results + measured, 9), (short, results, 5)):
        figures = re.findall(r"[+-]?\d+\.\d+ ± \d+\.\d+", explained)
        assert len(figures) >= least
        assert [figure for figure in figures if figure not in source] == []


NAMES = ("x", "bits", "leaves", "init")


@pytest.mark.parametrize(
    "docstring, rendered",
    [
        (["The sum of a * b, |x| and s_."], [r"The sum of a \* b, \|x\| and s\_."]),
        (["Calls `f(*x)` once."], ["Calls ``f(*x)`` once."]),
        (["x: [B], a batch.", "bits: int32 []."], ["``x``", "    [B], a batch.", "``bits``", "    int32 []."]),
        (["x, bits: two", "    lines."], ["``x, bits``", "    two lines."]),
        (
            ["x: goes on in", "a line without indent.", "Not this."],
            ["``x``", "    goes on in a line without indent.", "Not this."],
        ),
        (["x: first; bits: second."], ["``x``", "    first", "``bits``", "    second."]),
        (["Note: x is no definition here."], ["Note: x is no definition here."]),
        (["init(x) -> {leaf: [K]}: start values."], ["``init(x) -> {leaf: [K]}``", "    start values."]),
        (["init(x) -> start values."], ["``init(x)``", "    -> start values."]),
        (["init(x) -> values. Of y: none."], ["``init(x)``", "    -> values. Of y: none."]),
        (["A text. Raises Refusal for", "nothing."], ["A text.", ":raises Refusal: for nothing."]),
        (["-> (a, b*)"], [r":returns: (a, b\*)"]),
        (["Text:", "", "  y = x_ * 2", "", "More."], ["Text:", "::", "      y = x_ * 2", "More."]),
        (["- one", "  still one", "- two"], ["- one still one", "- two"]),
    ],
)
def test_docstrings_in_plain_text(docstring, rendered):
    assert [line for line in EXTENSION["restructured"](docstring, NAMES) if line] == rendered
