"""The quadratic form of an importance with interactions, and its projection to a positive semi-definite one.

CLADO (2023) projects so that a convex solver can be used. The search here needs no convexity: it is an option, for
comparing with CLADO only, and it changes what is minimised.
"""

import itertools

import numpy as np

from mpq_jax.importance import combined
from mpq_jax.types import Importance, Interaction, Refusal

# (path, "w" or "a")
Decision = tuple[str, str]


def quadratic(importance: Importance, alpha: float | None = None) -> tuple[np.ndarray, list[Decision], list[slice]]:
    """(G, decisions, where each stands): the objective is x' G x for the one-hot vector x [N] of all decisions.

    G: float64 [N, N], symmetric. Harm of one decision stands on the diagonal, half of what two do together on each
    side of it. A pair table [L, Kw, Ka] is what a layer's two decisions do together.
    """
    searched = [layer.path for layer in importance.layers if layer.searched]
    widths = {"w": len(importance.bit_widths), "a": len(importance.activation_bit_widths)}
    decisions = [(path, kind) for path in searched for kind in "wa"]
    ends = np.cumsum([0, *(widths[kind] for _, kind in decisions)])
    places = [slice(int(a), int(b)) for a, b in itertools.pairwise(ends)]
    at = dict(zip(decisions, places, strict=True))
    form = np.zeros((ends[-1], ends[-1]))

    def together(a: Decision, b: Decision, table: np.ndarray) -> None:
        form[at[a], at[b]] += table / 2
        form[at[b], at[a]] += table.T / 2

    table = combined(importance, alpha)
    for row, path in enumerate(searched):
        if importance.pair is not None:
            together((path, "w"), (path, "a"), table[row])
            continue
        assert importance.weight is not None and importance.activation is not None
        activation = importance.activation[row]
        form[at[path, "a"], at[path, "a"]] += np.diag(activation)
        form[at[path, "w"], at[path, "w"]] += np.diag(table[row, :, 0] - activation[0])
    for each in importance.interactions:
        if each.a == each.b:
            raise Refusal(f"an interaction of {each.a} with itself is no harm of two decisions; put it in its table")
        together(each.a, each.b, each.table)
    return form, decisions, places


def projected(importance: Importance, alpha: float | None = None) -> Importance:
    """The importance whose quadratic form is the nearest positive semi-definite one (negative eigenvalues become 0).

    Every pair of decisions interacts in it. alpha is worked into the tables.
    """
    form, decisions, places = quadratic(importance, alpha)
    values, vectors = np.linalg.eigh(form)
    nearest = (vectors * np.maximum(values, 0.0)) @ vectors.T
    alone = [np.diag(nearest[place, place]) for place in places]
    pairs = itertools.combinations(range(len(decisions)), 2)
    return importance._replace(
        criterion=f"{importance.criterion}, positive semi-definite",
        weight=np.array(alone[0::2]),
        activation=np.array(alone[1::2]),
        pair=None,
        alpha=None,
        interactions=tuple(
            Interaction(decisions[i], decisions[j], 2 * nearest[places[i], places[j]]) for i, j in pairs
        ),
    )
