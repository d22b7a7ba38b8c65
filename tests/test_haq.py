"""HAQ: its rule, its states and its repair by hand; the search on known optima."""

import dataclasses

import numpy as np
import pytest
from measured import Known, check_resumed, losses
from tables import budgets_of, cost_by_hand, made

from mpq_jax import Bits
from mpq_jax.search import haq
from mpq_jax.search.journal import Ended, Journal
from mpq_jax.search.methods import Haq
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUICK = Haq(hidden=64, actor_learning_rate=1e-3, critic_learning_rate=3e-3, batch_size=32)


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
