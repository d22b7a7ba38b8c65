"""The page in a real browser, at the width of a phone and of a desk; skipped where there is no Chromium."""

import json

import browser
import pytest
from made_reports import searched

from mpq_jax import report

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason=f"no Chromium on the PATH (looked for {', '.join(browser.NAMES)})"
)

LONG = "encoder/transformer/layers/self_attention/output_projection_with_a_long_name"
# What can have the focus, as HTML says it; of radio buttons of one name the checked one has it.
FOCUSABLE = """[...document.querySelectorAll('a[href], summary, input, [tabindex="0"]')]
  .filter((each) => each.checkVisibility() && (each.type !== 'radio' || each.checked))"""
NAME = "(each) => each.tagName + '#' + (each.id || each.name || each.getAttribute('aria-label') || each.textContent)"
# Elements that stick out of the window, but for those inside of something that scrolls.
SPILT = """[...document.body.querySelectorAll('*')].filter((each) => {
  const at = each.getBoundingClientRect();
  return at.width && (at.right > innerWidth + 1 || at.left < -1) && !each.closest('.scroll, .wide, .skip');
}).map((each) => each.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Paths of pages: few layers, many, and long names."""
    place = tmp_path_factory.mktemp("pages")
    made = {
        "few": searched(3),
        "many": searched(150),
        "long": searched(20, lambda i: f"{LONG}/{i}")._replace(title=LONG, provenance={LONG: "ab" * 32}),
    }
    for name, one in made.items():
        (place / f"{name}.html").write_text(report.html(one), encoding="utf-8")
    return {name: place / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as page:
        yield page


@pytest.fixture
def page(chromium):
    """A page without complaints before the test, nor after it."""
    chromium.problems.clear()
    yield chromium
    assert chromium.problems == []


def told(page):
    return page.ask("document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').innerText")


@pytest.mark.parametrize("name", ["few", "many", "long"])
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_fits(page, pages, name, width):
    """No scrolling sideways with everything unfolded, nothing beside the window, letters of a size to be read."""
    page.open(pages[name], width)
    page.ask("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.ask("innerWidth") == width == page.ask("document.documentElement.scrollWidth")
    assert page.ask(SPILT) == []
    letters = "[...document.querySelectorAll('text')].filter((t) => t.checkVisibility()).map((t) => t.getBBox().height)"
    assert min(page.ask(letters)) >= 11
    # One layer is no wall, a hundred and fifty keep apart.
    columns = (
        "[...document.querySelectorAll('#bits-plot .mark .hit')].map((each) => each.getBoundingClientRect().width)"
    )
    assert 3.9 <= min(page.ask(columns)) <= max(page.ask(columns)) <= 90


def test_keys_reach_everything(page, pages):
    """Tab goes to every link, control, plot and table, in the order of the page, and shows where it is."""
    page.open(pages["few"])
    wanted = page.ask(f"{FOCUSABLE}.map({NAME})")
    reached, outlined = [], []
    for _ in wanted:
        page.press("Tab")
        reached.append(page.ask(f"({NAME})(document.activeElement)"))
        seen = "[document.activeElement, document.activeElement.nextElementSibling, document.activeElement.closest('.scroll')]"
        outlined.append(page.ask(f"{seen}.some((each) => each && getComputedStyle(each).outlineStyle === 'solid')"))
    assert reached == wanted and all(outlined)
    assert {"svg#bits-plot", "svg#heat-plot", "svg#frontier-plot", "INPUT#theme", "INPUT#beside"} <= set(wanted)


def test_arrows_tell_every_value(page, pages):
    """Right through a plot of bits every layer is told once; up and down a heat map goes to other widths."""
    page.open(pages["few"])
    page.ask("document.querySelector('#bits-plot').focus({focusVisible: true})")
    names = [told(page).split("\n")[0]]
    for _ in range(4):
        page.press("ArrowRight")
        names.append(told(page).split("\n")[0])
    page.press("ArrowRight")
    paths = ["stem/conv", "stage1/block1/conv1", "stage1/block1/conv2", "stage1/block2/conv1", "head"]
    assert [name.split() for name in names] == [[str(i + 1), path] for i, path in enumerate(paths)]
    assert told(page).split("\n")[0] == names[-1], "the end is the end"
    page.press("Home")
    assert "W8A8, fixed" in told(page)
    page.ask("document.querySelector('#heat-plot').focus({focusVisible: true})")
    first = told(page)
    page.press("ArrowUp")
    assert "weights at 2 bits" in first and "weights at 3 bits" in told(page)
    page.press("ArrowDown")
    page.press("ArrowDown")
    assert "activations at 6 bits" in told(page)
    page.press("Escape")
    assert told(page) == ""


def test_pointer_tells(page, pages):
    """The value under the pointer, inside the window, also at its edge; nothing beside the marks."""
    page.open(pages["few"], 375)
    # A tip goes when the page is scrolled: let it settle.
    settled = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.ask(f"document.querySelector('#heat-plot').scrollIntoView(); {settled}")
    place = page.ask(
        "JSON.stringify([...document.querySelectorAll('#heat-plot .mark')].map((m) => m.getBoundingClientRect().toJSON()))"
    )
    last = json.loads(place)[-1]
    page.point(last["x"] + last["width"] / 2, last["y"] + last["height"] / 2)
    assert "activations at 6 bits" in told(page) and "stage1/block2/conv1" in told(page)
    box = page.ask("document.querySelector('.tip').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 375 and box["top"] >= 0
    page.point(5, 5)
    assert told(page) == ""


def test_theme(page, pages):
    """As the system says, until it is chosen; then as chosen, after loading again too."""
    light, dark = "rgb(251, 250, 247)", "rgb(21, 25, 29)"
    ground = "getComputedStyle(document.body).backgroundColor"
    for system, other, choice in ((False, dark, "dark"), (True, light, "light")):
        page.open(pages["few"], dark=system)
        assert page.ask(ground) == (dark if system else light)
        page.ask(f"document.querySelector('input[name=theme][value={choice}]').click()")
        assert page.ask(ground) == other
        page.open(pages["few"], dark=system)
        assert page.ask(ground) == other
        page.ask("document.querySelector('input[name=theme][value=system]').click()")
        assert page.ask(ground) == (dark if system else light)


def test_contestants(page, pages):
    """The lines are the chosen contestant's, or nobody's; the arrow keys choose."""
    page.open(pages["few"])
    groups = "[...document.querySelectorAll('[data-contestant]')]"
    shown = f"{groups}.filter((each) => getComputedStyle(each).display !== 'none').length"
    assert page.ask(shown) == 1
    page.ask("document.querySelector('input[name=beside]').focus()")
    page.press("ArrowRight")
    assert page.ask("document.querySelector('input[name=beside]:checked').value") == "" and page.ask(shown) == 0
    page.press("ArrowLeft")
    assert page.ask(shown) == 1


def test_without_scripts(page, pages):
    """Figures and tables stand; no control that would do nothing; the browser tells the values by titles."""
    page.open(pages["few"], scripts=False)
    assert page.ask("document.querySelectorAll('fieldset').length") == 2
    assert page.ask("[...document.querySelectorAll('fieldset')].some((each) => each.checkVisibility())") is False
    assert page.ask("document.querySelectorAll('svg.field .mark > title').length") > 30
    assert page.ask("document.querySelector('#bits-plot').getBoundingClientRect().height") > 200
    assert (
        page.ask("getComputedStyle(document.querySelector('#bits-plot .mark:not(.fixed) .weights')).fill")
        == "rgb(0, 114, 178)"
    )


def test_paper(page, pages):
    """Dark rooms or not, paper is white; what is folded is unfolded, controls are not there."""
    page.open(pages["few"], 794, dark=True, media="print")
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.ask("dispatchEvent(new Event('beforeprint'))")
    assert page.ask("document.querySelectorAll('details:not([open])').length") == 0
    assert page.ask("[...document.querySelectorAll('nav, fieldset')].some((each) => each.checkVisibility())") is False
    assert page.ask("document.documentElement.scrollWidth") <= 794
    page.ask("dispatchEvent(new Event('afterprint'))")
    assert page.ask("document.querySelectorAll('details:not([open])').length") == 4
