"""SPOS's evolutionary search (Guo et al., ECCV 2020), on the joint model.

A generation is measured; the best policies so far are the parents of the next: mutations and crossovers of them, and
random policies where these do not fill it. What breaks a budget or was measured before is rejected.
"""

from collections.abc import Callable

import numpy as np

from mpq_jax.search.journal import Journal
from mpq_jax.search.methods import Evolution
from mpq_jax.search.others import random_fitting
from mpq_jax.search.problem import Problem
from mpq_jax.types import Refusal

Picks = np.ndarray


def evolve(problem: Problem, journal: Journal, settings: Evolution, seed: int) -> None:
    """Measures generation after generation by `journal`, whose losses are what parents are chosen by.

    Ends after `settings.generations`, or where no policy is left that was not measured.
    Raises Refusal where no policy within the budgets is found, and what `journal.measure` raises.
    """
    rng = np.random.default_rng(seed)
    seen: set[bytes] = set()

    def fresh(count: int, make: Callable[[], Picks | None]) -> list[Picks]:
        """Up to `count` new policies within the budgets, of 10 tries each; it ends where `make` finds none."""
        found: list[Picks] = []
        for _ in range(10 * count):
            if len(found) == count or (picks := make()) is None:
                break
            if picks.tobytes() not in seen and problem.fits(picks):
                seen.add(picks.tobytes())
                found.append(picks)
        return found

    def at_random() -> Picks | None:
        return random_fitting(problem, rng)

    generation = fresh(settings.population, at_random)
    if not generation:
        raise Refusal("no policy within the budgets was found at random; loosen a budget, or use --method ilp")
    scored: list[tuple[float, int, Picks]] = []
    for number in range(settings.generations):
        for picks in generation:
            measured = journal.measure(problem.policy(picks), generation=number + 1)
            scored.append((measured.loss, len(scored), picks))
        parents = [picks for *_, picks in sorted(scored, key=lambda entry: entry[:2])[: settings.top]]

        def parent(parents: list[Picks] = parents) -> Picks:
            return parents[rng.integers(len(parents))]

        generation = fresh(settings.mutations, lambda: mutated(problem, parent(), settings.probability, rng))
        generation += fresh(settings.crossovers, lambda: crossed(problem, parent(), parent(), rng))
        generation += fresh(max(0, settings.population - len(generation)), at_random)
        if not generation:
            return


def mutated(problem: Problem, picks: Picks, probability: float, rng: np.random.Generator) -> Picks:
    """Each row's choice drawn anew with this probability, and so the activation bits of each tied group.

    A row of a group whose activation bits change keeps its weight bits where it may.
    """
    picks = picks.copy()
    for group in problem.tied:
        if rng.random() < probability:
            shared = rng.choice(sorted(problem.shared_bits(group)))
            for row in group:
                columns = np.flatnonzero(problem.allowed[row] & (problem.a == shared))
                same = columns[problem.w[columns] == problem.w[picks[row]]]
                picks[row] = same[0] if len(same) else rng.choice(columns)
    tied = {row for group in problem.tied for row in group}
    for row in range(len(picks)):
        if rng.random() < probability:
            bound = problem.a == problem.a[picks[row]] if row in tied else True
            picks[row] = rng.choice(np.flatnonzero(problem.allowed[row] & bound))
    return picks


def crossed(problem: Problem, mother: Picks, father: Picks, rng: np.random.Generator) -> Picks:
    """Each row from one of the parents, tied rows from the same one."""
    picks = mother.copy()
    grouped = {row for group in problem.tied for row in group}
    for unit in [*problem.tied, *((row,) for row in range(len(picks)) if row not in grouped)]:
        if rng.random() < 0.5:
            picks[list(unit)] = father[list(unit)]
    return picks
