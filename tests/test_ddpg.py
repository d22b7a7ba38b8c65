"""The agent of HAQ and AutoQ: on known optima, one update by hand, its noise against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from mpq_jax.search import ddpg
from mpq_jax.search.methods import Haq

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUICK = Haq(hidden=64, actor_learning_rate=1e-3, critic_learning_rate=3e-3, batch_size=32)


@pytest.fixture(scope="module")
def learner():
    return ddpg.learner(3, QUICK)


def test_learns_the_best_action_of_each_state(learner):
    """Three states, each with its own best action: the actor comes near all of them."""
    best = np.array([0.15, 0.5, 0.9])
    rng = np.random.default_rng(0)
    states = np.eye(3, dtype=np.float32)[rng.integers(3, size=600)]
    actions = rng.random(600).astype(np.float32)
    replay = ddpg.Replay(600, 3)
    rewards = -np.square(actions - states @ best)
    replay.add(ddpg.Transitions(states, actions[:, None], rewards, states, np.ones(600)))
    agent = learner.init(jax.random.key(0))
    assert all(abs(learner.act(agent, state) - 0.5) < 0.1 for state in np.eye(3))
    for _ in range(15):
        agent = learner.learn(agent, replay.batches(50, 32, rng))
    found = [learner.act(agent, state) for state in np.eye(3)]
    np.testing.assert_allclose(found, best, atol=0.12)


def test_one_update_by_hand(learner):
    """The critic's step is Adam on the squared error to y = r - b + gamma Q'(s', mu'(s')), ends left out; b starts as
    the batch's mean and moves half way; targets move by tau."""
    rng = np.random.default_rng(1)
    agent = learner.init(jax.random.key(1))
    agent = agent._replace(target_critic=learner.init(jax.random.key(2)).critic)
    batch = ddpg.Transitions(
        *(rng.random(shape).astype(np.float32) for shape in ((32, 3), (32, 1), (32,), (32, 3))),
        (np.arange(32) % 4 == 0).astype(np.float32),
    )
    critic, actor = ddpg.Critic(64), ddpg.Actor(64)
    optimizer = optax.adam(QUICK.critic_learning_rate)

    @jax.jit
    def by_hand(agent):
        next_actions = actor.apply(agent.target_actor, batch.next_states)
        following = critic.apply(agent.target_critic, batch.next_states, next_actions)
        y = batch.rewards - batch.rewards.mean() + (1 - batch.ends) * following
        grads = jax.grad(lambda q: jnp.mean((critic.apply(q, batch.states, batch.actions) - y) ** 2))(agent.critic)
        return optax.apply_updates(agent.critic, optimizer.update(grads, optimizer.init(agent.critic))[0])

    expected = by_hand(agent)
    one = learner.learn(agent, jax.tree.map(lambda x: jnp.asarray(x)[None], batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.critic, expected)
    slow = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, agent.target_critic, one.critic)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.target_critic, slow)
    assert float(one.baseline) == pytest.approx(batch.rewards.mean(), rel=1e-5)
    again = learner.learn(one, jax.tree.map(lambda x: jnp.asarray(x)[None], batch._replace(rewards=batch.rewards + 1)))
    assert float(again.baseline) == pytest.approx(batch.rewards.mean() + 0.5, rel=1e-5)


def test_noise():
    """The truncated normal against SciPy's; 0.5 * 0.99^episode after the warm-up."""
    rng = np.random.default_rng(0)
    for mean, deviation in ((0.3, 0.5), (0.0, 0.1), (0.98, 0.02)):
        drawn = [ddpg.truncated_normal(mean, deviation, rng) for _ in range(2000)]
        exact = stats.truncnorm(-mean / deviation, (1 - mean) / deviation, mean, deviation)
        assert stats.kstest(drawn, exact.cdf).pvalue > 1e-3 and 0 <= min(drawn) <= max(drawn) <= 1
    assert ddpg.truncated_normal(0.4, 0.5 * 0.1**400, rng) == 0.4
    assert [ddpg.noise_of(e, Haq()) for e in (0, 19, 20, 22)] == [None, None, 0.5, 0.5 * 0.99**2]


def test_replay_keeps_the_newest():
    replay = ddpg.Replay(4, 1)
    rng = np.random.default_rng(0)
    for i in range(3):
        x = np.full((2, 1), i, np.float32)
        replay.add(ddpg.Transitions(x, x, x[:, 0], x, x[:, 0]))
        assert set(np.unique(replay.batches(5, 50, rng).rewards)) == set(range(max(0, i - 1), i + 1))
