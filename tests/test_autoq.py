"""AutoQ: a made problem whose best bits per output channel are known; goals, channels and repair by hand."""

import dataclasses

import numpy as np
import pytest
from measured import log_without_seconds, losses
from tables import budgets_of

from mpq_jax import Bits, Importance, Layer, Refusal, costs
from mpq_jax.policy import validate
from mpq_jax.search import autoq
from mpq_jax.search.journal import Ended, Journal, Outcome
from mpq_jax.search.methods import Autoq
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 4, 5, 6)
CHANNELS = (8, 6)
QUICK = Autoq(hidden=64, actor_learning_rate=3e-4, critic_learning_rate=3e-3, channel_updates=50)
FEATURES = np.array([[0.0] * 8, [1.0] * 8])


def made_channels(channels=CHANNELS, tied=None, rules=()):
    """(importance, variances): channels of a layer differ in how much they suffer, e^-3 to e^3."""
    rng = np.random.default_rng(0)
    layers = tuple(
        Layer(f"layer{i}", 50 * c, 1000 * c, True, tied=tied, inputs=10, outputs=10, channels=c)
        for i, c in enumerate(channels)
    )
    zeros = np.zeros((len(channels), len(WIDTHS)))
    variances = [np.exp(rng.uniform(-3, 3, c)) for c in channels]
    return Importance("made", WIDTHS, WIDTHS, layers, zeros, zeros, rules=tuple(rules)), variances


class Suffering:
    """evaluate(policy): loss = sum over channels of variance * 4^-bits, and over layers of 2 * 4^-activation bits."""

    def __init__(self, variances, stop_after=None):
        self.variances, self.left = variances, stop_after

    def loss(self, policy):
        each = [policy[f"layer{i}"] for i in range(len(self.variances))]
        return sum((v * 4.0 ** -np.array(b.w)).sum() + 2 * 4.0**-b.a for v, b in zip(self.variances, each, strict=True))

    def __call__(self, policy):
        if self.left is not None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        return Outcome(self.loss(policy), 1 - min(self.loss(policy), 10) / 10)


def spreads(variances):
    roots = [np.sqrt(v) for v in variances]
    return [(r - r.min()) / (r.max() - r.min()) for r in roots]


def run(journal, importance, budgets, variances, settings, seed=0):
    autoq.search(build(importance, budgets), journal, settings, seed, FEATURES, spreads(variances), float_accuracy=1.0)


def best_loss(variances, budget):
    """Bits given one by one where they help most: exact for sums of convex losses and equal costs."""
    bits = [np.full(len(v), 2) for v in variances]
    gains = {(i, c): 0.75 * v[c] * 4.0**-2 for i, v in enumerate(variances) for c in range(len(v))}
    while True:
        for i, c in sorted(gains, key=gains.get, reverse=True):
            bits[i][c] += 1
            if bits[i][c] <= 6 and sum(-(-50 * int(b.sum()) // 8) for b in bits) <= budget.limit:
                gains[i, c] /= 4
                break
            bits[i][c] -= 1
        else:
            return Suffering(variances).loss({f"layer{i}": Bits(tuple(b), 6) for i, b in enumerate(bits)})


def test_better_than_random(tmp_path):
    """200 policies of 5^16 under a size budget: much nearer the optimum than the best of 1000 random ones."""
    importance, variances = made_channels()
    budgets = budgets_of(importance, "size=W3")
    journal = Journal(tmp_path / "log", importance, budgets, Suffering(variances), evaluations=200)
    with pytest.raises(Ended):
        run(journal, importance, budgets, variances, QUICK)
    space = autoq.space_of(build(importance, budgets), importance.layers, budgets, CHANNELS)
    rng = np.random.default_rng(0)
    random = []
    for _ in range(1000):
        rows = [autoq.Chosen(rng.choice(WIDTHS, c).tolist(), int(rng.choice(WIDTHS))) for c in CHANNELS]
        random.append(Suffering(variances).loss(space.policy(autoq.within_budgets(space, rows))))
    found, best = losses(journal), best_loss(variances, budgets[0])
    assert best <= min(found) < 1.6 * best and min(found) < 0.85 * min(random)
    assert np.mean(found[-20:]) < 0.5 * np.mean(found[:20])
    uniform = Suffering(variances).loss({f"layer{i}": Bits((3,) * c, 6) for i, c in enumerate(CHANNELS)})
    assert min(found) < 0.7 * uniform
    for evaluation in journal.evaluated:
        policy = evaluation.policy
        assert sum(-(-50 * sum(policy[f"layer{i}"].w) // 8) for i in range(2)) <= budgets[0].limit
        validate(policy, importance.layers, WIDTHS, WIDTHS, "autoq")


def test_resumed(tmp_path):
    """Stopped in the warm-up and while learning, it leaves the log of a search that was not stopped."""
    importance, variances = made_channels(tied="in")
    budgets = budgets_of(importance, "bitops=W3A3", "wbits=3.5", "memory=1KB")
    settings = dataclasses.replace(QUICK, episodes=12, warmup_episodes=4)
    whole = Journal(tmp_path / "whole", importance, budgets, Suffering(variances))
    run(whole, importance, budgets, variances, settings)
    for stop_after in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            stopped = Journal(tmp_path / "stopped", importance, budgets, Suffering(variances, stop_after))
            run(stopped, importance, budgets, variances, settings)
    run(
        Journal(tmp_path / "stopped", importance, budgets, Suffering(variances)),
        importance,
        budgets,
        variances,
        settings,
    )
    assert len(whole.evaluated) == 12
    assert log_without_seconds(tmp_path / "stopped") == log_without_seconds(tmp_path / "whole")
    for evaluation in whole.evaluated:
        assert evaluation.policy["layer0"].a == evaluation.policy["layer1"].a
        assert all(evaluation.cost[b.name] <= b.limit for b in budgets)


def test_goals_and_channels_by_hand():
    """Activations, then the goal; a channel's state; the reward for reaching the goal; the goal as it was achieved."""
    importance, variances = made_channels((3, 2), tied="in")
    problem = build(importance, budgets_of(importance, "size=W6"))
    space = autoq.space_of(problem, importance.layers, budgets_of(importance, "size=W6"), (3, 2))
    high, low = iter([0.5, 0.75, 0.25]), iter([1.0, 0.5, 0.9, 0.0, 0.3])
    seen = spreads(variances)
    walked = autoq.walk(space, FEATURES, seen, lambda s: next(high), lambda s: next(low))
    assert walked.rows == [([6, 4, 6], 4), ([2, 3], 4)] and walked.goals == [1, 2]
    assert walked.states[:, 8].tolist() == [1.0, 0.5, 0.75] and walked.states[:, 9].tolist() == [0, 1, 1]
    states, actions, missed = walked.low[0]
    np.testing.assert_allclose(actions, [1.0, 0.5, 0.9])
    # action before, done, goal, mean so far, what the rest must be, variance
    expected = [[0.75, 0, 0.75, 0.75, 0.75], [1.0, 1 / 3, 0.75, 1.0, 0.625], [0.5, 2 / 3, 0.75, 0.75, 0.75]]
    np.testing.assert_allclose(states[:, 8:13], expected, rtol=1e-6)
    np.testing.assert_allclose(states[:, 13], seen[0], rtol=1e-6)
    assert missed == pytest.approx(abs((6 + 4 + 6 - 6) / 12 - 0.75))
    assert walked.low[1][2] == pytest.approx(abs((2 + 3 - 4) / 8 - 0.25))
    rows = [autoq.Chosen([5, 4, 6], 4), walked.rows[1]]
    np.testing.assert_allclose(autoq.achieved(space, walked, rows), [0.5, (15 - 6) / 12, (5 - 4) / 8])
    limit = budgets_of(importance, "size=W6")[0].limit
    share = (-(-50 * 15 // 8) + -(-50 * 5 // 8)) / limit
    assert autoq.extrinsic(space, rows, 0.8, 0.9, 2.0) == pytest.approx(-1.0 - 0.2 * share)


def test_repair_by_hand():
    """The last layer's activations, its channels from the last, then the layer before, round after round."""
    importance, _ = made_channels((2, 2))
    loose = budgets_of(importance, "bitops=W6A6")
    top = [autoq.Chosen([4, 3], 3), autoq.Chosen([2, 4], 4)]
    order = [
        [([4, 3], 3), ([2, 4], 3)],
        [([4, 3], 3), ([2, 3], 3)],
        [([4, 3], 2), ([2, 3], 3)],
        [([4, 2], 2), ([2, 3], 3)],
        [([3, 2], 2), ([2, 3], 3)],
        [([3, 2], 2), ([2, 3], 2)],
        [([3, 2], 2), ([2, 2], 2)],
        [([2, 2], 2), ([2, 2], 2)],
    ]
    for rows in order:
        policy = {f"layer{i}": Bits(tuple(w), a) for i, (w, a) in enumerate(rows)}
        budgets = [loose[0]._replace(limit=costs.bitops(importance.layers, policy))]
        space = autoq.space_of(build(importance, budgets), importance.layers, budgets, (2, 2))
        assert autoq.within_budgets(space, top) == rows
    assert autoq.within_budgets(space._replace(budgets=tuple(loose)), top) == top


def test_rules_bind_channels():
    """Pairs of bits: every channel of a layer may have its bits beside the layer's activations."""
    importance, variances = made_channels(rules=["layer0=2,2|4,2|4,4|6,6", "layer1=equal"])
    budgets = budgets_of(importance, "size=W3")
    space = autoq.space_of(build(importance, budgets), importance.layers, budgets, CHANNELS)
    rng = np.random.default_rng(0)
    pairs = {(2, 2), (4, 2), (4, 4), (6, 6)}
    for _ in range(50):
        draw = lambda state: rng.random()  # noqa: E731
        rows = autoq.within_budgets(space, autoq.walk(space, FEATURES, spreads(variances), draw, draw).rows)
        assert {(w, rows[0].a) for w in rows[0].w} <= pairs and set(rows[1].w) == {rows[1].a}
        assert costs.size(importance.layers, space.policy(rows)) <= budgets[0].limit


def test_refusals():
    importance, _ = made_channels(rules=["layer.=share"])
    budgets = budgets_of(importance, "size=W3")
    with pytest.raises(Refusal, match=r"8 output channels; it has 6.*shares the bits of 'layer0'"):
        autoq.space_of(build(importance, budgets), importance.layers, budgets, [8])
    latency = {f"layer{i}": {(w, a): 1.0 for w in WIDTHS for a in WIDTHS} for i in range(2)}
    timed = costs.parse_budgets(["latency=9ms"], importance.layers, WIDTHS, WIDTHS, latency)
    with pytest.raises(Refusal, match="measurements of whole layers"):
        autoq.space_of(build(importance, timed), importance.layers, timed, [8])
