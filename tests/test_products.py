"""Which products a model has, what runs them, and how they are measured: against definitions, loops and a clock of ours."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from product_nets import BATCH, opened

from mpq_jax import Bits, Refusal, products
from mpq_jax.products import KERNELS, Kernel, ProductShape
from mpq_jax.quantized_model import quantize

INT4, _, _, FLOAT32 = KERNELS
ROUNDS = 3


class Clock:
    """Every look at it is one hundredth of a second after the last."""

    looks = 0

    def __call__(self):
        self.looks += 1
        return self.looks / 100


# ---- which products a model has -----------------------------------------------------------------------------------


def test_every_kind_of_layer_has_its_products():
    """The products' multiply-accumulates are the layer table's: every call and every repeated run is there."""
    model, uses = opened()
    assert list(uses) != [] and set(uses) == {layer.path for layer in model.layers}
    kinds = {"strided", "depthwise", "grouped", "transposed", "attention/query", "attention/out", "stack/Dense_0[2]"}
    assert kinds < set(uses)
    for layer in model.layers:
        assert sum(use.runs * use.product.macs for use in uses[layer.path]) == BATCH * layer.macs, layer.path
        assert all(use.own == "float32" for use in uses[layer.path])
    params = {path: dict(its[0].product.params) for path, its in uses.items()}
    assert params["strided"]["window_strides"] == (2, 2) and params["transposed"]["lhs_dilation"] == (2, 2)
    assert params["depthwise"]["feature_group_count"] == 4 and params["grouped"]["feature_group_count"] == 2
    assert uses["strided"][0].product.lhs == (BATCH, 8, 8, 1) and uses["head"][0].product.rhs == (6, 3)
    assert [len(uses[path]) for path in ("shared", "head")] == [2, 1]


class Looped(nn.Module):
    """Runs one layer five times, in bfloat16."""

    @nn.compact
    def __call__(self, x):
        step = nn.Dense(4, use_bias=False, dtype=jnp.bfloat16)
        again = nn.scan(
            lambda module, x, _: (module(x), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=5,
        )
        return nn.Dense(2, dtype=jnp.bfloat16, name="head")(again(step, x, None)[0])


def test_a_layer_that_runs_again_and_the_models_own_type():
    x = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    model = quantize(Looped(), x)
    uses = products.uses(model, jax.eval_shape(Looped().init, jax.random.key(0), x), x)
    (again,), (head,) = uses[model.layers[0].path], uses["head"]
    assert (again.runs, again.product.lhs, again.own) == (5, (3, 4), "bfloat16") and head.runs == 1


def test_equal_shapes_are_measured_once(monkeypatch):
    """Whichever layers they stand in; compilations are counted, and the clock's looks."""
    _, uses = opened()
    paths = ("attention/query", "attention/key", "stack/Dense_0[0]", "stack/Dense_0[2]", "shared", "head")
    every = [use.product for path in paths for use in uses[path]]
    clock, made, repeated = Clock(), [], products.repeated
    monkeypatch.setattr(products, "repeated", lambda *a: made.append(a[:2]) or repeated(*a))
    measured = products.measure(every, ROUNDS, clock)
    assert len(made) == len(set(made)) == len(KERNELS) * len(measured)
    assert set(measured) == set(every) and len(measured) < len(every)
    query, key = uses["attention/query"][0].product, uses["attention/key"][0].product
    assert query == key and uses["stack/Dense_0[0]"] == uses["stack/Dense_0[2]"]
    assert clock.looks == 2 * ROUNDS * sum(len(found.rounds) for found in measured.values())
    for found in measured.values():
        assert set(found.rounds) | set(found.missing) == {kernel.name for kernel in KERNELS}
        assert not set(found.rounds) & set(found.missing)
        for rounds in found.rounds.values():
            np.testing.assert_allclose(rounds, [10 / found.calls] * ROUNDS)


# ---- what runs them -----------------------------------------------------------------------------------------------


def conv(lhs, rhs, strides=None, padding=None, up=None, dilation=None, groups=1, batch_groups=1, layout="last"):
    """A convolution as JAX's primitive has it."""
    n = len(lhs) - 2
    last = lax.ConvDimensionNumbers((0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n)), (0, n + 1, *range(1, n + 1)))
    first = lax.ConvDimensionNumbers(*[tuple(range(n + 2))] * 3)
    params = {
        "window_strides": strides or (1,) * n,
        "padding": padding or ((0, 0),) * n,
        "lhs_dilation": up or (1,) * n,
        "rhs_dilation": dilation or (1,) * n,
        "dimension_numbers": {"last": last, "first": first}[layout],
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
        "precision": None,
    }
    return ProductShape("conv_general_dilated", lhs, rhs, tuple(params.items()))


def dot(lhs, rhs, sums, batch=((), ())):
    params = {"dimension_numbers": (sums, batch), "precision": None}
    return ProductShape("dot_general", lhs, rhs, tuple(params.items()))


def conv_by_loops(product, lhs, rhs):
    """The definition, one number at a time: out[b, o, p] = sum of x[b, c, (p stride + k dilation - low) / up] w[o, c, k]."""
    params = dict(product.params)
    numbers, groups, split = (params[k] for k in ("dimension_numbers", "feature_group_count", "batch_group_count"))
    x, w = lhs.astype(int).transpose(numbers.lhs_spec), rhs.astype(int).transpose(numbers.rhs_spec)
    padding, up, stride, dilation = (params[k] for k in ("padding", "lhs_dilation", "window_strides", "rhs_dilation"))
    size = [
        ((n - 1) * u + 1 + low + high - (k - 1) * d - 1) // s + 1
        for n, u, (low, high), k, d, s in zip(x.shape[2:], up, padding, w.shape[2:], dilation, stride, strict=True)
    ]
    batch, outs, depth = x.shape[0] // split, w.shape[0], w.shape[1]
    out = np.zeros((batch, outs, *size), int)
    for b, o, *p in np.ndindex(*out.shape):
        for c, *k in np.ndindex(depth, *w.shape[2:]):
            places = [p[i] * stride[i] + k[i] * dilation[i] - padding[i][0] for i in range(len(size))]
            inside = all(q % u == 0 and 0 <= q // u < n for q, u, n in zip(places, up, x.shape[2:], strict=True))
            if inside:
                channel = o // (outs // groups) * depth + c
                sample = o // (outs // split) * batch + b
                at = tuple(q // u for q, u in zip(places, up, strict=True))
                out[(b, o, *p)] += x[(sample, channel, *at)] * w[(o, c, *k)]
    return out.transpose(np.argsort(numbers.out_spec))


def dot_by_einsum(product, lhs, rhs):
    (left, right), (left_batch, right_batch) = dict(product.params)["dimension_numbers"]
    letters = list("abcdefgh"[: lhs.ndim])
    others = list("stuvwxyz"[: rhs.ndim])
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        others[j] = letters[i]
    out = [letters[i] for i in left_batch]
    out += [c for i, c in enumerate(letters) if i not in (*left, *left_batch)]
    out += [c for j, c in enumerate(others) if j not in (*right, *right_batch)]
    return np.einsum(f"{''.join(letters)},{''.join(others)}->{''.join(out)}", lhs.astype(int), rhs.astype(int))


PRODUCTS = {
    "plain": conv((2, 4, 5, 3), (3, 2, 3, 4)),
    "strided": conv((1, 5, 6, 2), (3, 3, 2, 3), strides=(2, 1), padding=((1, 1), (0, 2))),
    "dilated": conv((1, 7, 6, 2), (3, 2, 2, 2), dilation=(2, 3), padding=((2, 1), (1, 1))),
    "transposed": conv((1, 3, 4, 2), (3, 3, 2, 3), up=(2, 2), padding=((2, 1), (1, 2))),
    "cut": conv((1, 6, 5, 2), (2, 2, 2, 3), padding=((-1, 0), (1, -2))),
    "depthwise": conv((2, 4, 4, 3), (3, 3, 1, 6), groups=3, padding=((1, 1), (1, 1))),
    "grouped": conv((1, 4, 4, 4), (2, 2, 2, 6), groups=2, strides=(2, 2)),
    "groups of samples": conv((4, 4, 3, 2), (2, 2, 2, 6), batch_groups=2),
    "1d": conv((2, 6, 2), (3, 2, 3), padding=((1, 1),)),
    "3d, channels first": conv((1, 2, 3, 4, 3), (3, 2, 2, 2, 2), layout="first"),
    "dense": dot((2, 5), (5, 3), ((1,), (0,))),
    "attention": dot((2, 3, 2, 4), (2, 4, 6), ((2, 3), (0, 1))),
    "batched": dot((3, 2, 4), (4, 3, 5), ((2,), (0,)), ((0,), (1,))),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_kernels_equal_numpy(name):
    """The reference is the definition; so is what each kernel here computes; a kernel that is missing says why."""
    product = PRODUCTS[name]
    by_hand = dot_by_einsum if product.primitive == "dot_general" else conv_by_loops
    present = 0
    for kernel in KERNELS:
        lhs, rhs = products.codes(product, kernel, seed=3)
        assert lhs.min() >= -(2 ** (min(kernel.bits, 8) - 1)) and rhs.max() < 2 ** (min(kernel.bits, 8) - 1)
        expected = by_hand(product, lhs, rhs)
        np.testing.assert_array_equal(products.reference(product, lhs, rhs), expected)
        run = products.repeated(product, kernel, 1)
        why = products.fault(product, kernel, run)
        if why is None:
            present += 1
            out, _ = run(*(jnp.asarray(x.astype(jnp.dtype(kernel.name))) for x in (lhs, rhs)))
            assert out.dtype == kernel.sums
            np.testing.assert_array_equal(np.asarray(out, np.float64), expected)
        else:
            # A GPU was seen to give other numbers than NumPy's: int8, 2x5 times 5x3.
            assert "\n" not in why and ("Error" in why or jax.default_backend() != "cpu")
    assert present >= 2


def test_what_is_wrong_or_refused_is_no_kernel():
    product = PRODUCTS["dense"]
    assert products.fault(product, FLOAT32, products.repeated(product, FLOAT32, 2)) is None
    # Sums in int8 overflow: it compiles and runs, but its numbers are not NumPy's.
    narrow = Kernel("int8", 8, "int8")
    assert "are wrong" in products.fault(product, narrow, products.repeated(product, narrow, 1))
    off_by_one = products.fault(product, FLOAT32, lambda a, b: (jnp.dot(a, b).at[0, 0].add(1), 0))
    assert off_by_one == "1 of 6 numbers of its result are wrong"

    def refuses(a, b):
        raise RuntimeError("no such\n   type")

    assert products.fault(product, INT4, refuses) == "RuntimeError: no such type"


def test_without_float32_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(products, "fault", lambda product, kernel, run: "out of memory")
    with pytest.raises(Refusal, match=r"dot 2x5 \* 5x3 does not run in float32 \(out of memory\); try a smaller"):
        products.measure([PRODUCTS["dense"]], 1)


@pytest.mark.parametrize("name, word", [("plain", "convolution("), ("dense", "dot(")])
def test_the_compiler_keeps_every_run(name, word):
    """One product inside the loop, one behind it: none moved out of the loop, none cut down to the number summed."""
    product = PRODUCTS[name]
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (product.lhs, product.rhs)]
    compiled = products.repeated(product, FLOAT32, 5).lower(*operands).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    lines = [line for line in text.splitlines() if word in line]
    shapes = {line.partition("=")[2].split("{")[0].strip() for line in lines}
    if jax.default_backend() == "cpu":  # elsewhere products have other names
        assert len(lines) == 2 and len(shapes) == 1, text
        assert "while(" in text and entry.count(word) <= 1, text
    # And the loop runs: the sum over the four runs before the last one.
    lhs, rhs = products.codes(product, FLOAT32)
    out, seen = products.repeated(product, FLOAT32, 5)(jnp.asarray(lhs, jnp.float32), jnp.asarray(rhs, jnp.float32))
    assert seen == 4 * out.ravel()[0] != 0


def test_runs_in_a_measurement():
    """Enough work to tell, never more runs than the most; big products run once."""
    assert products.calls_of(PRODUCTS["dense"]) == products.MOST_CALLS
    assert products.calls_of(conv((8, 224, 224, 64), (3, 3, 64, 64))) == 1
    some = conv((1, 28, 28, 64), (3, 3, 64, 64), padding=((1, 1), (1, 1)))
    assert some.macs == 28 * 28 * 64 * 64 * 9
    if jax.default_backend() == "cpu":
        assert products.calls_of(some) == 2**28 // some.macs


# ---- which widths run as what -------------------------------------------------------------------------------------


def test_the_narrowest_kernel_that_holds_both():
    """Against the rule by force: of the types that hold both widths, the one with the fewest bits of storage."""
    storage, holds = {"int4": 4, "int8": 8, "bfloat16": 16, "float32": 32}, [4, 8, 8, 16]
    holds = dict(zip(storage, holds, strict=True))
    for n in range(4):
        for others in itertools.combinations(["int4", "int8", "bfloat16"], n):
            has = [*others, "float32"]
            for w, a in itertools.product(range(1, 17), repeat=2):
                fits = [name for name in has if holds[name] >= w and holds[name] >= a]
                assert products.kernel_for(Bits(w, a), has, "bfloat16") == min(fits, key=storage.get)
            own = products.kernel_for(Bits(32, 32), has, "bfloat16")
            assert own == ("bfloat16" if "bfloat16" in has else "float32")
            assert products.kernel_for(Bits(32, 32), has, "float32") == "float32"
    with pytest.raises(Refusal, match="holds 9 bits"):
        products.kernel_for(Bits(9, 2), ["int8"], "float32")
