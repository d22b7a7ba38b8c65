"""search.py: what it prints and writes, what it refuses, and that it needs no JAX."""

import json
import os
import subprocess
import sys

import pytest
from made_reports import rows_of, table_named, taken_apart
from tables import cost_by_hand, made

import search
from mpq_jax.importance import save_importance
from mpq_jax.policy import load_policy

TABLE = made(1, tied=True)
# Imports of these fail in the child; whether cvxpy was imported is printed.
GUARD = """
import sys
for name in ("jax", "flax", "optax", "orbax", "tensorflow_datasets", "grain"):
    sys.modules[name] = None
import search
code = search.main(sys.argv[1:])
print("cvxpy" in sys.modules)
sys.exit(code)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_importance(tmp_path / "importance.json", TABLE)
    return tmp_path


def test_finds_prints_and_writes(place, capsys):
    arguments = ["--importance", str(place / "importance.json"), "--budget", "bitops=W3A3", "--budget", "size=W3"]
    assert search.main([*arguments, "--out", str(place / "out" / "p.json")]) == 0
    shown = capsys.readouterr().out
    policy = load_policy(place / "out" / "p.json", TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths)
    saved = json.loads((place / "out" / "p.json").read_text())
    for name in ("bitops", "size"):
        used = cost_by_hand(TABLE, policy, name)
        limit = saved["budgets"][name]["limit"]
        assert saved["budgets"][name]["used"] == used <= limit and f"({100 * used / limit:.2f} %)" in shown
    assert saved["status"] == "optimal" and "optimal" in shown and "alpha: 1.3 (of the table)" in shown
    assert all(word in shown for word in ("best uniform", "random", "reversed", *policy))


def test_says_which_policy_it_replaced(place, capsys):
    for budget, before in (("W3A3", None), ("W3A3", None), ("W2A3", "another policy (within bitops ")):
        assert search.main(["--importance", str(place / "importance.json"), "--budget", f"bitops={budget}"]) == 0
        shown = capsys.readouterr().out
        assert f"policy: {place / 'policy.json'}\n" in shown
        assert (f"replaced: {place / 'policy.json'} held {before}" in shown) if before else "replaced" not in shown


def test_newest_run_and_alpha(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert search.main(["--budget", "bitops=W3A3"]) == 2
    assert "no run under runs/" in capsys.readouterr().err
    for i, name in enumerate(("old", "new")):
        save_importance(tmp_path / "runs" / name / "importance.json", made(i)._replace(alpha=None))
    import os

    os.utime(tmp_path / "runs/old/importance.json", (1, 1))
    assert search.main(["--budget", "bitops=W3A3"]) == 0
    shown = capsys.readouterr().out
    assert "runs/new (the newest)" in shown and "alpha: 1 (1: the file has none)" in shown
    assert (tmp_path / "runs/new/policy.json").exists() and not (tmp_path / "runs/old/policy.json").exists()
    assert search.main(["--workdir", "runs/old", "--budget", "bitops=W3A3", "--alpha", "2.5"]) == 0
    assert "alpha: 2.5 (as given)" in capsys.readouterr().out


REFUSED = [
    (["--budget", "bitops=W3"], "not understood"),
    (["--budget", "bitops=1K"], "least reachable"),
    ([], "no budget"),
    (["--budgt", "x"], "nearest is --budget"),
    (["--budget", "bitops=W3A3", "--alpha", "0"], "positive number"),
    (["--budget", "bitops=W3A3", "--alpha", "big"], "positive number"),
    (["--budget", "bitops=W3A3", "--time-limit", "-1"], "positive number"),
    (["--budget", "bitops=W3A3", "--time-limit", "soon"], "invalid float"),
    (["--budget", "latency=3ms"], "--latency"),
    (["--budget", "bitops=W3A3", "--latency", "none.json"], "does not exist"),
    (["--budget", "bitops=W3A3", "--workdir", "x"], "give one of them"),
    (["--budget", "bitops=W3A3", "--json"], "--describe"),
    (["--budget", "bitops=W3A3", "--out", "{}"], "is a folder"),
    (["--budget", "bitops=W3A3", "--out", "{}/importance.json"], "would replace a file"),
    (["--budget", "bitops=W3A3", "--out", "{}/importance.json/policy.json"], "is no folder"),
    (["--budget", "bitops=W3A3", "--budget", "bitops=1G"], "two budgets limit bitops"),
    (["--describe", "--config", "configs/digits.py", "--model.name", "resnet9"], "possible: resnet8"),
    (["--describe", "--config", "configs/digits.py", "--model.name", "no_such_package:net"], "no_such_package"),
    (["--describe"], "needs --config"),
    (["--describe", "--config", "configs/digits.py", "--budget", "bitops=W3A3"], "leave out --budget"),
    (["--frontier", "1"], "from 2 to 10000"),
    (["--frontier", "8", "--budget", "bitops=W3A3", "--out", "{}/frontier.json"], "is where the frontier is written"),
    (["--frontier", "many"], "invalid int"),
    (["--frontier", "8", "--budget", "memory=1MB"], "name another first"),
    (["--policy", "p.json"], "go together"),
    (["--check", "--budget", "bitops=W3A3"], "go together"),
    (["--policy", "p.json", "--check"], "p.json does not exist"),
    (["--policy", "p.json", "--check", "--frontier", "8"], "ask one of them"),
    (["--budget", "bitops=W3A3", "--rule", "layer0"], "write"),
    (["--budget", "bitops=W3A3", "--rule", "layer9=w4"], "matches no layer"),
    (["--budget", "bitops=W3A3", "--rule", "layer0=w9"], "no bits"),
    (["--budget", "bitops=W3A3", "--config", "configs/digits.py"], "goes with --describe"),
    (["--import-limpq", "x.pkl", "--config", "configs/digits.py"], "give one of them"),
    (["--import-limpq", "x.pkl"], "add --config"),
    (["--budget", "wbits=2", "--budget", "size=W2", "--rule", "layer2=w4"], "least reachable"),
    (["--describe", "--config", "configs/none.py"], "does not exist"),
    (["--frontier", "4", "--report", "{0}/r.html"], "give it with --budget"),
    (["--budget", "bitops=W3A3", "--report", "{0}"], "--report {0} is a folder"),
    (["--budget", "bitops=W3A3", "--report", "{0}/importance.json"], "give another --report"),
    (["--budget", "bitops=W3A3", "--report", "{0}/policy.json"], "give another --report"),
]


@pytest.mark.parametrize("more, words", REFUSED)
def test_refusals(place, capsys, more, words):
    before = (place / "importance.json").read_bytes()
    more = [argument.format(place) for argument in more]
    assert search.main(["--importance", str(place / "importance.json"), *more]) == 2
    assert (place / "importance.json").read_bytes() == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words.format(place) in error
    assert [p.name for p in place.iterdir()] == ["importance.json"]


@pytest.mark.parametrize(
    "budget, code, cvxpy", [("bitops=W3A3", 0, False), ("bitops=W3", 2, False), ("bitops=1K", 2, False)]
)
def test_without_jax(place, budget, code, cvxpy):
    """The whole command in an interpreter that cannot import JAX; CVXPY is imported only where a solver is needed."""
    command = [sys.executable, "-c", GUARD, "--importance", str(place / "importance.json"), "--budget", budget]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == str(cvxpy)
    assert "HiGHS" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--frontier", "5"]])
def test_report_without_jax(place, more):
    """The page has the policy that was written, what it costs, and the frontier; neither JAX nor matplotlib is needed."""
    written = place / "pages" / "r.html"
    blocked = GUARD if more else GUARD.replace('"jax", ', '"jax", "matplotlib", ')
    command = ["--importance", str(place / "importance.json"), "--budget", "bitops=W3A3", "--alpha", "2.5"]
    command += ["--report", str(written), *more]
    done = subprocess.run([sys.executable, "-c", blocked, *command], capture_output=True, text=True)
    assert done.returncode == 0 and f"report: {written}" in done.stdout, done.stderr
    saved = json.loads((place / "policy.json").read_text())
    root = taken_apart(written.read_text())
    layers = {row[1].split()[0]: row[-4] for row in rows_of(table_named(root, "Layers in execution order"))}
    assert layers == {path: "float" if w == 32 else f"W{w}A{a}" for path, (w, a) in saved["bits"].items()}
    used, limit = saved["budgets"]["bitops"]["used"], saved["budgets"]["bitops"]["limit"]
    assert rows_of(table_named(root, "spends of each budget"))[0][-1] == f"{used:,} of {limit:,}"
    points = rows_of(table_named(root, "Policies by their cost"))
    assert ("mixed", f"{saved['objective']:.6g}") in [(row[0], row[2]) for row in points]
    assert sum(row[0] == "best" for row in points) in ((2, 3, 4, 5) if more else range(6, 25))
    assert "less harm" in next(root.all(of="headline")).text and "2.5 times (alpha)" in root.text


def test_rules_on_the_command_line(place, capsys):
    arguments = ["--importance", str(place / "importance.json"), "--budget", "bitops=W3A3"]
    assert search.main([*arguments, "--rule", "layer[23]=equal", "--rule", "layer0=w3+"]) == 0
    shown = capsys.readouterr().out
    policy = load_policy(place / "policy.json", TABLE.layers, TABLE.bit_widths, TABLE.activation_bit_widths)
    assert policy["layer2"].w == policy["layer2"].a and policy["layer3"].w == policy["layer3"].a
    assert policy["layer0"].w >= 3 and "rules: layer[23]=equal; layer0=w3+" in shown


def test_frontier(place, capsys):
    """With a budget the policy is written too, and stands on the picture; without one BitOps are walked."""
    source = ["--importance", str(place / "importance.json")]
    assert search.main([*source, "--frontier", "8"]) == 0
    shown = capsys.readouterr().out
    assert "8 limits, 8 proven optimal" in shown and "uniform W3A3" in shown
    assert sorted(p.name for p in place.iterdir()) == ["frontier.json", "frontier.png", "importance.json"]
    arguments = [*source, "--frontier", "8", "--budget", "size=W3", "--budget", "bitops=W3A3"]
    assert search.main([*arguments, "--out", str(place / "out" / "p.json")]) == 0
    saved = json.loads((place / "out" / "frontier.json").read_text())
    assert saved["budget"] == "size" and saved["others"] == ["bitops=W3A3"] and (place / "out" / "p.json").exists()


def test_check(place, capsys):
    """A policy as found loses nothing; edited it says what it loses, and over the budget it exits with 1."""
    source = ["--importance", str(place / "importance.json")]
    assert search.main([*source, "--budget", "bitops=W3A3", "--budget", "size=W3"]) == 0
    capsys.readouterr()
    path = place / "policy.json"
    before = path.read_bytes()
    assert search.main([*source, "--policy", str(path), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "loses nothing" in shown and "bitops" in shown and "size" in shown and path.read_bytes() == before
    edited = json.loads(before)
    edited["bits"]["layer2"] = [2, 2] if edited["bits"]["layer2"] != [2, 2] else [3, 2]
    path.write_text(json.dumps(edited))
    assert search.main([*source, "--policy", str(path), "--check"]) in (0, 1)
    assert "loses" in capsys.readouterr().out
    edited["bits"] |= {f"layer{i}": [4, 4] for i in range(4)}
    path.write_text(json.dumps(edited))
    assert search.main([*source, "--policy", str(path), "--check"]) == 1
    assert "OVER THE BUDGET" in capsys.readouterr().out
    assert search.main([*source, "--policy", str(path), "--check", "--budget", "bitops=W8A8"]) == 0
    path.write_text(json.dumps({**edited, "budgets": {"latency": {"limit": 3.0}, **edited["budgets"]}}))
    capsys.readouterr()
    assert search.main([*source, "--policy", str(path), "--check"]) == 2
    assert "add --latency latency.json" in capsys.readouterr().err
    del edited["budgets"]
    path.write_text(json.dumps(edited))
    assert search.main([*source, "--policy", str(path), "--check"]) == 0
    assert "what it costs itself" in capsys.readouterr().out
    for wrong in ([], {"bitops": 3}, {"bitops": {"limit": "1"}}, {"size": {"limit": -1}}):
        path.write_text(json.dumps({**edited, "budgets": wrong}))
        assert search.main([*source, "--policy", str(path), "--check"]) == (2 if wrong != {} else 0)
        assert capsys.readouterr().err.count("\n") == 1


def test_import_limpq(tmp_path, capsys):
    """From an indicator file to a policy, and to the table alone."""
    import pickle

    from test_limpq import made as indicators

    (tmp_path / "i.pkl").write_bytes(pickle.dumps(indicators()))
    arguments = ["--import-limpq", str(tmp_path / "i.pkl"), "--config", "configs/cifar10_resnet20.py"]
    arguments += ["--model.name", "resnet8"]
    assert search.main([*arguments, "--out", str(tmp_path / "table.json")]) == 0
    assert "importance of 8 layers" in capsys.readouterr().out and not (tmp_path / "policy.json").exists()
    assert search.main([*arguments, "--budget", "bitops=W3A3"]) == 0
    assert (tmp_path / "policy.json").exists() and "optimal" in capsys.readouterr().out
    assert search.main([*arguments[:2], "--config", "configs/digits.py", "--model.name", "mobilenetv1"]) == 2
    assert "which mobilenetv1 has not" in capsys.readouterr().err


def test_a_killed_search_leaves_the_old_policy_or_a_whole_new_one(place):
    """SIGKILL at moments spread over the whole run."""
    import os
    import signal
    import time

    command = [sys.executable, "search.py", "--importance", str(place / "importance.json"), "--budget", "bitops=W3A3"]
    began = time.monotonic()
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole = time.monotonic() - began
    old = (place / "policy.json").read_text().replace('"mpq-policy"', '"mpq-policy" ')
    seen = set()
    for i in range(8):
        (place / "policy.json").write_text(old)
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.3 + 0.1 * i))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        text = (place / "policy.json").read_text()
        seen.add(text == old)
        if text != old:
            assert json.loads(text)["status"] == "optimal" and text.endswith("}\n")
    assert True in seen


def test_a_loose_budget_is_answered_too(place, capsys):
    """Above what the widest policy costs: no random policy spends it, and the answer says so."""
    arguments = ["--importance", str(place / "importance.json"), "--budget", "bitops=W8A8"]
    assert search.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "none found within 2 %" in shown and "HiGHS" not in shown


def test_describe(capsys):
    assert search.main(["--config", "configs/imagenet_resnet18.py", "--describe", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(layer["searched"] for layer in shown["layers"]) == 19 and len(shown["uniform"]) == 49
    # LIMPQ's table: 22.85 G BitOps at W3A3, 27.93 at W3A4, 11,678,912 weights, 9.93 times smaller at three bits.
    assert round(shown["uniform"]["W3A3"]["bitops"] / 1e9, 2) == 22.85
    assert round(shown["uniform"]["W3A4"]["bitops"] / 1e9, 2) == 27.93
    assert sum(layer["params"] for layer in shown["layers"]) == 11_678_912
    assert round(shown["uniform"]["W3A3"]["compression"], 2) == 9.93
    arguments = ["--config", "configs/digits.py", "--describe", "--model.name", "mobilenetv1"]
    assert search.main([*arguments, "--model.options", '{"small_images": true}']) == 0
    assert "unit1/depthwise" in capsys.readouterr().out
    assert search.main(["--config", "configs/digits.py", "--describe", "--data.name", "mnist"]) == 2
    assert "not known here" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_mistake():
    """search.py | head: the pipe is closed before all is written."""
    text = "import os, sys; os.dup2(int(sys.argv[1]), 1); import search; sys.exit(search.main(sys.argv[2:]))"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", text, str(write), "--config", "configs/digits.py", "--describe"]
    done = subprocess.run(command, pass_fds=[write], capture_output=True, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
