"""Differentiable search, with noise (gumbel.py) and without (edmips.py): shares and probabilities against enumeration."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from shares import allowed_policies, problem_of, random_theta
from tables import budgets_of

from mpq_jax import Bits, Importance, joint
from mpq_jax.quantized_model import quantize
from mpq_jax.search import edmips, gumbel, likely, supernet
from mpq_jax.search.methods import Edmips, Gumbel
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")


def softmax_numpy(x):
    e = np.exp(x - x.max())
    return e / e.sum()


# ---- shares and probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gumbel", "edmips"])
@pytest.mark.parametrize("tied", [False, True])
def test_probabilities_add_up(form, tied):
    """Over all allowed policies the probabilities add up to 1; the most likely one and the repaired one are those of
    enumeration; the joint form's are the softmax of theta's sums."""
    importance, budgets, problem = problem_of(tied=tied, narrowed=True)
    if form == "gumbel":
        theta = random_theta(gumbel.init_theta(problem))
        shares = gumbel.final_shares(theta, problem)
    else:
        theta = random_theta(edmips.init_theta(problem))
        shares = edmips.probabilities(theta, problem)
    np.testing.assert_allclose(np.asarray(shares).sum((1, 2)), 1, rtol=1e-5)
    assert (np.asarray(shares).reshape(problem.allowed.shape)[~problem.allowed] < 1e-12).all()
    log_p = likely.log_probabilities(problem, np.asarray(shares))
    rows = np.arange(len(log_p))
    policies = allowed_policies(problem, importance)
    logs = np.array([log_p[rows, picks].sum() for picks in policies])
    assert np.exp(logs).sum() == pytest.approx(1, rel=1e-4)
    np.testing.assert_array_equal(likely.most_likely(problem, log_p), policies[int(logs.argmax())])
    tight = build(importance, [budgets[0]._replace(limit=int(0.6 * budgets[0].limit))])
    fitting = [i for i, picks in enumerate(policies) if tight.fits(picks)]
    assert 0 < len(fitting) < len(policies)
    repaired, proved = likely.repaired(tight, log_p)
    assert proved and log_p[rows, repaired].sum() == pytest.approx(logs[fitting].max(), rel=1e-9)
    if form == "gumbel" and not tied:
        by_hand = [
            softmax_numpy(np.where(ok, t, -np.inf))
            for ok, t in zip(
                problem.allowed, np.asarray(theta["pair"], np.float64).reshape(problem.allowed.shape), strict=True
            )
        ]
        np.testing.assert_allclose(np.asarray(shares).reshape(problem.allowed.shape), by_hand, rtol=1e-4, atol=1e-7)


def test_gumbel_softmax():
    """The largest of theta + noise is k with probability softmax(theta)_k; low temperatures choose, high ones mix."""
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.7]))

    @jax.jit
    def draw(key, temperature):
        return gumbel.gumbel_softmax(key, temperature)(logits, 0, 0)

    keys = jax.random.split(jax.random.key(0), 4000)
    cold, warm = (jax.vmap(draw, (0, None))(keys, t) for t in (1e-3, 100.0))
    np.testing.assert_allclose(np.bincount(np.asarray(cold).argmax(1)) / 4000, [0.1, 0.2, 0.7], atol=0.03)
    assert np.asarray(cold).max(1).mean() > 0.99 and np.abs(np.asarray(warm) - 1 / 3).max() < 0.1
    _, _, problem = problem_of()
    settings = Gumbel(steps=11, warmup_steps=1)
    form = gumbel.gumbel_form(problem, settings)
    theta = gumbel.init_theta(problem)
    first, last = (np.asarray(form.shares(theta, keys[0], jnp.int32(step))) for step in (0, 11))
    assert (
        first.max(where=problem.allowed.reshape(first.shape), initial=0, axis=(1, 2)).mean() < last.max((1, 2)).mean()
    )


@pytest.mark.parametrize("form", ["gumbel", "edmips"])
def test_probabilities_go_to_an_option_that_dominates(form):
    """A loss that is linear in the shares, one policy best by far: theta finds it, in tied rows too."""
    _, _, problem = problem_of(tied=True)
    harm = np.abs(problem.w - 4) + np.abs(problem.a - 2) + np.zeros(problem.allowed.shape)
    harm[3] = np.abs(problem.w - 3) + np.abs(problem.a - 4)
    table = jnp.asarray(harm, jnp.float32).reshape(-1, *problem.widths)
    if form == "gumbel":
        theta, shares_of = (
            gumbel.init_theta(problem),
            gumbel.gumbel_form(problem, Gumbel(steps=300, warmup_steps=0)).shares,
        )
    else:
        theta, shares_of = edmips.init_theta(problem), edmips.form(problem).shares
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(theta):
        def step(carry, i):
            theta, state = carry
            key = jax.random.fold_in(jax.random.key(0), i)
            grads = jax.grad(lambda theta: (table * shares_of(theta, key, i)).sum())(theta)
            moves, state = optimizer.update(grads, state)
            return (optax.apply_updates(theta, moves), state), None

        return jax.lax.scan(step, (theta, optimizer.init(theta)), jnp.arange(300))[0][0]

    theta = train(theta)
    shares = gumbel.final_shares(theta, problem) if form == "gumbel" else edmips.probabilities(theta, problem)
    log_p = likely.log_probabilities(problem, np.asarray(shares))
    picks = likely.most_likely(problem, log_p)
    assert problem.policy(picks) == {
        "layer0": Bits(4, 2),
        "layer1": Bits(4, 2),
        "layer2": problem.policy(picks)["layer2"],
        "layer3": Bits(3, 4),
    }
    assert problem.policy(picks)["layer2"] in (Bits(2, 2), Bits(4, 4))  # equally far, and all that its rule leaves
    clear = [0, 1, 3]
    assert np.exp(log_p[clear, picks[clear]].sum()) > 0.9


@pytest.mark.parametrize("method", ["gumbel", "edmips"])
def test_theta_finds_the_bits_that_the_data_need(method):
    """A layer whose answers need six bits of its weights and of its input, with no price on cost: both become likely."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 4)).astype(np.float32)

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return 20 * nn.Dense(4, use_bias=False, name="dense")(x.reshape(x.shape[0], -1))

    x = jnp.asarray(rng.normal(size=(256, 2, 2, 2)), jnp.float32)
    model = quantize(Linear(), x, bit_widths=(2, 6), ends=None)
    variables = model.calibrate({"params": {"dense": {"kernel": jnp.asarray(kernel)}}}, x)
    zeros = np.zeros((1, 2))
    importance = Importance("made", (2, 6), (2, 6), model.layers, zeros, zeros)
    problem = build(importance, budgets_of(importance, "bitops=W6A6"))
    data = {"image": x, "label": jnp.asarray((np.asarray(x).reshape(256, -1) @ kernel).argmax(1), jnp.int32)}
    settings = {"gumbel": Gumbel, "edmips": Edmips}[method](steps=60, warmup_steps=0, beta=1.0, gamma=0.0)
    form = gumbel.gumbel_form(problem, settings) if method == "gumbel" else edmips.form(problem)
    theta = (gumbel if method == "gumbel" else edmips).init_theta(problem)
    thetas, still = optax.adam(0.1), optax.set_to_zero()
    step = jax.jit(
        supernet.make_step(
            model, joint.classification(), problem, problem.cost[0], 0.0, form, still, thetas, settings, seed=0
        )
    )
    state = supernet.init_state(variables, theta, still, thetas)
    for _ in range(60):
        state, _ = step(state, {"weights": data, "theta": data}, jax.random.key(0))
    shares = (
        gumbel.final_shares(state.theta, problem) if method == "gumbel" else edmips.probabilities(state.theta, problem)
    )
    assert float(shares[0, 1, 1]) > 0.9


# ---- the end ------------------------------------------------------------------------------------------------------


def test_training_log_goes_on(tmp_path):
    """Lines of steps that will be done again are dropped, and seconds count on."""
    now = [10.0]
    log = gumbel.TrainingLog(tmp_path / "t.jsonl", lambda: now[0])
    log.load(0)
    for i in range(3):
        now[0] += 2
        log.add(i, {"losses": np.array([1.0, 2.0]), "cost": np.float32(3)})
    log.flush()
    now[0] = 500.0
    log = gumbel.TrainingLog(tmp_path / "t.jsonl", lambda: now[0])
    log.load(2)
    assert log.seconds() == 4.0
    now[0] += 1
    log.add(2, {"losses": np.array([1.0, 2.0]), "cost": np.float32(3)})
    log.flush()
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and [line["seconds"] for line in lines] == [2, 4, 5]
