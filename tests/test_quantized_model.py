"""quantize on models of many shapes: what is found, what is applied, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from layer_nets import Net

from mpq_jax import Bits, Refusal, flax_seam
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq, pact, qil
from mpq_jax.rules import Candidates

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0, impl="rbg")
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 2)), jnp.float32)


@pytest.fixture(scope="module")
def net():
    model = Net()
    return model, started(model, IMAGES), quantize(model, IMAGES)


@pytest.fixture(scope="module")
def calibrated(net):
    """The net's variables with step sizes."""
    _, variables, quantized = net
    return fitted(quantized, variables, IMAGES)


# Compiled: operation by operation, every shape of every operation would be a program.


def started(model, x):
    return jax.jit(model.init)(KEY, x)


def fitted(quantized, variables, x, **kwargs):
    return jax.jit(lambda variables, x: quantized.calibrate(variables, x, **kwargs))(variables, x)


def applied(quantized, variables, policy, x, **kwargs):
    return jax.jit(lambda variables, x: quantized.apply(variables, policy, x, **kwargs))(variables, x)


def full_policy(quantized, w=6, a=6):
    return {layer.path: layer.bits or Bits(w, a) for layer in quantized.layers}


def conv_numpy(x, k, padding):
    """[B,H,W,C] x [h,w,C,O] stride 1, by loops, float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), padding, padding, (0, 0)))
    h, w = x.shape[1] - k.shape[0] + 1, x.shape[2] - k.shape[1] + 1
    out = np.zeros((x.shape[0], h, w, k.shape[3]))
    for i in range(k.shape[0]):
        for j in range(k.shape[1]):
            out += np.einsum("bhwc,co->bhwo", x[:, i : i + h, j : j + w], np.asarray(k[i, j], np.float64))
    return out


def grid_numpy(x, s, bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.round(np.clip(np.asarray(x, np.float64) / s, low, high)) * s


def test_step_sizes_are_leaves_beside_the_kernel(net, calibrated):
    _, variables, _ = net
    conv1 = calibrated["params"]["block1"]["conv1"]
    assert set(conv1) == {"kernel", "weight_step_size", "activation_step_size"}
    assert conv1["weight_step_size"].shape == conv1["activation_step_size"].shape == (5,)
    x = nn.relu(jax.jit(nn.Conv(4, (3, 3)).apply)({"params": variables["params"]["stem"]}, IMAGES))
    expected = [2 * np.abs(x).mean() / np.sqrt(2**b - 1) for b in (2, 3, 4, 5, 6)]
    np.testing.assert_allclose(conv1["activation_step_size"], expected, rtol=1e-5)


def test_apply_equals_numpy(net):
    """A two-layer network computed by hand with the step sizes from the tree."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="a")(x))
            return nn.Dense(3, use_bias=False, name="b")(x)

    model = Two()
    quantized = quantize(model, IMAGES, ends=None)
    variables = fitted(quantized, started(model, IMAGES), IMAGES)
    params = jax.tree.map(np.asarray, variables["params"])
    out = quantized.apply(variables, {"a": Bits(3, 5), "b": Bits(4, 2)}, IMAGES)  # not compiled
    widths = (2, 3, 4, 5, 6)

    def step(layer, kind, bits):
        return float(params[layer][f"{kind}_step_size"][widths.index(bits)])

    x = grid_numpy(IMAGES, step("a", "activation", 5), 5, True)
    k = grid_numpy(params["a"]["kernel"], step("a", "weight", 3), 3, True)
    x = np.maximum(conv_numpy(x, k, (1, 1)), 0)
    x = grid_numpy(x, step("b", "activation", 2), 2, False)
    expected = x @ grid_numpy(params["b"]["kernel"], step("b", "weight", 4), 4, True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_float_policy_and_many_bits_give_the_float_model(net):
    model, variables, _ = net
    quantized = quantize(model, IMAGES, bit_widths=(2, 16), ends=Bits(16, 16))
    calibrated = fitted(quantized, variables, IMAGES)
    expected = jax.jit(model.apply)(variables, IMAGES)
    np.testing.assert_allclose(applied(quantized, calibrated, None, IMAGES), expected, rtol=1e-5, atol=1e-6)
    run = jax.jit(lambda policy: quantized.apply(calibrated, policy, IMAGES))
    np.testing.assert_allclose(run(full_policy(quantized, 16, 16)), expected, rtol=2e-2, atol=2e-2)
    assert float(jnp.abs(run(full_policy(quantized, 2, 2)) - expected).max()) > 0.05


def test_rows_equal_one_by_one_and_compile_once(net, calibrated):
    """Twenty policies, one compilation; vmapped rows, values and gradients, equal rows one by one (in float64)."""
    _, _, quantized = net
    rng = np.random.default_rng(1)
    policies = [
        {ly.path: ly.bits or Bits(*(int(b) for b in rng.integers(2, 7, 2))) for ly in quantized.layers}
        for _ in range(20)
    ]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), calibrated)
        images = jnp.asarray(IMAGES, jnp.float64)
        traces = []

        @jax.jit
        def one(params, policy):
            traces.append(1)

            def loss(params):
                return jnp.square(quantized.apply({**wide, "params": params}, policy, images)).sum()

            return jax.value_and_grad(loss)(params)

        traced = [jax.tree.map(jnp.int32, policy) for policy in policies]
        singles = [one(wide["params"], policy) for policy in traced]
        assert len(traces) == 1
        rows = jax.tree.map(lambda *bits: np.stack(bits), *traced[:3])

        @jax.jit
        def together(params):
            def losses(params):
                run = jax.vmap(lambda policy: quantized.apply({**wide, "params": params}, policy, images))
                losses = jnp.square(run(rows)).sum((1, 2))
                return losses.sum(), losses

            return jax.grad(losses, has_aux=True)(params)

        grads, losses = together(wide["params"])
        np.testing.assert_allclose(losses, [float(v) for v, _ in singles[:3]], rtol=1e-9)
        expected = jax.tree.map(lambda *g: sum(map(np.asarray, g)), *[g for _, g in singles[:3]])
        for path, leaf in flax_seam.flatten(grads).items():
            assert leaf.dtype == jnp.float64
            np.testing.assert_allclose(leaf, flax_seam.flatten(expected)[path], rtol=1e-8, atol=1e-8, err_msg=path)


def test_training_mode_remat_and_dropout(net, calibrated):
    """nn.remat changes nothing; batch statistics come back; dropout takes its rngs."""
    _, _, quantized = net
    policy = full_policy(quantized, 3, 3)
    rematted = quantize(Net(remat=True), IMAGES)
    assert rematted.layers == quantized.layers

    def run(q):
        def loss(params):
            out, updates = q.apply(
                {**calibrated, "params": params},
                policy,
                IMAGES,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(7)},
            )
            return jnp.square(out).sum(), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(calibrated["params"])

    (value, updates), grads = run(quantized)
    (value2, updates2), grads2 = run(rematted)
    assert not np.allclose(updates["batch_stats"]["block1"]["bn1"]["mean"], 0)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (updates, grads), (updates2, grads2)
    )


# ---- other kinds of layers ----------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """ConvTranspose, DenseGeneral, Einsum, attention, Embed.attend, a raw product; keyword arguments."""

    @nn.compact
    def __call__(self, tokens, *, scale=1.0):
        embed = nn.Embed(7, 8, name="embed")
        x = embed(tokens) * scale
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        x = nn.DenseGeneral((2, 4), name="general")(x)
        x = nn.Einsum((2, 4, 8), "btij,ijk->btk", name="einsum")(x)
        x = nn.ConvTranspose(8, (3,), strides=(2,), name="transposed")(x)
        x = x @ self.param("raw", nn.initializers.lecun_normal(), (8, 8))
        return embed.attend(nn.gelu(x))


def test_every_kind_of_layer():
    tokens = jnp.arange(6).reshape(2, 3)
    model = Zoo()
    variables = started(model, tokens)
    quantized = quantize(model, tokens, scale=2.0, ends=None)
    table = {layer.path: layer for layer in quantized.layers}
    names = ["query", "key", "value", "out"]
    assert set(table) == {f"attention/{n}" for n in names} | {"general", "einsum", "transposed", "raw", "embed"}
    assert table["general"].macs == 3 * 64 and table["einsum"].macs == 3 * 64
    assert table["transposed"].macs == 3 * 3 * 64  # three positions, three taps, no inserted zeros
    assert table["raw"].macs == 6 * 64 and table["embed"].macs == 6 * 8 * 7
    assert table["attention/query"].tied == table["attention/key"].tied == table["attention/value"].tied
    assert [macs for _, macs in quantized.products] == [3 * 3 * 8, 3 * 3 * 8]
    calibrated = fitted(quantized, variables, tokens, scale=2.0)
    assert calibrated["params"]["raw_weight_step_size"].shape == (5,)
    assert calibrated["params"]["embed"]["weight_step_size"].shape == (5,)
    run = jax.jit(lambda policy: quantized.apply(calibrated, policy, tokens, scale=2.0))
    low, high = (run(full_policy(quantized, b, b)) for b in (2, 6))
    expected = jax.jit(lambda variables: model.apply(variables, tokens, scale=2.0))(variables)
    assert float(jnp.square(high - expected).mean()) < float(jnp.square(low - expected).mean())
    counted = quantize(model, tokens, scale=2.0, count_products=True)
    assert [layer.macs for layer in counted.layers if layer.params == 0] == [72, 72]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Stack(nn.Module):
    length: int = 3
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        if self.scan:
            layers = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=self.length
            )
            return layers(name="layers")(x, None)[0]
        for i in range(self.length):
            x, _ = Layer(name=f"layer{i}")(x, None)
        return x


def test_scanned_stack_counts_as_many_layers():
    """A scanned stack equals the same layers in a Python loop, each with bits of its own; so do the gradients."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    scanned, looped = Stack(), Stack(scan=False)
    variables = started(scanned, x)
    stacked = variables["params"]["layers"]
    loop_variables = {"params": {f"layer{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)}}
    q_scan, q_loop = quantize(scanned, x, ends=None), quantize(looped, x, ends=None)
    names = [f"layers/{n}[{i}]" for i in range(3) for n in ("up", "down")]
    assert [layer.path for layer in q_scan.layers] == names
    for mine, theirs in zip(q_scan.layers, q_loop.layers, strict=True):
        assert (mine.macs, mine.params) == (theirs.macs, theirs.params)
    rng = np.random.default_rng(0)
    bits = [Bits(*(int(b) for b in rng.integers(2, 7, 2))) for _ in names]
    policies = [dict(zip((ly.path for ly in q.layers), bits, strict=True)) for q in (q_scan, q_loop)]
    calibrated = [fitted(q_scan, variables, x), fitted(q_loop, loop_variables, x)]
    assert calibrated[0]["params"]["layers"]["up"]["weight_step_size"].shape == (3, 5)

    def run(q, calibrated, policy):
        loss = jax.value_and_grad(lambda p: jnp.square(q.apply({"params": p}, policy, x)).sum())
        return jax.jit(loss)(calibrated["params"])

    (value, grads), (value2, grads2) = (run(*a) for a in zip((q_scan, q_loop), calibrated, policies, strict=True))
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    for i in range(3):
        mine = jax.tree.map(lambda a, i=i: a[i], grads["layers"])
        theirs = grads2[f"layer{i}"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), mine, theirs)


def test_recurrent_scan_shares_one_layer():
    """A layer that a scan runs again and again is one layer, with the MACs of all its runs."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            carry = nn.tanh(nn.Dense(5, name="update")(jnp.concatenate([carry, x], -1)))
            return carry, carry

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, xs):
            cell = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
            return cell(name="cell")(jnp.zeros((xs.shape[0], 5)), xs)[1]

    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)), jnp.float32)
    model = Recurrent()
    variables = started(model, xs)
    quantized = quantize(model, xs, ends=None)
    (layer,) = quantized.layers
    assert (layer.path, layer.macs, layer.params) == ("cell/update", 7 * 8 * 5, 40)
    calibrated = fitted(quantized, variables, xs)
    assert calibrated["params"]["cell"]["update"]["activation_step_size"].shape == (5,)
    out = applied(quantized, calibrated, {"cell/update": Bits(6, 6)}, xs)
    np.testing.assert_allclose(out, jax.jit(model.apply)(variables, xs), atol=0.2)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x))).mean((1, 2))
        return self.layers[1](nnx.relu(self.layers[0](x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(4, (3, 3), name="conv")(x)))
        x = nn.relu(nn.Dense(4, name="layers0")(x.mean((1, 2))))
        return nn.Dense(3, name="layers1")(x)


def test_linen_equals_nnx():
    """Outputs, step-size gradients and new statistics of the same network in both."""
    q_nnx = quantize(NnxNet(nnx.Rngs(0)), IMAGES, ends=None, train=False)
    q_linen = quantize(LinenNet(), IMAGES, ends=None, train=False)
    rename = {"conv": "conv", "layers/0": "layers0", "layers/1": "layers1", "bn": "bn"}
    assert [rename[layer.path] for layer in q_nnx.layers] == [layer.path for layer in q_linen.layers]
    source = q_nnx.variables

    def to_linen(tree):
        flat = {}
        for path, leaf in flax_seam.flatten(tree).items():
            module, _, name = path.rpartition("/")
            flat[f"{rename[module]}/{name}"] = leaf
        return flax_seam.unflatten(flat)

    pairs = [(q_nnx, source), (q_linen, {name: to_linen(tree) for name, tree in source.items()})]
    results = []
    for q, variables in pairs:
        calibrated = fitted(q, variables, IMAGES, train=False)
        policy = {layer.path: Bits(3, 4) for layer in q.layers}

        def loss(params, q=q, calibrated=calibrated, policy=policy):
            variables = {**calibrated, "params": params}
            out, updates = q.apply(variables, policy, IMAGES, mutable=["batch_stats"], train=True)
            return jnp.square(out).sum(), (out, updates)

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(calibrated["params"]))
    ((value, (out, updates)), grads), ((value2, (out2, updates2)), grads2) = results
    np.testing.assert_allclose(out, out2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    for mine, theirs in ((to_linen(grads), grads2), (to_linen(updates["batch_stats"]), updates2["batch_stats"])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), mine, theirs)


# ---- rules and refusals -------------------------------------------------------------------------------------------


def test_rules(net):
    model, variables, _ = net
    quantized = quantize(
        model,
        IMAGES,
        rules=[
            ("depthwise", "float"),
            ("block1/conv1", Bits(4, 4)),
            ("block1", "w2/4/8,a4/8"),
            ("stem", Candidates((2,), (3,))),
        ],
    )
    table = {layer.path: layer for layer in quantized.layers}
    assert table["block1/depthwise"].bits == Bits(32, 32) and not table["block1/depthwise"].searched
    assert table["block1/conv1"].bits == Bits(4, 4)
    assert table["block1/shortcut"].weight_bit_widths == (2, 4, 8)
    assert table["block1/shortcut"].activation_bit_widths == (4, 8)
    assert table["stem"].searched and table["head"].bits == Bits(8, 8)
    calibrated = fitted(quantized, variables, IMAGES)
    assert "weight_step_size" not in calibrated["params"]["block1"]["depthwise"]
    policy = full_policy(quantized, 4, 4) | {"stem": Bits(2, 3)}
    assert np.isfinite(applied(quantized, calibrated, policy, IMAGES)).all()


def test_float_within_a_stack():
    """One layer of a scanned stack left in float equals the loop with that layer left in float."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    scanned, looped = Stack(), Stack(scan=False)
    variables = started(scanned, x)
    stacked = variables["params"]["layers"]
    loop_variables = {"params": {f"layer{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)}}
    q_scan = quantize(scanned, x, ends=None, rules=[(r"up\[1\]", "float")])
    q_loop = quantize(looped, x, ends=None, rules=[("layer1/up", "float")])
    outs = [
        applied(q, fitted(q, v, x), {ly.path: ly.bits or Bits(2, 2) for ly in q.layers}, x)
        for q, v in ((q_scan, variables), (q_loop, loop_variables))
    ]
    np.testing.assert_allclose(*outs, rtol=1e-4, atol=1e-5)


def test_refusals_when_applying(net, calibrated):
    model, variables, quantized = net
    with pytest.raises(Refusal, match="calibrate"):
        quantized.apply(variables, full_policy(quantized), IMAGES)
    with pytest.raises(Refusal, match="no bits for layer"):
        quantized.apply(calibrated, {"stem": Bits(8, 8)}, IMAGES)
    with pytest.raises(Refusal, match="another model"):
        head = {name: leaf for name, leaf in calibrated["params"]["head"].items() if name != "bias"}
        other = {**calibrated, "params": {**calibrated["params"], "head": head}}
        quantized.apply(other, full_policy(quantized), IMAGES)
    with pytest.raises(Refusal, match="neither"):
        quantize(object(), IMAGES)


@pytest.mark.parametrize("bits", [Bits(5, 4), Bits(4, 5), Bits(8, 8)])
@pytest.mark.parametrize("quantizer", [lsq(), pact(), qil(), lq_nets("same")], ids=lambda each: each.name)
def test_bits_that_are_no_candidate_show(quantizer, bits):
    """NaN, of every quantizer, through whatever layers follow."""
    quantized = quantize(Stacked(), IMAGES, bit_widths=(2, 3, 4), ends=None, quantizer=quantizer)
    variables = fitted(quantized, started(Stacked(), IMAGES), IMAGES)
    for first in (bits, Bits(4, 4)):
        out = applied(quantized, variables, {"first": first, "last": Bits(4, 4)}, IMAGES)
        assert np.isnan(out).all() if first == bits else np.isfinite(out).all()


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(4, name="first")(x.reshape(x.shape[0], -1))))


def test_variables_and_policies_of_other_models(net, calibrated):
    _, variables, quantized = net
    with pytest.raises(Refusal, match="names layer 'cnov', which this model does not have"):
        quantized.apply(calibrated, {**full_policy(quantized), "cnov": Bits(4, 4)}, IMAGES)
    fewer = quantize(Net(), IMAGES, bit_widths=(2, 3, 6))
    with pytest.raises(Refusal, match=r"weight_step_size' has shape \(5,\), and layer .* has 3 widths"):
        fewer.apply(calibrated, full_policy(fewer), IMAGES)
    other = jax.tree.map(lambda x: jnp.concatenate([x, x]), variables)
    with pytest.raises(Refusal, match=r"parameter '.*' has shape .*, the model's has"):
        quantized.calibrate(other, IMAGES)


def test_ends_are_bits_as_rules_have_them():
    same = [quantize(Net(), IMAGES, ends=ends).layers for ends in (Bits(8, 8), (8, 8), "8,8")]
    assert same[0] == same[1] == same[2]
    for ends, words in (
        (Bits(1, 1), "ends: weight bits"),
        (Bits(8, 8.5), "ends: activation bits"),
        ("float", "ends is"),
    ):
        with pytest.raises(Refusal, match=words):
            quantize(Net(), IMAGES, ends=ends)
    with pytest.raises(Refusal, match="distinct integers"):
        quantize(Net(), IMAGES, bit_widths=(2.7, 4))
    widths = np.array([2, 4])
    assert quantize(Net(), IMAGES, activation_bit_widths=widths).activation_bit_widths == (2, 4)


def test_bfloat16_keeps_float32_step_sizes():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, dtype=jnp.bfloat16, name="a")(x))
            return nn.Dense(3, dtype=jnp.bfloat16, name="b")(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    model = Half()
    variables = started(model, x)
    quantized = quantize(model, x, ends=None)
    calibrated = fitted(quantized, variables, x)
    assert calibrated["params"]["a"]["weight_step_size"].dtype == jnp.float32

    def loss(params):
        return quantized.apply({"params": params}, full_policy(quantized, 4, 4), x).astype(jnp.float32).sum()

    assert applied(quantized, calibrated, full_policy(quantized), x).dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(loss))(calibrated["params"])
    assert grads["a"]["weight_step_size"].dtype == jnp.float32
    assert np.isfinite(grads["a"]["weight_step_size"]).all()


def test_per_channel_weights():
    quantized = quantize(LinenNet(), IMAGES, ends=None, quantizer=lsq(per_channel=True), train=False)
    variables = started(LinenNet(), IMAGES)
    calibrated = fitted(quantized, variables, IMAGES, train=False)
    steps = calibrated["params"]["conv"]["weight_step_size"]
    assert steps.shape == (5, 4)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    expected = np.maximum(
        abs(kernel.mean((0, 1, 2)) - 3 * kernel.std((0, 1, 2))), abs(kernel.mean((0, 1, 2)) + 3 * kernel.std((0, 1, 2)))
    )
    np.testing.assert_allclose(steps[0], expected / 2, rtol=1e-5)
    assert np.isfinite(applied(quantized, calibrated, full_policy(quantized, 2, 2), IMAGES, train=False)).all()


class Normed(nn.Module):
    """Parameters whose own names have slashes, and a compute type that the codes' float32 sums are not of."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.WeightNorm(nn.Dense(8, dtype=jnp.bfloat16))(x.mean((1, 2))))
        return nn.Dense(3, dtype=jnp.bfloat16)(x)


def test_names_with_slashes_and_exact_products_in_bfloat16():
    model = Normed()
    quantized = quantize(model, IMAGES, ends=None)
    variables = fitted(quantized, started(model, IMAGES), IMAGES)
    assert "Dense_0/kernel/scale" in variables["params"]["WeightNorm_0"]
    policy = full_policy(quantized)
    exact, ordinary = (applied(quantized, variables, policy, IMAGES, exact=exact) for exact in (True, False))
    assert exact.dtype == ordinary.dtype == jnp.bfloat16 and len(quantized.layers) == 2
    np.testing.assert_allclose(exact.astype(np.float32), ordinary.astype(np.float32), rtol=0.05, atol=0.05)


class Pooled(nn.Module):
    """Attention whose one query is learned: each sample gets a copy of it."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x.reshape(x.shape[0], 36, -1))
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, 8))
        x = nn.MultiHeadDotProductAttention(2, name="pool")(jnp.tile(probe, (x.shape[0], 1, 1)), x)
        return nn.Dense(3, name="head")(x[:, 0])


def test_a_learned_query_is_no_weight():
    found = [quantize(Pooled(), jax.ShapeDtypeStruct((count, 6, 6, 2), jnp.float32)) for count in (1, 4)]
    assert found[0].layers == found[1].layers
    assert [layer.path for layer in found[0].layers] == ["first", "pool/key", "pool/value", "pool/out", "head"]
    assert [macs for _, macs in found[0].products] == [36 * 8, 36 * 8]


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name="plain")(x.mean((1, 2))))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (5, 4))
        memory = self.variable("masks", "memory", jnp.ones, (7, 4)).value
        mask = self.variable("masks", "mask", jnp.ones, (5, 4)).value
        # Keys of a memory that is no input are activations all the same.
        keys = nn.Dense(4, name="keys")(memory)
        return (x @ (kernel * mask)) @ keys.T


def test_a_weight_of_parameters_and_other_variables_is_named():
    with pytest.raises(Refusal, match=r"'kernel'.*other variables.*leave it in float"):
        quantize(Masked(), IMAGES)
    quantized = quantize(Masked(), IMAGES, rules=[("^kernel$", "float")], ends=None)
    assert [layer.path for layer in quantized.layers] == ["plain", "keys"]
