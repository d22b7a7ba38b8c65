"""Finding layers: paths, order, counts, ties and candidates, against hand counts and the order of plain loops."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from layer_nets import Net

from mpq_jax import Bits, Refusal
from mpq_jax.layers import check_widths, choice_of
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import lsq
from mpq_jax.rules import Candidates

IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 2), jnp.float32)
ROWS = jax.ShapeDtypeStruct((3, 4), jnp.float32)

# ---- the table ------------------------------------------------------------------------------------------------------


def test_layer_table():
    """Paths, order, MACs by hand count, ties, signs, fixed ends."""
    quantized = quantize(Net(), IMAGES)
    table = {layer.path: layer for layer in quantized.layers}
    assert list(table) == ["stem", "block1/conv1", "block1/depthwise", "block1/shortcut", "head"]
    macs = {"stem": 36 * 9 * 2 * 4, "block1/conv1": 36 * 9 * 4 * 6, "block1/depthwise": 36 * 9 * 6}
    macs |= {"block1/shortcut": 36 * 4 * 6, "head": 18}
    assert {path: layer.macs for path, layer in table.items()} == macs
    assert table["block1/conv1"].params == 9 * 4 * 6 and table["block1/depthwise"].params == 54
    assert table["stem"].bits == table["head"].bits == Bits(8, 8)
    assert table["block1/conv1"].tied == table["block1/shortcut"].tied is not None
    assert table["block1/depthwise"].tied is None
    signs = {spec.paths[0]: spec.signed for spec in quantized.specs.values()}
    assert signs == {path: path == "stem" for path in table}
    kinds = {spec.paths[0]: spec.kind for spec in quantized.specs.values()}
    assert kinds["block1/depthwise"] == "depthwise" and kinds["head"] == "dense" and kinds["stem"] == "conv"


class Inner(nn.Module):
    """A stack of three in a stack of two: six layers of each name."""

    @nn.compact
    def __call__(self, x, _):
        class Pair(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(4, name="b")(nn.Dense(5, name="a")(x)), None

        scan = nn.scan(Pair, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="pair")(x, None)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="first")(x)
        scan = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(2, name="last")(scan(name="block")(x, None)[0])


def test_stacks_in_stacks_are_in_the_order_that_they_run():
    """The loops that the scans stand for, written out; each layer with the counts of one run."""
    expected = ["first"]
    for i in range(2):
        for j in range(3):
            expected += [f"block/pair/a[{i}][{j}]", f"block/pair/b[{i}][{j}]"]
    quantized = quantize(Outer(), ROWS, ends=None)
    assert [layer.path for layer in quantized.layers] == [*expected, "last"]
    assert all((layer.params, layer.macs) == (20, 20) for layer in quantized.layers[1:-1])
    assert all(
        (layer.inputs, layer.outputs) == ((4, 5) if "/a" in layer.path else (5, 4)) for layer in quantized.layers[1:-1]
    )
    spec = quantized.specs["block/pair/a/kernel"]
    assert (spec.stack, spec.shared, len(spec.paths)) == ((2, 3), (), 6)


class Twice(nn.Module):
    """A weight in both directions, a module with two parameters, and a parameter at the top."""

    @nn.compact
    def __call__(self, x):
        class Two(nn.Module):
            @nn.compact
            def __call__(self, x):
                up = self.param("up", nn.initializers.ones, (4, 6))
                down = self.param("down", nn.initializers.ones, (6, 4))
                return nn.relu(x @ up) @ down

        w = self.param("w", nn.initializers.ones, (4, 7))
        return Two(name="two")(x @ w @ w.T)


def test_names_and_channels_where_a_module_has_several_parameters():
    """Paths are the parameters' where a module has more than one; leaves stand beside them; a weight that is used both
    ways has no one number of output channels, and its calls' multiply-accumulates add up."""
    quantized = quantize(Twice(), ROWS, ends=None)
    table = {layer.path: layer for layer in quantized.layers}
    assert {path: layer.channels for path, layer in table.items()} == {"w": None, "two/up": 6, "two/down": 4}
    assert {path: layer.macs for path, layer in table.items()} == {"w": 2 * 28, "two/up": 24, "two/down": 24}
    assert quantized.specs["two/up"].names == {"weight": "two/up_weight_", "activation": "two/up_activation_"}
    assert quantized.specs["w"].names == {"weight": "w_weight_", "activation": "w_activation_"}
    assert (quantized.specs["two/down"].signed, quantized.specs["two/up"].signed) == (False, True)
    shapes = jax.eval_shape(lambda x: quantized.calibrate(Twice().init(jax.random.key(0), x), x), ROWS)
    with pytest.raises(Refusal, match="'w' has no one number of output channels"):
        quantized.apply(shapes, {path: Bits((4,) * 7, 4) for path in table}, ROWS)
    per_channel = quantize(Twice(), ROWS, ends=None, quantizer=lsq(per_channel=True))
    with pytest.raises(
        Refusal, match=r"layer 'w' is used in several products with .* \(7, 4\).*no step_size a channel"
    ):
        jax.eval_shape(lambda x: per_channel.calibrate(Twice().init(jax.random.key(0), x), x), ROWS)
    overridden = quantize(Twice(), ROWS, ends=None, signed=[("down", True), ("up", False)])
    assert (overridden.specs["two/down"].signed, overridden.specs["two/up"].signed) == (True, False)


def test_costs_are_of_one_sample_whatever_the_batch():
    tables = [quantize(Net(), jax.ShapeDtypeStruct((n, 6, 6, 2), jnp.float32)).layers for n in (1, 2, 7)]
    assert tables[0] == tables[1] == tables[2]
    layer = next(layer for layer in tables[0] if layer.path == "block1/conv1")
    assert (layer.inputs, layer.outputs) == (6 * 6 * 4, 6 * 6 * 6)


class Pyramid(nn.Module):
    """One convolution on a small map, then on the large one it was pooled from."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Conv(4, (3, 3), name="shared")
        return shared(nn.max_pool(x, (2, 2), (2, 2))).sum((1, 2)) + shared(x).sum((1, 2))


def test_a_shared_layer_is_as_large_as_its_largest_call():
    (layer,) = quantize(Pyramid(), jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32), ends=None).layers
    assert (layer.inputs, layer.outputs) == (6 * 6 * 3, 6 * 6 * 4)
    assert layer.macs == (6 * 6 + 3 * 3) * 3 * 3 * 3 * 4


def test_ties_are_of_tensors_and_can_be_left_out():
    free = quantize(Net(), IMAGES, tie_activations=False)
    assert [layer.tied for layer in free.layers] == [None] * 5
    tied = {layer.path: layer.tied for layer in quantize(Net(), IMAGES).layers}
    assert [path for path, name in tied.items() if name] == ["block1/conv1", "block1/shortcut"]
    fixed = quantize(Net(), IMAGES, rules=[("shortcut", Bits(4, 4))])
    assert {layer.path: layer.tied for layer in fixed.layers}["block1/shortcut"] is None


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        return self.blocks[1](self.blocks[0](x))


def test_nnx_lists_are_numbered():
    assert [layer.path for layer in quantize(Mixed(nnx.Rngs(0)), ROWS).layers] == ["blocks/0", "blocks/1"]


def test_a_model_without_layers():
    class Nothing(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, ())

    with pytest.raises(Refusal, match="no product of data with a parameter"):
        quantize(Nothing(), ROWS)


# ---- what a layer may be given --------------------------------------------------------------------------------------


def test_choices_by_force():
    """Every place of a layer, with and without ends, two rules in both orders: the first that matches, or the end, or
    all candidates."""
    paths, ends, default = ("stem", "block/a", "head"), Bits(8, 8), Candidates((2, 3), (4,))
    rules = [("block", "4,4"), ("a$", "w2/8,a4"), ("head", "float")]
    values = {"4,4": Bits(4, 4), "w2/8,a4": Candidates((2, 8), (4,)), "float": "float"}
    for order in itertools.permutations(rules):
        for given in (ends, None):
            for path in paths:
                matching = [value for pattern, value in order if re.search(pattern, path)]
                expected = values[matching[0]] if matching else given if given and path in ("stem", "head") else default
                assert choice_of(path, paths, order, given, default) == expected


@pytest.mark.parametrize("widths", [(), (1, 2), (2, 17), (2, 2), (0,), (-3,)])
def test_widths_that_no_grid_has(widths):
    with pytest.raises(Refusal, match=r"^these widths .* must be distinct integers from 2 to 16"):
        check_widths(widths, "these widths")


def test_widths_are_put_in_order():
    assert check_widths([6, 2, 16], "w") == check_widths(np.array([16, 6, 2]), "w") == (2, 6, 16)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A product with a parameter inside a while loop: it cannot be taken apart."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 4))
        x = nn.Dense(4, name="dense")(x)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ kernel), (0, x))[1]


def test_not_reached_is_refused_by_name():
    x = jnp.ones((2, 4))
    with pytest.raises(Refusal, match=r"kernel.*while.*float"):
        quantize(Hidden(), x)
    for allowed in ({"rules": [("^kernel$", "float")]}, {"allow_unreached": True}):
        quantized = quantize(Hidden(), x, **allowed)
        assert [layer.path for layer in quantized.layers] == ["dense"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"rules": [("nothing", "float")]}, "matches no layer"),
        ({"rules": [("(", "float")]}, "not a regular expression"),
        ({"rules": [("stem", "fp4")]}, "rule value"),
        ({"rules": [("stem", "1,8")]}, "from 2 to 16"),
        ({"bit_widths": (1, 2)}, "from 2 to 16"),
        ({"bit_widths": (2, 2)}, "distinct"),
        ({"signed": [("nowhere", True)]}, "matches no layer"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(Refusal, match=words):
        quantize(Net(), IMAGES, **arguments)
