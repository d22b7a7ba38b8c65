"""Weight files in torch's naming: our logits against the NumPy reference, names, and refusals."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpq_jax import models
from mpq_jax.pretrained import load_safetensors, torch_names
from mpq_jax.types import Refusal


def _reference() -> Any:
    path = Path(__file__).parent / "reference" / "numpy_reference.py"
    spec = importlib.util.spec_from_file_location("numpy_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference()
CLASSES = 10
VIT = {"patch_size": 4, "dim": 24, "depth": 3, "heads": 3}
VIT_SHAPES = {"patch": 4, "dim": 24, "depth": 3, "patches": 6 * 5}


def _shapes(name: str, options: dict[str, Any], image: tuple[int, int]) -> tuple[Any, Any]:
    """(model, shapes of its variables)."""
    model = models.create(name, CLASSES, **options)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image, 3)))


def _made(name: str) -> dict[str, np.ndarray]:
    return reference.made_tensors(reference.tensor_shapes(name, CLASSES, **(VIT_SHAPES if name == "vit" else {})))


# Sides are unequal and become odd on the way: a swapped axis or SAME padding would show.
@pytest.mark.parametrize(
    ("name", "options", "image", "arguments"),
    [
        ("resnet8", {}, (14, 10), {}),
        ("resnet18", {}, (40, 36), {}),
        ("resnet50", {}, (40, 36), {}),
        ("mobilenetv1", {}, (40, 36), {}),
        ("mobilenetv1", {"relu6": True}, (40, 36), {"relu6": True}),
        ("vit", VIT, (24, 20), {"heads": 3}),
        ("vit", {**VIT, "scan": True}, (24, 20), {"heads": 3}),
    ],
)
def test_logits_equal_the_numpy_reference(
    name: str, options: dict[str, Any], image: tuple[int, int], arguments: dict[str, Any], tmp_path: Path
) -> None:
    tensors = _made(name)
    save_file(tensors, tmp_path / "weights.safetensors")
    images = np.random.default_rng(1).standard_normal((2, *image, 3)).astype(np.float32)
    expected = reference.logits(name, tensors, images, **arguments)
    model, shapes = _shapes(name, options, image)
    variables = load_safetensors(tmp_path / "weights.safetensors", name, shapes)
    found = np.asarray(jax.jit(model.apply)(variables, images))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "resnet34", "resnet50", "mobilenetv1", "vit"])
def test_every_leaf_is_filled_in_its_shape_and_type(name: str, tmp_path: Path) -> None:
    tensors = _made(name)
    save_file(tensors, tmp_path / "weights.safetensors")
    _, shapes = _shapes(name, VIT if name == "vit" else {}, (24, 20))
    variables = load_safetensors(tmp_path / "weights.safetensors", name, shapes)
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (variables, shapes)]
    assert kinds[0] == kinds[1]
    # Nothing is used twice or dropped: the same numbers are in the file and in the tree.
    ours = sum(float(np.asarray(leaf, np.float64).sum()) for leaf in jax.tree.leaves(variables))
    theirs = sum(float(t.astype(np.float64).sum()) for n, t in tensors.items() if "num_batches" not in n)
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16, np.float64])
def test_stored_types_prefixes_and_aliases_are_read(kind: Any, tmp_path: Path) -> None:
    tensors = _made("resnet8")
    renamed = {
        "module." + name.replace("downsample", "shortcut").replace("fc.", "linear."): tensor.astype(kind)
        for name, tensor in tensors.items()
        if "num_batches" not in name
    }
    save_file(renamed, tmp_path / "weights.safetensors")
    _, shapes = _shapes("resnet8", {}, (8, 8))
    variables = load_safetensors(tmp_path / "weights.safetensors", "resnet8", shapes)
    expected = tensors["layer3.0.downsample.0.weight"].astype(kind).astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(variables["params"]["stage3"]["block1"]["shortcut_conv"]["kernel"], expected)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], tensors["fc.bias"].astype(kind))


def test_leaves_that_a_float_model_has_not_are_kept(tmp_path: Path) -> None:
    save_file(_made("resnet8"), tmp_path / "weights.safetensors")
    _, shapes = _shapes("resnet8", {}, (8, 8))
    steps = jnp.arange(5.0)
    shapes["params"]["stem"]["conv"]["weight_step_size"] = steps
    variables = load_safetensors(tmp_path / "weights.safetensors", "resnet8", {**shapes, "other": {"bias": steps}})
    assert variables["params"]["stem"]["conv"]["weight_step_size"] is steps
    assert variables["other"]["bias"] is steps


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "count", "some"),
    [
        ("resnet18", {}, 21, {"conv1": "stem/conv", "layer2.0.downsample.0": "stage2/block1/shortcut_conv"}),
        ("resnet50", {}, 54, {"layer3.5.conv3": "stage3/block6/conv3", "fc": "head"}),
        ("resnet20", {}, 22, {"layer3.2.conv2": "stage3/block3/conv2"}),
        (
            "mobilenetv1",
            {},
            28,
            {
                "conv_stem": "stem/conv",
                "blocks.0.0.conv_dw": "unit1/depthwise",
                "blocks.2.1.conv_pw": "unit5/pointwise",
                "blocks.3.5.conv_dw": "unit11/depthwise",
                "blocks.4.1.conv_pw": "unit13/pointwise",
                "classifier": "head",
            },
        ),
        ("vit", VIT, 20, {"blocks.2.attn.qkv.key": "block3/attn/key", "blocks.0.attn.proj": "block1/attn/out"}),
        (
            "vit",
            {**VIT, "scan": True},
            20,
            {"blocks.2.attn.qkv.key": "blocks/attn/key[2]", "patch_embed.proj": "patch_embed"},
        ),
    ],
)
def test_torch_names_point_to_our_layers(name: str, options: dict[str, Any], count: int, some: dict[str, str]) -> None:
    _, shapes = _shapes(name, options, (24, 20))
    names = torch_names(name, shapes)
    assert len(names) == count == len(set(names.values()))
    assert some.items() <= names.items()
    file = {tensor.removesuffix(".weight") for tensor in reference.tensor_shapes(name, **VIT_SHAPES)}
    assert {torch.removesuffix(".query").removesuffix(".key").removesuffix(".value") for torch in names} <= file


# ---- refusals -----------------------------------------------------------------------------------------------------


def _refusal(path: Path, name: str = "resnet8", options: dict[str, Any] | None = None) -> str:
    _, shapes = _shapes(name, options or {}, (24, 20))
    with pytest.raises(Refusal) as error:
        load_safetensors(path, name, shapes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_missing_or_not_safetensors_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in _refusal(tmp_path / "none.safetensors")
    assert "cannot be read" in _refusal(tmp_path)
    path = tmp_path / "weights.safetensors"
    for content in (b"", b"PK\x03\x04 a torch file", b"\xff" * 100):
        path.write_bytes(content)
        assert "is not a whole safetensors file" in _refusal(path)
    save_file(_made("resnet8"), path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is not a whole safetensors file" in _refusal(path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = _made("resnet8")
    save_file({**tensors, "conv1.weight": tensors["conv1.weight"].astype(np.int8)}, tmp_path / "w.safetensors")
    assert "stores conv1.weight as I8" in _refusal(tmp_path / "w.safetensors")


def test_missing_and_unexpected_tensors_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path, tensors = tmp_path / "w.safetensors", _made("resnet8")
    save_file({n: t for n, t in tensors.items() if not n.startswith(("layer2.0.conv1", "layer3"))}, path)
    assert "lacks 16 tensors of resnet8 (the first is layer2.0.conv1.weight)" in _refusal(path)
    save_file({**tensors, "fc2.bias": tensors["fc.bias"]}, path)
    assert "has 1 tensor that resnet8 has not (the first is fc2.bias)" in _refusal(path)
    save_file(_made("resnet20"), path)
    assert "has 60 tensors that resnet8 has not (the first is layer1.1.bn1.bias)" in _refusal(path)
    text = _refusal(path, "mobilenetv1")
    assert "lacks 133 tensors of mobilenetv1" in text and "first is blocks.0.0.bn1.bias" in text  # both have a bn1
    assert "(the first is conv1.weight)" in text


@pytest.mark.parametrize(
    ("name", "tensor", "shape", "needed"),
    [
        ("resnet8", "fc.weight", (1000, 64), "[10, 64]"),
        ("resnet8", "layer2.0.conv1.weight", (3, 3, 16, 32), "[32, 16, 3, 3]"),
        ("resnet8", "bn1.running_var", (1, 16), "[16]"),
        ("vit", "pos_embed", (1, 5, 24), "[1, 31, 24]"),
        ("vit", "blocks.1.attn.qkv.weight", (24, 72), "[72, 24]"),
        ("vit", "blocks.1.attn.qkv.bias", (24,), "[72]"),
    ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_other_shapes_are_refused(
    name: str, tensor: str, shape: tuple[int, ...], needed: str, scan: bool, tmp_path: Path
) -> None:
    save_file({**_made(name), tensor: np.zeros(shape, np.float32)}, tmp_path / "w.safetensors")
    text = _refusal(tmp_path / "w.safetensors", name, {**VIT, "scan": scan} if name == "vit" else {})
    assert f"has {tensor} of shape {list(shape)}, the model needs {needed}" in text


def test_models_without_a_naming_and_variables_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(_made("resnet8"), tmp_path / "w.safetensors")
    _, shapes = _shapes("mobilenetv1", {}, (32, 32))
    with pytest.raises(Refusal, match="no naming of weights is known for 'cnn_nnx'; possible: resnet8, resnet20"):
        load_safetensors(tmp_path / "w.safetensors", "cnn_nnx", shapes)
    with pytest.raises(Refusal, match="is no parameter of a resnet8"):
        load_safetensors(tmp_path / "w.safetensors", "resnet8", shapes)
    with pytest.raises(Refusal, match="possible: resnet8"):
        torch_names("resnet9", shapes)
