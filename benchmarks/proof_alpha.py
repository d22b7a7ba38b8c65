"""How much the weights' harm counts after fine-tuning: alpha, from the losses of all policies that were fine-tuned.

A table says  alpha * W + A  of a policy, W and A being the sums of its weights' and its activations' entries. In the model as
it is alpha is 1 where both are in units of loss. Fine-tuning moves weights and cannot move inputs, so that it is less then.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.proof_lines import PREDICTED, TABLES, THIRDS, finetuned
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
    policies = lines.get(f"random {level}", {}).get("policies", [])
    parts = None if f"parts {name}" in lines else parts_of(lines, name, dict(enumerate(policies)))
    if not parts or len(parts) < len(policies):
        return None
    return [weight / 3 + activation for weight, activation in parts.values()]


def within(lines: Mapping[str, Any], name: str, alpha: float, narrow: bool = True) -> float | None:
    """Mean over BITOPS of the rank correlation of alpha W + A with the loss after fine-tuning, policies of one budget.

    alpha: a multiple of the table's own, where it has one. narrow: with uniform policies whose activations are narrower
    than their weights, and with the choices of tables whose weights count a third.
    """
    found = []
    for level in BITOPS:
        parts = parts_of(lines, name, asked(lines, level, narrow))
        if parts is None or len(parts) < LEAST:
            return None
        weight, activation = np.array(list(parts.values())).T
        losses = [lines[f"finetuned {key}"]["loss"] for key in parts]
        # Predictions had the table's own alpha in them already.
        own = lines.get(f"parts {name}", {}).get("alpha") or 1.0
        found.append(spearman(alpha * own * weight + activation, losses))
    return float(np.mean(found))


def asked(lines: Mapping[str, Any], level: str, narrow: bool) -> dict[str, list[list[int]]]:
    """{digest: bits} of the policies of a level that were fine-tuned."""
    prefix = f"chosen {level} "
    left_out = {key for key in lines if key.startswith(prefix) and not narrow and is_narrow(lines, key, prefix)}
    return finetuned({key: line for key, line in lines.items() if key not in left_out}, f"{level} ")


def is_narrow(lines: Mapping[str, Any], key: str, prefix: str) -> bool:
    weight, activation = lines[key]["policy"][0]
    return key[len(prefix) :] in THIRDS or (key.startswith(prefix + "uniform") and activation < weight)


def alpha_table(runs: Runs, names: Mapping[str, str]) -> str:
    """Rows: a table, a net, and whether its runs are those that alpha was chosen on. Columns: alphas."""
    rows = []
    for name, text in TABLES.items():
        for net, shown in names.items():
            for chosen in (True, False):
                own = [runs[run] for run in runs if run[0] == net and (run[1] in CHOSEN_ON[net]) == chosen]
                own = [lines for lines in own if within(lines, name, 1.0) is not None]
                counts = [len(asked(lines, level, True)) for lines in own for level in BITOPS]
                if own:
                    about = f"{'chosen on' if chosen else 'others'}, {len(own)}"
                    cells = [cell([within(lines, name, alpha) for lines in own]) for alpha in ALPHAS]
                    rows.append([f"{text}, {shown} ({about})", f"{min(counts)} to {max(counts)}", *cells])
    return table(["alpha", "policies", *(f"{alpha:.2g}" for alpha in ALPHAS)], rows)


def values(runs: Runs, names: Mapping[str, str]) -> dict[str, str]:
    """{placeholder: text} of this module's tables: "third NET TABLE": the correlation at a third minus that at 1, over runs."""
    found = {"alphas": alpha_table(runs, names)}
    for net, name, narrow in itertools.product(names, TABLES, (True, False)):
        pairs = [
            [within(lines, name, alpha, narrow) for alpha in (1 / 3, 1.0)]
            for run, lines in runs.items()
            if run[0] == net
        ]
        gains = [a - b for a, b in pairs if a is not None and b is not None]
        found[f"third {net} {name}{'' if narrow else ' wide'}"] = (
            f"{cell(gains, sign=True)} ({len(gains)} runs)" if gains else ""
        )
    return found
