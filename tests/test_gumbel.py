"""Differentiable search: shares and probabilities against enumeration, both forms against sums of quantized models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from measured import Known, log_without_seconds
from tables import budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Bits, Importance, flax_seam, joint
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq
from mpq_jax.search import edmips, gumbel, likely, supernet
from mpq_jax.search.journal import Journal
from mpq_jax.search.methods import Edmips, Gumbel
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
RULES = ("layer2=2,2|4,4", "layer3=w3+")


def problem_of(rules=RULES, budget="bitops=W4A4", **options):
    importance = made(4, **options)._replace(rules=rules)
    budgets = budgets_of(importance, budget)
    return importance, budgets, build(importance, budgets)


def allowed_policies(problem, importance):
    """picks of every policy that rules, candidates and ties allow."""
    each = (problem.picks(policy) for policy in every_policy(importance))
    return [picks for picks in each if picks is not None]


def random_theta(theta, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(2 * rng.normal(size=x.shape), jnp.float32), theta)


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


def test_samples_have_their_probabilities():
    importance, _, problem = problem_of(layers=2, rules=(), tied=True)
    shares = np.asarray(gumbel.final_shares(random_theta(gumbel.init_theta(problem), 3), problem))
    log_p = likely.log_probabilities(problem, shares)
    rng = np.random.default_rng(0)
    drawn = [tuple(likely.sampled(problem, log_p, rng)) for _ in range(3000)]
    for picks in allowed_policies(problem, importance):
        p = np.exp(log_p[np.arange(2), picks].sum())
        assert abs(drawn.count(tuple(picks)) / 3000 - p) < 4 * np.sqrt(p * (1 - p) / 3000) + 1e-3


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


# ---- the layers ---------------------------------------------------------------------------------------------------

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 5, 2)), jnp.float32)
WIDTHS = (2, 3, 6)


class One(nn.Module):
    """One convolution and nothing else: the model's output is the layer's."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Conv(3, (3, 3), name="conv")(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(4, (3, 3), name="conv")(x)))
        x = nn.relu(nn.Dense(6, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)


def opened(module, **options):
    model = quantize(module, IMAGES, bit_widths=WIDTHS, **options)
    variables = jax.jit(module.init)(jax.random.key(0, impl="rbg"), IMAGES)
    variables = model.calibrate(variables, IMAGES)
    searched = sum(layer.searched for layer in model.layers)
    zeros = np.zeros((searched, 3))
    importance = Importance("made", WIDTHS, WIDTHS, model.layers, zeros, zeros)
    return model, variables, build(importance, budgets_of(importance, "bitops=W6A6"))


def walked(model, problem, variables, layer, shares):
    @jax.jit
    def run(shares):
        values = supernet.layer_values(model, problem, variables, shares)
        return model.walk(variables, values, layer(model), (IMAGES,), {})[0]

    return run(jnp.asarray(shares, jnp.float32))


def test_forms_equal_sums_of_quantized_layers():
    """Supernet: the sum over all nine pairs of the layer at that pair. One branch: the product of two mixtures; both
    agree where the shares of weights and activations are independent."""
    model, variables, problem = opened(One(), ends=None)
    rng = np.random.default_rng(0)
    joint_shares = rng.dirichlet(np.ones(9)).reshape(1, 3, 3)
    p, q = rng.dirichlet(np.ones(3), 2)
    apart = (p[:, None] * q)[None]
    run = jax.jit(lambda policy: model.apply(variables, policy, IMAGES))
    each = np.array(
        [[np.asarray(run({"conv": Bits(jnp.int32(w), jnp.int32(a))}), np.float64) for a in WIDTHS] for w in WIDTHS]
    )
    for shares in (joint_shares, apart):
        expected = np.tensordot(shares[0], each, 2)
        found = walked(model, problem, variables, supernet.supernet_layer, shares)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    found = walked(model, problem, variables, supernet.one_branch_layer, apart)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    marginal = joint_shares.sum(2)[0][:, None] * joint_shares.sum(1)[0]
    found = walked(model, problem, variables, supernet.one_branch_layer, joint_shares)
    np.testing.assert_allclose(found, np.tensordot(marginal, each, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "quantizer"),
    [
        (supernet.supernet_layer, lsq()),
        (supernet.one_branch_layer, lsq()),
        (supernet.one_branch_layer, lq_nets()),  # a basis for each output channel, on an axis of its own
    ],
    ids=["supernet", "one branch", "one branch, lq_nets"],
)
def test_shares_of_one_are_a_policy(layer, quantizer):
    """All of the share at one pair of bits: the quantized model at that policy, fixed layers and float ones as ever."""
    model, variables, problem = opened(Net(), rules=[("hidden", "float")], quantizer=quantizer)
    policy = {ly.path: ly.bits or Bits(3, 6) for ly in model.layers}
    shares = np.zeros((1, 3, 3))
    shares[0, 1, 2] = 1
    found = walked(model, problem, variables, layer, shares)
    np.testing.assert_allclose(found, model.apply(variables, policy, IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [supernet.supernet_layer, supernet.one_branch_layer])
def test_a_stack_of_layers(layer):
    """Each layer of a scanned stack has shares of its own; one is fixed by a rule, one left in float."""

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(6, name="dense")(x), None

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return scan(name="body")(x, None)[0]

    x = IMAGES.reshape(4, -1)[:, :6]
    rules = [(r"\[1\]", "float"), (r"\[2\]", "3,2")]
    model = quantize(Layers(), x, bit_widths=WIDTHS, ends=None, rules=rules)
    variables = model.calibrate(jax.jit(Layers().init)(jax.random.key(0, impl="rbg"), x), x)
    importance = Importance("made", WIDTHS, WIDTHS, model.layers, np.zeros((2, 3)), np.zeros((2, 3)))
    problem = build(importance, budgets_of(importance, "bitops=W6A6"))
    shares = np.zeros((2, 3, 3), np.float32)
    shares[0, 1, 2] = shares[1, 2, 0] = 1
    policy = {ly.path: ly.bits for ly in model.layers} | {"body/dense[0]": Bits(3, 6), "body/dense[3]": Bits(6, 2)}
    values = supernet.layer_values(model, problem, variables, jnp.asarray(shares))
    found = model.walk(variables, values, layer(model), (x,), {})[0]
    np.testing.assert_allclose(found, model.apply(variables, policy, x), rtol=1e-4, atol=1e-5)


# ---- training -----------------------------------------------------------------------------------------------------


def batch(seed, size=16):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(size, 5, 5, 2)).astype(np.float32)
    return {"image": jnp.asarray(image), "label": jnp.asarray((image.mean((1, 2)).argmax(1)), jnp.int32)}


def test_steps_in_turn():
    """The weights move by their own batch's gradient alone; theta waits for the warm-up's end, then moves by its own
    batch; its loss is CE * beta (log cost)^gamma."""
    model, variables, problem = opened(Net())
    settings = Edmips(steps=4, warmup_steps=1, beta=0.2, gamma=0.7)
    form, task = edmips.form(problem), joint.classification()
    weights, thetas = optax.sgd(0.1), optax.adam(0.5)
    cost, fixed = gumbel._cost(problem, model)
    step = jax.jit(supernet.make_step(model, task, problem, cost, fixed, form, weights, thetas, settings, seed=0))
    state = supernet.init_state(variables, edmips.init_theta(problem), weights, thetas)
    key = jax.random.key(0)
    one, metrics = step(state, {"weights": batch(1), "theta": batch(2)}, key)
    other, _ = step(state, {"weights": batch(1), "theta": batch(3)}, key)
    jax.tree.map(np.testing.assert_array_equal, (one.params, one.theta), (other.params, state.theta))

    shares = edmips.shares_of(state.theta, problem)

    @jax.jit
    def ce(params, stats, data):
        full = {"params": params, **stats}
        values = supernet.layer_values(model, problem, full, shares)
        layer = supernet.one_branch_layer(model)
        out, _, _ = model.walk(full, values, layer, (data["image"],), {"train": True}, list(stats))
        return task.loss(out, data)

    grads = jax.grad(ce)(state.params, state.stats, batch(1))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    for path, leaf in flax_seam.flatten(one.params).items():
        np.testing.assert_allclose(leaf, flax_seam.flatten(moved)[path], rtol=1e-3, atol=1e-6, err_msg=path)
    spent = float((np.asarray(shares).reshape(cost.shape) * cost).sum() + fixed)
    expected = float(ce(one.params, one.stats, batch(2))) * 0.2 * np.log(spent) ** 0.7
    np.testing.assert_allclose(metrics["losses"], [ce(state.params, state.stats, batch(1)), expected], rtol=1e-3)
    np.testing.assert_allclose(metrics["cost"], spent, rtol=1e-5)
    two, _ = step(one, {"weights": batch(1), "theta": batch(2)}, key)
    other, _ = step(one, {"weights": batch(1), "theta": batch(3)}, key)
    jax.tree.map(np.testing.assert_array_equal, two.params, other.params)
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (two.theta, one.theta)), strict=True))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (two.theta, other.theta)), strict=True))


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


def test_measured_at_the_end(tmp_path, capsys):
    """The most likely policy breaks the budget: it is repaired, said so, and measured first; then samples that fit."""
    importance, budgets, problem = problem_of(budget="bitops=W3A3", rules=())
    theta = random_theta(gumbel.init_theta(problem), 5)
    theta["pair"] = theta["pair"] + jnp.asarray([[[0.5 * (i + j) for j in range(3)] for i in range(3)]])
    shares = np.asarray(gumbel.final_shares(theta, problem))
    journal = Journal(tmp_path / "log", importance, budgets, Known(importance))
    likely.measure_policies(problem, shares, journal, 4, np.random.default_rng(0))
    assert "breaks a budget; repaired" in capsys.readouterr().out
    first, *others = log_without_seconds(tmp_path / "log")
    assert first["repaired"] and first["least_loss"] and first["before"] > first["log_probability"]
    assert len(others) == 3 and all(line["sampled"] for line in others)
    assert len({str(e.policy) for e in journal.evaluated}) == 4
    for evaluation in journal.evaluated:
        assert cost_by_hand(importance, evaluation.policy, "bitops") <= budgets[0].limit
    loose = Journal(tmp_path / "loose", importance, [], Known(importance))
    likely.measure_policies(build(importance, []), shares, loose, 1, np.random.default_rng(0))
    (line,) = log_without_seconds(tmp_path / "loose")
    assert not line["repaired"] and line["log_probability"] == pytest.approx(first["before"])


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
    import json

    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and [line["seconds"] for line in lines] == [2, 4, 5]
