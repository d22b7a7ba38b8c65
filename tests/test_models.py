"""The float models: costs against the published table, layouts, training mode, data types."""

import ast
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mpq_jax import models
from mpq_jax.models.resnet import BottleneckBlock, ResNet

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONVOLUTIONAL = ("resnet8", "resnet20", "resnet18", "resnet34", "resnet50", "mobilenetv1")
LINEN = (*CONVOLUTIONAL, "vit")


def _reference() -> Any:
    path = Path(__file__).parent / "reference" / "numpy_reference.py"
    spec = importlib.util.spec_from_file_location("numpy_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shapes(model: Any, image: tuple[int, ...]) -> Any:
    return jax.eval_shape(model.init, _key(), jnp.zeros((1, *image)))


def _key(seed: int = 0) -> jax.Array:
    """A key of the generator that compiles five times faster than the default."""
    return jax.random.key(seed, impl="rbg")


def _flat(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key, simple=True, separator="/"): leaf for key, leaf in found}


# ---- costs --------------------------------------------------------------------------------------------------------


PRODUCTS = ("conv_general_dilated", "dot_general")


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every convolution and dot, inner jaxprs included, in the order of execution."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
        if eqn.primitive.name in PRODUCTS:
            yield eqn


def _macs(eqn: Any) -> int:
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    kernel = eqn.invars[1].aval.shape
    # Every output element reads one filter: all kernel elements but the axis of output channels.
    return out * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]


def _trace(model: Any, image: tuple[int, ...]) -> list[Any]:
    return list(_equations(jax.make_jaxpr(model.apply)(_shapes(model, image), jnp.zeros((1, *image))).jaxpr))


def _costs(model: Any, image: tuple[int, ...]) -> list[tuple[int, int]]:
    """(MACs, kernel elements) of each layer, in the order of execution."""
    return [(_macs(eqn), math.prod(eqn.invars[1].aval.shape)) for eqn in _trace(model, image)]


# LIMPQ's networks at 224x224, first convolution and classifier at 8x8 bits: BitOps in G at W2A2, W3A3, W3A4, W4A4,
# W8A8; weights; compression of the weights at W3 and W4.
TABLE = {
    "resnet18": (19, "1.6955", "14.37 22.85 27.93 34.71 116.10", 11678912, "9.93 7.66"),
    "resnet50": (52, "3.9691", "23.56 43.41 55.31 71.19 261.71", 25502912, "9.40 7.40"),
    "mobilenetv1": (26, "0.5569", "2.987 5.771 7.442 9.669 36.40", 4209088, "7.59 6.43"),
}


@pytest.mark.parametrize("name", TABLE)
def test_costs_equal_the_published_table_to_every_printed_digit(name: str) -> None:
    searched, gmacs, bitops, weights, compression = TABLE[name]
    costs = _costs(models.create(name, 1000), (224, 224, 3))
    macs, elements = [m for m, _ in costs], [n for _, n in costs]
    fixed_macs, searched_macs = macs[0] + macs[-1], sum(macs[1:-1])
    fixed_elements, searched_elements = elements[0] + elements[-1], sum(elements[1:-1])

    assert len(costs) - 2 == searched
    assert f"{searched_macs / 1e9:.4f}" == gmacs
    assert sum(elements) == weights
    for (w, a), printed in zip(((2, 2), (3, 3), (3, 4), (4, 4), (8, 8)), bitops.split(), strict=True):
        digits = len(printed.split(".")[1])
        assert f"{(searched_macs * w * a + fixed_macs * 64) / 1e9:.{digits}f}" == printed
    for w, printed in zip((3, 4), compression.split(), strict=True):
        assert f"{32 * weights / (searched_elements * w + fixed_elements * 8):.2f}" == printed


# Parameters of the torchvision and timm models of the same names, 1000 classes.
@pytest.mark.parametrize(
    ("name", "options", "image", "parameters"),
    [
        ("resnet18", {}, 224, 11689512),
        ("resnet34", {}, 224, 21797672),
        ("resnet50", {}, 224, 25557032),
        ("mobilenetv1", {}, 224, 4231976),
        ("vit", {"patch_size": 16, "dim": 192, "depth": 12, "heads": 3}, 224, 5717416),
    ],
)
def test_parameter_counts_are_those_of_torchvision_and_timm(
    name: str, options: dict[str, int], image: int, parameters: int
) -> None:
    variables = _shapes(models.create(name, 1000, **options), (image, image, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3)])
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_small_resnets_cost_what_a_hand_count_gives(name: str, blocks: int, width: float) -> None:
    c1, c2, c3 = (int(c * width) for c in (16, 32, 64))
    expected = 28 * 28 * 9 * (c1 + 2 * blocks * c1 * c1)
    expected += 14 * 14 * (9 * c1 * c2 + 9 * (2 * blocks - 1) * c2 * c2 + c1 * c2)
    expected += 7 * 7 * (9 * c2 * c3 + 9 * (2 * blocks - 1) * c3 * c3 + c2 * c3)
    costs = _costs(models.create(name, 10, width=width), (28, 28, 1))
    assert sum(m for m, _ in costs) == expected + c3 * 10
    assert len(costs) == 6 * blocks + 2 + 2  # the layers of its name, and two projections


# Sides of the last feature map: only the right units have a stride.
@pytest.mark.parametrize(
    ("options", "image", "side"),
    [
        ({}, 224, 7),
        ({}, 32, 1),
        ({"small_images": True}, 28, 4),
        ({"small_images": True}, 32, 4),
        ({"stem_stride": 1}, 28, 2),
        ({"small_images": True, "stem_stride": 2}, 28, 2),
    ],
)
def test_mobilenet_strides(options: dict[str, Any], image: int, side: int) -> None:
    costs = _costs(models.create("mobilenetv1", 10, width=0.25, **options), (image, image, 3))
    assert costs[-2][0] == side**2 * 256 * 256  # the last pointwise convolution
    assert [n for _, n in costs[:3]] == [27 * 8, 9 * 8, 8 * 16]


# ---- layout -------------------------------------------------------------------------------------------------------


def test_resnet8_paths_are_short_and_readable() -> None:
    paths = _flat(_shapes(models.create("resnet8", 10), (28, 28, 1))["params"])
    layers = {path.removesuffix("/kernel") for path in paths if path.endswith("/kernel")}
    blocks = {f"stage{s}/block1/conv{c}" for s in (1, 2, 3) for c in (1, 2)}
    assert layers == {"stem/conv", "head", *blocks, "stage2/block1/shortcut_conv", "stage3/block1/shortcut_conv"}
    norms = {path.removesuffix("/scale") for path in paths if path.endswith("/scale")}
    twins = {layer.replace("/conv", "/bn").replace("shortcut_conv", "shortcut_bn") for layer in layers} - {"head"}
    assert norms == twins


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("image", [(28, 28, 1), (36, 20, 2)])
def test_any_image_gives_float32_logits_and_float32_variables(name: str, image: tuple[int, ...]) -> None:
    model = models.create(name, 7, dtype=jnp.bfloat16)
    x = jnp.zeros((2, *image))
    logits, variables = jax.eval_shape(lambda x: model.init_with_output(_key(), x), x)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    trained, updates = jax.eval_shape(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, x)
    assert trained.shape == (2, 7)
    assert list(_flat(updates)) == [path for path in _flat(variables) if path.startswith("batch_stats/")]


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16"])
def test_products_with_parameters_are_computed_in_dtype(name: str, dtype: Any) -> None:
    model = models.create(name, 10, dtype=dtype)
    # Only products of two activations have batch axes; attention scores are float32 for the softmax.
    layers = [
        eqn
        for eqn in _trace(model, (32, 32, 3))
        if eqn.primitive.name != "dot_general" or not eqn.params["dimension_numbers"][1][0]
    ]
    seen = {variable.aval.dtype for eqn in layers for variable in eqn.invars}
    assert seen == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "model",
    [
        models.create("resnet8", 10),
        ResNet(10, BottleneckBlock, (1, 2, 1, 1)),
        models.create("mobilenetv1", 10, small_images=True, width=0.25),
    ],
    ids=lambda model: type(model).__name__,
)
def test_only_the_first_layer_reads_negative_values(model: Any) -> None:
    @jax.jit
    def smallest(x: jax.Array) -> dict[str, jax.Array]:
        read: dict[str, jax.Array] = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, (nn.Conv, nn.Dense)):
                read["/".join(context.module.path)] = jnp.min(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            model.apply(variables, x)
        return read

    shapes = _shapes(model, (16, 16, 3))
    rng = np.random.default_rng(0)
    # All random, so that without its ReLU a layer would read negative values; small, so that nothing overflows.
    variables = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes)
    variables["batch_stats"] = jax.tree.map(lambda leaf: jnp.abs(leaf) + 1, variables["batch_stats"])
    read = smallest(jnp.asarray(rng.standard_normal((2, 16, 16, 3)), jnp.float32))
    assert {path for path, value in read.items() if not value >= 0} == {"stem/conv"}
    assert len(read) == sum(path.endswith("/kernel") for path in _flat(shapes["params"]))


# ---- initial values and training mode -----------------------------------------------------------------------------


def test_convolutions_start_he_normal_and_the_last_scales_at_zero_on_demand() -> None:
    model = models.create("resnet8", 10, width=2.0, zero_init_last=True)
    found = _flat(jax.jit(model.init)(_key(), jnp.zeros((1, 8, 8, 3)))["params"])
    for path, leaf in found.items():
        if "conv" in path:
            fan_out = math.prod(leaf.shape[:2]) * leaf.shape[3]
            assert float(jnp.std(leaf)) == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        elif path.endswith("/scale"):
            assert np.all(leaf == (0 if "/bn2/" in path else 1)), path


def test_depthwise_convolutions_start_at_the_fan_out_of_their_group() -> None:
    model = models.create("mobilenetv1", 10)
    kernel = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]["unit13"]["depthwise"]["kernel"])
    assert float(jnp.std(kernel(_key()))) == pytest.approx(math.sqrt(2 / 9), rel=0.05)


def test_training_moves_statistics_a_tenth_of_the_way_and_evaluation_does_not() -> None:
    model = models.create("resnet8", 10, width=0.25)
    x = np.random.default_rng(0).standard_normal((8, 6, 6, 3)).astype(np.float32)
    variables = jax.jit(model.init)(_key(), x)
    scales = [leaf for path, leaf in _flat(variables).items() if path.endswith("/scale")]
    assert all(np.all(leaf == 1) for leaf in scales)
    _, updates = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float64)
    y = _reference().conv2d(np.moveaxis(x.astype(np.float64), -1, 1), kernel.transpose(3, 2, 0, 1), 1, 1)
    moved = updates["batch_stats"]["stem"]["bn"]
    np.testing.assert_allclose(moved["mean"], 0.1 * y.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["var"], 0.9 + 0.1 * y.var((0, 2, 3)), rtol=1e-4)
    # Statistics are immutable here: whatever writes to them raises.
    jax.eval_shape(lambda v: model.apply(v, x), variables)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        jax.eval_shape(lambda v: model.apply(v, x, train=True), variables)


# ---- NNX ----------------------------------------------------------------------------------------------------------


def test_nnx_cnn_equals_numpy_and_trains_its_statistics() -> None:
    model = models.create("cnn_nnx", 6, in_channels=2, width=0.25, rngs=nnx.Rngs(_key(3)))
    reference, rng = _reference(), np.random.default_rng(0)
    x = rng.standard_normal((4, 9, 7, 2)).astype(np.float32)
    before = np.asarray(model.bn1.mean[...])
    model(jnp.asarray(x), train=True)  # statistics away from 0 and 1
    assert not np.allclose(model.bn1.mean[...], before)

    y = np.moveaxis(x.astype(np.float64), -1, 1)
    for conv, bn, stride in ((model.conv1, model.bn1, 1), (model.conv2, model.bn2, 2), (model.conv3, model.bn3, 2)):
        names = {"weight": bn.scale, "bias": bn.bias, "running_mean": bn.mean, "running_var": bn.var}
        tensors = {f"bn.{name}": np.asarray(value[...], np.float64) for name, value in names.items()}
        kernel = np.asarray(conv.kernel[...], np.float64).transpose(3, 2, 0, 1)
        y = np.maximum(reference.batch_norm(reference.conv2d(y, kernel, stride, 1), tensors, "bn"), 0)
    expected = y.mean((2, 3)) @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model(jnp.asarray(x)), model(jnp.asarray(x)))  # evaluation changes nothing


def test_nnx_cnn_is_made_from_its_seed_or_rngs_and_computes_in_dtype() -> None:
    def made(**options: Any) -> Any:
        return models.create("cnn_nnx", 6, in_channels=2, width=0.25, **options)

    with jax.default_prng_impl("rbg"):
        seeded = (made(seed=1), made(rngs=nnx.Rngs(1)), made())
        model, x = made(dtype=jnp.bfloat16), jnp.zeros((1, 8, 8, 2))
    one, same, other = (np.asarray(m.conv1.kernel[...]) for m in seeded)
    assert np.array_equal(one, same) and not np.allclose(one, other)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}
    assert (model.conv1(x).dtype, model(x).dtype) == (jnp.bfloat16, jnp.float32)
    assert model.conv3.out_features == 16


# ---- create -------------------------------------------------------------------------------------------------------


def test_every_name_can_be_made_and_tells_its_options() -> None:
    for name in models.NAMES:
        small = {"width": 0.25, "in_channels": 2} if name == "cnn_nnx" else {}
        with jax.default_prng_impl("rbg"):
            assert callable(models.create(name, 6, **small))
        assert "dtype" in models.options_of(name)
        assert not {"self", "parent", "name", "num_classes", "blocks", "depths"} & set(models.options_of(name))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet9", {}, "did you mean 'resnet8'"),
        ("x", {}, "possible: resnet8, resnet20"),
        ("mobilenetv1", {"widht": 0.5}, "did you mean 'width'"),
        ("resnet8", {"blocks": 3}, "resnet8 has no option 'blocks'"),
        ("cnn_nnx", {"depth": 3}, "it has: in_channels, width"),
    ],
)
def test_unknown_names_and_options_are_named_in_one_line(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        models.create(name, 10, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_models_import_nothing_of_the_rest() -> None:
    folder = Path(models.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("mpq_jax") or name.startswith("mpq_jax.models."), (path.name, name)
