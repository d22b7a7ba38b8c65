"""How much the weights' harm counts after fine-tuning: alpha, from the losses of all policies that were fine-tuned.

A table says  alpha * W + A  of a policy, W and A being the sums of its weights' and its activations' entries. In the model as
it is alpha is 1 where both are in units of loss. Fine-tuning moves weights and cannot move inputs, so that it is less then.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.proof_lines import TABLES, finetuned
from benchmarks.proof_statistics import Runs, cell, spearman, table

ALPHAS = (0.03, 0.1, 0.2, 1 / 3, 0.5, 0.7, 1.0, 2.0, 4.0)
BITOPS = ("W2A3", "W3A3", "W3A4")  # where weights and activations both have a choice
LEAST = 4  # policies of a budget that an order is asked of
# Alpha was chosen on these runs; those after them had no part in it.
CHOSEN_ON = {"resnet8": (5, 6, 7), "mobilenetv1": (3, 4, 5, 6)}


def within(lines: Mapping[str, Any], name: str, alpha: float) -> float | None:
    """Mean over BITOPS of the rank correlation of alpha W + A with the loss after fine-tuning, policies of one budget.

    alpha: a multiple of the table's own, where it has one.
    """
    if f"parts {name}" not in lines:
        return None
    line, found = lines[f"parts {name}"], []
    for level in BITOPS:
        keys = [key for key in finetuned(lines, f"{level} ") if key in line["policies"]]
        if len(keys) < LEAST:
            return None
        weight, activation = np.array([line["policies"][key] for key in keys]).T
        losses = [lines[f"finetuned {key}"]["loss"] for key in keys]
        found.append(spearman(alpha * (line["alpha"] or 1.0) * weight + activation, losses))
    return float(np.mean(found))


def alpha_table(runs: Runs, names: Mapping[str, str]) -> str:
    """Rows: a table, a net, and whether its runs are those that alpha was chosen on. Columns: alphas."""
    rows = []
    for name, text in TABLES.items():
        for net, shown in names.items():
            for chosen in (True, False):
                asked = [run for run in runs if run[0] == net and (run[1] in CHOSEN_ON[net]) == chosen]
                cells = [[v for run in asked if (v := within(runs[run], name, a)) is not None] for a in ALPHAS]
                if cells[0]:
                    about = f"{'chosen on' if chosen else 'later'}, {len(cells[0])}"
                    rows.append([f"{text}, {shown} ({about})", *(cell(each) for each in cells)])
    return table(["alpha", *(f"{alpha:.2g}" for alpha in ALPHAS)], rows)
