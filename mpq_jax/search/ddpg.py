"""Deep deterministic policy gradient (Lillicrap et al. 2016) as HAQ and AutoQ use it: actions in [0, 1].

Actor and critic are Flax networks; everything an agent knows is one pytree, and learning is a pure function of it.
What HAQ's code adds: the final reward of an episode stands with every transition of it, and a moving average of the
batches' mean reward is taken off.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from scipy.special import ndtr, ndtri

from mpq_jax.search.methods import Agents

BASELINE_RATE = 0.5  # of the moving average of rewards, a batch


class Actor(nn.Module):
    """mu(s): states [..., S] -> actions [..., 1] in [0, 1]; two hidden layers."""

    hidden: int

    @nn.compact
    def __call__(self, states: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(states))
        x = nn.relu(nn.Dense(self.hidden)(x))
        # Near 0 at the start, so that the first actions are near 1/2 (Lillicrap et al. 2016).
        return nn.sigmoid(nn.Dense(1, kernel_init=nn.initializers.normal(3e-3))(x))


class Critic(nn.Module):
    """Q(s, a): states [..., S], actions [..., 1] -> [...]."""

    hidden: int

    @nn.compact
    def __call__(self, states: jax.Array, actions: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden)(states) + nn.Dense(self.hidden, use_bias=False)(actions))
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(1, kernel_init=nn.initializers.normal(3e-3))(x)[..., 0]


class Transitions(NamedTuple):
    """states, next_states: [N, S]; actions: [N, 1]; rewards, ends: [N]; ends is 1 where nothing follows."""

    states: Any
    actions: Any
    rewards: Any
    next_states: Any
    ends: Any


class Agent(NamedTuple):
    """Parameters of actor and critic, of their slow copies (targets), optimizer states, the rewards' average (or NaN)."""

    actor: Any
    critic: Any
    target_actor: Any
    target_critic: Any
    actor_state: Any
    critic_state: Any
    baseline: jax.Array


class Learner(NamedTuple):
    """init(key) -> Agent; act(agent, state [S]) -> action; learn(agent, Transitions [U, B, ...]) -> Agent, U updates."""

    init: Callable[[Any], Agent]
    act: Callable[[Agent, np.ndarray], float]
    learn: Callable[[Agent, Transitions], Agent]


@functools.lru_cache(maxsize=8)
def learner(state_size: int, settings: Agents) -> Learner:
    """The functions of an agent with states of `state_size`, compiled once, for the same settings once in a process."""
    actor, critic = Actor(settings.hidden), Critic(settings.hidden)
    actor_optimizer, critic_optimizer = (
        optax.adam(rate) for rate in (settings.actor_learning_rate, settings.critic_learning_rate)
    )

    def init(key: Any) -> Agent:
        key_actor, key_critic = jax.random.split(key)
        states = jnp.zeros((1, state_size))
        mu, q = actor.init(key_actor, states), critic.init(key_critic, states, jnp.zeros((1, 1)))
        return Agent(mu, q, mu, q, actor_optimizer.init(mu), critic_optimizer.init(q), jnp.float32(jnp.nan))

    def update(agent: Agent, batch: Transitions) -> tuple[Agent, None]:
        mean = batch.rewards.mean()
        baseline = jnp.where(jnp.isnan(agent.baseline), mean, agent.baseline + BASELINE_RATE * (mean - agent.baseline))
        # y = r - b + gamma Q'(s', mu'(s'))
        following = critic.apply(
            agent.target_critic, batch.next_states, actor.apply(agent.target_actor, batch.next_states)
        )
        target = batch.rewards - baseline + settings.discount * (1 - batch.ends) * following

        def critic_loss(q: Any) -> jax.Array:
            return jnp.square(critic.apply(q, batch.states, batch.actions) - target).mean()

        moves, critic_state = critic_optimizer.update(jax.grad(critic_loss)(agent.critic), agent.critic_state)
        q = optax.apply_updates(agent.critic, moves)

        def actor_loss(mu: Any) -> jax.Array:
            values: Any = critic.apply(q, batch.states, actor.apply(mu, batch.states))
            return -values.mean()

        moves, actor_state = actor_optimizer.update(jax.grad(actor_loss)(agent.actor), agent.actor_state)
        mu = optax.apply_updates(agent.actor, moves)
        slow_mu = optax.incremental_update(mu, agent.target_actor, settings.tau)
        slow_q = optax.incremental_update(q, agent.target_critic, settings.tau)
        return Agent(mu, q, slow_mu, slow_q, actor_state, critic_state, baseline), None

    @jax.jit
    def acting(mu: Any, state: jax.Array) -> jax.Array:
        actions: Any = actor.apply(mu, state)
        return actions[0]

    return Learner(
        init=jax.jit(init),
        act=lambda agent, state: float(acting(agent.actor, jnp.asarray(state, jnp.float32))),
        learn=jax.jit(lambda agent, batches: jax.lax.scan(update, agent, batches)[0]),
    )


class Replay:
    """The newest `size` transitions, drawn from uniformly."""

    def __init__(self, size: int, state_size: int):
        shapes = ((size, state_size), (size, 1), (size,), (size, state_size), (size,))
        self._kept = Transitions(*(np.zeros(shape, np.float32) for shape in shapes))
        self._size, self._count = size, 0

    def add(self, transitions: Transitions) -> None:
        """Transitions [N, ...], in their order."""
        number = len(transitions.rewards)
        places = (self._count + np.arange(number)) % self._size
        for kept, new in zip(self._kept, transitions, strict=True):
            kept[places] = new
        self._count += number

    def batches(self, updates: int, size: int, rng: np.random.Generator) -> Transitions:
        """[updates, size, ...], with replacement."""
        rows = rng.integers(min(self._count, self._size), size=(updates, size))
        return Transitions(*(kept[rows] for kept in self._kept))


def truncated_normal(mean: float, deviation: float, rng: np.random.Generator) -> float:
    """A draw of the normal distribution truncated to [0, 1], by its inverse; mean from 0 to 1."""
    if deviation == 0:  # which decays
        return mean
    low, high = ndtr((0 - mean) / deviation), ndtr((1 - mean) / deviation)
    return float(np.clip(mean + deviation * ndtri(low + rng.random() * (high - low)), 0, 1))


def noise_of(episode: int, settings: Agents) -> float | None:
    """The actions' standard deviation in an episode (from 0), 0.5 * 0.99^episode counted from the end of the warm-up;
    None in the warm-up, whose actions are uniform."""
    late = episode - settings.warmup_episodes
    return None if late < 0 else settings.noise * settings.noise_decay**late
