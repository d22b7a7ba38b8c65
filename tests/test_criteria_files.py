"""search.py --criterion on runs: computed once, kept, made anew when stale; the path without training; refusals."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import search
import train
from mpq_jax.config import Config, Criteria, Quantize, from_json, to_json
from mpq_jax.criteria import CRITERIA, compute, files
from mpq_jax.importance import load_importance, sha256

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="criteria_nets:Tiny"),
    quantize=Quantize(bit_widths=(2, 3, 4), rules=("dense3=w2/4,a2/3/4",)),
    pretrain=Pretrain(steps=8, batch_size=32, warmup_steps=2),
    joint=Joint(steps=30, batch_size=16),
    finetune=Finetune(steps=2, batch_size=16, compare=False),
    criteria=Criteria(samples=64, batch_size=32, hessian_samples=32, max_draws=10, settled=1.0, policies=20),
    eval_batch_size=355, statistics_batches=2, checkpoint_every=4, log_every=4,
)
"""
BUDGET = ("--budget", "bitops=W3A3")
# Imports of these fail in the child.
WITHOUT_JAX = """
import sys
for name in ("jax", "flax", "optax", "orbax", "tensorflow_datasets", "grain"):
    sys.modules[name] = None
import search
sys.exit(search.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the config, a run of float training alone, and a copy of it that joint training followed."""
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.py").write_text(CONFIG.format(data=str(root / "data")))
    assert train.main(["--config", str(root / "tiny.py"), "--workdir", str(root / "float"), "--float-only"]) == 0
    shutil.copytree(root / "float", root / "joint")
    assert train.main(["--config", str(root / "tiny.py"), "--workdir", str(root / "joint")]) == 0
    return root


def wanted(place, run, name, *more):
    return search.main(["--workdir", str(place / run), "--criterion", name, *BUDGET, *more])


def error_of(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def without_jax(*arguments):
    return subprocess.run([sys.executable, "-c", WITHOUT_JAX, *arguments], capture_output=True, text=True)


def test_the_path_without_training(place, capsys):
    """Float weights, output-Fisher, policy, fine-tuning from the calibrated model: no joint training anywhere."""
    run = place / "float"
    assert not (run / "joint").exists() and not (run / "importance.json").exists()
    assert wanted(place, "float", "output_fisher") == 0
    shown = capsys.readouterr().out
    assert "criterion output_fisher" in shown and "unit: loss" in shown and "passes over the training set" in shown
    policy = json.loads((run / "policy.json").read_text())
    assert policy["status"] == "optimal" and set(policy["bits"]) == {"dense1", "dense2", "dense3", "head"}
    command = ["--config", str(place / "tiny.py"), "--workdir", str(run), "--policy", str(run / "policy.json")]
    assert train.main(command) == 2
    assert "--finetune.start float" in error_of(capsys)
    assert train.main([*command, "--finetune.start", "float"]) == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "mixed"]
    report = (run / "report.md").read_text()
    assert "Criterion: output_fisher" in report and "importance_output_fisher.json (SHA-256)" in report
    assert not (run / "joint").exists()


def test_kept_reused_and_made_anew(place, capsys, monkeypatch):
    run = place / "joint"
    assert wanted(place, "joint", "mpqco") == 0
    file = run / "importance_mpqco.json"
    about = json.loads(file.read_text())["about"]
    assert about["unit"] == "loss" and about["sample_passes"] == pytest.approx(64 * (2 + 6) / 3)
    assert about["made_from"]["criteria"] == {
        "samples": 64,
        "batch_size": 32,
        "step_sizes": "calibrated",
        "uniform_activations": 0,
    }
    calls, real = [], compute.compute
    monkeypatch.setattr(compute, "compute", lambda *a, **k: calls.append(a[0]) or real(*a, **k))
    before = file.read_bytes()
    # Reused, also without JAX, and whatever settings it does not depend on.
    assert wanted(place, "joint", "mpqco", "--criteria.monotone", "true") == 0 and not calls
    done = without_jax("--workdir", str(run), "--criterion", "mpqco", *BUDGET)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == before
    # Made anew for other settings, for another checkpoint, for another config.
    assert wanted(place, "joint", "mpqco", "--criteria.samples", "32") == 0 and calls == ["mpqco"]
    assert file.read_bytes() != before
    assert wanted(place, "joint", "mpqco") == 0 and len(calls) == 2 and file.read_bytes() == before
    for change in ({"files": {"_CHECKPOINT_METADATA": "0"}}, {"config": {"seed": 1}}):
        value = json.loads(before)
        value["about"]["made_from"] |= change
        file.write_text(json.dumps(value))
        assert wanted(place, "joint", "mpqco") == 0
    assert len(calls) == 4 and file.read_bytes() == before
    # Somebody's own file is left alone.
    value.pop("about")
    file.write_text(json.dumps(value))
    capsys.readouterr()
    assert wanted(place, "joint", "mpqco") == 2
    assert "does not say what it was made from" in error_of(capsys) and len(calls) == 4
    assert json.loads(file.read_text()) == value
    file.unlink()


def made_with(policy):
    """The digest of the table that a policy was found with."""
    return json.loads(Path(policy).read_text())["importance_sha256"]


def test_the_default_is_there_after_training(place, tmp_path, capsys):
    """train.py leaves the table that search.py takes, so that this needs neither JAX nor data; a name still chooses."""
    run = tmp_path / "run"
    shutil.copytree(place / "joint", run)
    command = ["--config", str(place / "tiny.py"), "--workdir", str(run)]
    (run / "importance_output_fisher.json").unlink(missing_ok=True)
    assert train.main(command) == 0  # again: nothing is trained, the table is measured
    assert "criterion output_fisher" in capsys.readouterr().out
    done = without_jax("--workdir", str(run), *BUDGET)
    assert done.returncode == 0 and "criterion: output_fisher" in done.stdout, done.stderr
    assert made_with(run / "policy.json") == sha256(run / "importance_output_fisher.json")
    learned = tmp_path / "learned.json"
    done = without_jax("--workdir", str(run), *BUDGET, "--criterion", "learned", "--out", str(learned))
    assert done.returncode == 0 and made_with(learned) == sha256(run / "importance.json"), done.stderr
    # A check is of the table that the policy was found with.
    for policy, file in ((run / "policy.json", "importance_output_fisher.json"), (learned, "importance.json")):
        done = without_jax("--workdir", str(run), "--policy", str(policy), "--check")
        assert done.returncode == 0 and f"importance: {run / file}" in done.stdout, done.stderr
        assert "loses nothing against the best" in done.stdout, done.stdout
    # The same table that a search measures by itself, from the files.
    from_training = json.loads((run / "importance_output_fisher.json").read_text())
    (run / "importance_output_fisher.json").unlink()
    assert search.main(["--workdir", str(run), *BUDGET]) == 0
    assert json.loads((run / "importance_output_fisher.json").read_text()) == from_training
    # Where it cannot be made any more, there is another.
    (run / "importance_output_fisher.json").unlink()
    shutil.rmtree(run / "pretrain")
    done = without_jax("--workdir", str(run), *BUDGET)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "finished float checkpoint" in done.stderr and "--criterion learned" in done.stderr


def test_another_default(place, tmp_path, capsys):
    """search.criterion: whose table training leaves and searches take; refused, or put off, as each must be."""
    command = ["--config", str(place / "tiny.py"), "--workdir"]
    assert train.main([*command, str(tmp_path / "learned"), "--search.criterion", "learned"]) == 0
    assert not list((tmp_path / "learned").glob("importance_*.json"))
    assert search.main(["--workdir", str(tmp_path / "learned"), *BUDGET]) == 0
    assert made_with(tmp_path / "learned" / "policy.json") == sha256(tmp_path / "learned" / "importance.json")
    capsys.readouterr()
    assert train.main([*command, str(tmp_path / "new"), "--search.criterion", "learnt"]) == 2
    assert "did you mean learned?" in error_of(capsys) and not (tmp_path / "new").exists()
    # A run of float training alone is searched, too.
    float_run = tmp_path / "float"
    shutil.copytree(place / "float", float_run)
    (float_run / "importance_output_fisher.json").unlink(missing_ok=True)
    assert search.main(["--workdir", str(float_run), *BUDGET]) == 0
    assert made_with(float_run / "policy.json") == sha256(float_run / "importance_output_fisher.json")
    # Without a checkpoint, the table that is there can still be searched, by its file.
    pretrain = (float_run / "pretrain").rename(tmp_path / "moved")
    assert search.main(["--workdir", str(float_run), *BUDGET]) == 2
    assert f"--importance {float_run / 'importance_output_fisher.json'}" in error_of(capsys)
    pretrain.rename(float_run / "pretrain")
    # Settings of the criterion, for the default too.
    assert search.main(["--workdir", str(float_run), *BUDGET, "--criteria.alpha", "2"]) == 0
    assert "alpha: 2 (of the table)" in capsys.readouterr().out
    # The last training command decides. What needs the budgets waits for them; a refusal does not undo the training.
    run = str(tmp_path / "joint")
    shutil.copytree(place / "joint", run)
    for more, words in (
        (("--search.criterion", "sampled"), "criterion sampled is measured by the first search"),
        (("--criteria.samples", "0"), "criterion output_fisher was not measured: criteria.samples is 0"),
    ):
        capsys.readouterr()
        kept = (Path(run) / "config.json").read_bytes()
        for refused in (("--search.criterion", "learnt"), ("--search.rules", "nothing=w4")):
            assert train.main([*command, run, *refused]) == 2
            assert (Path(run) / "config.json").read_bytes() == kept
        capsys.readouterr()
        assert train.main([*command, run, *more]) == 0
        assert words in capsys.readouterr().out
        assert files.default(Path(run)) == ("sampled" if "sampled" in more else "output_fisher")
    assert train.main([*command, run, "--search.rules", "dense2=w4"]) == 0
    measured = json.loads((Path(run) / "importance_output_fisher.json").read_text())
    assert search.main(["--workdir", run, *BUDGET]) == 0 and "rules: dense2=w4" in capsys.readouterr().out
    assert json.loads((Path(run) / "policy.json").read_text())["bits"]["dense2"][0] == 4
    # Other rules change no number of the table, and it is not measured again.
    assert train.main([*command, run]) == 0 and "criterion output_fisher:" not in capsys.readouterr().out
    assert measured.pop("rules") == ["dense2=w4"]
    assert json.loads((Path(run) / "importance_output_fisher.json").read_text()) == measured


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_ends_as_a_table(place, name, capsys):
    """Finite, of the right shape, each layer's taken width the largest of its row; and a policy within the budget."""
    code = wanted(place, "joint", name, "--out", str(place / f"{name}.json"))
    shown = capsys.readouterr()
    table = load_importance(files.path_of(place / "joint", name))
    assert [layer.path for layer in table.layers if layer.searched] == ["dense2", "dense3"]
    assert table.criterion == name and table.weight.shape == table.activation.shape == (2, 3)
    assert np.isfinite(table.weight).all() and np.isfinite(table.activation).all() and table.weight.any()
    assert table.weight[1, 1] == max(table.weight[1, [0, 2]])
    assert (table.alpha is not None) == ("alpha" in CRITERIA[name].unit)
    assert code == 0 and len(table.interactions) == (4 if name == "regression_pairwise" else 0)
    assert json.loads((place / f"{name}.json").read_text())["budgets"]["bitops"]["used"] > 0
    if name not in ("learned", Config().search.criterion):  # joint training has measured that one
        about = json.loads(files.path_of(place / "joint", name).read_text())["about"]
        assert about["cost"] == CRITERIA[name].cost and f"criterion {name}: {CRITERIA[name].line}" in shown.out


def test_memory_that_is_too_short_does_not_undo_the_training(place, tmp_path, capsys, monkeypatch):
    def short(*_, **__):
        raise jax.errors.JaxRuntimeError(words)

    run = tmp_path / "run"
    shutil.copytree(place / "joint", run)
    for file in run.glob("importance*.json"):
        file.unlink()
    monkeypatch.setattr(compute, "compute", short)
    command = ["--config", str(place / "tiny.py"), "--workdir", str(run)]
    words = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError):
        train.main(command)
    words = "RESOURCE_EXHAUSTED: Out of memory"
    assert train.main(command) == 0 and (run / "importance.json").is_file()
    assert "memory is too short for 32 samples" in capsys.readouterr().out


def test_learned_step_sizes_by_option(place):
    """criteria.step_sizes joint: other quantization errors than those of calibration."""
    tables = []
    for choice in ("calibrated", "joint"):
        assert wanted(place, "joint", "output_fisher", "--criteria.step_sizes", choice) == 0
        tables.append(load_importance(place / "joint" / "importance_output_fisher.json"))
    assert not np.allclose(tables[0].weight, tables[1].weight)


def test_uniform_activations_end_in_a_policy(place, capsys):
    out = place / "published.json"
    more = ("--out", str(out), "--criteria.uniform_activations")
    assert wanted(place, "joint", "mpqco", *more, "3") == 0
    bits = json.loads(out.read_text())["bits"]
    assert bits["dense2"][1] == bits["dense3"][1] == 3
    capsys.readouterr()
    assert wanted(place, "joint", "mpqco", *more, "5") == 2
    assert "choose one that every layer has" in capsys.readouterr().err


REFUSED = [
    ("float", ["regression"], "needs the log of joint training's random rows"),
    ("float", ["regression_pairwise"], "needs the log of joint training's random rows"),
    ("float", ["power_law"], "needs the learned step sizes"),
    ("float", ["learned"], "criteria without it: hawq, hawq_v2, mpqco, output_fisher, one_at_a_time, initial, random"),
    ("float", ["hawq", "--criteria.step_sizes", "joint"], "needs the learned step sizes"),
    ("joint", ["fisher"], "there are: learned, hawq, hawq_v2, mpqco, output_fisher, regression, regression_pairwise"),
    ("joint", ["hawq", "--criteria.samples", "0"], "give a number from 1"),
    ("joint", ["hawq", "--criteria.relative_error", "0"], "between 0 and 1"),
    ("joint", ["hawq", "--criteria.step_sizes", "best"], '"calibrated" or "joint"'),
    ("joint", ["hawq", "--criteria.sample", "5"], "nearest is --criteria.samples"),
    ("joint", ["hawq", "--joint.steps", "5"], "unknown option --joint.steps"),
    ("nothing", ["hawq"], "does not exist"),
]


@pytest.mark.parametrize("run, more, words", REFUSED)
def test_refused_before_it_starts(place, capsys, monkeypatch, run, more, words):
    def started(*_):
        raise AssertionError("started")

    monkeypatch.setattr(compute, "compute", started)
    assert search.main(["--workdir", str(place / run), *BUDGET, "--criterion", *more]) == 2
    assert words in error_of(capsys)


def test_refused_without_jax(place, tmp_path):
    """An unknown name, and a checkpoint that is not there or not finished: said without importing JAX."""
    run = tmp_path / "run"
    shutil.copytree(place / "float", run, ignore=lambda *_: ["8"])
    for name, words in (("hawq", "has one at step 4 of 8"), ("nope", "there are: learned")):
        done = without_jax("--workdir", str(run), "--criterion", name, *BUDGET)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    shutil.rmtree(run / "pretrain")
    done = without_jax("--workdir", str(run), "--criterion", "output_fisher", *BUDGET)
    assert done.returncode == 2 and "needs the finished float checkpoint" in done.stderr and "has none" in done.stderr
    assert "--float-only" in done.stderr


def test_options_that_exclude_each_other(place, capsys):
    table = str(place / "joint" / "importance.json")
    assert search.main(["--importance", table, "--criterion", "hawq", *BUDGET]) == 2
    assert "give one of them" in error_of(capsys)
    assert search.main(["--importance", table, *BUDGET, "--criteria.samples", "5"]) == 2
    assert "unknown option --criteria.samples" in error_of(capsys)
    command = ["--config", str(place / "tiny.py"), "--workdir", str(place / "float")]
    assert train.main([*command, "--float-only", "--policy", table]) == 2
    assert "give one of them" in error_of(capsys)


def test_the_documentation_lists_every_criterion():
    text = (Path(__file__).parent.parent / "docs" / "reference" / "criteria.md").read_text()
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(CRITERIA) == set(rows)


def test_config_round_trip():
    config = Config(seed=3, quantize=Quantize(bit_widths=(2, 8), rules=("a=float",)), criteria=Criteria(samples=7))
    assert from_json(to_json(config)) == config
    older = to_json(config)
    older.pop("criteria")
    assert from_json(older).criteria == Criteria()
    # Runs from before there were slices trained on whole batches; then they were a matter of true and false.
    for said, meant in (({}, "false"), ({"slices": True}, "true"), ({"slices": "auto"}, "auto")):
        assert from_json({"joint": {"steps": 3, **said}}).joint.slices == meant
    with pytest.raises(TypeError):
        from_json({"joint": {"weights": True}})
    with pytest.raises(KeyError):
        from_json({"joint": {"stepz": 3}})


def test_policies_are_drawn_near_the_budgets_asked_for(place, capsys):
    assert files.near("sampled", ["bitops=W3A3", "latency=3ms", "size=W4"]) == [
        "--criteria.near",
        "bitops=W3A3;size=W4",
    ]
    assert files.near("sampled", ["latency=3ms"]) == files.near("hawq", ["bitops=W3A3"]) == []
    assert wanted(place, "joint", "sampled") == 0
    about = json.loads((place / "joint" / "importance_sampled.json").read_text())["about"]
    assert about["made_from"]["criteria"]["near"] == ["bitops=W3A3"] and "bitops=W3A3" in about["notes"][0]
