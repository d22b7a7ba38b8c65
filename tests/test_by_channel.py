"""Weight bits per output channel: costs by hand, the file, and applying against channels one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tables import budgets_of, made

from mpq_jax import Bits, Layer, Refusal, Solution, costs, evaluation, flax_seam, joint, ops, policy
from mpq_jax.importance import load_importance, save_importance
from mpq_jax.quantized_model import learned_leaves, quantize
from mpq_jax.quantizers import lsq
from mpq_jax.report.tables import bits_text

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 4, 6)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 2)), jnp.float32)
BATCH = {"image": IMAGES, "label": jnp.asarray([0, 1, 2, 0], jnp.int32)}


class Net(nn.Module):
    """A convolution, a depthwise one, and a projection with two axes of output channels."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(6, (3, 3), name="conv")(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)).mean((1, 2))
        return nn.Dense(3, name="head")(nn.relu(nn.DenseGeneral((2, 4), name="general")(x)).reshape(-1, 8))


def calibrated_net(per_channel):
    quantized = quantize(Net(), IMAGES, bit_widths=WIDTHS, quantizer=lsq(per_channel=per_channel))
    variables = jax.jit(Net().init)(jax.random.key(0, impl="rbg"), IMAGES)
    return quantized, jax.jit(quantized.calibrate)(variables, IMAGES)


def applied(quantized, variables, chosen, x=IMAGES):
    return jax.jit(lambda variables: quantized.apply(variables, chosen, x))(variables)


@pytest.fixture(scope="module")
def net():
    return calibrated_net(per_channel=False)


def drawn(quantized, seed):
    """A policy with bits per output channel in every searched layer."""
    rng = np.random.default_rng(seed)
    return {
        ly.path: ly.bits or Bits(tuple(rng.choice(WIDTHS, ly.channels).tolist()), int(rng.choice(WIDTHS)))
        for ly in quantized.layers
    }


def kernels_by_hand(quantized, variables, chosen):
    """leaf -> the kernel with its output channels quantized one by one, NumPy float64."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flax_seam.flatten(variables["params"]).items()}
    result = {}
    for spec in quantized.specs.values():
        bits = chosen[spec.paths[0]]
        # Output channels are the last axes in all of these layers.
        columns = flat[spec.leaf].reshape(-1, spec.channels).copy()
        for c, b in enumerate(bits.w if isinstance(bits.w, tuple) else (bits.w,) * spec.channels):
            s = flat[spec.names["weight"] + "step_size"][spec.weight_bit_widths.index(b)]
            s = s if s.ndim == 0 else s[c]
            columns[:, c] = np.round(np.clip(columns[:, c] / s, -(2 ** (b - 1)), 2 ** (b - 1) - 1)) * s
        result[spec.leaf] = columns.reshape(flat[spec.leaf].shape)
    return result


def test_channels_of_the_layers(net):
    table = {layer.path: layer.channels for layer in net[0].layers}
    assert table == {"stem": 4, "conv": 6, "depthwise": 6, "general": 8, "head": 3}


@pytest.mark.parametrize("per_channel", [False, True])
def test_apply_equals_channels_one_by_one(net, per_channel):
    """The network run on kernels that were quantized channel by channel outside of it.

    per_channel: the step sizes are one a channel and width, in place of one a width.
    """
    quantized, variables = calibrated_net(True) if per_channel else net
    chosen = drawn(quantized, 1)
    kernels = kernels_by_hand(quantized, variables, chosen)

    def product_of_ready_kernels(call, lhs, rhs, value):
        spec, side = quantized.specs[call.leaf], call.weight_side
        bits = chosen[spec.paths[0]].a
        step = value["activation"]["step_size"][spec.activation_bit_widths.index(bits)]
        operands = [lhs, rhs]
        operands[side] = jnp.asarray(kernels[call.leaf], jnp.float32).reshape(operands[side].shape)
        operands[1 - side] = quantized.quantizer.activation.fake_quant(
            operands[1 - side], {"step_size": step}, jnp.int32(bits), spec.signed
        )
        return ops.contract(call.primitive, call.params, "plain")(*operands), None

    values = learned_leaves(quantized.specs, quantized.quantizer, variables)
    run = jax.jit(lambda variables: quantized.walk(variables, values, product_of_ready_kernels, (IMAGES,), {})[0])
    expected = run(variables)
    np.testing.assert_allclose(applied(quantized, variables, chosen), expected, rtol=1e-4, atol=1e-5)
    coarser = chosen | {"conv": Bits((2,) * 6, chosen["conv"].a)}
    assert float(jnp.abs(applied(quantized, variables, coarser) - expected).max()) > 1e-3


def test_all_channels_alike_are_the_layer(net):
    """The same bits in every channel: the values and all gradients of the layer at those bits."""
    quantized, variables = net
    whole = {ly.path: ly.bits or Bits(3, 4) for ly in quantized.layers}
    each = {ly.path: ly.bits or Bits((3,) * ly.channels, 4) for ly in quantized.layers}

    @jax.jit
    def run(params, chosen):
        def loss(params):
            return jnp.square(quantized.apply({**variables, "params": params}, chosen, IMAGES)).sum()

        return jax.value_and_grad(loss)(params)

    (value, grads), (value2, grads2) = (
        run(variables["params"], jax.tree.map(lambda x: x[0], policy.stack([p]))) for p in (whole, each)
    )
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, grads2)


def test_one_compilation_rows_and_finetuning(net):
    """Twenty policies through joint's own step and evaluation, compiled once each; a loss that falls."""
    quantized, variables = net
    task = joint.classification()
    optimizer = optax.sgd(0.05)
    traces = []
    plain = joint.make_step(quantized, task, optimizer)

    @jax.jit
    def step(*arguments):
        traces.append("step")
        return plain(*arguments)

    @jax.jit
    def evaluate(*arguments):
        traces.append("evaluate")
        return evaluation.make_evaluate(quantized, task)(*arguments)

    state = joint.init_state(variables, optimizer, 2)
    key = jax.random.key(0)
    policies = [drawn(quantized, seed) for seed in range(20)]
    for first, second in zip(policies[::2], policies[1::2], strict=True):
        step(state, BATCH, key, policy.stack([first, second]))
        together, _, _ = evaluate(variables["params"], state.rows["stats"], policy.stack([first, second]), BATCH)
    assert traces == ["step", "evaluate"]
    for row, chosen in ((0, first), (1, second)):
        logits = applied(quantized, variables, chosen)
        np.testing.assert_allclose(together[row] / 4, task.loss(logits, BATCH), rtol=1e-4)
    losses = []
    for _ in range(8):
        state, metrics = step(state, BATCH, key, policy.stack(policies[:2]))
        losses.append(metrics["losses"])
    assert traces == ["step", "evaluate"] and (losses[-1] < losses[0]).all()
    before, after = (flax_seam.flatten(tree)["conv/weight_step_size"] for tree in (variables["params"], state.params))
    assert not np.allclose(before, after)


def test_a_stack_of_layers():
    """In a scanned stack each layer has its own list, or one number for all; a layer in float stays in float."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Body(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return x + nn.Dense(8, name="dense")(x), None

            scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="body")(x, None)[0]

    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    variables = jax.jit(Layers().init)(jax.random.key(0, impl="rbg"), x)
    quantized = quantize(Layers(), x, ends=None, bit_widths=WIDTHS, rules=[(r"\[1\]", "float")])
    calibrated = jax.jit(quantized.calibrate)(variables, x)
    rng = np.random.default_rng(0)
    lists = {f"body/dense[{i}]": Bits(tuple(rng.choice(WIDTHS, 8).tolist()), 4) for i in (0, 2)}
    mixed = lists | {"body/dense[2]": Bits(3, 4)}
    body = {name: np.asarray(leaf, np.float64) for name, leaf in calibrated["params"]["body"]["dense"].items()}
    out = np.asarray(x, np.float64)
    for i in range(3):
        kernel, read = body["kernel"][i].copy(), out
        if i != 1:
            bits = mixed[f"body/dense[{i}]"]
            for c, b in enumerate(bits.w if isinstance(bits.w, tuple) else (bits.w,) * 8):
                s = body["weight_step_size"][i, WIDTHS.index(b)]
                kernel[:, c] = np.round(np.clip(kernel[:, c] / s, -(2 ** (b - 1)), 2 ** (b - 1) - 1)) * s
            s = body["activation_step_size"][i, WIDTHS.index(4)]
            read = np.round(np.clip(out / s, -8, 7)) * s
        out = out + read @ kernel + body["bias"][i]

    def apply(params):
        return quantized.apply({"params": params}, mixed, x)

    np.testing.assert_allclose(jax.jit(apply)(calibrated["params"]), out, rtol=1e-3, atol=1e-3)
    grads = jax.jit(jax.grad(lambda params: jnp.square(apply(params)).sum()))(calibrated["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert np.isfinite(applied(quantized, calibrated, lists, x)).all()


@pytest.mark.parametrize("bits", [Bits((2, 3, 4), 4), Bits((2, 3, 4, 6, 2, 9), 4)])
def test_applying_refuses_or_shows(net, bits):
    """A list of the wrong length is refused; bits that are no candidate give NaN, as they do for whole layers."""
    quantized, variables = net
    chosen = drawn(quantized, 0) | {"conv": bits}
    if len(bits.w) == 3:
        with pytest.raises(Refusal, match=r"'conv' has 6 output channels.*one number a channel"):
            quantized.apply(variables, chosen, IMAGES)
    else:
        assert np.isnan(applied(quantized, variables, chosen)).all()


# ---- costs and files ----------------------------------------------------------------------------------------------

CHANNELS = {"layer0": 4, "layer1": 3, "layer2": 2, "layer3": 5}


def table_of_channels(tied=False):
    """A made importance whose searched layers have channels, with params and macs that they divide."""
    importance = made(1, tied=tied)
    layers = tuple(
        ly._replace(channels=c, params=ly.params // c * c, macs=ly.macs // c * c)
        if (c := CHANNELS.get(ly.path))
        else ly
        for ly in importance.layers
    )
    return importance._replace(layers=layers)


def policy_of_channels(importance, seed=0):
    rng = np.random.default_rng(seed)
    return {
        ly.path: ly.bits or Bits(tuple(rng.choice((2, 3, 4), ly.channels).tolist()), int(rng.choice((2, 3, 4))))
        for ly in importance.layers
    }


def test_costs_by_hand():
    """Sums over channels in plain integers; size rounds up once a layer; a budget is added up from the lists."""
    layer = Layer("x", 30, 900, True, inputs=10, outputs=20, channels=3)
    bits = Bits((2, 3, 4), 5)
    assert costs.layer_bitops(layer, bits) == 300 * 2 * 5 + 300 * 3 * 5 + 300 * 4 * 5
    assert costs.layer_size(layer, bits) == -(-(10 * 2 + 10 * 3 + 10 * 4) // 8) == 12
    importance = table_of_channels()
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3", "memory=1KB", "wbits=3", "abits=3")
    for seed in range(5):
        chosen = policy_of_channels(importance, seed)
        by_hand = dict.fromkeys(("bitops", "size", "memory", "wbits", "abits"), 0)
        for ly in importance.layers:
            w, a = chosen[ly.path]
            each = w if isinstance(w, tuple) else (w,)
            weights, macs = ly.params // len(each), ly.macs // len(each)
            by_hand["bitops"] += sum(macs * b * a for b in each)
            by_hand["size"] += -(-sum(weights * b for b in each) // 8)
            by_hand["wbits"] += sum(weights * b for b in each)
            by_hand["abits"] += ly.inputs * a
            by_hand["memory"] = max(by_hand["memory"], -(-(ly.inputs + ly.outputs) * a // 8))
        assert {b.name: costs.used(b, chosen, importance) for b in budgets} == by_hand
        assert costs.bitops(importance.layers, chosen) == by_hand["bitops"]
        assert costs.size(importance.layers, chosen) == by_hand["size"]
    alike = {ly.path: ly.bits or Bits((3,) * ly.channels, 3) for ly in importance.layers}
    whole = {ly.path: ly.bits or Bits(3, 3) for ly in importance.layers}
    assert [costs.used(b, alike, importance) for b in budgets] == [costs.used(b, whole, importance) for b in budgets]


def test_latency_is_refused():
    importance = table_of_channels()
    latency = {ly.path: {(w, a): 1.0 for w in (2, 3, 4, 8, 32) for a in (2, 3, 4, 8, 32)} for ly in importance.layers}
    widths = (importance.bit_widths, importance.activation_bit_widths)
    budgets = costs.parse_budgets(["latency=9ms"], importance.layers, *widths, latency)
    with pytest.raises(Refusal, match="measurements of whole layers"):
        costs.used(budgets[0], policy_of_channels(importance), importance)


def test_files(tmp_path):
    """policy.json and importance.json keep lists and channels; without channels the counts are checked by division."""
    importance = table_of_channels(tied=True)
    chosen = policy_of_channels(importance)
    chosen["layer1"] = chosen["layer1"]._replace(a=chosen["layer0"].a)
    solution = Solution(chosen, 0.5, None, "feasible", "autoq", 1.0, {"bitops": (1, 2)})
    assert solution.gap is None
    policy.save_policy(tmp_path / "p.json", solution, "abc")
    saved = json.loads((tmp_path / "p.json").read_text())
    assert saved["bits"]["layer0"] == [list(chosen["layer0"].w), chosen["layer0"].a] and saved["bound"] is None
    widths = (importance.bit_widths, importance.activation_bit_widths)
    save_importance(tmp_path / "i.json", importance)
    assert load_importance(tmp_path / "i.json").layers == importance.layers
    bare = tuple(ly._replace(channels=None) for ly in importance.layers)
    for layers in (importance.layers, bare):
        assert policy.load_policy(tmp_path / "p.json", layers, *widths) == chosen
    assert bits_text(Bits((2, 3, 3, 4), 4)) == "W3.00A4" and bits_text(Bits((2, 3), 4)) == "W2.50A4"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer0": [[2, 3, 4], 2]}, "'layer0' is given weight bits for 3 output channels; it has 4"),
        ({"layer0": [[], 2]}, "each output channel"),
        ({"layer0": [[2, 3, 4, 5], 2]}, "'layer0' 5 weight bits.*candidates are 2, 3, 4"),
        ({"layer0": [[2, 3, 4, 2.0], 2]}, "each output channel"),
        ({"layer0": [[2, 3, 4, True], 2]}, "each output channel"),
        ({"layer0": [[2, 3, 4, 4], [2]]}, "each output channel"),
        ({"layer0": [2, 3, 4]}, "each output channel"),
        ({"first": [[8, 8], 8]}, "'first' W8.00A8, but a rule fixes it at W8A8"),
    ],
)
def test_refused_lists(tmp_path, change, words):
    importance = table_of_channels()
    bits = {
        path: [list(b.w) if isinstance(b.w, tuple) else b.w, b.a] for path, b in policy_of_channels(importance).items()
    }
    (tmp_path / "p.json").write_text(json.dumps({"format": "mpq-policy", "version": 1, "bits": bits | change}))
    with pytest.raises(Refusal, match=words) as refusal:
        policy.load_policy(tmp_path / "p.json", importance.layers, importance.bit_widths, importance.bit_widths)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("channels", [0, 7, True, "3"])
def test_refused_channels(tmp_path, channels):
    importance = table_of_channels()
    save_importance(tmp_path / "i.json", importance)
    saved = json.loads((tmp_path / "i.json").read_text())
    saved["layers"][1]["channels"] = channels
    (tmp_path / "i.json").write_text(json.dumps(saved))
    with pytest.raises(Refusal, match=r'"channels" is .*must divide'):
        load_importance(tmp_path / "i.json")
