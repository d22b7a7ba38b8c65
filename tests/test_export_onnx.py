"""ONNX files of whole networks: onnxruntime and QONNX's executor against the fake-quantized model in JAX."""

import functools
import importlib
import math
import sys

import export_nets
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import linen as nn
from made_models import dense
from onnx import TensorProto, numpy_helper
from onnx_nets import calibrated, policy_of
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

from mpq_jax import flax_seam, models
from mpq_jax.export import onnx as export
from mpq_jax.quantizers import lq_nets
from mpq_jax.types import Bits, Refusal

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# name -> (shape of an image, candidates, options)
NETS = {
    "resnet8": ((8, 8, 1), WIDTHS, {"width": 0.25}),
    "mobilenetv1": ((8, 8, 1), (3, 4, 8), {"width": 0.25, "small_images": True}),
    "vit": ((6, 4, 1), WIDTHS, {"patch_size": 2, "dim": 12, "depth": 2, "heads": 3, "scan": True}),
    "cnn_nnx": ((8, 8, 1), WIDTHS, {"width": 0.25}),
}


@functools.cache
def net(name):
    """(quantized, variables, policy with every candidate, images, the standard file)."""
    shape, widths, options = NETS[name]
    x = np.random.default_rng(0).normal(size=(24, *shape)).astype(np.float32)
    quantized, variables = calibrated(models.create(name, 5, **options), x, bit_widths=widths, ends=None)
    policy = policy_of(quantized, lambda i: Bits(widths[i % len(widths)], widths[(2 * i + 1) % len(widths)]))
    return quantized, variables, policy, x, export.standard(quantized, variables, policy, shape)


def arrays(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def element_types(proto):
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer}


def run(proto, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": x})[0]


def close(found, expected):
    """The share of images that agree to 1e-4 of the largest logit."""
    apart = np.abs(found - expected).reshape(len(found), -1).max(1)
    return (apart <= 1e-4 * np.abs(expected).max()).mean()


# ---- whole networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_onnxruntime_agrees(name):
    quantized, variables, policy, x, proto = net(name)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    found = export.compare(proto, quantized, variables, policy, x, batch=16)
    print(name, found)
    assert found.images == len(x)
    assert found.off.codes == found.on.codes == len(x) * sum(layer.inputs for layer in quantized.layers)
    assert set(found.off.by_layer) == {layer.path for layer in quantized.layers}
    assert found.off.close >= 0.95 and found.off.top1 >= 0.95 and found.off.flips <= 1e-4 * found.off.codes
    assert found.on.top1 >= 0.9 and found.on.flips <= 1e-3 * found.on.codes
    logits = run(proto, x)
    assert np.ptp(logits, axis=0).min() > 0.1 * np.abs(logits).max()  # the network tells the images apart


def test_a_thousand_images():
    quantized, variables, policy, _, proto = net("cnn_nnx")
    x = np.random.default_rng(1).normal(size=(1000, 8, 8, 1)).astype(np.float32)
    found = export.compare(proto, quantized, variables, policy, x, batch=500)
    print(found)
    assert found.off.close >= 0.99 and found.off.top1 >= 0.999
    assert found.on.top1 >= 0.99
    logits = np.asarray(jax.jit(lambda x: quantized.apply(variables, policy, x))(x[:500]))
    assert len(set(logits.argmax(1))) > 1


def test_the_float_model():
    quantized, variables, _, x, _ = net("cnn_nnx")
    proto = export.standard(quantized, variables, None, x.shape[1:])
    assert not {node.op_type for node in proto.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    expected = np.asarray(jax.jit(lambda x: quantized.apply(variables, None, x))(x))
    np.testing.assert_allclose(run(proto, x), expected, atol=1e-5 * np.abs(expected).max())
    found = export.compare(proto, quantized, variables, None, x)
    assert (found.off.close, found.off.top1, found.off.codes, found.off.flips) == (1, 1, 0, 0)


class Several(nn.Module):
    """A dict of outputs, the logits not the first."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, name="body")(x.reshape(x.shape[0], -1)))
        return {"features": x, "logits": nn.Dense(3, name="head")(x)}


def test_of_several_outputs_the_logits_are_compared():
    x = np.random.default_rng(0).normal(size=(20, 4, 4, 1)).astype(np.float32)
    quantized, variables = calibrated(Several(), x, bit_widths=(4, 8), ends=None)
    policy = policy_of(quantized, (4, 4))
    proto = export.standard(quantized, variables, policy, x.shape[1:])
    found = export.compare(proto, quantized, variables, policy, x, batch=8)
    assert found.off.close > 0.9 and found.off.top1 > 0.9 and found.off.codes == 20 * (16 + 6)


def test_a_changed_file_is_seen():
    quantized, variables, policy, x, proto = net("cnn_nnx")
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    scale = next(t for t in changed.graph.initializer if t.name == "conv2/input_scale")
    scale.CopyFrom(numpy_helper.from_array(np.float32(1.1) * numpy_helper.to_array(scale), scale.name))
    found = export.compare(changed, quantized, variables, policy, x, batch=24).off
    assert found.by_layer["conv1"] == 0
    assert found.by_layer["conv2"] > 100 and found.close < 0.9 and found.worst > 0.01


@pytest.mark.parametrize("name", ["cnn_nnx", "vit"])
def test_qonnx_agrees(name):
    quantized, variables, policy, x, _ = net(name)
    proto = export.qonnx(quantized, variables, policy, x.shape[1:], batch=12)
    found = executed(proto, x[:12])
    expected = np.asarray(jax.jit(lambda x: quantized.apply(variables, policy, x))(x[:12]))
    assert close(found, expected) >= 0.9
    assert len(quants(proto)) == 2 * len(quantized.layers)
    for layer in quantized.layers:
        bits = [float(arrays(proto)[quants(proto)[f"{layer.path}/{kind}"].input[3]]) for kind in ("weight", "input")]
        assert tuple(bits) == tuple(policy[layer.path])


def executed(proto, x):
    return execute_onnx(ModelWrapper(proto), {"images": x})["logits"]


def quants(proto):
    return {node.name: node for node in proto.graph.node if node.op_type == "Quant"}


# ---- what is in the file ------------------------------------------------------------------------------------------


def test_weights_are_stored_as_integers_and_nothing_else():
    quantized, variables, policy, _, proto = net("resnet8")
    values, types = arrays(proto), element_types(proto)
    sizes = {t.name: len(t.raw_data) for t in proto.graph.initializer}
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flax_seam.flatten(variables["params"]).items()}
    for layer in quantized.layers:
        bits, name = policy[layer.path].w, f"{layer.path}/weight_codes"
        assert types[name] == ("INT4" if bits <= 4 else "INT8")
        assert sizes[name] == (math.ceil(layer.params / 2) if bits <= 4 else layer.params)
        kernel = flat[f"{layer.path}/kernel"]
        s = flat[f"{layer.path}/weight_step_size"][WIDTHS.index(bits)]
        by_hand = np.round(np.clip(kernel / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)) * s
        layout = (3, 2, 0, 1) if kernel.ndim == 4 else (0, 1)  # HWIO to OIHW
        found = values[name].astype(np.float64) * values[f"{layer.path}/weight_scale"]
        np.testing.assert_allclose(found, by_hand.transpose(layout), rtol=1e-6)
    floats = sum(values[name].size for name, kind in types.items() if kind == "FLOAT")
    others = sum(leaf.size for path, leaf in flat.items() if path.endswith(("scale", "bias")))
    statistics = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
    # Scales of weights and inputs, both ends of each Clip, and a few constants.
    assert floats <= others + statistics + 4 * len(quantized.layers) + 4
    assert floats < sum(layer.params for layer in quantized.layers) / 8


def test_inputs_are_clipped_where_their_width_is_not_that_of_a_type():
    quantized, variables, policy, _, proto = net("resnet8")
    values, types = arrays(proto), element_types(proto)
    producer = {name: node for node in proto.graph.node for name in node.output}
    flat = flax_seam.flatten(variables["params"])
    seen = set()
    for layer in quantized.layers:
        bits = policy[layer.path].a
        signed = layer.path == "stem/conv"  # the only layer whose input can be negative
        node = producer[f"{layer.path}/input_codes"]
        width = 4 if bits == 4 else 8
        assert types[node.input[2]] == ("INT" if signed else "UINT") + str(width)
        s = np.asarray(flat[f"{layer.path}/activation_step_size"])[WIDTHS.index(bits)]
        assert values[node.input[1]] == s
        clip = producer.get(node.input[0])
        clipped = clip is not None and clip.op_type == "Clip"
        assert clipped == (bits not in (4, 8))
        if clipped:
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            np.testing.assert_allclose([values[name] for name in clip.input[1:]], [low * s, high * s], rtol=1e-6)
        seen.add(bits)
    assert len(seen) >= 6 and {4, 8} < seen


def test_no_transposition_between_convolutions():
    *_, proto = net("resnet8")
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Conv") == 9 and kinds.count("Transpose") == 1


def test_saved_whole(tmp_path):
    *_, proto = net("cnn_nnx")
    export.save(proto, tmp_path / "deep" / "net.onnx")
    assert onnx.load(tmp_path / "deep" / "net.onnx") == proto
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["net.onnx"]


# ---- quantizers ---------------------------------------------------------------------------------------------------


def narrowed(variables):
    """QIL's half widths smaller than its centres: an interval that prunes what is near 0."""

    def leaf(path, x):
        return 0.7 * x if "half_width" in jax.tree_util.keystr(path) else x

    return jax.tree_util.tree_map_with_path(leaf, variables)


def of_channels(model):
    """A policy with weight bits per output channel."""
    rng = np.random.default_rng(0)
    widths = [tuple(rng.choice(WIDTHS[:6], layer.channels).tolist()) for layer in model.layers]
    return policy_of(model, lambda i: Bits(widths[i], widths[i][0]))


@pytest.mark.parametrize(
    "net, quantizer, by_channel",
    [
        ("turned", "lsq", False),
        ("net", "channels", True),
        ("nnx", "pact", False),
        ("net", "pact", True),
        ("nnx", "qil", False),
    ],
)
def test_quantizers(net, quantizer, by_channel):
    model, variables, policy, x, kwargs = export_nets.case(net, quantizer)
    policy, variables = of_channels(model) if by_channel else policy, narrowed(variables)
    expected = np.asarray(jax.jit(lambda x: model.apply(variables, policy, x, **kwargs))(x))
    proto = export.standard(model, variables, policy, x.shape[1:], **kwargs)
    onnx.checker.check_model(proto, full_check=True)
    assert close(run(proto, x), expected) >= 0.9
    proto = export.qonnx(model, variables, policy, x.shape[1:], batch=len(x), **kwargs)
    assert close(executed(proto, x), expected) >= 0.9
    if by_channel:
        widths = {b for path in policy for b in np.atleast_1d(policy[path].w)}
        told = {int(arrays(proto)[node.input[3]]) for name, node in quants(proto).items() if "/weight" in name}
        assert told == widths
    if quantizer == "qil":
        # Off its start the interval is no plain grid, and is written out.
        assert {"Abs", "Sign"} <= {node.op_type for node in proto.graph.node}


def test_dorefa_weights_are_odd_codes():
    model, variables, policy, x, kwargs = export_nets.case("net", "pact")
    proto = export.standard(model, variables, policy, x.shape[1:], **kwargs)
    values, types = arrays(proto), element_types(proto)
    for path, (bits, _) in policy.items():
        codes = values[f"{path}/weight_codes"].astype(int)
        assert (codes % 2 == 1).all() and np.abs(codes).max() == 2**bits - 1
        assert types[f"{path}/weight_codes"] == ("INT4" if bits <= 3 else "INT8" if bits <= 7 else "INT16")
        w = np.tanh(np.asarray(variables["params"][path]["kernel"], np.float64))
        n, largest = 2**bits - 1, np.abs(w).max()
        by_hand = largest * (2 * np.round(n * (w / (2 * largest) + 0.5)) / n - 1)
        found = np.sort(codes.reshape(-1) * np.float64(values[f"{path}/weight_scale"]))
        np.testing.assert_allclose(found, np.sort(by_hand.reshape(-1)), rtol=1e-5)


@pytest.mark.parametrize("make", [export.standard, export.qonnx])
def test_a_grid_that_is_not_even_is_refused(make):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    model, variables = calibrated(dense(3, (5,)), x, bit_widths=(2, 3), ends=None, quantizer=lq_nets("same"))
    # The start is an even grid, seen from outside; what training makes of it is not.
    for path in ("dense0", "head"):
        variables["params"][path]["activation_basis"] *= np.linspace(0.8, 1.1, 3, dtype=np.float32)
    with pytest.raises(Refusal, match=r"'dense0.*not evenly spaced.*--quantizer lsq"):
        make(model, variables, policy_of(model, (3, 2)), x.shape[1:])


# ---- versions, widths, refusals -----------------------------------------------------------------------------------


@functools.cache
def wide():
    x = np.random.default_rng(0).normal(size=(6, 6, 6, 2)).astype(np.float32)
    widths = tuple(range(2, 17))
    quantized, variables = calibrated(export_nets.Net(), x, bit_widths=widths, ends=None)
    return quantized, variables, x, jax.jit(lambda policy: quantized.apply(variables, policy, x))


# Every width of 2 to 16 once for weights and once for inputs; 6 layers.
SPREADS = [(2, 9, 12, 16, 13, 4), (3, 10, 15, 5, 14, 8), (11, 6, 7, 2, 16, 3)]


@pytest.mark.parametrize("spread", SPREADS)
def test_every_width(spread):
    quantized, variables, x, apply = wide()
    policy = policy_of(quantized, lambda i: Bits(spread[i], spread[::-1][i]))
    expected = np.asarray(apply(jax.tree.map(jnp.int32, policy)))
    found = executed(export.qonnx(quantized, variables, policy, x.shape[1:], batch=len(x)), x)
    # A flip of a code of 16 bits moves the logits by less than this.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    proto = export.standard(quantized, variables, policy, x.shape[1:])
    np.testing.assert_allclose(run(proto, x), expected, atol=1e-4 * np.abs(expected).max())
    types = element_types(proto)
    for path, (bits, _) in policy.items():
        assert types[f"{path}/weight_codes"] == ("INT4" if bits <= 4 else "INT8" if bits <= 8 else "INT16")


@pytest.mark.parametrize("opset, kinds", [(13, {"INT8"}), (25, {"INT2", "INT4", "INT8"})])
def test_other_opsets(opset, kinds):
    quantized, variables, x, apply = wide()
    policy = policy_of(quantized, lambda i: Bits(WIDTHS[i], (2, 4, 3, 2, 8, 7)[i]))
    proto = export.standard(quantized, variables, policy, x.shape[1:], opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    expected = np.asarray(apply(jax.tree.map(jnp.int32, policy)))
    np.testing.assert_allclose(run(proto, x), expected, atol=1e-4 * np.abs(expected).max())
    assert {kind for name, kind in element_types(proto).items() if name.endswith("weight_codes")} == kinds


def test_refusals(monkeypatch):
    quantized, variables, x, _ = wide()
    policy = policy_of(quantized, (12, 4))
    with pytest.raises(Refusal, match=r"'stem'.*opset 13.*opset 21"):
        export.standard(quantized, variables, policy, x.shape[1:], opset=13)
    with pytest.raises(Refusal, match="opset 9"):
        export.standard(quantized, variables, policy, x.shape[1:], opset=9)
    with pytest.raises(Refusal, match="standard"):
        export.compare(onnx.ModelProto(), quantized, variables, policy, x)
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("mpq_jax.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Refusal, match="pip install onnx"):
        importlib.import_module("mpq_jax.export.onnx")
