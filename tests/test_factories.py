"""Functions named on the command line: what they are called with, and whatever goes wrong in one line with its place."""

import re
import sys

import pytest

from mpq_jax import Refusal, factories

MODULE = """
def fixed():
    return 3

def options(depth, width=2, *, seed=7):
    return depth, width, seed

def anything(**kwargs):
    return kwargs

class Made:
    def __init__(self, depth=1):
        self.depth = depth

def careful(depth):
    from mpq_jax import Refusal
    raise Refusal("depth 3 is too much")

def broken():
    return inner()

def inner():
    raise ValueError("first line\\nsecond line")

NUMBER = 3
"""
RAISES = 1 + MODULE[: MODULE.index("raise ValueError")].count("\n")  # the line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules in it, the working directory."""
    (tmp_path / "given.py").write_text(MODULE)
    (tmp_path / "needs.py").write_text("import not_installed_at_all\n")
    (tmp_path / "typo.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("given", "needs", "typo"):
        sys.modules.pop(name, None)


def made(name, options=None, offered=None):
    return factories.made("--model", f"given:{name}", options or {}, offered)


def test_what_a_function_is_called_with(here):
    """The user's options; of what is offered besides, what the function takes; the user's word goes first."""
    assert made("fixed", offered={"seed": 1}) == 3
    assert made("options", {"depth": 1}, {"seed": 5, "classes": 10}) == (1, 2, 5)
    assert made("options", {"depth": 1, "seed": 9}, {"seed": 5}) == (1, 2, 9)
    assert made("anything", {"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    assert made("Made", {"depth": 4}).depth == 4
    assert [factories.is_factory(name) for name in ("m:f", "resnet8")] == [True, False]


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("given:fixed", {"depth": 1}, r"has no option 'depth'; it takes none \(--model.options, a JSON object\)"),
        ("given:options", {"deep": 1}, r"has no option 'deep'; it takes depth, width, seed"),
        ("given:options", {}, r"needs 'depth', and nobody gave it"),
        ("given:careful", {"depth": 3}, r"^depth 3 is too much$"),
        ("given:broken", {}, rf"failed: ValueError: first line \(given.py:{RAISES}\)$"),
        ("given:NUMBER", {}, r"is int, not a function"),
        ("given:optoins", {}, r"module given has no 'optoins'; did you mean options\?"),
        ("given:zzz", {}, r"has no 'zzz'; it has fixed, options"),
        (
            "needs:f",
            {},
            r"cannot be imported: ModuleNotFoundError: No module named 'not_installed_at_all' \(needs.py:1\)",
        ),
        ("typo:f", {}, r"cannot be imported: SyntaxError"),
        ("nowhere.to.be:f", {}, r"there is no module 'nowhere' here"),
        ("given.py:f", {}, r"is no name of a function; write given:f$"),
        ("./sub/given.py:f", {}, r"write sub.given:f$"),
        ("given:", {}, r"write given:function$"),
        (":f", {}, r"write my_package.module:f$"),
    ],
)
def test_what_goes_wrong(here, name, options, words):
    with pytest.raises(Refusal) as refusal:
        factories.made("--model", name, options)
    assert re.search(words, str(refusal.value)) and "\n" not in str(refusal.value), refusal.value
