"""The packed file: its bytes against the search's figure, its values with NumPy alone, its runs against the model's."""

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_nets import case

from mpq_jax import Bits, Refusal, costs
from mpq_jax.export import packed, replay
from mpq_jax.export.fold import fold
from mpq_jax.export.graph import graph

CASES = {
    "net": ("net", "lsq", False),
    "by_channel": ("net", "lsq", True),
    "channels": ("net", "channels", False),
    "stack": ("stack", "lsq", False),
    "tied": ("tied", "lsq", False),
    "turned": ("turned", "lsq", False),
    "half": ("half", "lsq", False),
    "nnx": ("nnx", "lsq", False),
    "pact": ("nnx", "pact", False),
    "lq_nets": ("nnx", "lq_nets", False),
}


def shapes_of(found):
    return jax.eval_shape(lambda: found.variables)


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def written(request, tmp_path_factory):
    found = case(*CASES[request.param])
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    sizes = packed.save(path, network, found.model.quantizer.name, found.variables, {"seed": 0})
    return found, network, path, sizes


def test_sizes_are_what_the_search_promised(written):
    found, _, path, sizes = written
    assert sizes.weight_bytes == costs.size(found.model.layers, found.policy)
    assert sizes.file_bytes == path.stat().st_size
    assert sizes.header <= packed.LARGEST_HEADER
    assert {line.name for line in sizes.weights} == {layer.path for layer in found.model.layers}


def test_runs_as_the_model(written):
    """Restored into Flax and run as it is, and as a graph: the outputs of the model with its policy."""
    found, network, path, _ = written
    file = packed.load(path)
    assert {name: file.bits(name) for name in file.layers} == dict(found.policy)
    again = packed.network(file, found.model, shapes_of(found), found.images, **found.kwargs)
    (a,), (b,) = (replay.run(each, replay.fake_quantized, found.images) for each in (network, again))
    np.testing.assert_array_equal(a, b)
    made = any(entry["layout"] == "product" for entry in file.layers.values())
    if made or "params/embed/embedding" in file.tensors:  # a table that stays in float, for the lookups
        with pytest.raises(Refusal, match=r"no parameters can stand for .*packed\.network and replay\.run"):
            packed.restore(file, found.model, shapes_of(found))
        return
    variables, policy = packed.restore(file, found.model, shapes_of(found))
    as_is = {name: Bits(32, b.a) for name, b in policy.items()}
    run = jax.jit(lambda v, p, x: found.model.apply(v, p, x, float_bits=True, **found.kwargs))
    expected = jax.jit(lambda v, x: found.model.apply(v, found.policy, x, **found.kwargs))
    np.testing.assert_allclose(
        run(variables, as_is, found.images), expected(found.variables, found.images), rtol=1e-5, atol=1e-5
    )


def test_read_with_a_few_lines_of_numpy(tmp_path):
    """The lines that the documentation shows, which know nothing of this package."""
    found = case()
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    path = tmp_path / "model.safetensors"
    packed.save(path, network, "lsq", found.variables, {})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for layer in json.loads(header["__metadata__"]["layers"]):
        start, end = header[layer["path"] + ".codes"]["data_offsets"]
        stream = np.unpackbits(np.frombuffer(raw[8 + length :][start:end], np.uint8), bitorder="little")
        n, b = int(np.prod(layer["shape"])), layer["bits"]
        codes = stream[: n * b].reshape(n, b) @ (1 << np.arange(b))
        codes -= (codes >> (b - 1)) << b
        weight = ((codes + layer["offset"]) * layer["scale"]).reshape(layer["shape"]).astype(np.float32)
        product = next(node.product for node in network.products if node.product.path == layer["path"])
        np.testing.assert_allclose(weight, replay.weight_values(product), rtol=1e-6)
        kernel = np.asarray(found.variables["params"][layer["path"]]["kernel"], np.float64)
        k = found.model.specs[layer["leaf"]].weight_bit_widths.index(b)
        s = float(found.variables["params"][layer["path"]]["weight_step_size"][k])
        by_hand = np.round(np.clip(kernel / s, -(2 ** (b - 1)), 2 ** (b - 1) - 1)) * s
        assert np.isclose(weight, by_hand, rtol=1e-5).mean() > 0.99  # but for values on the edge of two codes


def test_the_lines_that_the_documentation_shows(tmp_path, monkeypatch):
    """As they stand, on grids with an offset and a layer in float."""
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    shown = text[text.index("import json, struct") :].partition("```")[0]
    found = case("nnx", "pact", rules=(("head", "float"),), ends=None)
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    monkeypatch.chdir(tmp_path)
    packed.save("model.safetensors", network, "pact", found.variables, {})
    names: dict = {}
    exec(shown, names)
    np.testing.assert_allclose(names["weight"], packed.values(packed.load("model.safetensors"), "conv"), rtol=1e-6)
    assert names["layer"]["path"] == "head"


def test_folded_file_holds_pairs_and_no_normalisation(tmp_path):
    found = case()
    network = fold(graph(found.model, found.variables, found.policy, found.images, **found.kwargs))
    path = tmp_path / "model.safetensors"
    sizes = packed.save(path, network, "lsq", found.variables, {})
    names = {line.name for line in sizes.others}
    assert "conv.multiplier" in names and "conv.shift" in names
    assert not any("bn" in name or "bias" in name for name in names)
    again = packed.network(packed.load(path), found.model, shapes_of(found), found.images, **found.kwargs)
    runs = [
        replay.run(each, how, found.images)[0] for each in (network, again) for how in (replay.exact, replay.integer)
    ]
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0], other)
    with pytest.raises(Refusal, match="layer 'stem' has what follows it folded in"):
        packed.restore(packed.load(path), found.model, shapes_of(found))


def test_a_shared_embedding_stays_in_float_for_its_lookups():
    found = case("tied")
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    assert packed._needed(network) >= {"params/embed/embedding"}


# ---- files that are not what they should be -----------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    found = case()
    path = tmp_path / "model.safetensors"
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    packed.save(path, network, "lsq", found.variables, {})
    return path


def test_damaged_files_are_refused(file, tmp_path):
    raw = file.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut").write_bytes(raw[:cut])
        with pytest.raises(Refusal):
            packed.load(tmp_path / "cut")
    for at in rng.integers(0, len(raw), 60):
        edited = bytearray(raw)
        edited[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "edited").write_bytes(bytes(edited))
        with pytest.raises(Refusal):
            packed.load(tmp_path / "edited")


def test_other_files_and_other_models_are_refused(file, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(Refusal, match="does not exist"):
        packed.load(tmp_path / "none")
    save_file({"a": np.zeros(3)}, str(tmp_path / "plain"))
    with pytest.raises(Refusal, match="no packed model"):
        packed.load(tmp_path / "plain")
    other = case("nnx")
    with pytest.raises(Refusal, match="another model"):
        packed.restore(packed.load(file), other.model, shapes_of(other))
    network = graph(other.model, other.variables, other.policy, other.images, **other.kwargs)
    packed.save(tmp_path / "lsq.safetensors", network, "lsq", other.variables, {})
    found = case("nnx", "pact")
    with pytest.raises(Refusal, match="quantized with lsq"):
        packed.restore(packed.load(tmp_path / "lsq.safetensors"), found.model, shapes_of(found))


def test_nothing_is_left_where_the_header_is_too_large(tmp_path, monkeypatch):
    found = case()
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    monkeypatch.setattr(packed, "LARGEST_HEADER", 1000)
    with pytest.raises(Refusal, match="header"):
        packed.save(tmp_path / "model.safetensors", network, "lsq", found.variables, {})
    assert list(tmp_path.iterdir()) == []


# ---- the C header -------------------------------------------------------------------------------------------------

MAIN = """
#include "model.h"
#include <stdio.h>
int main(void) {
  /* y = (x + o_x) W of the dense layer `head`, in integers, then its scales: inputs and outputs as text. */
  size_t in = head_shape[0], out = head_shape[1];
  int32_t x[64]; float scale;
  for (size_t i = 0; i < in; i++) if (scanf("%d", &x[i]) != 1) return 1;
  if (scanf("%f", &scale) != 1) return 1;
  for (size_t j = 0; j < out; j++) {
    int32_t sum = 0;
    for (size_t i = 0; i < in; i++) sum += x[i] * mpq_code(head_codes, head_bits, head_signed, i * out + j);
    printf("%.9g\\n", (double)((float)sum * (head_scale[0] * scale)));
  }
  /* every code of a layer with a width a channel */
  size_t each = conv_shape[0] * conv_shape[1] * conv_shape[2];
  for (size_t c = 0; c < conv_shape[3]; c++)
    for (size_t i = 0; i < each; i++) printf("%d\\n", mpq_channel_code(conv_codes, conv_bits, conv_signed, each, c, i));
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_header_compiles_and_computes_a_layer(tmp_path):
    import subprocess

    from mpq_jax.export import c_header

    found = case(by_channel=True)
    network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
    packed.save(tmp_path / "model.safetensors", network, "lsq", found.variables, {})
    file = packed.load(tmp_path / "model.safetensors")
    (tmp_path / "model.h").write_text(c_header.header(file))
    (tmp_path / "main.c").write_text(MAIN)
    command = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-variable"]
    subprocess.run([*command, "-Wno-unused-const-variable", "main.c", "-o", "main"], cwd=tmp_path, check=True)
    data = {}
    (logits,) = replay.run(network, replay.integer, found.images, seen=lambda p, x: data.setdefault(p.path, (p, x)))
    product, x = data["head"]
    codes = np.asarray(product.activation.encode(x))
    scale = float(np.ravel(product.activation.values["step_size"])[0])
    for row in range(3):
        given = " ".join(map(str, codes[row])) + f" {scale!r}\n"
        done = subprocess.run(["./main"], cwd=tmp_path, input=given, capture_output=True, text=True, check=True)
        printed = done.stdout.split()
        bias = np.asarray(found.variables["params"]["head"]["bias"])
        np.testing.assert_allclose(np.float32(printed[:3]) + bias, logits[row], rtol=1e-6)
    conv = next(node.product for node in network.products if node.product.path == "conv")
    np.testing.assert_array_equal(np.int32(printed[3:]), np.moveaxis(conv.weight.codes, 3, 0).ravel())
    assert jnp.ndim(np.asarray(found.policy["conv"].w)) == 1
