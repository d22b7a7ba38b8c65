"""Latency tables: which products a model has, what runs them, what a table says, and the command from end to end."""

import itertools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from tables import best_by_force

import search
from mpq_jax import Bits, Importance, Layer, Refusal, costs, latency, products
from mpq_jax.importance import save_importance
from mpq_jax.products import KERNELS, Kernel, ProductShape, Times, Use
from mpq_jax.quantized_model import quantize
from mpq_jax.search import solve

INT4, INT8, BFLOAT16, FLOAT32 = KERNELS


class Dense(nn.Module):
    """One step of a scanned stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6, use_bias=False)(x)), None


class Net(nn.Module):
    """A layer of every kind."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="strided")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x))
        x = nn.relu(nn.Conv(4, (3, 3), feature_group_count=2, name="grouped")(x))
        x = nn.relu(nn.ConvTranspose(6, (3, 3), strides=(2, 2), name="transposed")(x))
        x = x.reshape(x.shape[0], -1, 6)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.scan(Dense, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="stack")(x, None)[0]
        shared = nn.Dense(6, name="shared")
        x = shared(nn.relu(shared(x)))
        return nn.Dense(3, name="head")(x.mean(1))


def tiny(num_classes):
    """For the command: two layers of one shape, and one of another."""

    class Tiny(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="stem")(x))
            for i in range(2):
                x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name=f"conv{i}")(x))
            return nn.Dense(num_classes, name="head")(x.mean((1, 2)))

    return Tiny()


class Clock:
    """Every look at it is one hundredth of a second after the last."""

    looks = 0

    def __call__(self):
        self.looks += 1
        return self.looks / 100


BATCH, ROUNDS = 2, 3


@pytest.fixture(scope="module")
def net():
    """(model, uses, measured, clock): the net's layers measured by a clock of ours; compilations are counted."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    model = quantize(Net(), images, bit_widths=(2, 4, 6), rules=[("shared", "float"), ("grouped", "w2/4,a4/6")])
    variables = jax.eval_shape(Net().init, jax.random.key(0), images)
    uses = products.uses(model, variables, jax.ShapeDtypeStruct((BATCH, 8, 8, 1), jnp.float32), train=False)
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        made = []
        repeated = products.repeated
        patch.setattr(products, "repeated", lambda *a: made.append(a[:2]) or repeated(*a))
        measured = products.measure((use.product for its in uses.values() for use in its), ROUNDS, clock)
    assert len(made) == len(set(made)) == len(KERNELS) * len(measured)
    return model, uses, measured, clock


# ---- which products a model has -----------------------------------------------------------------------------------


def test_every_kind_of_layer_has_its_products(net):
    """The products' multiply-accumulates are the layer table's: every call and every repeated run is there."""
    model, uses, _, _ = net
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


def test_equal_shapes_are_measured_once(net):
    _, uses, measured, clock = net
    every = [use.product for its in uses.values() for use in its]
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
            assert "\n" not in why and "Error" in why
    assert present >= 2


def test_what_is_wrong_or_refused_is_no_kernel():
    product = PRODUCTS["dense"]
    assert products.fault(product, INT8, products.repeated(product, INT8, 2)) is None
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


# ---- the table ----------------------------------------------------------------------------------------------------


def test_every_layer_has_every_pair(net):
    model, uses, measured, _ = net
    table = latency.table(model.layers, uses, measured, model.bit_widths, model.activation_bit_widths)
    every = {(w, a) for w in (2, 4, 6) for a in (2, 4, 6)}
    for layer in model.layers:
        own = every if layer.searched else {tuple(layer.bits)}
        assert {tuple(bits) for bits in table[layer.path]} == own | {(32, 32)}, layer.path
        assert all(entry.ms > 0 and math.isfinite(entry.ms) for entry in table[layer.path].values())
    kernels = {bits: entry.kernel for bits, entry in table["depthwise"].items()}
    assert kernels[Bits(32, 32)] == "float32" and kernels[Bits(2, 6)] == kernels[Bits(6, 6)] != "float32"
    assert {entry.kernel for entry in table["shared"].values()} == {"float32"}
    shown = latency.report(model.layers, table, uses, measured)
    assert all(word in shown for word in (*uses, "stride 2", "groups 4", "up 2", "uniform W4A4", "all in float"))


A, B = PRODUCTS["dense"], PRODUCTS["plain"]
MADE = {
    A: Times(4, {"int8": [1.0, 9.0, 2.0], "bfloat16": [4.0] * 3, "float32": [1.0, 1.0, 5.0]}, {"int4": "E: no"}),
    B: Times(1, {"bfloat16": [10.0] * 3, "float32": [30.0, 20.0, 10.0]}, {"int4": "E: no", "int8": "E: slow"}),
}
USES = {"a": [Use(A, 1, "float32")], "b": [Use(A, 3, "bfloat16"), Use(B, 2, "bfloat16")]}
LAYERS = (Layer("a", 15, 30, True), Layer("b", 9, 90, False, Bits(8, 8)))


def test_a_table_by_hand():
    """Medians; several products and runs add up; a layer runs in one type, which all of its products have."""
    table = latency.table(LAYERS, USES, MADE, (2, 16), (2,))
    assert {bits: tuple(entry) for bits, entry in table["a"].items()} == {
        Bits(2, 2): (2.0, "int8"),
        Bits(16, 2): (1.0, "float32"),
        Bits(32, 32): (1.0, "float32"),
    }
    assert {bits: tuple(entry) for bits, entry in table["b"].items()} == {
        Bits(8, 8): (3 * 4 + 2 * 10, "bfloat16"),
        Bits(32, 32): (3 * 4 + 2 * 10, "bfloat16"),
    }
    value = json.loads(json.dumps(latency.to_json(table, USES, MADE, {"device": "d"})))
    assert value["layers"]["a"] == {"2,2": 2.0, "16,2": 1.0, "32,32": 1.0}
    assert value["kernels"]["b"] == {"8,8": "bfloat16", "32,32": "bfloat16"}
    first = value["measured"][0]
    assert first["layers"] == ["a", "b"] and first["ms"]["int8"] == 2.0 and first["quartiles"]["int8"] == [1.5, 5.5]
    assert first["calls"] == 4 and first["missing"] == {"int4": "E: no"}


def test_what_people_are_told():
    table = latency.table(LAYERS, USES, MADE, (2, 16), (2, 16))
    shown = latency.report(LAYERS, table, USES, MADE)
    assert "int4 is missing here for 2 of 2 products: E: no" in shown
    assert "int8 is missing here for 1 of 2 products: E: slow" in shown
    assert "2 as int8; 16, float as float32 (a)" in shown and "8, float as bfloat16 (b)" in shown
    assert "int8 takes longer than float32 in 1 of 1 layers" in shown
    assert "uniform W2A2  34.0000 ms" in shown and "uniform W16A16  33.0000 ms" in shown
    assert "share one kernel" not in shown
    alike = latency.report(LAYERS, latency.table(LAYERS, USES, MADE, (2, 3), (2, 3)), USES, MADE)
    assert "no latency budget can tell them apart" in alike


# ---- the command --------------------------------------------------------------------------------------------------

CONFIG = """
from mpq_jax.config import Config, Data, Model, Quantize
config = Config(data=Data(name="digits"), model=Model(name="test_latency:tiny"), quantize=Quantize(bit_widths=(2, 8, 12)))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, importance): a table measured by the command, and an importance for the same layers."""
    folder = tmp_path_factory.mktemp("latency")
    (folder / "config.py").write_text(CONFIG)
    steps = itertools.count()

    def uneven():
        i = next(steps)
        return i + (i % 7) / 10

    arguments = ["--config", str(folder / "config.py"), "--out", str(folder / "latency.json")]
    assert latency.main([*arguments, "--batch", "3", "--rounds", "2"], uneven) == 0
    layers = tuple(
        Layer(path, 36, 100, path.startswith("conv"), None if path.startswith("conv") else Bits(8, 8))
        for path in ("stem", "conv0", "conv1", "head")
    )
    weight = np.array([[0.9, 0.2, 0.1], [0.7, 0.3, 0.1]])
    importance = Importance("made", (2, 8, 12), (2, 8, 12), layers, weight, weight, None, 1.0)
    save_importance(folder / "importance.json", importance)
    return folder, importance


def test_from_the_command_to_a_policy(made):
    """The file is read back whole; a latency budget from it is solved, and equals trying every policy."""
    folder, importance = made
    value = json.loads((folder / "latency.json").read_text())
    assert (value["format"], value["version"], value["unit"]) == ("mpq-latency", 1, "ms")
    assert (value["batch"], value["rounds"], value["platform"]) == (3, 2, jax.devices()[0].platform)
    assert value["versions"]["jax"] == jax.__version__ and value["device"]
    assert len(value["measured"]) == 3 and value["measured"][1]["layers"] == ["conv0", "conv1"]
    found = costs.load_latency(folder / "latency.json")
    assert list(found) == ["stem", "conv0", "conv1", "head"] and list(found["head"]) == [(8, 8), (32, 32)]
    assert found == {
        path: {tuple(map(int, key.split(","))): ms for key, ms in row.items()} for path, row in value["layers"].items()
    }
    assert all(0 < ms < math.inf for row in found.values() for ms in row.values())
    assert found["conv0"][2, 2] == found["conv1"][2, 8] and len(found["conv0"]) == 10
    totals = {
        pairs: found["stem"][8, 8] + found["head"][8, 8] + sum(found["conv0"][pair] for pair in pairs)
        for pairs in itertools.product([(w, a) for w in (2, 8, 12) for a in (2, 8, 12)], repeat=2)
    }
    limit = sorted(set(totals.values()))[len(set(totals.values())) // 2]
    text = f"latency={limit * 1.000001:.9f}ms"
    (budget,) = costs.parse_budgets([text], importance.layers, (2, 8, 12), (2, 8, 12), found)
    solution = solve(importance, [budget])
    chosen = (tuple(solution.policy["conv0"]), tuple(solution.policy["conv1"]))
    assert solution.used["latency"][0] == pytest.approx(totals[chosen]) and totals[chosen] <= budget.limit
    best, _ = best_by_force(
        importance, [], allowed=lambda p: totals[tuple(p["conv0"]), tuple(p["conv1"])] <= budget.limit
    )
    assert solution.objective == pytest.approx(best)


def test_search_reads_it_and_names_what_is_missing(made, tmp_path, capsys):
    folder, _ = made
    arguments = ["--importance", str(folder / "importance.json"), "--out", str(tmp_path / "policy.json")]
    assert search.main([*arguments, "--latency", str(folder / "latency.json"), "--budget", "latency=10s"]) == 0
    assert json.loads((tmp_path / "policy.json").read_text())["budgets"]["latency"]["used"] > 0
    capsys.readouterr()
    value = json.loads((folder / "latency.json").read_text())
    del value["layers"]["conv1"]["12,2"]
    (tmp_path / "less.json").write_text(json.dumps(value))
    assert search.main([*arguments, "--latency", str(tmp_path / "less.json"), "--budget", "latency=10s"]) == 2
    assert "no \"12,2\" for layer 'conv1'" in capsys.readouterr().err
    del value["layers"]["head"]
    value["layers"]["conv1"]["12,2"] = 1
    (tmp_path / "less.json").write_text(json.dumps(value))
    assert search.main([*arguments, "--latency", str(tmp_path / "less.json"), "--budget", "latency=10s"]) == 2
    error = capsys.readouterr().err
    assert "no layer 'head'" in error and "python -m mpq_jax.latency" in error


REFUSED = [
    (["--config", "{}/none.py"], "does not exist"),
    (["--config", "{}/broken.py"], "must define"),
    (["--btch", "3"], "nearest is --batch"),
    (["--joint.stps", "3"], "--joint.steps"),
    (["--batch", "0"], "--batch is 0"),
    (["--batch", "many"], "invalid int"),
    (["--rounds", "-1"], "--rounds is -1"),
    (["--seed", "x"], "takes an integer"),
    (["--out", "{}"], "is a folder"),
    (["--out", "{}/config.py"], "would replace a file"),
    (["--out", "{}/config.py/latency.json"], "is no folder"),
    (["--data.name", "mnist"], "not known here"),
    (["--model.name", "test_latency:none"], "has no 'none'"),
    (["--quantize.bit_widths", "1,2"], "from 2 to 16"),
]


@pytest.mark.parametrize("more, words", REFUSED)
def test_refusals(tmp_path, capsys, more, words):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "broken.py").write_text("config = 3\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = ["--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "latency.json")]
    assert latency.main([*arguments, *(word.format(tmp_path) for word in more)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_stopped_half_way_nothing_is_written(tmp_path, capsys, monkeypatch):
    """A table that was there stays as it was."""
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "latency.json").write_text("mine")
    monkeypatch.setattr(products, "KERNELS", (FLOAT32,))

    def stopped():
        raise KeyboardInterrupt

    arguments = ["--config", str(tmp_path / "config.py"), "--out", str(tmp_path / "latency.json")]
    assert latency.main(arguments, stopped) == 130
    assert (tmp_path / "latency.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_help_and_refusals_import_no_jax():
    code = (
        "import sys\n"
        "for name in ('jax', 'flax'): sys.modules[name] = None\n"
        "from mpq_jax import latency\n"
        "assert latency.main(['--config', 'configs/none.py', '--out', 'x.json']) == 2\n"
        "latency.main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--batch" in done.stdout and "--quantize.bit_widths  (tuple[int, ...]" in done.stdout
