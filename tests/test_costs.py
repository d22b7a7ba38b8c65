"""Costs against hand counts in Python integers; every form of a budget, and every refusal."""

import json
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from tables import budgets_of, cost_by_hand, every_policy, made

from mpq_jax import Bits, Layer, Refusal, costs, layer_costs

TABLE = made(0)
MACS = sum(layer.macs for layer in TABLE.layers)
PARAMS = sum(layer.params for layer in TABLE.layers)
INPUTS = sum(layer.inputs for layer in TABLE.layers)


def test_bits_of_32_bits_overflow_nothing():
    """As a stack of policies has them: a large layer's product with them is beyond 2^31."""
    layers = (Layer("a", 10**8, 115_605_504, True), Layer("b", 10**8, 115_605_504, False, Bits(8, 8)))
    for one in (np.int32, np.asarray, jnp.int32):
        policy = {"a": Bits(one(6), one(6)), "b": Bits(8, 8)}
        assert layer_costs.bitops(layers, policy) == 115_605_504 * (36 + 64)
        assert layer_costs.size(layers, policy) == 10**8 * (6 + 8) // 8
    channels = Bits(np.array([2, 6] * 4, np.int32), np.int32(6))
    assert layer_costs.layer_bitops(layers[0], channels) == 115_605_504 * 4 * 6


def uniform_cost(w, a, name):
    policy = {layer.path: layer.bits or Bits(w, a) for layer in TABLE.layers}
    return cost_by_hand(TABLE, policy, name)


@pytest.mark.parametrize(
    "text, limit",
    [
        ("bitops=W3A4", uniform_cost(3, 4, "bitops")),
        ("bitops=0.0055G", 5_500_000),
        ("bitops=5.5M", 5_500_000),
        ("bitops=5500.1234567K", 5_500_123),
        ("bitops=76x", int(Fraction(MACS * 1024, 76))),
        ("size=W3", uniform_cost(3, 32, "size")),
        ("size=0.01MB", 10485),
        ("size=3.5KB", 3584),
        ("size=900B", 900),
        ("size=12.2x", int(Fraction(PARAMS * 4) / Fraction("12.2"))),
        ("memory=1.5KB", 1536),
        ("wbits=3.2", int(Fraction("3.2") * PARAMS)),
        ("abits=4", 4 * INPUTS),
    ],
)
def test_limits(text, limit):
    (budget,) = budgets_of(TABLE, text)
    assert budget.limit == limit and isinstance(budget.limit, int)


def test_tables_and_fixed_layers_add_up():
    """For every policy: table entries + fixed = the sum over layers by hand, exactly."""
    importance = made(1, layers=2, tied=True)
    budgets = budgets_of(importance, "bitops=W3A3", "size=W3", "memory=1KB", "wbits=3", "abits=3")
    for policy in every_policy(importance):
        for budget in budgets:
            assert costs.used(budget, policy, importance) == cost_by_hand(importance, policy, budget.name)
    # 101 weights at 8 bits and 7 in float: 101 + 28 bytes.
    assert budgets[1].fixed == 129 and budgets[0].fixed == 5000 * 64 + 70 * 1024


@pytest.mark.parametrize(
    "text",
    [
        *("bitops=W3", "bitops=55", "bitops=55g", "bitops=", "bitops", "bitops=0G", "bitops=-1G", "bitops=infx"),
        *("bitops=nanG", "bitops=1e3G", "bitops=0x", "bitops=W3A", "bitops=w3a4", "bitops=W0A4", "bitops = 3G"),
        *("size=W3A4", "size=8", "size=8mb", "size=0x", "size=0B", "size=-3KB", "size=1TB", "size=W0"),
        *("bitops=W33A3", "bitops=W3A99", "size=W64", "bitops=\u0663G", "bitops=W" + "9" * 5000 + "A3"),
        *("bitops=0." + "9" * 5000 + "G", "size=" + "9" * 5000 + "MB", "bitops=1_0G", "bitops=1.G", "bitops=.5G"),
        *("latency=3", "latency=0ms", "latency=-3ms", "flops=3G", "", "="),
        *(
            "wbits=0",
            "wbits=-3",
            "wbits=33",
            "wbits=W3",
            "wbits=3x",
            "abits=",
            "abits=nan",
            "memory=W3",
            "memory=3",
            "memory=0KB",
        ),
    ],
)
def test_refused(text):
    with pytest.raises(Refusal) as refusal:
        costs.parse_budgets([text], TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths, {})
    assert "\n" not in str(refusal.value) and "write " in str(refusal.value)


def test_more_than_is_counted_is_refused():
    """Typed, or in a policy that was edited; of every unit."""
    for text in ("bitops=10000000T", "size=99999999999GB", "memory=99999999999GB"):
        with pytest.raises(Refusal, match="leave it out"):
            budgets_of(TABLE, text)
    with pytest.raises(Refusal, match="leave it out"):
        costs.restore_budgets({"wbits": 2**62}, TABLE)


def test_refused_together():
    with pytest.raises(Refusal, match="two budgets limit bitops"):
        budgets_of(TABLE, "bitops=W3A4", "bitops=1G")
    with pytest.raises(Refusal, match="no budget given"):
        budgets_of(TABLE)
    with pytest.raises(Refusal, match="--latency"):
        budgets_of(TABLE, "latency=3ms")


def test_means_are_shown_as_means():
    (budget,) = budgets_of(TABLE, "wbits=3.25")
    policy = {layer.path: layer.bits or Bits(4, 2) for layer in TABLE.layers}
    by_hand = sum(layer.params * policy[layer.path].w for layer in TABLE.layers) / PARAMS
    assert costs.shown(budget, costs.used(budget, policy, TABLE)) == pytest.approx(by_hand, rel=1e-15)
    assert costs.shown(budget, budget.limit) == pytest.approx(3.25, abs=1 / PARAMS)


def test_memory_and_means_need_elements():
    bare = [layer._replace(inputs=None) for layer in TABLE.layers]
    for text in ("memory=1KB", "abits=4"):
        with pytest.raises(Refusal, match=r"layer '(layer0|first)' has no .inputs. in the table"):
            costs.parse_budgets([text], bare, TABLE.bit_widths, TABLE.activation_bit_widths)


def test_limits_are_restored_from_a_policy():
    """What a saved policy says of its limits is the budget again, latency aside."""
    budgets = budgets_of(TABLE, "bitops=W3A3", "memory=1KB", "wbits=3.2", "abits=4.7")
    limits = {budget.name: costs.shown(budget, budget.limit) for budget in budgets}
    again = costs.restore_budgets({**limits, "latency": 3.0}, TABLE)
    assert [(b.name, b.limit) for b in again] == [(b.name, b.limit) for b in budgets]


def latency_file(path, **changes):
    names = [layer.path for layer in TABLE.layers]
    entries = {f"{w},{a}": 0.1 * w + 0.01 * a for w in (2, 3, 4, 8, 32) for a in (2, 3, 4, 8, 32)}
    value = {"format": "mpq-latency", "version": 1, "device": "d", "unit": "ms", "layers": {n: entries for n in names}}
    path.write_text(json.dumps(value | changes))
    return path


def test_latency(tmp_path):
    latency = costs.load_latency(latency_file(tmp_path / "latency.json"))
    arguments = (["latency=2.5ms"], TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths, latency)
    (budget,) = costs.parse_budgets(*arguments)
    policy = next(every_policy(TABLE))
    assert budget.limit == 2.5 and budget.unit == "ms"
    expected = sum(0.1 * bits.w + 0.01 * bits.a for bits in policy.values())
    assert costs.used(budget, policy, TABLE) == pytest.approx(expected)
    (microseconds,) = costs.parse_budgets(["latency=2500us"], *arguments[1:])
    assert microseconds.limit == 2.5
    with pytest.raises(Refusal, match="no layer 'layer3'"):
        costs.parse_budgets(*arguments[:-1], {k: v for k, v in latency.items() if k != "layer3"})
    with pytest.raises(Refusal, match='no "4,4" for layer'):
        fewer = {k: {b: ms for b, ms in v.items() if b != (4, 4)} for k, v in latency.items()}
        costs.parse_budgets(*arguments[:-1], fewer)


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "s"},
        {"layers": []},
        {"layers": {"a": 3}},
        {"layers": {"a": {"8": 1}}},
        {"layers": {"a": {"8,8": -1}}},
        {"layers": {"a": {"8,8": None}}},
        {"layers": {"a": {"8,8": True}}},
        {"layers": {"a": {"8,8": 10**400}}},
        {"layers": {"a": {"8,8": 1e13}}},
        {"layers": {"a": {"0,8": 1}}},
        {"layers": {"a": {"8,33": 1}}},
        {"layers": {"a": {"8,8": "1"}}},
        {"version": 2},
        {"format": "x"},
    ],
)
def test_refused_latency_files(tmp_path, changes):
    with pytest.raises(Refusal) as refusal:
        costs.load_latency(latency_file(tmp_path / "latency.json", **changes))
    assert "\n" not in str(refusal.value)


def test_measured_costs_add_up_as_decimals_do():
    assert costs.add([0.1, 0.2]) == 0.3 and costs.add([0.1] * 10 + [0.2]) == 1.2 and costs.add([]) == 0
    assert costs.add([2**62, 2**62, 1]) == 2**63 + 1


def test_describe():
    shown = costs.describe(TABLE.layers)
    assert set(shown["uniform"]) == {f"W{w}A{a}" for w in range(2, 9) for a in range(2, 9)}
    assert shown["uniform"]["W3A4"]["bitops"] == uniform_cost(3, 4, "bitops")
    assert shown["uniform"]["W3A4"]["size_bytes"] == uniform_cost(3, 4, "size")
    assert shown["uniform"]["W3A4"]["compression"] == pytest.approx(4 * PARAMS / uniform_cost(3, 4, "size"), abs=1e-4)
    assert shown["layers"][1] == {
        "path": "layer0",
        "params": TABLE.layers[1].params,
        "macs": TABLE.layers[1].macs,
        "searched": True,
    }
    text = costs.describe_text(TABLE.layers)
    assert "W8A8" in text and "float" in text and f"{PARAMS:,}" in text


def test_human():
    assert costs.human(55_313_432_576, "BitOps") == "55.31 G" and costs.human(3 * 2**20, "bytes") == "3.00 MB"
    assert costs.human(12, "bytes") == "12 B" and costs.human(1.5, "ms") == "1.500 ms"
    assert costs.layer_size(Layer("x", 3, 0, True), Bits(3, 2)) == 2
