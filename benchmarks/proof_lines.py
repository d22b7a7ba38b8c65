"""What the proof's lines hold, and how they are kept: budgets, policies, lines.jsonl. No JAX."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq_jax.types import Bits, Importance

NAMES = {"resnet8": "ResNet-8", "mobilenetv1": "MobileNetV1-0.25"}
# name -> (budget, search rules): at "size=W3" the activations of all contestants stay at 4 bits.
BUDGETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "W2A3": ("bitops=W2A3", ()),
    "W3A3": ("bitops=W3A3", ()),
    "W3A4": ("bitops=W3A4", ()),
    "size W3, A4": ("size=W3", (".*=a4",)),
    "size W3, A6": ("size=W3", (".*=a6",)),
}
LEVELS = ("W2A3", "W3A3", "W3A4", "size W3, A4")  # what every contestant is asked for; A6: weights alone
PREDICTED = ("W2A3", "W3A3")  # where predictions are measured
TUNED = ("finetuned", "longer", "tuned", "repeat")  # first words of the lines of policies after fine-tuning
# Tables with the weights' factor a third of what it was: (contestant, whose table).
THIRDS = {"output_fisher_third": "output_fisher", "learned_third": "learned", "constant_third": "constant"}
# Sums of two tables, each divided by its standard deviation over random policies near the budget.
COMBINED = {"combined": ("output_fisher_third", "regression")}
# Whose alpha is looked for after fine-tuning.
TABLES = {"output_fisher": "output-Fisher", "learned": "learned step sizes"}


class Lines:
    """One run's lines.jsonl: {key: line}. A line that was cut off by a kill is left out."""

    def __init__(self, path: Path):
        self.path, self.lines = path, {}
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                one = json.loads(text)
            except json.JSONDecodeError:
                continue
            self.lines[one["key"]] = one

    def add(self, key: str, **values: Any) -> dict[str, Any]:
        self.lines[key] = {"key": key, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[key]) + "\n")
        return self.lines[key]

    def __contains__(self, key: str) -> bool:
        return key in self.lines

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.lines[key]


def as_lists(policies: Sequence[Mapping[str, Bits]], table: Importance) -> list[list[list[int]]]:
    """[N][L][2]: bits of the searched layers."""
    paths = [layer.path for layer in table.layers if layer.searched]
    return [[list(each[path]) for path in paths] for each in policies]


def as_policy(bits: Sequence[Sequence[int]], table: Importance) -> dict[str, Bits]:
    """The policy of `as_lists`' bits, fixed layers added."""
    searched = iter(bits)
    return {layer.path: Bits(*(next(searched) if layer.searched else layer.bits)) for layer in table.layers}


def digest(bits: Sequence[Sequence[int]]) -> str:
    """A policy's short name."""
    return hashlib.sha256(json.dumps(bits).encode()).hexdigest()[:12]


def kept(lines: Mapping[str, Any]) -> dict[str, Any]:
    """The lines with what fine-tuning keeps today: of two statistics those that lose less on training batches.

    Losses and accuracies after fine-tuning that were measured with re-estimated statistics alone are left out.
    """
    found = {}
    for key, line in lines.items():
        if key.split()[0] not in TUNED:
            found[key] = line
        elif "running" in line:
            found[key] = {**line, **(line["running"] if keeps_own(line) else {})}
    return found


def keeps_own(line: Mapping[str, Any]) -> bool:
    """Whether fine-tuning keeps its own statistics: they lose no more on training batches than those re-estimated."""
    return line["running"]["train_loss"] <= line["train_loss"]


def result(lines: Mapping[str, Any], budget: str, name: str) -> Mapping[str, Any] | None:
    """The line of a contestant's fine-tuning."""
    one = lines.get(f"chosen {budget} {name}")
    return None if one is None else lines.get(f"finetuned {digest(one['policy'])}")


def best_uniform(lines: Mapping[str, Any], budget: str) -> tuple[str, Mapping[str, Any]] | None:
    """Of the uniform policies that fit, the one of least validation loss after fine-tuning."""
    prefix = f"chosen {budget} uniform "
    found = {
        key[len(prefix) :]: result(lines, budget, key[len(f"chosen {budget} ") :])
        for key in lines
        if key.startswith(prefix)
    }
    done = {name: one for name, one in found.items() if one is not None}
    return min(done.items(), key=lambda item: item[1]["loss"]) if done else None


def finetuned(lines: Mapping[str, Any], budget: str = "") -> dict[str, list[list[int]]]:
    """{digest: bits} of the contestants' policies that were fine-tuned, at a budget or at all."""
    chosen = [one["policy"] for key, one in lines.items() if key.startswith(f"chosen {budget}")]
    named = {digest(bits): bits for bits in chosen}
    return {key: bits for key, bits in named.items() if f"finetuned {key}" in lines}
