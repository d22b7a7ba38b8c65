"""From the probabilities of every layer's bits to policies: the most likely one, brought within budgets, and samples."""

import time

import numpy as np

from mpq_jax.search.ilp import solve_problem
from mpq_jax.search.journal import Journal
from mpq_jax.search.problem import Problem
from mpq_jax.search.solvers import Answer
from mpq_jax.types import Refusal

Picks = np.ndarray


def log_probabilities(problem: Problem, shares: np.ndarray) -> np.ndarray:
    """float64 [L, C] whose sum over a policy's picks is the log of its probability, ties included; -inf: not allowed.

    Rows of a tied group share the draw of their activation bits: it counts once, in the group's first row.
    """
    p = np.where(problem.allowed, np.asarray(shares, np.float64).reshape(problem.allowed.shape), 0)
    p = p / p.sum(1, keepdims=True)
    for group in problem.tied:
        for row in group[1:]:
            for a in set(problem.a[problem.allowed[row]].tolist()):
                columns = problem.a == a
                p[row, columns] /= max(p[row, columns].sum(), np.finfo(float).tiny)
    with np.errstate(divide="ignore"):
        # Never -inf where allowed: what is almost impossible stays possible where budgets ask for it.
        return np.where(problem.allowed, np.log(np.maximum(p, 1e-300)), -np.inf)


def most_likely(problem: Problem, log_p: np.ndarray) -> Picks:
    """The policy of most probability, budgets aside."""
    picks = log_p.argmax(1)
    for group in problem.tied:
        rows = list(group)

        def best(a: int, rows: list[int] = rows) -> np.ndarray:
            return np.where(problem.a == a, log_p[rows], -np.inf)

        shared = max(sorted(problem.shared_bits(group)), key=lambda a: best(a).max(1).sum())
        picks[rows] = best(shared).argmax(1)
    return picks


def repaired(problem: Problem, log_p: np.ndarray, seconds: float = 60.0) -> tuple[Picks, bool]:
    """The policy of most probability within the budgets: what is lost of it is the least (the program of the ILP).

    -> (columns [L], whether that is proved)

    Raises Refusal where none is found.
    """
    value = np.where(problem.allowed, -log_p, np.inf)
    found = solve_problem(problem._replace(value=value), time.monotonic(), seconds)
    if isinstance(found, Answer) or found.picks is None:
        raise Refusal("no policy within all budgets was found; loosen one of them, or use --method ilp to see why")
    return found.picks, found.proved


def sampled(problem: Problem, log_p: np.ndarray, rng: np.random.Generator) -> Picks:
    """A policy drawn from the probabilities."""
    group_of = {row: group for group in problem.tied for row in group}
    shared: dict[tuple[int, ...], int] = {}
    picks = np.zeros(len(log_p), int)
    for row, logs in enumerate(log_p):
        group = group_of.get(row)
        p = np.exp(logs) * ((problem.a == shared[group]) if group in shared else 1)
        picks[row] = rng.choice(len(p), p=p / p.sum())
        if group is not None:
            shared.setdefault(group, int(problem.a[picks[row]]))
    return picks


def measure_policies(
    problem: Problem, shares: np.ndarray, journal: Journal, evaluations: int, rng: np.random.Generator
) -> None:
    """Measures the most likely policy, brought within the budgets where it breaks one, and then sampled ones that
    keep them. The log says what was repaired, and what probability that cost."""
    log_p = log_probabilities(problem, shares)
    rows = np.arange(len(log_p))

    def log_of(picks: Picks) -> float:
        return float(log_p[rows, picks].sum())

    likely = most_likely(problem, log_p)
    picks, note = likely, {"log_probability": log_of(likely), "repaired": False}
    if not problem.fits(likely):
        picks, proved = repaired(problem, log_p)
        note = {"log_probability": log_of(picks), "repaired": True, "before": log_of(likely), "least_loss": proved}
        print(
            f"the most likely policy breaks a budget; repaired: its log-probability falls from {log_of(likely):.3f} to "
            f"{log_of(picks):.3f}, the least loss {'there is' if proved else 'found'}"
        )
    journal.measure(problem.policy(picks), **note)
    seen = {picks.tobytes()}
    for _ in range(100 * evaluations):
        if len(seen) >= evaluations:
            return
        drawn = sampled(problem, log_p, rng)
        if problem.fits(drawn) and drawn.tobytes() not in seen:
            seen.add(drawn.tobytes())
            journal.measure(problem.policy(drawn), log_probability=log_of(drawn), sampled=True)
