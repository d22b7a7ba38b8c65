"""search.py --method: every method on a tiny run, its files, a kill in between, and what is refused."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from measured import log_without_seconds

import search
import train
from mpq_jax import Bits, Refusal, costs, data, joint, stages
from mpq_jax.importance import load_importance
from mpq_jax.policy import load_policy, stack
from mpq_jax.search import gumbel, measure, methods, run
from mpq_jax.search.journal import Evaluation, Outcome
from mpq_jax.stages import evaluation

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="cnn_nnx", options={{"width": 0.25}}),
    quantize=Quantize(bit_widths=(2, 4)),
    pretrain=Pretrain(steps=20, batch_size=32, warmup_steps=2),
    joint=Joint(steps=2, batch_size=16, random_rows=1),
    finetune=Finetune(steps=2, batch_size=16, compare=False),
    eval_batch_size=144,
    statistics_batches=1,
    checkpoint_every=2,
    log_every=2,
)
"""
BUDGETS = ["--budget", "bitops=W3A3", "--budget", "size=W3"]
FEW = {
    "evolution": ["--evaluations", "4"],
    "haq": ["--evaluations", "3", "--haq.warmup_episodes", "1", "--haq.hidden", "8", "--haq.finetune_steps", "0"],
    "autoq": ["--evaluations", "2", "--autoq.hidden", "8", "--autoq.finetune_steps", "1"],
    "gumbel": ["--evaluations", "2", "--gumbel.steps", "4", "--gumbel.warmup_steps", "1", "--gumbel.batch_size", "8"],
    "edmips": ["--edmips.steps", "4", "--edmips.warmup_steps=1", "--edmips.batch_size", "8"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "tiny.py").write_text(CONFIG.format(data=str(root / "data")))
    assert train.main(["--config", str(root / "tiny.py"), "--workdir", str(root / "run")]) == 0
    return root


@pytest.fixture(scope="module")
def opened(place):
    """The run, opened once: its functions are compiled once for all tests."""
    return measure.open_bench(place / "run", methods.Measuring())


@pytest.fixture
def quick(opened, monkeypatch):
    monkeypatch.setattr(measure, "open_bench", lambda workdir, settings: opened._replace(settings=settings))


def command(place, method, *more, out=None):
    return [
        "--workdir",
        str(place / "run"),
        *BUDGETS,
        "--method",
        method,
        *FEW[method],
        *more,
        "--out",
        str(out or place / f"{method}.json"),
    ]


def log_of(place, method):
    (folder,) = (place / "run" / f"search_{method}").iterdir()
    return folder


@pytest.mark.parametrize("method", list(FEW))
def test_every_method(place, quick, capsys, method):
    """A valid policy within both budgets, that of the log's best line; run again, nothing is measured twice."""
    assert search.main(command(place, method)) == 0
    shown = capsys.readouterr().out
    table = load_importance(place / "run" / "importance.json")
    policy = load_policy(place / f"{method}.json", table.layers, table.bit_widths, table.activation_bit_widths)
    saved = json.loads((place / f"{method}.json").read_text())
    assert (saved["status"], saved["bound"], saved["solver"]) == ("feasible", None, method) and saved["seconds"] > 0
    for name, cost in (("bitops", costs.bitops), ("size", costs.size)):
        used = saved["budgets"][name]["used"]
        assert used == cost(table.layers, policy) <= saved["budgets"][name]["limit"]
    lines = log_without_seconds(log_of(place, method) / "evaluations.jsonl")
    assert len(lines) == (int(FEW[method][1]) if "--evaluations" in FEW[method] else 1)
    by_accuracy = method in ("haq", "autoq")
    best = min(lines, key=lambda line: (-line["accuracy"] if by_accuracy else 0, line["loss"]))
    assert best["loss"] == saved["objective"] and best["policy"] == saved["bits"]
    assert f"validation loss {best['loss']:.6g}" in shown and "best uniform" in shown
    assert all(isinstance(saved["bits"][ly.path][0], list) == (method == "autoq") for ly in table.layers if ly.searched)
    assert search.main(command(place, method)) == 0
    assert log_without_seconds(log_of(place, method) / "evaluations.jsonl") == lines
    again = json.loads((place / f"{method}.json").read_text())
    assert again["bits"] == saved["bits"]


def test_measured_as_the_model_is(place, opened):
    """The loss in the log is that of the joint model with statistics of the policy's own, on the validation split."""
    (line, *_) = log_without_seconds(log_of(place, "evolution") / "evaluations.jsonl")
    policy = {path: Bits(*map(jnp.int32, bits)) for path, bits in line["policy"].items()}
    variables, bench = opened.variables, opened.run
    stats = stages.reestimated(bench, variables["params"], stages.rows_of(variables, 1), stack([policy]))
    own = jax.tree.map(lambda x: x[0], stats)
    assert not np.allclose(own["batch_stats"]["bn2"]["mean"], variables["batch_stats"]["bn2"]["mean"])
    task = joint.classification()

    @jax.jit
    def of_batch(batch):
        logits = bench.model.apply({"params": variables["params"], **own}, policy, batch["image"], train=False)
        right, count = task.correct(logits, batch)
        return jnp.stack([task.loss(logits, batch) * count, right, count])

    loss, right, count = sum(of_batch(batch) for batch in data.eval_batches(bench.dataset, "validation", 144))
    assert count == bench.dataset.sizes["validation"]
    assert line["loss"] == pytest.approx(float(loss / count), rel=1e-4)
    assert line["accuracy"] == pytest.approx(float(right / count))


def test_statistics_after_training_are_those_that_lose_less(opened, monkeypatch):
    """Measured anew, unless those that training left are better, on the training images."""
    bench, variables = opened.run, opened.variables
    table = load_importance(bench.workdir / "importance.json")
    policies = stack([{layer.path: layer.bits or Bits(4, 4) for layer in table.layers}])
    spoilt = {**variables, "batch_stats": jax.tree.map(lambda x: 0 * x + 50, variables["batch_stats"])}
    found = evaluation.with_statistics(bench, spoilt, policies)
    anew = stages.reestimated(bench, variables["params"], stages.rows_of(variables, 1), policies)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found["batch_stats"], anew["batch_stats"]
    )
    monkeypatch.setattr(evaluation, "reestimated", lambda *_: stages.rows_of(spoilt, 1))
    found = evaluation.with_statistics(bench, variables, policies)
    own = stages.rows_of(variables, 1)
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], own["batch_stats"])


def test_bits_that_nothing_was_learned_of_are_no_answer(place, quick, capsys):
    """Too few steps for theta to move at all; or too few seconds, after which nothing is written."""
    with pytest.raises(Refusal, match=r"--gumbel.steps is 20, and theta moves after 100.*fewer --gumbel.warmup_steps"):
        methods.settings("gumbel", ["--gumbel.steps=20"])
    out = place / "short.json"
    assert search.main(command(place, "gumbel", "--seconds", "1e-9", out=out)) == 2
    shown = capsys.readouterr().err
    assert "theta moves after 1 alone" in shown and "give --seconds more" in shown and not out.exists()


def test_killed_while_theta_trains(place, quick, tmp_path, monkeypatch):
    """Stopped between two checkpoints and started again: the same training log, the same policies."""
    whole = log_of(place, "edmips")
    real = data.train_batches
    table = load_importance(place / "run" / "importance.json")
    budgets = costs.parse_budgets(["bitops=W3A3", "size=W3"], table.layers, table.bit_widths, table.bit_widths)
    settings = methods.settings("edmips", FEW["edmips"])
    monkeypatch.setattr(run, "_request", lambda *asked: "stopped")

    def stopping(*arguments, **options):
        for number, batch in enumerate(real(*arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(gumbel.data, "train_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.find("edmips", place / "run", table, budgets, settings)
    stopped = place / "run" / "search_edmips" / "stopped"
    assert len(log_without_seconds(stopped / "training.jsonl")) == 2
    monkeypatch.setattr(gumbel.data, "train_batches", real)
    run.find("edmips", place / "run", table, budgets, settings)
    for name in ("training.jsonl", "evaluations.jsonl"):
        assert log_without_seconds(stopped / name) == log_without_seconds(whole / name)


def test_a_policy_per_channel_is_finetuned_and_reported(place, capsys):
    arguments = ["--config", str(place / "tiny.py"), "--workdir", str(place / "run")]
    assert train.main([*arguments, "--policy", str(place / "autoq.json")]) == 0
    shown = capsys.readouterr().out
    saved = json.loads((place / "autoq.json").read_text())
    mean = np.mean(saved["bits"]["conv2"][0])
    assert f"W{mean:.2f}A{saved['bits']['conv2'][1]}" in shown
    rows = json.loads((place / "run" / "results.json").read_text())["rows"]
    assert rows[-1]["name"] == "mixed" and rows[-1]["bitops"] == saved["budgets"]["bitops"]["used"]


def test_what_is_no_number_is_never_chosen():
    """NaN is some class's, and as often right as that class is there."""
    nan, good = (Evaluation({}, {}, Outcome(*pair), 0.0) for pair in ((float("nan"), 0.4), (1.2, 0.35)))
    for method in ("haq", "autoq", "evolution"):
        assert run.best_of(method, [good, nan]) is good


def test_tables_of_other_models_are_refused(place):
    """Bits that the run was not trained at would be measured as what they are not."""
    table = load_importance(place / "run" / "importance.json")
    model = types.SimpleNamespace(
        layers=table.layers, bit_widths=table.bit_widths, activation_bit_widths=table.activation_bit_widths
    )
    run._check_table(table, model, place)
    wider = table._replace(bit_widths=(*table.bit_widths[:-1], 9))
    with pytest.raises(Refusal, match=r"at 9 weight bits, which the model of .* was not trained at"):
        run._check_table(wider, model, place)
    renamed = table._replace(layers=(table.layers[0]._replace(path="other"), *table.layers[1:]))
    with pytest.raises(Refusal, match="layer 'other' otherwise than the model"):
        run._check_table(renamed, model, place)


def test_theta_that_had_its_seconds_is_not_trained_on(place, quick):
    """The same command again trains no step, and finds what it found."""
    arguments = command(place, "gumbel", "--seconds", "2", "--gumbel.warmup_steps", "1", "--gumbel.steps", "100000")
    logs = []
    for _ in range(2):
        search.main(arguments)  # theta may not have moved enough to choose: then it says so, both times
        newest = max((place / "run" / "search_gumbel").glob("*/training.jsonl"), key=lambda path: path.stat().st_mtime)
        logs.append(newest.read_text())
    assert logs[0] == logs[1] and 0 < logs[0].count("\n") < 100000


def test_seconds_stop_a_search(place, quick):
    assert (
        search.main(
            [
                "--workdir",
                str(place / "run"),
                *BUDGETS,
                "--method",
                "evolution",
                "--seconds",
                "0.001",
                "--seed",
                "7",
                "--out",
                str(place / "s.json"),
            ]
        )
        == 0
    )
    logs = [p for p in (place / "run" / "search_evolution").glob("*/evaluations.jsonl")]
    assert sorted(len(log_without_seconds(p)) for p in logs) == [1, 4]


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, words",
    [
        (["--method", "evolve"], "invalid choice: 'evolve' (choose from"),
        (["--method", "haq", "--haq.epsiodes", "3"], "nearest is --haq.episodes"),
        (["--method", "haq", "--evolution.top", "3"], "unknown option --evolution.top"),
        (["--method", "haq", "--haq.episodes", "many"], "takes an integer"),
        (["--method", "haq", "--haq.episodes", "0"], "above 0"),
        (["--method", "haq", "--haq.tau", "1.5"], "from 0 to 1"),
        (["--method", "haq", "--haq.noise", "nan"], "above 0"),
        (["--method", "haq", "--haq.episodes"], "needs a value"),
        (["--method", "haq", "--evaluations", "0"], "positive number"),
        (["--method", "haq", "--seconds", "-3"], "positive number"),
        (["--method", "haq", "--seed", "-3"], "from 0"),
        (["--method", "haq", "--alpha", "2"], "leave --alpha out"),
        (["--method", "haq", "--time-limit", "60"], "stops after --seconds"),
        (["--method", "haq", "--random", "20"], "--random is of --method ilp"),
        (["--random", "-1"], "from 0 to 100000"),
        (["--time-limit", "0"], "positive number of seconds"),
        (["--evaluations", "3"], "--evaluations goes with a method that measures: --method evolution, gumbel"),
        (["--method", "haq", "--importance", "i.json"], "give --workdir in place"),
    ],
)
def test_refused_options(tmp_path, capsys, more, words):
    assert search.main(["--workdir", str(tmp_path), "--budget", "bitops=W3A3", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())


def test_refused_runs(place, tmp_path, capsys):
    """A run without its joint model; budgets that no policy keeps; a latency budget and channels."""
    (tmp_path / "importance.json").write_bytes((place / "run" / "importance.json").read_bytes())
    (tmp_path / "config.json").write_bytes((place / "run" / "config.json").read_bytes())
    arguments = ["--workdir", str(tmp_path), "--method", "evolution"]
    for budget, words in (("bitops=W3A3", "has no joint model"), ("bitops=1K", "the least reachable")):
        assert search.main([*arguments, "--budget", budget]) == 2
        assert words in capsys.readouterr().err
    table = load_importance(tmp_path / "importance.json")
    widths = table.bit_widths
    latency = {ly.path: {(w, a): 1.0 for w in (*widths, 8) for a in (*widths, 8)} for ly in table.layers}
    budgets = costs.parse_budgets(["latency=9ms"], table.layers, widths, widths, latency)
    with pytest.raises(Refusal, match="measurements of whole layers"):
        run.find("autoq", tmp_path, table, budgets, methods.settings("autoq"))
