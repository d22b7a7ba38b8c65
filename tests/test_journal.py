"""The log of a search: what it writes, what it answers again, and when it says stop."""

import json
import math

import pytest
from tables import budgets_of, cost_by_hand, made

from mpq_jax import Bits, Refusal
from mpq_jax.search.journal import Ended, Journal, Outcome

TABLE = made(2, layers=2)
BUDGETS = budgets_of(TABLE, "bitops=W4A4", "size=W4")


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def opened(path, clock, losses, accuracy=0.5, **limits):
    """A journal whose evaluation takes two seconds and gives the next of `losses`."""
    given = iter(losses)

    def evaluate(policy):
        assert policy["first"] == Bits(8, 8)  # fixed layers are filled in
        clock.now += 2
        return Outcome(next(given), accuracy)

    return Journal(path, TABLE, BUDGETS, evaluate, clock=clock, **limits)


def searched(i):
    return {"layer0": Bits(2 + i % 3, 2), "layer1": Bits(2, 3)}


def test_lines(tmp_path):
    clock = Clock()
    journal = opened(tmp_path / "log.jsonl", clock, [1.5, math.nan])
    clock.now += 1  # what the search itself takes
    assert journal.measure(searched(1), generation=3) == Outcome(1.5, 0.5)
    journal.measure(searched(2))
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    policy = {"first": Bits(8, 8), **searched(1), "last": Bits(32, 32)}
    assert first == {
        "number": 1,
        "policy": {path: list(bits) for path, bits in policy.items()},
        "cost": {name: cost_by_hand(TABLE, policy, name) for name in ("bitops", "size")},
        "loss": 1.5,
        "accuracy": 0.5,
        "seconds": 3.0,
        "generation": 3,
    }
    assert second["loss"] is None and second["seconds"] == 2.0 and journal.elapsed == 5.0
    assert journal.evaluated[0].policy == policy


def test_what_was_measured_is_not_measured_again(tmp_path):
    path, clock = tmp_path / "log.jsonl", Clock()
    before = opened(path, clock, [1.5, math.nan, 0.5])
    answers = [before.measure(searched(i)) for i in range(3)]
    with open(path, "a") as file:
        file.write('{"number": 4, "policy": {"fir')  # killed while it wrote
    again = opened(path, clock, [7.0])
    assert [again.measure(searched(i)) for i in (0,)] == answers[:1]
    assert again.measure(searched(1)).loss == math.inf
    assert again.measure(searched(2)) == answers[2] and again.elapsed == 6.0
    assert again.measure(searched(0)).loss == 7.0 and again.elapsed == 8.0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    other = opened(path, clock, [])
    other.measure(searched(0))
    with pytest.raises(Refusal, match=r"another policy as number 2.*delete it"):
        other.measure(searched(2))


def test_what_is_no_number_reads_back_as_it_was_measured(tmp_path):
    """A loss that is none is the worst, before and after a kill; a task may have no accuracy."""
    path, clock = tmp_path / "log.jsonl", Clock()
    journal = opened(path, clock, [math.nan, 0.7, -math.inf], accuracy=math.nan)
    before = [journal.measure(searched(i)) for i in range(3)]
    assert [one.loss for one in before] == [math.inf, 0.7, math.inf]
    again = opened(path, clock, [])
    for i, one in enumerate(before):
        read = again.measure(searched(i))
        assert read.loss == one.loss and math.isnan(read.accuracy)


@pytest.mark.parametrize("broken", ["[1, 2]", "{}", "{not json", '{"policy": {}, "loss": 1}'])
def test_a_broken_line_is_refused(tmp_path, broken):
    (tmp_path / "log.jsonl").write_text(broken + "\n")
    with pytest.raises(Refusal, match="line 1 is no evaluation; delete the file"):
        opened(tmp_path / "log.jsonl", Clock(), [])


def test_limits(tmp_path):
    """So many evaluations; or seconds, those before a kill counted; the first policy is always measured."""
    clock = Clock()
    journal = opened(tmp_path / "a", clock, [1.0] * 9, evaluations=2)
    journal.measure(searched(0))
    journal.measure(searched(1))
    with pytest.raises(Ended):
        journal.measure(searched(2))
    journal = opened(tmp_path / "b", clock, [1.0] * 9, seconds=5)
    for i in range(2):
        journal.measure(searched(i))
    journal = opened(tmp_path / "b", clock, [1.0] * 9, seconds=5)
    for i in range(3):
        journal.measure(searched(i))
    with pytest.raises(Ended):
        journal.measure(searched(3))
    assert len((tmp_path / "b").read_text().splitlines()) == 3
    journal = opened(tmp_path / "c", clock, [1.0] * 9, seconds=5)
    journal.begin_at(99.0)
    journal.measure(searched(0))
    with pytest.raises(Ended):
        journal.measure(searched(1))


def test_a_policy_over_a_budget_is_never_measured(tmp_path):
    tight = [budget._replace(limit=budget.fixed) for budget in BUDGETS]
    journal = Journal(tmp_path / "a", TABLE, tight, lambda policy: Outcome(0.0, 1.0))
    with pytest.raises(AssertionError, match="over its budget"):
        journal.measure(searched(0))
    assert not (tmp_path / "a").exists()
