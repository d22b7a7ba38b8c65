"""Policies within the budgets, found greedily: what there is to offer before, and without, any proof."""

import numpy as np

from mpq_jax.search.dual import Dual
from mpq_jax.search.problem import Problem


def incumbent(problem: Problem, dual: Dual, tries: int = 3) -> np.ndarray | None:
    """The best of the dual's own policies, each made to fit. -> picks [L], or None"""
    rows = np.arange(len(problem.paths))
    offered = (made_to_fit(problem, picks) for picks in dual.picks[-tries:])
    fitting = [picks for picks in offered if picks is not None]
    return min(fitting, key=lambda picks: problem.value[rows, picks].sum()) if fitting else None


def made_to_fit(problem: Problem, picks: np.ndarray) -> np.ndarray | None:
    """Takes bits away, least loss for the saving first, until every budget holds; then gives back what fits.

    Tied rows move their weight bits only. None where that does not reach the budgets.
    """
    picks = picks.copy()
    rows = np.arange(len(picks))
    tied = np.isin(rows, [row for group in problem.tied for row in group])
    while not problem.fits(picks):
        move = _best_move(problem, picks, tied, down=True)
        if move is None:
            return None
        picks[move[0]] = move[1]
    while (move := _best_move(problem, picks, tied, down=False)) is not None:
        picks[move[0]] = move[1]
    return picks


def _best_move(problem: Problem, picks: np.ndarray, tied: np.ndarray, down: bool) -> tuple[int, int] | None:
    """(row, column) of the change that loses least for what it saves, or wins most in the room there is."""
    rows = np.arange(len(picks))
    harm = problem.value - problem.value[rows, picks][:, None]
    movable = problem.allowed & (~tied[:, None] | (problem.a == problem.a[picks][:, None]))
    saved, room, cheaper = np.zeros(harm.shape), np.ones(harm.shape, bool), np.ones(harm.shape, bool)
    for c, limit, spent in zip(problem.cost, problem.limit, problem.spent(picks), strict=True):
        delta = c[rows, picks][:, None] - c
        if spent > limit:
            saved += delta / (abs(limit) or 1.0)
        room &= spent - delta <= limit
        cheaper &= delta >= 0  # a move that costs more of another budget could go round in circles
    if down:
        candidates = movable & cheaper & (saved > 0)
        price = np.where(candidates, harm, np.inf) / np.where(saved > 0, saved, 1)
    else:
        candidates = movable & room & (harm < 0)
        price = np.where(candidates, harm, np.inf)
    if not candidates.any():
        return None
    row, column = np.unravel_index(int(price.argmin()), price.shape)
    return int(row), int(column)


def polish(problem: Problem, picks: np.ndarray) -> np.ndarray:
    """Single changes that lower the objective, terms included, within the budgets, the best of each row in turn.

    Tied rows move their weight bits only. picks: [L] that fit. Ends where no single change helps.
    """
    picks = picks.copy()
    tied = {row for group in problem.tied for row in group}
    improved = True
    while improved:
        improved = False
        for row in range(len(picks)):
            harm = problem.value[row] + _harm_of_terms(problem, picks, row)
            room = problem.allowed[row].copy()
            if row in tied:
                room &= problem.a == problem.a[picks[row]]
            for c, limit, spent in zip(problem.cost, problem.limit, problem.spent(picks), strict=True):
                room &= spent - c[row, picks[row]] + c[row] <= limit
            if not room.any():
                continue
            best = int(np.where(room, harm, np.inf).argmin())
            if harm[best] < harm[picks[row]] - 1e-12 * abs(harm[picks[row]]):
                picks[row], improved = best, True
    return picks


def _harm_of_terms(problem: Problem, picks: np.ndarray, row: int) -> np.ndarray:
    """[C]: what the terms of a row add at each of its columns, the other rows as picked."""
    harm = np.zeros(len(problem.w))
    for term in problem.terms:
        if term.a == row:
            harm += term.table[term.level_a, term.level_b[picks[term.b]]]
        elif term.b == row:
            harm += term.table[term.level_a[picks[term.a]], term.level_b]
    return harm
