"""Both forms of differentiable search against sums of quantized models; its steps against plain gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tables import budgets_of

from mpq_jax import Bits, Importance, flax_seam, joint
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq
from mpq_jax.search import edmips, gumbel, supernet
from mpq_jax.search.methods import Edmips
from mpq_jax.search.problem import build

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
