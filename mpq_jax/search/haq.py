"""HAQ (Wang et al., CVPR 2019): one agent walks through the layers and says the bits of weights and of activations.

Every layer is two steps, its weights then its activations; what the agent sees of a layer are ten numbers. What breaks
a budget is lowered, the policy is measured, and the accuracy it lost is the reward of all its steps.
"""

import time
from collections.abc import Callable

import jax
import numpy as np

from mpq_jax.policy import nearest
from mpq_jax.search import ddpg
from mpq_jax.search.ilp import solve_problem
from mpq_jax.search.journal import Journal
from mpq_jax.search.methods import Haq
from mpq_jax.search.problem import Problem
from mpq_jax.search.solvers import Answer
from mpq_jax.types import Refusal

Picks = np.ndarray
STATE = 10
# choose(state [10]) -> action in [0, 1]
Choose = Callable[[np.ndarray], float]


def search(
    problem: Problem, journal: Journal, settings: Haq, seed: int, features: np.ndarray, float_accuracy: float
) -> ddpg.Agent:
    """Measures one policy an episode. features: [L, 8] of the rows, min-max normalised. -> the agent at the end

    Raises what `journal.measure` raises.
    """
    rng = np.random.default_rng(seed)
    learner = ddpg.learner(STATE, settings)
    agent = learner.init(jax.random.key(seed))
    replay: ddpg.Replay | None = None
    for episode in range(settings.episodes):
        noise = ddpg.noise_of(episode, settings)

        def choose(state: np.ndarray, agent: ddpg.Agent = agent, noise: float | None = noise) -> float:
            return rng.random() if noise is None else ddpg.truncated_normal(learner.act(agent, state), noise, rng)

        picks, states, actions = walk(problem, features, choose)
        picks = within_budgets(problem, picks)
        measured = journal.measure(problem.policy(picks), episode=episode + 1)
        reward = reward_of(measured.accuracy, float_accuracy)
        replay = replay or ddpg.Replay(settings.replay * len(actions), STATE)
        replay.add(transitions(states, actions, reward))
        if noise is not None:
            agent = learner.learn(agent, replay.batches(len(actions), settings.batch_size, rng))
    return agent


def reward_of(accuracy: float, float_accuracy: float) -> float:
    """0.1 * (acc_quantized - acc_float), in points of 100."""
    return 0.1 * (100 * accuracy - 100 * float_accuracy)


def transitions(states: np.ndarray, actions: np.ndarray, reward: float) -> ddpg.Transitions:
    """The steps of an episode, each with its final reward. states: [N, S]; actions: [N]."""
    following = np.concatenate([states[1:], states[-1:]])
    ends = np.zeros(len(actions), np.float32)
    ends[-1] = 1
    return ddpg.Transitions(states, actions[:, None], np.full(len(actions), reward), following, ends)


def action_to_bits(action: float, candidates: np.ndarray) -> int:
    """round((bmax - bmin + 1) a + bmin - 0.5), clipped, then the nearest candidate (the narrower of two)."""
    least, most = int(candidates.min()), int(candidates.max())
    bits = np.clip(np.round((most - least + 1) * action + least - 0.5), least, most)
    return nearest(int(bits), candidates.tolist())


def walk(problem: Problem, features: np.ndarray, choose: Choose) -> tuple[Picks, np.ndarray, np.ndarray]:
    """One episode. -> (columns [L], states [N, 10], actions [N])

    A state is a row's eight features, the action before (1 at first), and 1 for weights, 0 for activations. Rows that
    share activation bits take those that the first of them was given, without a step of their own.
    """
    group_of = {row: group for group in problem.tied for row in group}
    shared: dict[tuple[int, ...], int] = {}
    picks = np.zeros(len(problem.paths), int)
    states: list[np.ndarray] = []
    actions: list[float] = []

    def act(row: int, flag: float, candidates: np.ndarray) -> int:
        state = np.concatenate([features[row], [actions[-1] if actions else 1.0, flag]])
        states.append(state)
        actions.append(choose(state))
        return action_to_bits(actions[-1], candidates)

    for row in range(len(picks)):
        columns = problem.allowed[row].copy()
        group = group_of.get(row)
        if group in shared:
            columns &= problem.a == shared[group]
        columns &= problem.w == act(row, 1.0, problem.w[columns])
        if group not in shared:
            columns &= problem.a == act(row, 0.0, problem.a[columns])
            if group is not None:
                shared[group] = int(problem.a[columns][0])
        picks[row] = np.flatnonzero(columns)[0]
    return picks, np.array(states, np.float32), np.array(actions, np.float32)


# ---- budgets ------------------------------------------------------------------------------------------------------


def within_budgets(problem: Problem, picks: Picks) -> Picks:
    """Bits lowered by one, from the last row backwards (activations, then weights), round after round until all
    budgets hold.

    Where lowering gets stuck (rules, or measured latencies, which need not fall with the bits): the policy within the
    budgets that differs by the fewest bits.
    """
    picks = picks.copy()
    while not problem.fits(picks):
        moved = False
        for row in reversed(range(len(picks))):
            for kind in ("a", "w", "both"):
                if (lower := _lower(problem, picks, row, kind)) is not None and (kind != "both" or not moved):
                    picks, moved = lower, True
                    if problem.fits(picks):
                        return picks
        if not moved:
            return nearest_within(problem, picks)
    return picks


def _lower(problem: Problem, picks: Picks, row: int, kind: str) -> Picks | None:
    """The picks with a row's next lower weight or activation bits (or both, where a rule binds them); None without.

    The activation bits of a tied group are lowered once a round, at its last row.
    """
    group = next((group for group in problem.tied if row in group), (row,))
    w, a = problem.w, problem.a
    now = picks[row]
    if kind == "w":
        columns = np.flatnonzero(problem.allowed[row] & (a == a[now]) & (w < w[now]))
        return _with(picks, {row: columns[w[columns].argmax()]}) if len(columns) else None
    if row != max(group):
        return None
    for bits in sorted({int(b) for b in a[problem.allowed[row]] if b < a[now]}, reverse=True):
        moved = {}
        for member in group:
            fits_w = w == w[picks[member]] if kind == "a" else w < w[picks[member]]
            columns = np.flatnonzero(problem.allowed[member] & (a == bits) & fits_w)
            if not len(columns):
                break
            moved[member] = columns[w[columns].argmax()]
        else:
            return _with(picks, moved)
    return None


def _with(picks: Picks, moved: dict[int, int]) -> Picks:
    picks = picks.copy()
    for row, column in moved.items():
        picks[row] = column
    return picks


def nearest_within(problem: Problem, picks: Picks) -> Picks:
    """The policy within the budgets whose bits differ least in sum. Raises Refusal where none is found."""
    far = np.abs(problem.w - problem.w[picks][:, None]) + np.abs(problem.a - problem.a[picks][:, None])
    near = problem._replace(value=np.where(problem.allowed, far.astype(np.float64), np.inf))
    found = solve_problem(near, time.monotonic(), 30.0)
    if isinstance(found, Answer) or found.picks is None:
        raise Refusal("no policy within all budgets was found; loosen one of them, or use --method ilp to see why")
    return found.picks
