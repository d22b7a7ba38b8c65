"""The StableHLO program against `apply`, its constants against codes worked out in NumPy, and its file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from made_models import dense

from mpq_jax import Bits, Refusal, flax_seam
from mpq_jax.export import stablehlo
from mpq_jax.export.coded import Container, coded, contained, unpacked
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lq_nets, lsq, pact, qil

pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 4, 6)
QUANTIZERS = {
    "lsq": lsq(),
    "lsq per channel": lsq(per_channel=True),
    "pact": pact(),
    "qil": qil(),
    "lq_nets": lq_nets("same"),  # its statistics take long to compile
}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)


def key():
    return jax.random.key(0, impl="rbg")  # compiles faster than the default


class Net(nn.Module):
    """A convolution, a depthwise one, BatchNorm and a dense layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(6, (3, 3), name="conv")(x)))
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x).mean((1, 2))
        return nn.Dense(3, name="head")(x)


def calibrated(module, x, **options):
    model = quantize(module, x, bit_widths=WIDTHS, **options)
    variables = model.variables or jax.jit(module.init)(key(), x)
    return model, jax.jit(lambda variables, x: model.calibrate(variables, x))(variables, x)


def drawn(model, by_channel=False, seed=0):
    """A policy with every layer's bits at random; tied layers share their activation bits."""
    rng, tied = np.random.default_rng(seed), {}

    def bits(layer):
        w = tuple(rng.choice(WIDTHS, layer.channels).tolist()) if by_channel else int(rng.choice(WIDTHS))
        return Bits(w, tied.setdefault(layer.tied or layer.path, int(rng.choice(WIDTHS))))

    return {layer.path: layer.bits or bits(layer) for layer in model.layers}


def check_equal(model, variables, policy, x, exported, **kwargs):
    """The program at two batch sizes and `apply`: the same but for the last bits of float32 sums."""
    apply = jax.jit(lambda variables, x: model.apply(variables, policy, x, **kwargs))
    program = jax.jit(exported.call)
    expected = np.asarray(apply(variables, x))
    for size in (1, len(x)):
        np.testing.assert_allclose(program(x[:size]), expected[:size], rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("container", [2, 4, 8, 16])
def test_packed_codes_are_their_bits_in_a_row(container, signed):
    """Bytes against the numbers' binary digits written one after another; an odd number of codes, two layers."""
    low = -(2 ** (container - 1)) if signed else 0
    codes = np.random.default_rng(0).integers(low, low + 2**container, (2, 3, 5))
    held = contained(codes.reshape(2, -1), container, signed)
    for layer in range(2):
        digits = [(int(c) >> i) & 1 for c in codes[layer].ravel() for i in range(container)]
        assert held[layer].tobytes() == np.packbits(digits, bitorder="little").tobytes()
        again = unpacked(jnp.asarray(held[layer]), Container((3, 5), container, signed, True, None))
        np.testing.assert_array_equal(again, codes[layer])


@pytest.mark.parametrize("name", QUANTIZERS)
def test_equals_apply_at_any_batch_size(name):
    module, x = (dense(3, (6,)), IMAGES[:, :2, :2]) if name == "lq_nets" else (Net(), IMAGES)
    model, variables = calibrated(module, x, quantizer=QUANTIZERS[name], ends=Bits(6, 6))
    policy = drawn(model)
    exported = stablehlo.stablehlo(model, variables, policy, x.shape[1:], train=False)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    check_equal(model, variables, policy, x, exported, train=False)


@pytest.mark.parametrize("name", ["lsq", "lq_nets"])
def test_bits_by_output_channel(name):
    module, x = (dense(3, (6,)), IMAGES[:, :2, :2]) if name == "lq_nets" else (Net(), IMAGES)
    model, variables = calibrated(module, x, quantizer=QUANTIZERS[name], ends=None)
    policy = drawn(model, by_channel=True)
    exported = stablehlo.stablehlo(model, variables, policy, x.shape[1:], train=False)
    check_equal(model, variables, policy, x, exported, train=False)


def lsq_codes(model, variables, path, bits):
    """Codes of a dense layer by LSQ's formula, float64."""
    flat, spec = flax_seam.flatten(variables["params"]), model.specs[f"{path}/kernel"]
    s = np.float64(flat[spec.names["weight"] + "step_size"][spec.weight_bit_widths.index(bits)])
    return np.round(np.clip(np.float64(flat[f"{path}/kernel"]) / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)).astype(
        int
    )


@pytest.fixture(scope="module")
def wide():
    """Dense layers of 64 x 96 and 96 x 80 weights, a head: (model, variables, x)."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    return *calibrated(dense(10, (96, 80)), x), x


POLICY = {"dense0": Bits(8, 8), "dense1": Bits(3, 4), "head": Bits(8, 8)}


@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_inside_once_and_narrow(wide, packed):
    """The constants against NumPy's bytes; neither the file nor the compiled program holds a kernel in float."""
    model, variables, x = wide
    exported = stablehlo.stablehlo(model, variables, POLICY, (64,), packed=packed, train=False)
    check_equal(model, variables, POLICY, x, exported, train=False)
    content = bytes(exported.serialize())
    codes = lsq_codes(model, variables, "dense1", 3).ravel()
    pairs = (codes[::2] & 15) | (codes[1::2] & 15) << 4
    assert content.count(lsq_codes(model, variables, "dense0", 8).astype(np.int8).tobytes()) == 1
    assert (pairs.astype(np.uint8).tobytes() in content) == packed
    for path in POLICY:
        assert np.asarray(variables["params"][path]["kernel"]).tobytes()[:64] not in content
    sizes = {"dense0": 64 * 96, "dense1": 96 * 80 // (2 if packed else 1), "head": 80 * 10}
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves(variables) if leaf.ndim == 1)
    rest = len(content) - sum(sizes.values()) - floats
    assert 0 < rest < 12_000, rest  # the program itself
    if not packed:
        assert "xi4>" in exported.mlir_module()
    compiled = jax.jit(exported.call).lower(x).compile().as_text()
    constants = [line for line in compiled.splitlines() if " constant(" in line]
    assert constants and not any("f32[64,96]" in line or "f32[96,80]" in line for line in constants)


def test_payload_is_the_codes(wide):
    model, variables, _ = wide
    found = coded(model, variables, POLICY, jax.ShapeDtypeStruct((1, 64), jnp.float32), train=False)
    assert found.payload == 64 * 96 + 96 * 80 // 2 + 80 * 10


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(
            name="layers"
        )(x, None)[0]


@pytest.mark.parametrize("rules", [(), ((r"layers/up\[1\]", "float"),)])
def test_scanned_stack(rules):
    """Each layer of a stack at bits of its own; with a rule, one of them in float."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8)), jnp.float32)
    model, variables = calibrated(Stack(), x, ends=None, rules=rules, quantizer=lsq(per_channel=True))
    policy = drawn(model)
    exported = stablehlo.stablehlo(model, variables, policy, (8,))
    check_equal(model, variables, policy, x, exported)
    content, kernel = bytes(exported.serialize()), np.asarray(variables["params"]["layers"]["up"]["kernel"])
    assert [kernel[i].tobytes() in content for i in range(3)] == [False, bool(rules), False]


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        carry = nn.tanh(nn.Dense(5, name="update")(jnp.concatenate([carry, x], -1)))
        return carry, carry


class Recurrent(nn.Module):
    """A dense layer that a scan runs again and again."""

    @nn.compact
    def __call__(self, xs):
        cells = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        return cells(name="cell")(jnp.zeros((xs.shape[0], 5)), xs)[1]


def test_repeated_layer_is_held_once():
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)), jnp.float32)
    model, variables = calibrated(Recurrent(), xs, ends=None)
    policy = {"cell/update": Bits(4, 6)}
    check_equal(model, variables, policy, xs, stablehlo.stablehlo(model, variables, policy, (7, 3)))
    found = coded(model, variables, policy, jax.ShapeDtypeStruct((1, 7, 3), jnp.float32))
    assert list(found.values) == ["cell/update/kernel"] and found.payload == 8 * 5 // 2


class Tied(nn.Module):
    """An embedding that is looked up in float, and is a layer's weight twice: as it is, and transposed."""

    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(6, 4, name="embed")
        table = embed(jnp.arange(6))
        return embed.attend((jax.nn.softmax(x) @ embed.embedding) + table[1])


def test_parameter_that_is_also_read_in_float_stays():
    """The lookup needs the float table; the two products have the same codes in two shapes, hence two entries."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    model, variables = calibrated(Tied(), x, ends=None)
    (layer,) = model.layers
    policy = {layer.path: Bits(4, 4)}
    exported = stablehlo.stablehlo(model, variables, policy, (6,))
    check_equal(model, variables, policy, x, exported)
    assert np.asarray(variables["params"]["embed"]["embedding"]).tobytes() in bytes(exported.serialize())
    assert len(coded(model, variables, policy, x).values) == 2


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.bn(self.conv(x))).mean((1, 2))))


def test_nnx():
    model, variables = calibrated(NnxNet(nnx.Rngs(0)), IMAGES, train=False, ends=None)
    policy = drawn(model)
    exported = stablehlo.stablehlo(model, variables, policy, IMAGES.shape[1:], train=False)
    check_equal(model, variables, policy, IMAGES, exported, train=False)


def test_file_round_trip_and_refusals(wide, tmp_path):
    model, variables, x = wide
    path, exported = tmp_path / "model.stablehlo", stablehlo.stablehlo(model, variables, POLICY, (64,), train=False)
    size = stablehlo.save(path, exported)
    assert size == path.stat().st_size
    check_equal(model, variables, POLICY, x, stablehlo.load(path), train=False)
    # Other programs read it with JAX alone.
    plain = jax.export.deserialize(bytearray(path.read_bytes()))
    np.testing.assert_array_equal(plain.call(x), exported.call(x))
    content = path.read_bytes()
    for damaged in (content[:-1], content[:1000] + bytes([content[1000] ^ 1]) + content[1001:], b""):
        path.write_bytes(damaged)
        with pytest.raises(Refusal, match="checksum"):
            stablehlo.load(path)
    with pytest.raises(Refusal, match="cannot be read"):
        stablehlo.load(tmp_path / "none")


def test_refuses_what_does_not_fit(wide):
    model, variables, _ = wide
    with pytest.raises(Refusal, match="does not have"):
        stablehlo.stablehlo(model, variables, {**POLICY, "dense7": Bits(3, 3)}, (64,), train=False)
    with pytest.raises(Refusal, match="its candidates are"):
        stablehlo.stablehlo(model, variables, {**POLICY, "dense1": Bits(5, 3)}, (64,), train=False)
    with pytest.raises(Refusal, match="call calibrate"):
        float_only = jax.jit(dense(10, (96, 80)).init)(key(), jnp.zeros((1, 64)))
        stablehlo.stablehlo(model, float_only, POLICY, (64,), train=False)


class ByBatch(nn.Module):
    """Does something else for a batch of one."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(x)
        return nn.Dense(3, name="b")(x if x.shape[0] > 1 else 2 * x)


def test_model_that_depends_on_the_batch_size():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    model, variables = calibrated(ByBatch(), x)
    policy = drawn(model)
    with pytest.raises(Refusal, match="batch=64"):
        stablehlo.stablehlo(model, variables, policy, (6,))
    fixed = stablehlo.stablehlo(model, variables, policy, (6,), batch=3)
    np.testing.assert_allclose(fixed.call(x), model.apply(variables, policy, x), atol=1e-6)
