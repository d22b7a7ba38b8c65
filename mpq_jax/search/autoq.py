"""AutoQ (Lou et al., ICLR 2020): two levels of agents, and weight bits per output channel.

The high level walks through the layers as HAQ's agent does and sets each layer's activation bits and a goal, the average
of its weight bits. The low level walks through the layer's output channels and sets the bits of each: its reward is
intrinsic (how near the channels' mean came to the goal) and extrinsic (what the whole policy was worth). What the
description leaves open is chosen here and said beside it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from mpq_jax import costs
from mpq_jax.layer_costs import check_channels
from mpq_jax.policy import nearest
from mpq_jax.search import ddpg
from mpq_jax.search.haq import Choose, action_to_bits, nearest_within, reward_of, transitions
from mpq_jax.search.journal import Journal
from mpq_jax.search.methods import Autoq
from mpq_jax.search.problem import Problem
from mpq_jax.types import Bits, Budget, Layer, Refusal

HIGH_STATE = 10  # as in HAQ
LOW_STATE = 14


class Chosen(NamedTuple):
    """Bits of one row: of its output channels [C] and of its activations."""

    w: list[int]
    a: int


class Space(NamedTuple):
    """What a policy with bits per output channel may be.

    layers: per row of the problem, its layers. channels: per row. budgets: those whose sum has a limit.
    """

    problem: Problem
    layers: tuple[tuple[Layer, ...], ...]
    channels: tuple[int, ...]
    budgets: tuple[Budget, ...]

    def policy(self, rows: Sequence[Chosen]) -> dict[str, Bits]:
        """Bits of the searched layers, one width for each output channel."""
        return {
            layer.path: Bits(tuple(row.w), row.a)
            for layers, row in zip(self.layers, rows, strict=True)
            for layer in layers
        }

    def cost(self, budget: Budget, row: int, chosen: Chosen) -> int:
        """What one row costs, exactly."""
        cost = costs.KINDS[budget.name].cost
        return sum(cost(layer, Bits(tuple(chosen.w), chosen.a)) for layer in self.layers[row])

    def widths(self, row: int, a: int) -> np.ndarray:
        """Weight bits that the channels of a row may have beside these activation bits, ascending."""
        return np.unique(self.problem.w[self.problem.allowed[row] & (self.problem.a == a)])


def space_of(problem: Problem, layers: Sequence[Layer], budgets: Sequence[Budget], channels: Sequence[int]) -> Space:
    """channels: output channels of each row's first layer.

    Raises Refusal for a budget of measured latencies, and for a rule that gives layers with different numbers of
    output channels the same bits.
    """
    costs.check_by_channel(budgets)
    table = {layer.path: layer for layer in layers}
    rows = tuple(tuple(table[path] for path in paths) for paths in problem.paths)
    for row, count in zip(rows, channels, strict=True):
        for layer in row:
            try:
                check_channels(layer, count)
            except Refusal as refusal:
                raise Refusal(f"{refusal} (a rule shares the bits of {row[0].path!r}; leave it out)") from None
    return Space(problem, rows, tuple(channels), tuple(b for b in budgets if not b.largest))


def search(
    problem: Problem,
    journal: Journal,
    settings: Autoq,
    seed: int,
    features: np.ndarray,
    spreads: Sequence[np.ndarray],
    float_accuracy: float,
) -> None:
    """Measures one policy an episode. features: [L, 8]; spreads: per row [C], its channels' variances, normalised.

    Raises what `journal.measure` raises.
    """
    space = space_of(problem, journal.importance.layers, journal.budgets, [len(s) for s in spreads])
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed))
    high = ddpg.learner(HIGH_STATE, settings)
    low = ddpg.learner(LOW_STATE, dataclasses.replace(settings, discount=settings.channel_discount))
    high_agent, low_agent = high.init(keys[0]), low.init(keys[1])
    high_replay: ddpg.Replay | None = None
    low_replay = ddpg.Replay(settings.channel_replay, LOW_STATE)
    for episode in range(settings.episodes):
        noise = ddpg.noise_of(episode, settings)

        def chooser(learner: ddpg.Learner, agent: ddpg.Agent, noise: float | None = noise) -> Choose:
            return lambda state: (
                rng.random() if noise is None else ddpg.truncated_normal(learner.act(agent, state), noise, rng)
            )

        walked = walk(space, features, spreads, chooser(high, high_agent), chooser(low, low_agent))
        rows = within_budgets(space, walked.rows)
        measured = journal.measure(space.policy(rows), episode=episode + 1)
        reward = extrinsic(space, rows, measured.accuracy, float_accuracy, settings.cost_weight)
        high_replay = high_replay or ddpg.Replay(settings.replay * len(walked.actions), HIGH_STATE)
        high_replay.add(transitions(walked.states, achieved(space, walked, rows), reward))
        for states, actions, missed in walked.low:
            mixed = settings.extrinsic * reward - (1 - settings.extrinsic) * missed
            low_replay.add(transitions(states, actions, mixed))
        if noise is not None:
            updates = len(walked.actions)
            high_agent = high.learn(high_agent, high_replay.batches(updates, settings.batch_size, rng))
            if settings.channel_updates:
                batches = low_replay.batches(settings.channel_updates, settings.batch_size, rng)
                low_agent = low.learn(low_agent, batches)


def extrinsic(space: Space, rows: Sequence[Chosen], accuracy: float, float_accuracy: float, weight: float) -> float:
    """HAQ's reward, less 0.1 * weight * the largest share of a budget that the policy uses."""
    shares = [0.0]
    for budget in space.budgets:
        spent = costs.add([budget.fixed, *(space.cost(budget, r, row) for r, row in enumerate(rows))])
        shares.append(spent / budget.limit)
    return reward_of(accuracy, float_accuracy) - 0.1 * weight * max(shares)


# ---- one episode --------------------------------------------------------------------------------------------------


class Walked(NamedTuple):
    """rows: what was chosen. states [N, 10], actions [N]: of the high level, a step for each row's activations (where
    they are its own to choose) and goal. goals: per row, the number of its goal's step.
    low: per row (states [C, 14], actions [C], |mean - goal| / (bmax - bmin)).
    """

    rows: list[Chosen]
    states: np.ndarray
    actions: np.ndarray
    goals: list[int]
    low: list[tuple[np.ndarray, np.ndarray, float]]


def walk(
    space: Space, features: np.ndarray, spreads: Sequence[np.ndarray], choose: Choose, choose_bits: Choose
) -> Walked:
    """One episode: for each row its activation bits, the goal for its weights, then the bits of its channels.

    Activations come before weights (in HAQ, after): a rule on pairs then leaves every channel its candidates.
    """
    problem = space.problem
    group_of = {row: group for group in problem.tied for row in group}
    shared: dict[tuple[int, ...], int] = {}
    rows: list[Chosen] = []
    states: list[np.ndarray] = []
    actions: list[float] = []
    goals: list[int] = []
    low = []

    def act(row: int, flag: float) -> float:
        states.append(np.concatenate([features[row], [actions[-1] if actions else 1.0, flag]]))
        actions.append(choose(states[-1]))
        return actions[-1]

    for row in range(len(problem.paths)):
        group = group_of.get(row)
        if group in shared:
            a = shared[group]
        else:
            a = action_to_bits(act(row, 0.0), np.unique(problem.a[problem.allowed[row]]))
            if group is not None:
                shared[group] = a
        goal = act(row, 1.0)
        goals.append(len(actions) - 1)
        bits, walked = _channels(space.widths(row, a), features[row], spreads[row], goal, choose_bits)
        rows.append(Chosen(bits, a))
        low.append(walked)
    return Walked(rows, np.array(states, np.float32), np.array(actions, np.float32), goals, low)


def _channels(
    widths: np.ndarray, features: np.ndarray, spread: np.ndarray, goal: float, choose: Choose
) -> tuple[list[int], tuple[np.ndarray, np.ndarray, float]]:
    """The low level on one layer. goal: from 0 (all at the least bits) to 1 (all at the most).

    A channel's state: the layer's eight features, the action before, the share of the channels that are done, the
    goal, the mean so far, what the mean of the rest must be to reach the goal, and the channel's variance.
    """
    span = max(1, int(widths[-1] - widths[0]))
    count = len(spread)
    bits: list[int] = []
    states = np.zeros((count, LOW_STATE), np.float32)
    actions = np.zeros(count, np.float32)
    total = 0.0
    for c in range(count):
        before = actions[c - 1] if c else goal
        mean = total / c if c else goal
        rest = np.clip((goal * count - total) / (count - c), 0, 1)
        states[c] = [*features, before, c / count, goal, mean, rest, spread[c]]
        actions[c] = choose(states[c])
        bits.append(action_to_bits(float(actions[c]), widths))
        total += (bits[-1] - widths[0]) / span
    return bits, (states, actions, abs(total / count - goal))


def achieved(space: Space, walked: Walked, rows: Sequence[Chosen]) -> np.ndarray:
    """The high level's actions with every goal replaced by the mean that the row ended with, low level and budgets
    having had their say: what the reward was paid for (the relabelling of HIRO, Nachum et al. 2018)."""
    actions = walked.actions.copy()
    for row, (chosen, step) in enumerate(zip(rows, walked.goals, strict=True)):
        widths = space.widths(row, chosen.a)
        span = max(1, int(widths[-1] - widths[0]))
        actions[step] = np.clip((np.mean(chosen.w) - widths[0]) / span, 0, 1)
    return actions


# ---- budgets ------------------------------------------------------------------------------------------------------


def within_budgets(space: Space, rows: Sequence[Chosen]) -> list[Chosen]:
    """As HAQ lowers bits, by one from the last row backwards, round after round; a row's weights channel by channel.

    Where lowering gets stuck, the nearest policy of whole layers within the budgets.
    """
    rows = [Chosen(list(row.w), row.a) for row in rows]
    spent = {b.name: [space.cost(b, r, row) for r, row in enumerate(rows)] for b in space.budgets}

    def fits() -> bool:
        return all(costs.add([b.fixed, *spent[b.name]]) <= b.limit for b in space.budgets)

    def put(row: int, chosen: Chosen) -> None:
        rows[row] = chosen
        for budget in space.budgets:
            spent[budget.name][row] = space.cost(budget, row, chosen)

    while not fits():
        before = list(rows)
        for row in reversed(range(len(rows))):
            for member, chosen in _lower_activations(space, rows, row):
                put(member, chosen)
            if fits():
                return rows
            widths = space.widths(row, rows[row].a)
            for c in reversed(range(space.channels[row])):
                lower = widths[widths < rows[row].w[c]]
                if len(lower):
                    put(row, Chosen([*rows[row].w[:c], int(lower[-1]), *rows[row].w[c + 1 :]], rows[row].a))
                    if fits():
                        return rows
        if rows == before:
            return _whole_layers(space, rows)
    return rows


def _lower_activations(space: Space, rows: Sequence[Chosen], row: int) -> list[tuple[int, Chosen]]:
    """The next lower activation bits of a row, and of those tied to it, once a round; [] where there are none.

    Channels that may not keep their weight bits beside them take the nearest that they may have.
    """
    problem = space.problem
    group = next((group for group in problem.tied if row in group), (row,))
    lower = sorted(bits for bits in problem.shared_bits(group) if bits < rows[row].a)
    if row != max(group) or not lower:
        return []
    changed = []
    for member in group:
        widths = space.widths(member, lower[-1])
        w = [nearest(bits, widths.tolist()) for bits in rows[member].w]
        changed.append((member, Chosen(w, lower[-1])))
    return changed


def _whole_layers(space: Space, rows: Sequence[Chosen]) -> list[Chosen]:
    problem = space.problem
    picks = np.array(
        [
            np.where(problem.allowed[r] & (problem.a == row.a), np.abs(problem.w - np.mean(row.w)), np.inf).argmin()
            for r, row in enumerate(rows)
        ]
    )
    picks = nearest_within(problem, picks)
    return [
        Chosen([int(problem.w[p])] * count, int(problem.a[p])) for p, count in zip(picks, space.channels, strict=True)
    ]
