"""The log of a search that measures: one JSON line for every evaluated policy, and the search's only state.

A search here is a function of its seed and of what it measured. So a run that was killed is resumed by running it
again with its log: what was measured is answered from there, and the rest is measured and logged.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpq_jax import costs
from mpq_jax.types import Bits, Budget, Importance, Policy, Refusal


class Outcome(NamedTuple):
    """What a policy did on held-out data: mean loss (infinite where it was no number), accuracy from 0 to 1 (not a number
    where nothing is called right)."""

    loss: float
    accuracy: float


class Evaluation(NamedTuple):
    """One line of the log. cost: budget name -> what the policy uses of it. seconds: since the line before."""

    policy: dict[str, Bits]
    cost: dict[str, Any]
    measured: Outcome
    seconds: float


class Ended(Exception):
    """The search has used up its evaluations or its seconds."""


class Journal:
    """measure(searched layers' bits) -> Outcome, logged or from the log.

    path: of the log. evaluations, seconds: when `measure` raises Ended (None: never; the first policy is always
    measured). Seconds are those of the log: a resumed search has the time that is left.
    """

    def __init__(
        self,
        path: Path,
        importance: Importance,
        budgets: Sequence[Budget],
        evaluate: Callable[[Policy], Outcome],
        evaluations: int | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.importance, self.budgets, self._evaluate = path, importance, budgets, evaluate
        self.evaluations, self.seconds, self._clock = evaluations, seconds, clock
        self._lines = _whole_lines(path)
        self._mark = clock()
        self.elapsed = 0.0
        self.evaluated: list[Evaluation] = []

    def begin_at(self, seconds: float) -> None:
        """Counts what was spent before the first evaluation (training a supernet)."""
        self.elapsed, self._mark = seconds, self._clock()

    def check_limits(self) -> None:
        """Raises Ended where nothing more may be measured."""
        if self.evaluations is not None and len(self.evaluated) >= self.evaluations:
            raise Ended
        if self.seconds is not None and self.evaluated and self.elapsed >= self.seconds:
            raise Ended

    def measure(self, searched: Policy, **note: Any) -> Outcome:
        """Measures the policy, or takes what the log says of it. note: more to log beside it.

        Raises Ended at a limit, and Refusal where the log holds another policy here.
        """
        self.check_limits()
        policy = {ly.path: ly.bits if ly.bits is not None else searched[ly.path] for ly in self.importance.layers}
        cost = {budget.name: costs.used(budget, policy, self.importance) for budget in self.budgets}
        assert all(cost[budget.name] <= budget.limit for budget in self.budgets), "a policy over its budget"
        number = len(self.evaluated)
        if number < len(self._lines):
            line = self._lines[number]
            if line["policy"] != _bits_to_json(policy):
                raise Refusal(
                    f"{self.path} holds another policy as number {number + 1} than this search comes to: it was made "
                    "by another program or on another machine; delete it to start again"
                )
            loss = math.inf if line["loss"] is None else line["loss"]
            accuracy = math.nan if line["accuracy"] is None else line["accuracy"]
            measured, seconds = Outcome(loss, accuracy), line["seconds"]
        else:
            measured = self._evaluate(policy)
            if not math.isfinite(measured.loss):  # the worst, now as when it is read back
                measured = measured._replace(loss=math.inf)
            seconds = round(self._clock() - self._mark, 3)
            self._append({"number": number + 1, "policy": _bits_to_json(policy), "cost": cost}, measured, seconds, note)
        self._mark = self._clock()
        self.elapsed += seconds
        self.evaluated.append(Evaluation(policy, cost, measured, seconds))
        return measured

    def _append(self, line: dict[str, Any], measured: Outcome, seconds: float, note: Mapping[str, Any]) -> None:
        loss = measured.loss if math.isfinite(measured.loss) else None
        accuracy = None if math.isnan(measured.accuracy) else measured.accuracy
        text = json.dumps({**line, "loss": loss, "accuracy": accuracy, "seconds": seconds, **note})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def _bits_to_json(policy: Policy) -> dict[str, list[Any]]:
    return {path: [list(w) if isinstance(w, Sequence) else w, a] for path, (w, a) in policy.items()}


def _is_evaluation(value: Any) -> bool:
    """Whether a line says what was measured of which policy. What is null was no number; some tasks have no accuracy."""
    if not isinstance(value, dict) or not isinstance(value.get("policy"), dict) or "loss" not in value:
        return False
    if "accuracy" not in value:
        return False
    numbers = [value.get("seconds"), *(value[name] for name in ("loss", "accuracy") if value[name] is not None)]
    if not all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers):
        return False
    return (value["accuracy"] is None or 0 <= value["accuracy"] <= 1) and value["seconds"] >= 0


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. One that was being written at a kill is cut off; anything else that is broken is refused."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, torn = text.rpartition("\n")
    if torn:
        with open(path, "r+b") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not _is_evaluation(value):
            raise Refusal(f"{path}, line {number} is no evaluation; delete the file to start again")
        lines.append(value)
    return lines
