"""Sampled policies: their divergence against NumPy, where they are drawn, and that the table predicts fresh ones."""

import jax
import numpy as np
import pytest
from criteria_nets import TASK, WIDTHS, Net, batches, calibrated, start
from flax import linen as nn
from scipy import stats

from mpq_jax import Bits, Refusal, costs, joint
from mpq_jax.criteria import sampled
from mpq_jax.criteria.compute import measure
from mpq_jax.importance import total
from mpq_jax.quantized_model import quantize


class Normed(nn.Module):
    """With batch statistics, so that training and evaluation differ."""

    @nn.compact
    def __call__(self, x, train):
        for name in ("one", "two"):
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")(nn.Dense(8, name=name)(x)))
        return nn.Dense(3, name="head")(x)


@pytest.mark.parametrize(
    "count, size, groups", [(20, 16, [320]), (10, 100, [300, 300, 400]), (3, 300, [300] * 3), (2, 16, [32])]
)
def test_joined_batches_leave_nothing_out(count, size, groups):
    made = sampled._joined([{"x": np.full((size, 1), i)} for i in range(count)])
    assert [len(each["x"]) for each in made] == groups
    joined = np.concatenate([each["x"] for each in made])[:, 0]
    np.testing.assert_array_equal(joined, np.repeat(np.arange(count), size))


pytestmark = pytest.mark.usefixtures("quick_compilation")
NORMED = joint.classification(train_kwargs={"train": True}, eval_kwargs={"train": False})


@pytest.fixture(scope="module")
def net():
    given = batches(sizes=(6, 6, 6))
    x = given[0]["image"]
    model = quantize(Net(), x, bit_widths=WIDTHS)
    variables = calibrated(model, start(Net(), x, 2.0), x)
    return model, variables, given


def kl(teacher, mine):
    """Mean over samples, NumPy, float64."""
    teacher, mine = (np.asarray(x, np.float64) for x in (teacher, mine))
    teacher, mine = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (teacher, mine))
    return (np.exp(teacher) * (teacher - mine)).sum(-1).mean()


def random_ones(model, count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        shared = {}
        each = {}
        for layer in model.layers:
            w, a = (int(b) for b in rng.choice(WIDTHS, 2))
            a = shared.setdefault(layer.tied, a) if layer.tied else a
            each[layer.path] = layer.bits or Bits(w, a)
        drawn.append(each)
    return drawn


def test_divergences_without_statistics(net):
    model, variables, given = net
    policies = random_ones(model, 5)  # not a multiple of what is measured at once
    found = sampled.divergences(model, TASK, variables, variables, policies, given)
    images = np.concatenate([batch["image"] for batch in given])
    teacher = jax.jit(lambda v: model.apply(v, None, images))(variables)
    run = jax.jit(lambda policy: model.apply(variables, policy, images))
    wanted = [kl(teacher, run(each)) for each in policies]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7)
    assert min(wanted) > 0


def test_divergences_with_a_batch_s_own_statistics():
    given = batches(shape=(5,), sizes=(128,) * 4)
    x = given[0]["image"]
    model = quantize(Normed(), x, bit_widths=WIDTHS, train=False)
    variables = jax.jit(lambda x: Normed().init(jax.random.key(0), x, train=False))(x)
    variables = jax.jit(lambda v: model.calibrate(v, x, train=False))(variables)
    moved = {**variables, "batch_stats": jax.tree.map(lambda s: s + 1.0, variables["batch_stats"])}
    policies = random_ones(model, 3)
    found = sampled.divergences(model, NORMED, moved, moved, policies, given)
    floats = jax.jit(lambda images: model.apply(moved, None, images, train=False))
    run = jax.jit(lambda each, images: model.apply(moved, each, images, mutable=["batch_stats"], train=True)[0])
    wanted = []
    for each in policies:
        halves = []
        for first in (0, 2):  # 256 samples share their statistics
            images = np.concatenate([given[first]["image"], given[first + 1]["image"]])
            halves.append(kl(floats(images), run(each, images)))
        wanted.append(np.mean(halves))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_where_policies_are_drawn(net):
    model = net[0]
    table = sampled._empty(model)
    all_over, remark = sampled.draw(table, 200, (), 0)
    assert len(all_over) == 200 and "all bit-widths" in remark
    path = next(layer.path for layer in model.layers if layer.searched)
    counts = np.bincount([each[path].w for each in all_over], minlength=5)[2:]
    assert stats.chisquare(counts).pvalue > 1e-4
    near, remark = sampled.draw(table, 40, ("size=W3",), 0)
    (budget,) = costs.parse_budgets(["size=W3"], table.layers, WIDTHS, WIDTHS)
    shares = [costs.used(budget, each, table) / budget.limit for each in near]
    assert "within 5% of size=W3" in remark and min(shares) >= 0.95 and max(shares) <= 1
    # Above what the widest policy costs nothing is near.
    _, remark = sampled.draw(table, 40, ("size=8MB",), 0)
    assert "too few" in remark
    with pytest.raises(Refusal, match=r"criteria\.policies is 5; give 20"):
        sampled.draw(table, 5, (), 0)


def test_the_table_predicts_fresh_policies(net):
    model, variables, given = net
    found = measure(
        "sampled", model=model, task=TASK, variables=variables, joint=variables, batches=given, policies=200, seed=3
    )
    assert found.sample_passes == pytest.approx(201 * 18 / 3) and "200 random policies" in found.notes[0]
    fresh = random_ones(model, 60, seed=1)
    harm = sampled.divergences(model, TASK, variables, variables, fresh, given)
    predicted = [total(found.importance, each) for each in fresh]
    assert stats.spearmanr(predicted, harm).statistic > 0.7
