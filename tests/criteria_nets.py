"""Small networks for the criteria's tests, and the same network by hand with a hook at every layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import lax

from mpq_jax import Bits, joint
from mpq_jax.quantized_model import quantize
from mpq_jax.rules import Candidates

KEY = jax.random.key(0, impl="rbg")
WIDTHS = (2, 3, 4)
TASK = joint.classification(eval_kwargs={})


def batches(shape=(4, 4, 2), sizes=(6, 6), classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=(n, *shape)).astype(np.float32),
            "label": rng.integers(0, classes, n).astype(np.int32),
        }
        for n in sizes
    ]


def start(model, x, scale=1.0):
    """The model's variables, as initialised, times `scale`."""
    return jax.tree.map(lambda w: scale * w, jax.jit(model.init)(KEY, x))


def calibrated(quantized, variables, x):
    return jax.jit(quantized.calibrate)(variables, x)


class Net(nn.Module):
    """A residual block: conv and shortcut read one tensor."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(3, (3, 3), name="stem")(x))
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.tanh(y + nn.Conv(4, (1, 1), use_bias=False, name="shortcut")(x))
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


def by_hand(params, x, at_input=None, at_output=None):
    """Net without Flax; {"conv": array} is added to the inputs, or to the outputs, of a layer."""
    at_input, at_output = at_input or {}, at_output or {}

    def layer(name, x):
        x = x + at_input.get(name, 0)
        kernel = params[name]["kernel"]
        if kernel.ndim == 4:
            numbers = ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        else:
            y = x @ kernel
        return y + params[name].get("bias", 0) + at_output.get(name, 0)

    x = jax.nn.sigmoid(layer("stem", x))
    x = jnp.tanh(layer("conv", x) + layer("shortcut", x))
    return layer("head", x.reshape(len(x), -1))


def inputs_by_hand(params, x):
    """What conv and shortcut read."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
    return jax.nn.sigmoid(y + params["stem"]["bias"])


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1).mean()


def net():
    """(quantized, variables): two searched layers that are tied, one with narrowed candidates, ends fixed."""
    model, data = Net(), batches()
    rules = [("^conv", Candidates((2, 4), (2, 3, 4)))]
    quantized = quantize(model, data[0]["image"], bit_widths=WIDTHS, rules=rules)
    # Weights large enough that the Hessian is not that of a flat function.
    variables = start(model, data[0]["image"], 2.0)
    return quantized, calibrated(quantized, variables, data[0]["image"])


def on_grid(x, step_size, bits, signed):
    """round(clip(x / s)) s, in float64."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x, s = np.asarray(x, np.float64), np.float64(step_size)
    return np.round(np.clip(x / s, low, high)) * s


def step_size(params, layer, kind, bits, widths=WIDTHS):
    return np.asarray(params[layer][f"{kind}_step_size"])[widths.index(bits)]


class Tiny(nn.Module):
    """Four dense layers for whole runs, called as the program's own models are."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(len(x), -1)
        for i in range(3):
            x = nn.relu(nn.Dense(12, name=f"dense{i + 1}")(x))
        return nn.Dense(self.num_classes, name="head")(x)


class Wide(nn.Module):
    """Dense layers whose Hessians have many eigenvalues of one size: traces settle after few draws."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8, name="stem")(x))
        x = jnp.tanh(nn.Dense(8, name="first")(x))
        x = jnp.tanh(nn.Dense(8, name="second")(x))
        return nn.Dense(10, name="head")(x)


class Layers(nn.Module):
    """Two dense layers, three times: scanned, or the same in a loop."""

    scan: bool = True

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = jax.nn.sigmoid(nn.Dense(5, name="up")(x))
                return x + nn.Dense(4, name="down")(y), None

        if self.scan:
            scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x = scanned(name="layers")(x, None)[0]
        else:
            for i in range(3):
                x, _ = Layer(name=f"layer{i}")(x, None)
        return nn.Dense(3, name="head")(x)


def layers_of(scan):
    """(quantized, variables, batches) of Layers; both hold the same weights."""
    data = batches((4,), (5, 5))
    scanned = Layers()
    variables = start(scanned, data[0]["image"])
    if not scan:
        stacked = variables["params"]["layers"]
        loop = {f"layer{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)}
        variables = {"params": {**loop, "head": variables["params"]["head"]}}
    fixed = [(r"layers/up\[0\]" if scan else "layer0/up", Bits(4, 4)), ("head", "float")]
    quantized = quantize(Layers(scan), data[0]["image"], bit_widths=WIDTHS, rules=fixed)
    return quantized, calibrated(quantized, variables, data[0]["image"]), data


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        carry = jax.nn.sigmoid(nn.Dense(4, name="update")(jnp.concatenate([carry, x], -1)))
        return carry, carry


class Recurrent(nn.Module):
    """One layer that a scan runs again and again."""

    @nn.compact
    def __call__(self, xs):
        cell = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
        carry, _ = cell(name="cell")(jnp.zeros((xs.shape[0], 4)), xs)
        return nn.Dense(3, name="head")(carry)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.hidden = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.sigmoid(self.bn(self.conv(x))).mean((1, 2))
        return self.head(nnx.relu(self.hidden(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.sigmoid(nn.BatchNorm(use_running_average=not train, name="bn")(nn.Conv(4, (3, 3), name="conv")(x)))
        x = nn.relu(nn.Dense(4, name="hidden")(x.mean((1, 2))))
        return nn.Dense(3, name="head")(x)
