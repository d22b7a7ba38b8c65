"""Latency tables: what a table says, by hand, and the command from end to end."""

import itertools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from product_nets import opened
from tables import best_by_force

import search
from mpq_jax import Bits, Importance, Layer, costs, latency, products
from mpq_jax.importance import save_importance
from mpq_jax.products import KERNELS, ProductShape, Times, Use
from mpq_jax.search import solve

*_, FLOAT32 = KERNELS


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


# ---- the table ----------------------------------------------------------------------------------------------------


def test_every_layer_has_every_pair():
    model, uses = opened()
    rounds = {kernel.name: [1.0, 2.0, 4.0] for kernel in KERNELS}
    measured = {use.product: Times(8, rounds, {}) for its in uses.values() for use in its}
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


A = ProductShape("dot_general", (2, 5), (5, 3), (("dimension_numbers", (((1,), (0,)), ((), ()))), ("precision", None)))
B = A._replace(lhs=(7, 5))  # any other
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
