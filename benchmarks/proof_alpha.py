"""How much the weights' harm counts after fine-tuning: alpha, from the losses of all policies that were fine-tuned.

A table says  alpha * W + A  of a policy, W and A being the sums of its weights' and its activations' entries. In the model as
it is alpha is 1 where both are in units of loss. Fine-tuning moves weights and cannot move inputs, so that it is less then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.proof_lines import PREDICTED, TABLES, finetuned
from benchmarks.proof_statistics import Runs, cell, spearman, table

ALPHAS = (0.03, 0.1, 0.2, 1 / 3, 0.5, 0.7, 1.0, 2.0, 4.0)
BITOPS = ("W2A3", "W3A3", "W3A4")  # where weights and activations both have a choice
LEAST = 4  # policies of a budget that an order is asked of
# Alpha was chosen on these runs; those after them had no part in it.
CHOSEN_ON = {"resnet8": (5, 6, 7), "mobilenetv1": (3, 4, 5, 6)}


def parts_of(
    lines: Mapping[str, Any], name: str, policies: Mapping[Any, Sequence]
) -> dict[Any, Sequence[float]] | None:
    """{digest: (W, A)} of {digest: bits}, from the line "parts NAME" or else from what the table predicted.

    The predictions of the random policies are sums over a table's entries, which are solved for: W and A each up to a
    constant, which no order minds. A policy that they do not tell of is left out. None without either line.
    """
    if (line := lines.get(f"parts {name}")) is not None:
        return {key: line["policies"][key] for key in policies if key in line["policies"]}
    found = [(f"random {level}", f"predicted {level} {name}") for level in PREDICTED]
    if not policies or "indicators" not in lines or any(key not in lines for pair in found for key in pair):
        return None
    widths = np.array(lines["indicators"]["bit_widths"])

    def hot(each: Sequence) -> np.ndarray:
        """[N, 2, L K]: which entries N policies' sums have, of weights and of activations."""
        return (np.transpose(each, (0, 2, 1))[..., None] == widths).astype(float).reshape(len(each), 2, -1)

    known = hot(np.concatenate([lines[random]["policies"] for random, _ in found]))
    values = np.concatenate([lines[predicted]["values"] for _, predicted in found])
    matrix = known.reshape(len(known), -1)
    entries = np.linalg.lstsq(matrix, values, rcond=None)[0]
    if not np.allclose(matrix @ entries, values, rtol=1e-5, atol=0):
        return None  # not a sum over layers
    _, scales, rows = np.linalg.svd(matrix, full_matrices=False)
    rows = rows[scales > 1e-9 * scales[0]]
    parts, told = [], np.ones(len(policies), bool)
    for kind in (0, 1):
        apart = np.zeros((len(policies), *known.shape[1:]))
        apart[:, kind] = hot(list(policies.values()))[:, kind] - known[0, kind]
        flat = apart.reshape(len(policies), -1)
        told &= np.abs(flat @ rows.T @ rows - flat).max(1) < 1e-9
        parts.append(flat @ entries)
    return {
        key: pair for key, pair, is_told in zip(policies, np.transpose(parts).tolist(), told, strict=True) if is_told
    }


def third(lines: Mapping[str, Any], level: str, name: str) -> list[float] | None:
    """What a table says of a level's random policies, its weights' entries counted a third, from what it predicted as it is."""
    policies = lines.get(f"random {level}", {"policies": []})["policies"]
    parts = None if f"parts {name}" in lines else parts_of(lines, name, dict(enumerate(policies)))
    if not parts or len(parts) < len(policies):
        return None
    return [weight / 3 + activation for weight, activation in parts.values()]


def within(lines: Mapping[str, Any], name: str, alpha: float) -> float | None:
    """Mean over BITOPS of the rank correlation of alpha W + A with the loss after fine-tuning, policies of one budget.

    alpha: a multiple of the table's own, where it has one.
    """
    found = []
    for level in BITOPS:
        parts = parts_of(lines, name, finetuned(lines, f"{level} "))
        if parts is None or len(parts) < LEAST:
            return None
        weight, activation = np.array(list(parts.values())).T
        losses = [lines[f"finetuned {key}"]["loss"] for key in parts]
        # Predictions had the table's own alpha in them already.
        own = lines.get(f"parts {name}", {}).get("alpha") or 1.0
        found.append(spearman(alpha * own * weight + activation, losses))
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
