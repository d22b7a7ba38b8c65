"""Rules over layer paths: values, which one wins, and patterns that are refused, slow ones too."""

import re
import threading
import time

import pytest

from mpq_jax import Bits, Refusal, rules

PATHS = ("stem/conv", "block1/conv1", "block1/conv2", "head")


@pytest.mark.parametrize(
    "text, value",
    [
        ("float", "float"),
        ("8,8", Bits(8, 8)),
        ("w2/4/8,a4/8", rules.Candidates((2, 4, 8), (4, 8))),
        ((3, 4), Bits(3, 4)),
        (((2, 3), (4,)), rules.Candidates((2, 3), (4,))),
    ],
)
def test_rule_values(text, value):
    assert rules.parse_value(text) == value


@pytest.mark.parametrize("value", ["fp4", "8", "8,8,8", "w2,a", "w2/,a4", (2,), ((2, 3), 4), None, 8, "FLOAT", "8.0,8"])
def test_values_that_are_not_known(value):
    with pytest.raises(Refusal, match=r"rule value .* is not known; write \"float\", \"8,8\" .fixed. or"):
        rules.parse_value(value)


def test_first_rule_wins():
    ordered = [("a/b", 1), ("a", 2), ("", 3)]
    assert [rules.first_match(ordered, path) for path in ("a/b", "a/c", "z")] == [1, 2, 3]
    assert rules.first_match(ordered[:2], "z") is None


def test_the_first_match_is_that_of_a_loop():
    """Every order of four patterns on every path, anchors and alternatives too."""
    patterns = ["^stem", "conv[12]$", "block1|head", "conv1"]
    for shift in range(4):
        ordered = [(pattern, i) for i, pattern in enumerate(patterns[shift:] + patterns[:shift])]
        for path in PATHS:
            found = [value for pattern, value in ordered if re.search(pattern, path)]
            assert rules.first_match(ordered, path) == (found[0] if found else None)


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("block1/conv3", r"matches no layer; the layers nearest to it are block1/conv\d, block1/conv\d"),
        ("zzz", "matches no layer; the layers nearest to it are stem/conv, block1/conv1, block1/conv2"),
        ("(", "is not a regular expression"),
        ("(?P<a>x)(?P<a>y)", "is not a regular expression"),
        ("x{99999999999}", "is not a regular expression"),
    ],
)
def test_patterns_that_are_refused(pattern, words):
    with pytest.raises(Refusal, match=f"^signed rule .*{words}"):
        rules.check_rules([("stem", True), (pattern, True)], PATHS, "signed rule")


def test_a_pattern_that_takes_for_ever_is_cut_short(monkeypatch):
    """Its time doubles with each letter of a path; what stood watch is gone afterwards."""
    monkeypatch.setattr(rules, "SECONDS", 0.1)
    start = time.process_time()
    with pytest.raises(Refusal, match="takes too long on these layers; write it without nested repeats"):
        rules.check_rules([("(a+)+$", "float")], ["a" * 60 + "b"])
    assert time.process_time() - start < 5
    rules.check_rules([("conv", "float")], PATHS)
    time.sleep(0.15)  # no alarm is left


def test_other_threads_have_no_watch_and_need_none():
    problems = []

    def check():
        try:
            rules.check_rules([("conv", "float")], PATHS)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert problems == []
