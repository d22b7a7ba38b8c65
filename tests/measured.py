"""Searches on made problems: what a policy does is known, and nothing is trained."""

from mpq_jax.importance import total
from mpq_jax.search.journal import Journal, Outcome


class Known:
    """evaluate(policy) whose loss is the importance's total and whose accuracy falls with it; counts its calls."""

    def __init__(self, importance, stop_after=None):
        self.importance, self.stop_after, self.calls = importance, stop_after, 0

    def __call__(self, policy):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        loss = total(self.importance, policy)
        return Outcome(loss, 1 - loss / 100)


def losses(journal):
    return [evaluation.measured.loss for evaluation in journal.evaluated]


def log_without_seconds(path):
    """The log's lines, all but what depends on the clock."""
    import json

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def check_resumed(tmp_path, importance, budgets, search, after):
    """A search stopped in its k-th evaluation and started again leaves the log of one that was not stopped."""
    whole = Journal(tmp_path / "whole", importance, budgets, Known(importance))
    search(whole)
    for number, k in enumerate(after):
        try:
            search(Journal(tmp_path / "stopped", importance, budgets, Known(importance, stop_after=k)))
        except KeyboardInterrupt:
            done = sum(after[: number + 1])
            assert len(log_without_seconds(tmp_path / "stopped")) == done
    known = Known(importance)
    resumed = Journal(tmp_path / "stopped", importance, budgets, known)
    search(resumed)
    assert known.calls == len(whole.evaluated) - sum(after)
    assert log_without_seconds(tmp_path / "stopped") == log_without_seconds(tmp_path / "whole")
    assert [e.policy for e in resumed.evaluated] == [e.policy for e in whole.evaluated]
