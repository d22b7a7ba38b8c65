"""Products of integer codes: against the products of the decoded values in NumPy float64, and sums tried one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpq_jax import Refusal, codes
from mpq_jax.types import Decoding

RNG = np.random.default_rng(0)
LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC, HWIO


def dot(contracting, batch=((), ())):
    return {"dimension_numbers": (contracting, batch), "precision": None, "preferred_element_type": None}


CONVOLUTION = {
    "window_strides": (1, 2),
    "padding": ((1, 1), (0, 0)),
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": LAST,
    "feature_group_count": 1,
    "batch_group_count": 1,
    "precision": None,
    "preferred_element_type": None,
}


def convolved(x, w):
    """CONVOLUTION in NumPy."""
    x = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    rows, columns = x.shape[1] - w.shape[0] + 1, (x.shape[2] - w.shape[1]) // 2 + 1
    out = np.zeros((len(x), rows, columns, w.shape[3]))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[:, i : i + w.shape[0], 2 * j : 2 * j + w.shape[1]]
        out[:, i, j] = np.tensordot(window, w, 3)
    return out


# name -> (primitive, parameters, which operand is the weight, its output channels' axes, weight, input, NumPy's product)
CASES = {
    "dense": ("dot_general", dot(((1,), (0,))), 1, (1,), (6, 3), (4, 6), np.matmul),
    "weight first": ("dot_general", dot(((1,), (1,))), 0, (0,), (3, 6), (4, 6), lambda x, w: w @ x.T),
    "several channel axes": (
        "dot_general",
        dot(((2,), (1,))),
        1,
        (0, 2),
        (2, 6, 3),
        (4, 5, 6),
        lambda x, w: np.einsum("abi,oip->abop", x, w),
    ),
    "batched": (
        "dot_general",
        dot(((2,), (1,)), ((0,), (0,))),
        1,
        (2,),
        (2, 6, 3),
        (2, 4, 6),
        lambda x, w: np.einsum("gbi,gio->gbo", x, w),
    ),
    "convolution": ("conv_general_dilated", CONVOLUTION, 1, (3,), (3, 2, 4, 5), (2, 4, 6, 4), convolved),
}


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_product_of_the_values(name, per_channel, offset, integers):
    """s_a s_w sum (c_a + o_a)(c_w + o_w), a step size for the weight or one for each output channel."""
    primitive, params, side, axes, weight, inputs, product = CASES[name]
    w, x = RNG.integers(-8, 8, weight), RNG.integers(0, 16, inputs)
    channels = [n if i in axes else 1 for i, n in enumerate(weight)]
    scale = RNG.uniform(0.1, 1, channels if per_channel else ())
    found = codes.product_of_codes(
        primitive,
        params,
        side,
        axes,
        (jnp.asarray(w, jnp.int32), Decoding(jnp.float32(scale), offset)),
        (jnp.asarray(x, jnp.int32), Decoding(jnp.float32(0.3), offset)),
        "layer",
        integers,
    )
    expected = product((x + offset) * 0.3, (w + offset) * scale)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_output_channels_are_where_a_changed_channel_shows(name):
    """The weight of one output channel doubled: that channel of the output, along the axes named, and no other."""
    primitive, params, side, axes, weight, inputs, product = CASES[name]
    w, x = RNG.uniform(1, 2, weight), RNG.uniform(1, 2, inputs)
    out = product(x, w)
    places = codes.output_channel_axes(primitive, params, side, len(weight), out.ndim)
    assert len(places) == len(axes)
    for channel in np.ndindex(*(weight[i] for i in axes)):
        changed = w.copy()
        at = [slice(None)] * w.ndim
        for axis, index in zip(axes, channel, strict=True):
            at[axis] = index
        changed[tuple(at)] *= 2
        moved = ~np.isclose(product(x, changed), out)
        expected = np.zeros(out.shape, bool)
        at = [slice(None)] * out.ndim
        for axis, index in zip(places, channel, strict=True):
            at[axis] = index
        expected[tuple(at)] = True
        np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("name", CASES)
def test_sums_of_large_codes_are_exact_integers(name):
    """16-bit weights with 8-bit inputs leave float32's 24 bits: int32 sums are the int64 ones all the same."""
    primitive, params, side, axes, weight, inputs, product = CASES[name]
    w, x = RNG.integers(31_000, 2**15, weight), RNG.integers(200, 2**8, inputs)
    one = Decoding(jnp.float32(1))
    found = codes.product_of_codes(primitive, params, side, axes, (w, one), (x, one), "layer", integers=True)
    exact = product(x, w)  # in int64, or float64 of whole numbers below 2^53
    np.testing.assert_array_equal(found, exact.astype(np.float32))
    assert (exact > 2**24).all() and (exact % 2 == 1).any()  # odd: float32 has no such number


FIRST = lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))  # NCHW, OIHW


@pytest.mark.parametrize(
    "changes, weight, inputs",
    [
        ({"rhs_dilation": (2, 1)}, (3, 2, 4, 5), (2, 7, 6, 4)),
        ({"lhs_dilation": (2, 3), "padding": ((2, 1), (-1, 3))}, (3, 2, 4, 5), (2, 4, 5, 4)),
        ({"feature_group_count": 2}, (3, 2, 2, 6), (2, 4, 6, 4)),
        ({"feature_group_count": 4}, (3, 2, 1, 8), (2, 4, 6, 4)),
        ({"batch_group_count": 2}, (3, 2, 4, 6), (4, 4, 6, 4)),
        ({"dimension_numbers": FIRST}, (5, 4, 3, 2), (2, 4, 4, 6)),
        ({"padding": ((0, 0), (0, 0))}, (5, 2, 4, 5), (2, 4, 6, 4)),  # no place for the window
    ],
)
def test_integer_convolutions_of_all_forms(changes, weight, inputs):
    """The same as JAX's own in float32, which holds these sums exactly."""
    params = {**CONVOLUTION, **changes}
    w, x = RNG.integers(-8, 8, weight), RNG.integers(0, 16, inputs)
    one = Decoding(jnp.float32(1))
    found = codes.product_of_codes("conv_general_dilated", params, 1, (3,), (w, one), (x, one), "layer", integers=True)
    fields = {**params, "precision": lax.Precision.HIGHEST}
    expected = lax.conv_general_dilated(jnp.float32(x), jnp.float32(w), **fields)
    np.testing.assert_array_equal(found, expected)


def test_whole_numbers_and_their_step():
    c = RNG.integers(-8, 8, (3, 4)).astype(np.int32)
    for offset in (0.0, 0.5, np.full(4, 0.5)):
        numbers, step = codes.multiples(c, Decoding(np.float64(0.3), offset), "w")
        assert np.asarray(numbers).dtype == np.int32
        np.testing.assert_allclose(step * np.asarray(numbers), 0.3 * (c + offset), rtol=1e-12)


@pytest.mark.parametrize(
    "decoding, words",
    [
        (Decoding(table=np.ones(4)), "levels from a table .LQ-Nets.*--quantizer lsq"),
        (Decoding(1.0, 0.25), "offset of 0.25 steps"),
        (Decoding(1.0, np.array([0.0, 0.5])), "offset of 0 steps"),
    ],
)
def test_grids_without_a_common_step_are_refused(decoding, words):
    with pytest.raises(Refusal, match=f"^the weight of layer 'a' has .*{words}"):
        codes.multiples(np.zeros(3, np.int32), decoding, "the weight of layer 'a'")


def test_the_largest_sum_is_that_of_the_worst_input():
    """Every input of {-1, 0, 1}^4 times 5 tried on both channels; the bound is reached, and by no input passed."""
    w = RNG.integers(-8, 8, (4, 2))
    sums = [np.abs(5 * np.array(x) @ w).max() for x in itertools.product((-1, 0, 1), repeat=4)]
    assert codes.largest_sum(w, 5, (1,)) == max(sums)
    assert codes.largest_sum(np.full((3, 3), -(2**31), np.int64), 2**20, ()) == 9 * 2**51  # no int32 on the way


def test_jitted_codes_may_be_traced():
    w, x = jnp.ones((6, 3), jnp.int32), jnp.ones((4, 6), jnp.int32)

    @jax.jit
    def run(scale):
        args = CASES["dense"][:4]
        return codes.product_of_codes(*args, (w, Decoding(scale)), (x, Decoding(scale)), "layer")

    np.testing.assert_allclose(run(jnp.float32(0.5)), np.full((4, 3), 6 * 0.25))
