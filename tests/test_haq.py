"""HAQ: its agent on known optima, its rule, its states and its repair by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from measured import Known, check_resumed, losses
from scipy import stats
from tables import budgets_of, cost_by_hand, made

from mpq_jax import Bits
from mpq_jax.quantized_model import quantize
from mpq_jax.search import ddpg, features, haq
from mpq_jax.search.journal import Ended, Journal
from mpq_jax.search.methods import Haq
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUICK = Haq(hidden=64, actor_learning_rate=1e-3, critic_learning_rate=3e-3, batch_size=32)


# ---- the agent ----------------------------------------------------------------------------------------------------


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
    assert [ddpg.noise_of(e, Haq()) for e in (0, 19, 20, 22)] == [None, None, 0.5, 0.5 * 0.99**2]


def test_replay_keeps_the_newest():
    replay = ddpg.Replay(4, 1)
    rng = np.random.default_rng(0)
    for i in range(3):
        x = np.full((2, 1), i, np.float32)
        replay.add(ddpg.Transitions(x, x, x[:, 0], x, x[:, 0]))
        assert set(np.unique(replay.batches(5, 50, rng).rewards)) == set(range(max(0, i - 1), i + 1))


# ---- the walk -----------------------------------------------------------------------------------------------------


def test_action_to_bits():
    """round((bmax - bmin + 1) a + bmin - 0.5): equal shares of [0, 1] for each width; gaps go to the nearest."""
    widths = np.array([2, 3, 4, 5, 6])
    assert [haq.action_to_bits(a, widths) for a in (0, 0.19, 0.21, 0.5, 0.79, 0.81, 1)] == [2, 2, 3, 4, 5, 6, 6]
    counts = np.bincount([haq.action_to_bits(a, widths) for a in np.linspace(0, 1, 1001)])[2:]
    assert counts.min() >= 199 and counts.max() <= 202
    assert [haq.action_to_bits(a, np.array([2, 4, 8])) for a in (0, 0.2, 0.3, 0.55, 0.75, 1)] == [2, 2, 4, 4, 8, 8]
    assert haq.reward_of(0.85, 0.90) == pytest.approx(-0.5)


def test_states_and_ties():
    """Weights then activations; the action before; the flag; a tied row takes the group's activation bits."""
    importance = made(1, layers=4, tied=True)
    problem = build(importance, budgets_of(importance, "bitops=W4A4"))
    rows = np.random.default_rng(0).random((4, 8))
    given = iter([0.1, 0.9, 0.6, 0.2, 0.4, 0.7, 1.0])
    picks, states, actions = haq.walk(problem, rows, lambda state: next(given))
    assert len(actions) == 7 and states.shape == (7, 10)
    np.testing.assert_allclose(states[:, 8], [1.0, *actions[:-1]])
    assert states[:, 9].tolist() == [1, 0, 1, 1, 0, 1, 0]
    np.testing.assert_allclose(states[[0, 1, 2, 3, 5], :8], rows[[0, 0, 1, 2, 3]], rtol=1e-6)
    expected = {"layer0": (2, 4), "layer1": (3, 4), "layer2": (2, 3), "layer3": (4, 4)}
    assert problem.policy(picks) == {path: Bits(*bits) for path, bits in expected.items()}
    passed = haq.transitions(states, actions, -0.7)
    np.testing.assert_allclose(passed.rewards, np.full(7, -0.7))
    np.testing.assert_array_equal(passed.next_states[:-1], states[1:])
    assert passed.ends.tolist() == [0] * 6 + [1]


def test_rules_are_kept():
    importance = made(8, layers=6, tied=True, narrowed=True)
    importance = importance._replace(rules=("layer[45]=share", "layer3=2,2|4,4", "layer2=equal"))
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    problem = build(importance, budgets)
    rng = np.random.default_rng(0)
    rows = np.zeros((len(problem.paths), 8))
    for _ in range(100):
        picks, _, _ = haq.walk(problem, rows, lambda state: rng.random())
        assert (problem.picks(problem.policy(picks)) == picks).all()
        repaired = haq.within_budgets(problem, picks)
        assert (problem.picks(problem.policy(repaired)) == repaired).all() and problem.fits(repaired)


def test_repair_by_hand():
    """From all W4A4: the last row's activations, its weights, the row before, ... by one, until the budget holds."""
    importance = made(1, layers=3)
    budgets = budgets_of(importance, "bitops=W4A4")
    problem = build(importance, budgets)
    top = problem.picks({f"layer{i}": Bits(4, 4) for i in range(3)})
    order, policy, costs = [], {ly.path: ly.bits or Bits(4, 4) for ly in importance.layers}, []
    for _ in range(2):
        for i in (2, 1, 0):
            for kind in ("a", "w"):
                bits = policy[f"layer{i}"]
                policy = policy | {f"layer{i}": bits._replace(**{kind: getattr(bits, kind) - 1})}
                order.append(policy)
                costs.append(cost_by_hand(importance, policy, "bitops"))
    for policy, cost in zip(order, costs, strict=True):
        tight = build(importance, [budgets[0]._replace(limit=cost)])
        repaired = haq.within_budgets(tight, top)
        assert tight.policy(repaired) == {path: policy[path] for path in ("layer0", "layer1", "layer2")}
    assert (haq.within_budgets(problem, top) == top).all()


def test_repair_where_lowering_gets_stuck():
    """Fewer bits cost more (as measured latencies may): the nearest policy that fits, compared with all."""
    importance = made(1, layers=3)
    budgets = budgets_of(importance, "bitops=W4A4")
    upside_down = budgets[0].table.max() - budgets[0].table
    low = build(importance, budgets).picks({f"layer{i}": Bits(2, 2) for i in range(3)})
    fitting = int(upside_down.min((1, 2)).sum()) + int(0.4 * upside_down.max())
    problem = build(importance, [budgets[0]._replace(table=upside_down, limit=fitting + budgets[0].fixed)])
    found = haq.within_budgets(problem, low)

    def far(picks):
        return (np.abs(problem.w[picks] - 2) + np.abs(problem.a[picks] - 2)).sum()

    every = np.stack(np.meshgrid(*[np.arange(9)] * 3), -1).reshape(-1, 3)
    assert problem.fits(found) and far(found) == min(far(picks) for picks in every if problem.fits(picks))


def test_features_by_hand():
    """Depthwise, channels, stride, kernel, weights, positions of three layers, from a model; then min-max."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
            x = nn.relu(nn.Conv(6, (5, 5), strides=2, name="conv")(x))
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)).mean((1, 2))
            x = nn.relu(nn.DenseGeneral((2, 4), name="general")(x)).reshape(-1, 8)
            return nn.Dense(3, name="head")(x)

    image = jnp.zeros((1, 8, 8, 2))
    model = quantize(Net(), image)
    variables = jax.jit(Net().init)(jax.random.key(0, impl="rbg"), image)
    seen = features.layer_features(model, variables, (image,), {"train": False})
    assert seen["conv"] == (0, 4, 6, 2, 5, 600, 64)
    assert seen["depthwise"] == (1, 6, 6, 1, 3, 54, 16)
    assert seen["general"] == (0, 6, 8, 0, 1, 48, 1)
    importance = made(1, layers=3)
    paths = (("conv",), ("depthwise",), ("general",))
    problem = build(importance, budgets_of(importance, "bitops=W4A4"))._replace(paths=paths)
    rows = features.row_features(problem, model, variables, (image,), {"train": False})
    np.testing.assert_allclose(rows[:, 0], [0, 1, 0])
    np.testing.assert_allclose(rows[:, 1], [0, 1, 1])
    np.testing.assert_allclose(rows[:, 4], [1, 0.5, 0])
    np.testing.assert_allclose(rows[:, 7], [0, 0.5, 1])
    spreads = features.channel_spreads(problem, model, variables, (image,), {"train": False})
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64).reshape(-1, 6)
    variance = kernel.var(0)
    np.testing.assert_allclose(
        spreads[0], (variance - variance.min()) / (variance.max() - variance.min()), rtol=1e-4, atol=1e-6
    )
    assert [len(s) for s in spreads] == [6, 6, 8]


# ---- the search ---------------------------------------------------------------------------------------------------


def known_best():
    """15625 policies whose loss is the squared distance of their bits from a known policy; a budget that binds none."""
    widths, best = (2, 3, 4, 5, 6), [(3, 5), (5, 4), (4, 3)]
    far = [[[(w - b) ** 2 + (a - c) ** 2 for a in widths] for w in widths] for b, c in best]
    importance = made(3, layers=3, widths=widths, pair=True)._replace(pair=np.array(far, float))
    return importance, budgets_of(importance, "bitops=W6A6"), {f"layer{i}": Bits(*b) for i, b in enumerate(best)}


def test_finds_the_optimum(tmp_path):
    """In 300 episodes; and the agent's late policies are near it, where random ones are not."""
    importance, budgets, best = known_best()
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance), evaluations=300)
    with pytest.raises(Ended):
        haq.search(build(importance, budgets), journal, QUICK, 1, np.eye(3, 8), float_accuracy=1.0)
    found = losses(journal)
    winner = journal.evaluated[int(np.argmin(found))]
    assert {path: winner.policy[path] for path in best} == best and min(found) == 0
    assert np.mean(found[:20]) > 10 and np.mean(found[-20:]) < 4


def test_within_budgets_and_resumed(tmp_path):
    """Every policy keeps both budgets; stopped twice, in the warm-up and while learning, it leaves the same log."""
    importance = made(3, layers=3, tied=True)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3")
    problem = build(importance, budgets)
    settings = dataclasses.replace(QUICK, episodes=14, warmup_episodes=5)

    def search(journal):
        haq.search(problem, journal, settings, 1, np.eye(3, 8), float_accuracy=1.0)
        for evaluation in journal.evaluated:
            assert all(cost_by_hand(importance, evaluation.policy, b.name) <= b.limit for b in budgets)

    check_resumed(tmp_path, importance, budgets, search, [3, 5])
