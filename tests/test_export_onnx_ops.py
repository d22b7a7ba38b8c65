"""Operations and layers one by one: onnxruntime against JAX, whatever the batch."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_nets import calibrated, policy_of

from mpq_jax.export import onnx as export
from mpq_jax.quantizers import lsq
from mpq_jax.types import Bits, Refusal

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHAPE = (6, 4, 3)
X = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)

OPERATIONS = {
    "arithmetic": lambda x: (x * 2 - x / (1 + x**2)) ** 2 + x**3 + jnp.abs(x) ** 0.5 + (jnp.abs(x) + 1) ** -1.0,
    "curves": lambda x: jnp.exp(x) + jnp.log1p(jnp.abs(x)) + jnp.tanh(x) + jnp.expm1(x) + jnp.log(x**2 + 1),
    "more curves": lambda x: jnp.sin(x) + jnp.cos(x) + jnp.exp2(x) + jnp.arctan(x) + jnp.sign(x),
    "activations": lambda x: nn.gelu(x, approximate=False) + nn.gelu(x) + nn.silu(x) + nn.elu(x) + nn.softplus(x),
    "hard activations": lambda x: nn.relu6(3 * x) + nn.hard_swish(x) + nn.leaky_relu(x) + jnp.clip(x, -0.5, 0.7),
    "softmax": lambda x: nn.softmax(x) + nn.log_softmax(x, axis=1),
    "rounding": lambda x: jnp.round(4 * x) + jax.lax.round(4 * x) + jnp.floor(x) + jnp.ceil(x),
    "choice": lambda x: jnp.where((x > 0) & ~(x >= 1) | (x == 0) | (x < -1), x, 0) + (x != 0) + jnp.maximum(x, 0.1),
    "finite": lambda x: jnp.where(jnp.isfinite(x), jnp.nan_to_num(x), 0),
    "remainder": lambda x: jax.lax.rem(x, jnp.float32(0.3)),
    "reductions": lambda x: x.sum(3) + x.max(3) + x.min(3) + x.mean(3) + x.var(3) + x.prod(3) + jnp.linalg.norm(x, axis=3),
    "all of one sample": lambda x: x.mean((1, 2, 3)),
    "logical": lambda x: (x > 0).all(-1) | (x > 1).any(-1),
    "arg": lambda x: x.argmax(-1) - x.argmin(1)[:, :, :1].repeat(4, 2)[:, :1] * 0 + x.argmin(-1),
    "one hot": lambda x: nn.one_hot(x[:, 0, 0].argmax(-1), 3),
    "cumulative": lambda x: jnp.cumsum(x, 1) + jnp.cumsum(x, 2)[:, ::-1],
    "one index": lambda x: x[:, 0] + x[:, -1],
    "two indices": lambda x: x[:, 0, 1],
    "picked": lambda x: x[:, jnp.array([2, 0, 3])] + jnp.take(x, jnp.array([[1, 0, 2]]), axis=3)[:, :3, :, 0],
    "every other": lambda x: x[:, 1:, ::2],
    "slices": lambda x: x[:, 1:-1] + jnp.roll(x, 1, 2)[:, :4],
    "flipped": lambda x: jnp.flip(x, (1, 3)),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "cut by padding": lambda x: jax.lax.pad(x, jnp.float32(1), ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 0, 0))),
    "wrapped": lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"),
    "reflected": lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect"),
    "joined": lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 1, 4, 3)), x.transpose(0, 1, 2, 3)], 1),
    "stacked": lambda x: jnp.stack([x, 2 * x], 1),
    "split": lambda x: jnp.split(x, 3, axis=1)[1] * jnp.split(x, [1], axis=3)[0][:, :2],
    "reshaped": lambda x: x.reshape(x.shape[0], 2, 3, -1).transpose(0, 2, 1, 3),
    "batch in an axis": lambda x: (x.reshape(-1, 3) + jnp.arange(3)).reshape(-1, 6, 12)[..., None],
    "from the batch": lambda x: x - x.mean(0),
    "positions": lambda x: jnp.where(jnp.arange(6)[:, None, None] > 2, x, 0) + jnp.arange(x.shape[0])[:, None, None, None],
    "resized": lambda x: jax.image.resize(x, (x.shape[0], 12, 8, 3), "nearest"),
    "maximum pool": lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME") + nn.max_pool(x, (2, 2), (2, 2)),
    "mean pool": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "mean pool inside": lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    "pool of a line": lambda x: nn.max_pool(x[:, 0], (2,), (2,)),
    "products": lambda x: jnp.einsum("bhwc,bhwd->bcd", x, x) + jnp.einsum("bhwc,bhwd->bdc", x, x[:, ::-1]),
    "attention": lambda x: nn.dot_product_attention(x, 2 * x, 3 * x),
    "outer": lambda x: jnp.einsum("bi,bj->bij", x[:, 0, 0], x[:, 1, 1]),
    "constant product": lambda x: x @ jnp.arange(6.0).reshape(3, 2),
    "turned and added": lambda x: x.transpose(0, 3, 1, 2) * 2 + x.transpose(0, 3, 1, 2)[:, ::-1],
    "tiled": lambda x: jnp.tile(x, (1, 2, 1, 3)),
    "no axes": lambda x: jnp.sum(x, axis=()) + jnp.any(x > 0, axis=()),
    "clipped place": lambda x: jnp.take(x, 9, axis=3, mode="clip"),
    "narrow types": lambda x: (300 * x).astype(jnp.int8).astype(jnp.int32) + (300 * x).astype(jnp.uint8),
    "as precise": lambda x: jax.lax.reduce_precision(x, 8, 23),
    "types": lambda x: (x * 3).astype(jnp.int32) // 1 + (x > 0).astype(jnp.int32),
}  # fmt: skip


class All(nn.Module):
    """Every operation on the same input, each an output, and one layer."""

    @nn.compact
    def __call__(self, x):
        return [nn.Dense(2, name="layer")(x), *(operation(x) for operation in OPERATIONS.values())]


class Layers(nn.Module):
    """Layers of every shape of product, each an output."""

    @nn.compact
    def __call__(self, x):
        line, flat = x[:, 0], x.reshape(x.shape[0], -1)
        both = self.param("both", nn.initializers.normal(1.0), (4, 3, 2))
        left = self.param("left", nn.initializers.normal(1.0), (5, 3))
        return [
            nn.Conv(4, (3, 3), strides=2, padding="SAME", name="same")(x),
            nn.Conv(4, (3, 2), padding=((2, 1), (0, 3)), kernel_dilation=(1, 2), name="dilated")(x),
            nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False, name="grouped")(x),
            nn.Conv(3, (3, 3), feature_group_count=3, strides=(2, 1), name="depthwise")(x),
            nn.Conv(4, (3,), padding="CAUSAL", name="line")(line),
            nn.Conv(4, (2, 2), padding="CIRCULAR", name="circular")(x),
            nn.ConvTranspose(4, (3, 3), strides=(2, 2), name="up")(x),
            nn.ConvTranspose(4, (2, 2), strides=(2, 4), padding="VALID", name="up_valid")(x),
            nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=True, name="up_turned")(x),
            nn.DenseGeneral((2, 3), name="heads")(x),
            nn.DenseGeneral((2, 2), axis=(1, 3), name="axes")(x),
            nn.DenseGeneral(4, axis=(-2, -1), name="last")(x),
            nn.Dense(5, name="first")(flat),
            jnp.einsum("bhwc,wcd->bhwd", x, both),
            jnp.einsum("oc,bhwc->bohw", left, x),
            nn.Conv(2, (1, 1), name="in_float")(x),
        ]  # fmt: skip


def session(proto):
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def outputs(proto, x):
    return session(proto).run(None, {"images": x})


@pytest.fixture(scope="module")
def operations():
    """(what onnxruntime gives, what JAX gives), for five samples."""
    quantized, variables = calibrated(All(), X, bit_widths=(4, 8))
    policy = policy_of(quantized, (4, 4))
    proto = export.standard(quantized, variables, policy, SHAPE)
    return outputs(proto, X)[1:], jax.jit(lambda x: quantized.apply(variables, policy, x))(X)[1:]


@pytest.mark.parametrize("place, name", list(enumerate(OPERATIONS)))
def test_operation(operations, place, name):
    found, expected = (side[place] for side in operations)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def by_hand(w, s, bits):
    """LSQ's weights in NumPy, float64; s: [] or along the last axis."""
    return np.round(np.clip(w / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * s


@pytest.mark.parametrize("per_channel", [False, True])
def test_layers(per_channel):
    quantizer = lsq(per_channel=per_channel)
    options = {"ends": None, "rules": [("in_float", "float")], "quantizer": quantizer}
    quantized, variables = calibrated(Layers(), X, bit_widths=(3, 5, 8), **options)
    policy = policy_of(quantized, lambda i: Bits((3, 5, 8)[i % 3], (8, 5, 3)[i % 3]))
    proto = export.standard(quantized, variables, policy, SHAPE)
    expected = jax.jit(lambda x: quantized.apply(variables, policy, x))(X)
    for found, ours in zip(outputs(proto, X), expected, strict=True):
        np.testing.assert_allclose(found, ours, rtol=1e-4, atol=1e-5)
    # The same file for one sample.
    for found, ours in zip(outputs(proto, X[:1]), expected, strict=True):
        np.testing.assert_allclose(found, ours[:1], rtol=1e-4, atol=1e-5)
    codes = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    dense = variables["params"]["first"]
    s = np.asarray(dense["weight_step_size"], np.float64)[(3, 5, 8).index(policy["first"].w)]
    scale = codes["first/weight_scale"]
    assert scale.shape == ((5,) if per_channel else ())
    decoded = codes["first/weight_codes"].astype(np.float64) * scale
    np.testing.assert_allclose(
        decoded, by_hand(np.asarray(dense["kernel"], np.float64), s, policy["first"].w), rtol=1e-6
    )


class Refused(nn.Module):
    """One layer, then an operation that has no form."""

    operation: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="layer")(x)
        return Inner(self.operation, name="block")(x)


class Inner(nn.Module):
    operation: str

    @nn.compact
    def __call__(self, x):
        if self.operation == "sort":
            return jnp.sort(x)
        if self.operation == "dynamic_slice":
            return jax.lax.dynamic_slice(x, (0, 0, jnp.int32(x[0, 0, 0, 0]), 0), (1, 1, 2, 4))
        if self.operation == "gather":
            return jnp.take_along_axis(x, x.argmax(2, keepdims=True), axis=2)
        if self.operation == "gather at":
            return jnp.take(x, 9, axis=3)
        if self.operation == "reduce_precision":
            return jax.lax.reduce_precision(x, 8, 3)
        return x.cumprod(1) if self.operation == "cumprod" else x.astype(jnp.bfloat16)


REFUSED = ("sort", "dynamic_slice", "gather", "convert_element_type", "cumprod", "gather at", "reduce_precision")


@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_form_is_named_with_its_module(operation):
    model = Refused(operation)
    quantized, variables = calibrated(model, X, bit_widths=(4, 8))
    with pytest.raises(Refusal) as refusal:
        export.standard(quantized, variables, policy_of(quantized, (4, 4)), SHAPE)
    assert re.search(operation, str(refusal.value)) and "block" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_layers_in_half_precision_are_refused(dtype):
    quantized, variables = calibrated(nn.Dense(3, dtype=dtype), X, bit_widths=(4, 8))
    with pytest.raises(Refusal, match="float16, which the files have no numbers of; make the model with dtype float32"):
        export.standard(quantized, variables, policy_of(quantized, (8, 8)), SHAPE)
