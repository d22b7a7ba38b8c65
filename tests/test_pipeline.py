"""End to end on digits: train, search, fine-tune, report; interrupted and resumed; and what goes wrong on purpose."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_reports import rows_of, table_named, taken_apart

import search
import train
from mpq_jax import config as config_lib
from mpq_jax import data, joint, logs, pipeline, report, stages
from mpq_jax.criteria.learned import RowLog, fit_alpha, load_rows, save_rows
from mpq_jax.importance import load_importance
from mpq_jax.stages.run import sliced, train_batches
from mpq_jax.types import Bits, Importance, Layer, Refusal
from mpq_jax.workdir import latest_step, load_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="cnn_nnx", options={{"width": 0.5}}),
    quantize=Quantize(bit_widths=(2, 3, 4)),
    pretrain=Pretrain(steps=8, batch_size=32, warmup_steps=2),
    joint=Joint(steps=6, batch_size=16),
    finetune=Finetune(steps=4, batch_size=16, random_policies=2),
    eval_batch_size=355,
    statistics_batches=2,
    checkpoint_every=2,
    log_every=2,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the config, and one whole run in it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.py").write_text(CONFIG.format(data=str(root / "data")))
    assert train.main(["--config", str(root / "tiny.py"), "--workdir", str(root / "run")]) == 0
    return root


def arguments(place, run, *more):
    return ["--config", str(place / "tiny.py"), "--workdir", str(place / run), *more]


def test_interrupted_and_resumed_is_the_same(place, monkeypatch):
    """Stopped in the middle of joint training, the run ends with the same files, to the last byte."""
    real = data.train_batches
    served = []

    def stopping(*args, **kwargs):
        for batch in real(*args, **kwargs):
            served.append(1)
            if len(served) == 8 + 1 + 5:  # float training, calibration, five joint steps: one past a checkpoint
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(data, "train_batches", stopping)
    assert train.main(arguments(place, "stopped")) == 130
    assert not (place / "stopped" / "importance.json").exists()
    monkeypatch.setattr(data, "train_batches", real)
    assert train.main(arguments(place, "stopped")) == 0
    for name in ("importance.json", "indicators.json"):
        assert (place / "stopped" / name).read_bytes() == (place / "run" / name).read_bytes()
    for stage in ("pretrain", "joint"):
        lines = [logs.read(place / run / stage / "log.jsonl") for run in ("run", "stopped")]
        assert [line["step"] for line in lines[0]] == {"pretrain": [2, 4, 6, 8], "joint": [2, 4, 6]}[stage]
        assert [{**line, "seconds": 0} for line in lines[0]] == [{**line, "seconds": 0} for line in lines[1]]
    rows = [np.load(place / run / "joint" / "random_rows.npz") for run in ("run", "stopped")]
    for key in rows[0].files:
        np.testing.assert_array_equal(rows[0][key], rows[1][key])
    assert rows[0]["step"].tolist() == [0, 1, 2, 3, 4, 5] and rows[0]["policies"].shape == (6, 2, 2)
    assert set(np.unique(rows[0]["policies"])) <= {2, 3, 4}


def test_search_and_finetune(place, capsys):
    """The policy keeps its budget; the report compares float, uniform, random and mixed, and its numbers agree."""
    run = place / "run"
    assert search.main(["--workdir", str(run), "--budget", "bitops=W3A3"]) == 0
    policy = json.loads((run / "policy.json").read_text())
    assert policy["status"] == "optimal"
    assert policy["budgets"]["bitops"]["used"] <= policy["budgets"]["bitops"]["limit"]
    capsys.readouterr()
    assert train.main(arguments(place, "run", "--policy", str(run / "policy.json"))) == 0
    shown = capsys.readouterr().out
    rows = json.loads((run / "results.json").read_text())["rows"]
    names = [row["name"] for row in rows]
    assert names[0] == "float" and names[-1] == "mixed" and any(n.startswith("uniform W") for n in names)
    assert "random (mean of 2)" in names and all(name in shown for name in names)
    table = load_importance(run / "importance.json")
    bits = policy["bits"]
    by_hand = sum(layer.macs * bits[layer.path][0] * bits[layer.path][1] for layer in table.layers)
    assert rows[-1]["bitops"] == by_hand == policy["budgets"]["bitops"]["used"]
    assert rows[0]["bitops"] == sum(layer.macs for layer in table.layers) * 1024
    assert all(0 <= row["accuracy"] <= 1 and np.isfinite(row["loss"]) for row in rows)
    page = taken_apart((run / "report.html").read_text())
    assert f"report: {run / 'report.html'}" in shown
    accuracies = {cells[0]: cells[1] for cells in rows_of(table_named(page, "Contestants"))}
    assert accuracies["mixed"] == f"{100 * rows[-1]['accuracy']:.2f}" and list(accuracies) == names
    settings = dict(rows_of(table_named(page, "config")))
    assert settings["joint.steps"] == "6" and "data.data_dir" not in settings and str(place) not in page.text
    points = [row for row in rows_of(table_named(page, "Policies by their cost")) if row[0] == "mixed"]
    assert float(points[0][2]) == pytest.approx(policy["objective"], rel=1e-5)
    report = (run / "report.md").read_text()
    assert "mixed" in report and len(list((run / "figures").glob("*.png"))) >= 3


@pytest.mark.parametrize(
    "more, words",
    [
        (["--joint.stepz", "3"], "nearest is --joint.steps"),
        (["--polcy", "x"], "nearest is --policy"),
        (["--joint.steps", "7"], "another run"),
        (["--policy", "missing.json"], "does not exist"),
        (["--model.name", "resnet9"], "another run"),
    ],
)
def test_refusals(place, capsys, more, words):
    assert train.main(arguments(place, "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model.name", "resnet9"], "did you mean 'resnet"),
        (["--model.name", "nowhere:factory"], "there is no module"),
        (["--data.name", "cifar10"], "tfds build"),
        (["--quantize.quantizer", "lsk"], "choose one of lsq"),
        (["--quantize.rules", "nothing=float"], "matches no layer"),
        (["--quantize.bit_widths", "1,2"], "from 2 to 16"),
        (["--joint.alpha", "-1"], "positive number"),
        (["--joint.weights", "fixed"], '"still" or "trained"'),
        (["--joint.slices", "true", "--joint.distill", "0.5"], "leave out joint.slices"),
        (["--joint.slices", "true", "--joint.batch_size", "3"], "take at least --joint.batch_size 4"),
        (["--joint.slices", "maybe"], 'choose "auto", "true" or "false"'),
        (["--joint.bit_widths", "2,3"], "with 2 and 4 among them"),
        (["--joint.settled", "0.1", "--joint.weights", "trained"], "still weights; leave it out"),
    ],
)
def test_refusals_of_a_new_run(place, tmp_path, capsys, more, words):
    code = train.main(
        ["--config", str(place / "tiny.py"), "--workdir", str(tmp_path / "new"), "--pretrain.steps", "1", *more]
    )
    error = capsys.readouterr().err
    assert code == 2 and words in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == error.splitlines()[-1:]
    assert not (tmp_path / "new" / "importance.json").exists()


def test_policy_of_another_model(place, tmp_path, capsys):
    bits = {"format": "mpq-policy", "version": 1, "bits": {"other": [2, 2]}}
    (tmp_path / "policy.json").write_text(json.dumps(bits))
    assert train.main(arguments(place, "run", "--policy", str(tmp_path / "policy.json"))) == 2
    assert "does not have" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("every", "words"),
    [
        ("40", r"the loss of row float is not finite at step (\d+) of pretrain"),
        ("2", r"\['bias'\] is not finite after step (\d+) of pretrain"),  # a checkpoint is due before the loss is nan
    ],
    ids=["loss", "parameters"],
)
def test_training_that_is_not_finite_stops(place, capsys, every, words):
    """A learning rate that explodes: row or parameter, and step, are named, the last good checkpoint is kept."""
    more = ["--pretrain.learning_rate", "1e30", "--pretrain.warmup_steps", "0", "--pretrain.steps", "40"]
    run = f"exploded {every}"
    code = train.main(arguments(place, run, *more, "--checkpoint_every", every))
    error = capsys.readouterr().err.splitlines()[-1]
    found = re.search(words, error)
    kept = sorted(int(p.name) for p in (place / run / "pretrain").iterdir() if p.name.isdigit())
    assert code == 2 and found and ("last good checkpoint" in error) == bool(kept)
    assert all(k <= int(found[1]) for k in kept)


def test_paper_recipe_and_options_run(place, tmp_path):
    """The paper's recipe, and every option of joint training at once, run and give a finite table."""
    more = [
        *("--joint.weights", "trained", "--joint.step_size_optimizer", "sgd", "--joint.error_weight", "0"),
        *("--joint.same_bits", "true", "--joint.affine_per_row", "true", "--joint.label_smoothing", "0.1"),
        *("--joint.distill", "0.5", "--joint.average", "0.9", "--joint.accumulate", "2", "--joint.random_rows", "2"),
        *("--quantize.per_channel", "true", "--joint.steps", "4", "--model.dtype", "bfloat16"),
        *("--joint.recompute", "true"),
    ]
    run = str(tmp_path / "paper")
    assert train.main(["--config", str(place / "tiny.py"), "--workdir", run, *more]) == 0
    table = load_importance(Path(run) / "importance.json")
    assert np.isfinite(table.weight).all() and (table.weight > 0).all() and table.weight.shape == (2, 3)
    log = np.load(Path(run) / "joint" / "random_rows.npz")
    np.testing.assert_array_equal(log["policies"][..., 0], log["policies"][..., 1])
    assert len(log["step"]) == 8


@pytest.mark.parametrize(
    "settings, rows, wanted",
    [
        (config_lib.Joint(), 6, True),  # ten samples a row
        (config_lib.Joint(), 7, False),
        (config_lib.Joint(batch_size=59), 6, False),
        (config_lib.Joint(slices="true"), 64, True),
        (config_lib.Joint(slices="false"), 2, False),
        (config_lib.Joint(slices=False), 2, False),
        (config_lib.Joint(slices="1"), 64, True),
        (config_lib.Joint(weights="trained"), 6, False),
        (config_lib.Joint(distill=0.5), 6, False),
        (config_lib.Joint(alpha_policies=0), 6, False),
        (config_lib.Joint(alpha_policies=0, alpha="2"), 6, True),
        (config_lib.PAPER_JOINT, 2, False),
    ],
)
def test_when_rows_see_slices_of_the_batch(settings, rows, wanted):
    assert sliced(settings, rows) == wanted


CHEAPER = [
    *("--joint.slices", "true", "--joint.bit_widths", "2,4", "--joint.alpha_policies", "20"),
    *("--joint.steps", "20", "--joint.settled", "10", "--joint.window", "2"),  # any window is within 10 of the last
]


def test_cheaper_joint_training_stopped_and_resumed(place, monkeypatch):
    """Slices, fewer widths and a test of rest: it ends early, and the same if it was killed on the way."""
    for run in ("cheaper", "cheaper stopped"):
        shutil.copytree(place / "run" / "pretrain", place / run / "pretrain")
    assert train.main(arguments(place, "cheaper", *CHEAPER)) == 0
    # Error alone for 20 // 4 steps, two windows that hardly differ, two windows of cooling down.
    assert latest_step(place / "cheaper" / "joint") == 5 + 2 * 2 + 2 * 2
    real, served = data.train_batches, []

    def stopping(*args, **kwargs):
        for batch in real(*args, **kwargs):
            served.append(1)
            if len(served) == 1 + 11:  # calibration, then ten joint steps, within the cool-down
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(data, "train_batches", stopping)
    assert train.main(arguments(place, "cheaper stopped", *CHEAPER)) == 130
    monkeypatch.setattr(data, "train_batches", real)
    assert train.main(arguments(place, "cheaper stopped", *CHEAPER)) == 0
    for name in ("importance.json", "indicators.json"):
        assert (place / "cheaper stopped" / name).read_bytes() == (place / "cheaper" / name).read_bytes()
    table = load_importance(place / "cheaper" / "importance.json")
    saved = json.loads((place / "cheaper" / "indicators.json").read_text())["learned"]
    for kind in ("weight", "activation"):
        two, three, four = np.array(saved[kind]).T
        np.testing.assert_allclose(three, np.sqrt(two * four), rtol=1e-5)
    log = np.load(place / "cheaper" / "joint" / "random_rows.npz")
    assert set(np.unique(log["policies"])) == {2, 4} and log["uniform"].shape[1] == 2
    # Alpha is that of policies measured after training, each by itself here, on the same two batches.
    config = load_config(place / "cheaper")
    run = stages.open_run(config, place / "cheaper")
    state, _ = stages.joint_train(run, stages.calibrated(run, stages.finished_float(run)))
    rows = stages.measured_rows(run, state, 20)
    for mine, kept in zip(
        rows, load_rows(place / "cheaper" / "joint" / "alpha_rows.npz", run.model.layers), strict=True
    ):
        np.testing.assert_array_equal(mine, kept)
    assert len(rows.loss) == 24 and table.alpha == fit_alpha(table._replace(**_arrays(saved)), rows)
    variables, task = joint.row_variables(state, 0), joint.classification()
    batches = list(itertools.islice(train_batches(run, 16, "alpha")(0), 2))
    for number in (0, 23):
        bits = rows.policies[number]
        chosen = {
            **{layer.path: layer.bits for layer in run.model.layers if layer.bits},
            **dict(zip((ly.path for ly in run.model.layers if ly.searched), (Bits(*b) for b in bits), strict=True)),
        }
        outputs = [
            run.model.apply(variables, chosen, batch["image"], train=True, mutable=["batch_stats"])[0]
            for batch in batches
        ]
        losses = [float(task.loss(out, batch)) for out, batch in zip(outputs, batches, strict=True)]
        np.testing.assert_allclose(rows.loss[number], np.mean(losses), rtol=1e-4)


def _arrays(tables):
    return {kind: np.array(tables[kind]) for kind in ("weight", "activation")}


def test_fit_alpha_finds_the_alpha_of_made_losses():
    rng = np.random.default_rng(0)
    widths = (2, 3, 4)
    layers = tuple(Layer(f"l{i}", 1, 1, True) for i in range(5))
    weight, activation = (np.sort(rng.random((5, 3)))[:, ::-1] for _ in range(2))
    policies = rng.integers(2, 5, (400, 5, 2))
    rows = np.arange(5)
    harm = activation[rows, policies[..., 1] - 2].sum(1) + 3.0 * weight[rows, policies[..., 0] - 2].sum(1)
    drift = rng.normal(size=400)
    log = RowLog(np.arange(400), policies, (0.2 * harm + drift + 0.7).astype(np.float32), drift.astype(np.float32))
    table = Importance("learned", widths, widths, layers, weight, activation)
    assert abs(np.log(fit_alpha(table, log) / 3.0)) < 0.1
    assert fit_alpha(table, log._replace(**{k: getattr(log, k)[:4] for k in log._fields})) == 1.0


def test_a_log_is_read_under_the_name_that_policies_had(tmp_path):
    rng = np.random.default_rng(1)
    layers = (Layer("a", 4, 4, True), Layer("fixed", 4, 4, False, Bits(8, 8)), Layer("b", 4, 4, True))
    log = RowLog(np.arange(3), rng.integers(2, 5, (3, 2, 2)), rng.random(3), rng.random(3))
    save_rows(tmp_path / "new.npz", layers, log)
    with np.load(tmp_path / "new.npz") as file:
        np.savez(tmp_path / "old.npz", **{"assignment" if name == "policies" else name: file[name] for name in file})
    for name in ("new", "old"):
        for mine, kept in zip(log, load_rows(tmp_path / f"{name}.npz", layers), strict=True):
            np.testing.assert_array_equal(mine, kept)


def test_a_log_is_gone_on_with_under_the_name_that_policies_had(tmp_path):
    """Killed after step 4, its checkpoint of step 3: what was logged until then stays, in a file of today's names."""
    rng = np.random.default_rng(2)
    layers, steps = (Layer("a", 4, 4, True), Layer("b", 4, 4, True)), np.repeat(np.arange(6), 2).astype(np.int32)
    policies, losses = rng.integers(2, 5, (12, 2, 2)), rng.random((12, 4)).astype(np.float32)
    uniform = np.repeat(losses[::2, :3], 2, axis=0)
    path = tmp_path / "random_rows.npz"
    old = {"step": steps, "assignment": policies, "loss": losses[:, 3], "uniform": uniform}
    np.savez(path, layers=np.array(["a", "b"]), **{name: values[:8] for name, values in old.items()})
    log = stages.RowLogFile(path, 3, ["a", "b"])
    log.load(3)
    for i in range(3, 6):
        both = slice(2 * i, 2 * i + 2)
        log.add(i, {"policies": policies[both], "losses": np.concatenate([uniform[2 * i], losses[both, 3]])})
    log.flush()
    with np.load(path) as file:
        assert set(file) == {"layers", "step", "policies", "loss", "uniform"}
    for found in (log.log(), load_rows(path, layers)):
        expected = (steps, policies, losses[:, 3], uniform.mean(-1))
        for mine, given in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, given, rtol=1e-6)


def test_a_loss_that_is_no_number_is_null_in_results():
    """Test data with NaN in them, say: found out after everything has been fine-tuned."""
    row = report.AccuracyRow("mixed", 0.5, None, 1, float("nan"), 10, 20)
    found = json.loads(json.dumps(pipeline._as_json(row), allow_nan=False))
    assert found == {**row._asdict(), "loss": None}


@pytest.mark.parametrize("damage", ["half", "text", "npy", "missing", "empty"])
def test_a_log_that_is_none_is_refused(tmp_path, damage):
    path, layers = tmp_path / "random_rows.npz", (Layer("a", 4, 4, True),)
    save_rows(path, layers, RowLog(np.arange(9), np.full((9, 1, 2), 3, np.int32), np.ones(9), np.ones(9)))
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "text": b"rows", "empty": b""}.get(damage, whole))
    if damage == "npy":
        np.save(tmp_path / "array.npy", np.ones(3))
        (tmp_path / "array.npy").replace(path)
    if damage == "missing":
        path.unlink()
    with pytest.raises(Refusal, match="cannot be read"):
        load_rows(path, layers)
    with pytest.raises(Refusal, match="cannot be read"):
        stages.RowLogFile(path, 3, ["a"]).load(3)


def test_dropout_scan_and_no_batch_statistics(place, tmp_path):
    """A Linen ViT, its blocks scanned, with dropout and without BatchNorm, from training to a report."""
    options = '{"depth": 2, "dim": 8, "heads": 2, "patch_size": 4, "dropout": 0.1, "scan": true}'
    more = ["--model.name", "vit", "--model.options", options, "--finetune.compare", "false", "--joint.steps", "3"]
    more += ["--joint.random_rows", "1", "--joint.recompute", "true", "--finetune.recompute", "true"]
    command = ["--config", str(place / "tiny.py"), "--workdir", str(tmp_path / "vit"), *more]
    assert train.main(command) == 0
    table = load_importance(tmp_path / "vit" / "importance.json")
    assert sum("[1]" in layer.path for layer in table.layers) == 6  # query, key, value, out, fc1, fc2
    assert search.main(["--workdir", str(tmp_path / "vit"), "--budget", "bitops=W3A3"]) == 0
    assert train.main([*command, "--policy", str(tmp_path / "vit" / "policy.json")]) == 0
    rows = json.loads((tmp_path / "vit" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["float", "mixed"]
