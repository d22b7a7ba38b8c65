"""LiteRT files: the program without loops, weights put back on their grids, and the file run by LiteRT's interpreter.

litert-converter and ai-edge-litert are no requirement: what needs them runs where they are installed
(pip install --no-deps litert-converter ai-edge-litert).
"""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from made_models import dense

from mpq_jax import Bits, Refusal
from mpq_jax.export import litert
from mpq_jax.export.coded import coded
from mpq_jax.export.stablehlo import make_program
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lsq, pact, qil

INSTALLED = all(importlib.util.find_spec(name) for name in ("litert_converter", "ai_edge_litert"))
needs_litert = pytest.mark.skipif(not INSTALLED, reason="litert-converter and ai-edge-litert are not installed")
pytestmark = pytest.mark.usefixtures("quick_compilation")
WIDTHS = (2, 3, 4, 6)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(x))), None


class Net(nn.Module):
    """A convolution, a depthwise one, BatchNorm, a scanned stack of two layers, and a classifier."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn")(x)).mean((1, 2))
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3, name="head")(stack(name="layers")(x, None)[0])


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 2)), jnp.float32)


def made(quantizer, module=None, x=IMAGES):
    """(model, variables, policy): bits at random, activations of all layers at 4."""
    module = module or Net()
    model = quantize(module, x, bit_widths=WIDTHS, quantizer=quantizer)
    variables = jax.jit(module.init)(jax.random.key(0, impl="rbg"), x)
    variables = jax.jit(lambda variables, x: model.calibrate(variables, x))(variables, x)
    rng = np.random.default_rng(0)
    return model, variables, {ly.path: ly.bits or Bits(int(rng.choice(WIDTHS)), 4) for ly in model.layers}


def outputs(model, variables, policy, x=IMAGES):
    return np.asarray(jax.jit(lambda variables, x: model.apply(variables, policy, x))(variables, x))


def test_program_without_loops():
    """Loops and the arithmetic of bits are gone from the program's text, its outputs are the same."""
    model, variables, policy = made(lsq())
    codes = coded(model, variables, policy, IMAGES, packed=False)
    program = make_program(model, variables, codes, IMAGES)
    closed = jax.make_jaxpr(program)(IMAGES)
    straight = jax.jit(lambda x: litert.straight_line(closed, x))
    before, after = (jax.jit(f).lower(IMAGES).as_text() for f in (program, straight))
    for name in ("stablehlo.while", "stablehlo.shift_left"):
        assert name in before and name not in after
    np.testing.assert_allclose(straight(IMAGES), outputs(model, variables, policy), atol=1e-6)


@pytest.mark.parametrize("quantizer", [lsq(), lsq(per_channel=True), pact()], ids=["lsq", "per channel", "pact"])
def test_grids_find_their_weights_in_any_layout(quantizer):
    """The constants that a converter makes of a layer: the fake-quantized kernel, transposed. Anything else is none."""
    model, variables, _ = made(quantizer, dense(6, (10,)), jnp.ones((2, 5)) * jnp.arange(5.0))
    policy = {"dense0": Bits(8, 8), "head": Bits(8, 8)}
    every, tables = litert.integer_weights(coded(model, variables, policy, jnp.ones((1, 5))))
    assert not tables and [grid.name for grid in every] == ["dense0/kernel", "head/kernel"]
    kernel, spec = np.asarray(variables["params"]["head"]["kernel"]), model.specs["head/kernel"]
    if quantizer.name == "lsq":
        s = np.asarray(variables["params"]["head"]["weight_step_size"])[spec.weight_bit_widths.index(8)]
        integers = np.clip(np.round(kernel / s), -128, 127)
    else:  # DoReFa: 2 round(n (t / 2M + 1/2)) - n on a grid of M / n
        t, n = np.tanh(kernel), 255
        s = np.float32(np.abs(t).max() / n)
        integers = 2 * np.round(n * (t / (2 * np.abs(t).max()) + 0.5)) - n
    values = (integers.astype(np.float32) * s).astype(np.float32).T.reshape(6, 1, 10)
    found, axis = litert.integers_in(values, every[1])
    np.testing.assert_array_equal(found, integers.T.reshape(6, 1, 10))
    assert axis == 0
    assert litert.integers_in(values, every[0]) is None
    values[2, 0, 3] *= 1.001
    assert litert.integers_in(values, every[1]) is None


def test_without_the_converter(monkeypatch):
    monkeypatch.setitem(sys.modules, "litert_converter", None)
    with pytest.raises(Refusal, match="pip install --no-deps litert-converter"):
        litert.converted("module {}")


def ran(file, x):
    """What LiteRT's interpreter gives for x: an array, or a list of them."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=file.content)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.asarray(x))
    interpreter.invoke()
    found = [interpreter.get_tensor(each["index"]) for each in interpreter.get_output_details()]
    return found if len(found) > 1 else found[0]


@needs_litert
@pytest.mark.parametrize(
    "quantizer", [lsq(), lsq(per_channel=True), pact(), qil()], ids=["lsq", "channel", "pact", "qil"]
)
def test_interpreter_gives_what_apply_gives(quantizer):
    model, variables, policy = made(quantizer)
    file = litert.litert(model, variables, policy, IMAGES.shape[1:], batch=2)
    assert not file.in_float
    expected = outputs(model, variables, policy)
    np.testing.assert_allclose(ran(file, IMAGES), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@needs_litert
def test_file_is_as_small_as_its_codes():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 200)), jnp.float32)
    module = dense(10, (160, 120))
    model, variables, _ = made(lsq(), module, x)
    policy = {"dense0": Bits(8, 8), "dense1": Bits(3, 4), "head": Bits(8, 8)}
    file = litert.litert(model, variables, policy, (200,))
    codes = 200 * 160 + 160 * 120 // 2 + 120 * 10
    assert not file.in_float and codes < len(file.content) < codes + 16_000


class Up(nn.Module):
    """Transposed convolutions of two axes, of strides and paddings that the converter knows and that it does not."""

    @nn.compact
    def __call__(self, x):
        return [
            nn.ConvTranspose(3, (3, 3), strides=(2, 2), name="same")(x),
            nn.ConvTranspose(3, (3, 2), strides=(2, 3), padding="VALID", name="valid")(x),
            nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding=((1, 1), (2, 2)), name="own")(x),
            nn.ConvTranspose(3, (4, 2), strides=(3, 4), transpose_kernel=True, name="turned")(x),
        ]


@needs_litert
def test_transposed_convolutions():
    model, variables, policy = made(lsq(), Up())
    file = litert.litert(model, variables, policy, IMAGES.shape[1:], batch=2)
    expected = [np.asarray(y) for y in model.apply(variables, policy, IMAGES)]
    found = {y.shape: y for y in ran(file, IMAGES)}
    assert len({y.shape for y in expected}) == len(found) == 4
    for y in expected:
        np.testing.assert_allclose(found[y.shape], y, atol=1e-5 * np.abs(y).max())


@needs_litert
@pytest.mark.parametrize("options", [{"kernel_dilation": (2, 2)}, {"padding": ((4, 1), (1, 2))}])
def test_transposed_convolutions_that_are_refused(options):
    model, variables, policy = made(lsq(), nn.ConvTranspose(3, (3, 3), strides=(2, 2), **options))
    with pytest.raises(Refusal, match="LiteRT has no form of its own for a transposed convolution"):
        litert.litert(model, variables, policy, IMAGES.shape[1:])


@needs_litert
def test_operations_that_its_interpreter_lacks_are_named():
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(nn.Dense(4, name="a")(x))

    model, variables, policy = made(lsq(), Sorted(), jnp.ones((1, 3)))
    with pytest.raises(
        Refusal, match=r"no form of its own for stablehlo\.compare, stablehlo\.sort; use stablehlo or ONNX"
    ):
        litert.litert(model, variables, policy, (3,))


@needs_litert
def test_weights_beyond_16_bits_stay_in_float():
    """PACT's grid of 16 bits is the odd numbers of 17."""
    model = quantize(nn.Dense(3, name="a"), jnp.ones((1, 4)), bit_widths=(4, 16), ends=None, quantizer=pact())
    variables = model.calibrate(nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4))), jnp.ones((1, 4)))
    found = litert.litert(model, variables, {layer.path: Bits(16, 4) for layer in model.layers}, (4,))
    assert len(found.in_float) == 1


@needs_litert
def test_operations_that_litert_lacks_are_named():
    class Eigenvalues(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.linalg.eigh(jnp.outer(*2 * [nn.Dense(4, name="a")(x)[0]]))[0] + nn.Dense(4, name="b")(x)

    x = jnp.ones((1, 3))
    model, variables, policy = made(lsq(), Eigenvalues(), x)
    with pytest.raises(Refusal, match="LiteRT has no form of its own for"):
        litert.litert(model, variables, policy, (3,))
