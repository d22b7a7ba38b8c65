"""The comparison's own parts: options, keys, lines that survive a kill, means in the table; no training."""

import json

import numpy as np
import pytest

from benchmarks import compare
from mpq_jax import Refusal
from mpq_jax.config import Config
from mpq_jax.criteria import CRITERIA
from mpq_jax.search import methods

LINE = {
    "system": "learned",
    "predicted": 2.0,
    "passes": 3.0,
    "seconds": 0.5,
    "loss_before": 0.5,
    "accuracy_before": 0.8,
    "loss": 0.25,
    "accuracy": 0.9,
    "used": [{"bitops": 90}, {"bitops": 100}],
    "limits": {"bitops": 100},
}


def test_options_go_where_they_belong():
    arguments, overrides, settings = compare.parse(
        [
            "--config",
            "c.py",
            "--budget",
            "bitops=W3A3",
            "--joint.steps",
            "5",
            "--evolution.top",
            "3",
            "--haq.episodes=4",
        ]
    )
    assert arguments.budget == ["bitops=W3A3"] and arguments.seeds == 3
    assert overrides == ["--joint.steps=5"] and settings == ["--evolution.top=3", "--haq.episodes=4"]
    assert methods.settings("evolution", settings[:1]).top == 3


def test_systems():
    assert compare.chosen_systems(["all"]) == list(compare.SYSTEMS)
    assert set(compare.SYSTEMS) == {*compare.CONTROLS, *CRITERIA, *methods.SETTINGS}
    assert compare.chosen_systems(["haq", "uniform"]) == ["uniform", "haq"]
    with pytest.raises(Refusal, match="there are: all, uniform"):
        compare.chosen_systems(["uniform", "hawk"])


def test_keys_depend_on_what_decides_the_run():
    base = (Config(), ["bitops=W3A3"], ["--evolution.top=3"])
    key = compare.key_of(*base, "evolution")
    assert key == compare.key_of(*base, "evolution") and len(key) == 16
    others = [
        compare.key_of(*base, "learned"),
        compare.key_of(Config(seed=1), *base[1:], "evolution"),
        compare.key_of(Config(), ["bitops=W2A3"], base[2], "evolution"),
        compare.key_of(Config(), base[1], ["--evolution.top=4"], "evolution"),
    ]
    assert len({key, *others}) == 5
    # Another system's settings change nothing.
    assert compare.key_of(*base, "learned") == compare.key_of(Config(), base[1], [], "learned")


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    assert compare.read_lines(path) == []
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE)[:40])
    assert compare.read_lines(path) == [LINE]


def test_table():
    lines = [{**LINE, "loss": loss, "accuracy": a} for loss, a in ((0.2, 0.9), (0.3, 0.8), (0.25, 0.85))]
    lines.append({**LINE, "system": "uniform", "predicted": None, "seconds": 100.4})
    rows = compare.markdown(lines, "made").splitlines()
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in rows[4:]}
    spread = np.std([0.2, 0.3, 0.25], ddof=1)
    assert cells["learned"] == [
        *("3", "3", "0.50", "2", "0.5000 ± 0.0000", f"0.2500 ± {spread:.4f}", "85.00 ± 5.00", "95.0")
    ]
    assert cells["uniform"][2:4] == ["100", ""] and cells["uniform"][5] == "0.2500"
    assert all(row.count("|") == rows[2].count("|") for row in rows[2:])


def test_refusals_are_one_line(capsys):
    for arguments, words in (
        (["--config", "configs/digits.py", "--budget", "bitops=W3"], "not understood"),
        (["--config", "configs/digits.py", "--budget", "bitops=W3A3", "--systems", "hawk"], "there are"),
        (["--config", "configs/none.py", "--budget", "bitops=W3A3"], "does not exist"),
        (["--budget", "bitops=W3A3"], "--config"),
    ):
        assert compare.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
