"""A user's own model and data: as good as the built-in ones, resumed exactly, mistakes in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import made_models
import numpy as np
import own_models
import pytest
from flax import nnx, serialization

import search
import train
from mpq_jax import config as config_lib
from mpq_jax import data, stages
from mpq_jax.importance import load_importance

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
TINY = [
    *("--quantize.bit_widths", "2,4", "--data.augment", "false", "--statistics_batches", "2"),
    *("--pretrain.steps", "8", "--pretrain.batch_size", "32", "--joint.steps", "6", "--joint.batch_size", "16"),
    *("--finetune.steps", "4", "--finetune.batch_size", "16", "--finetune.compare", "false"),
    *("--checkpoint_every", "2", "--log_every", "2", "--eval_batch_size", "355"),
]
OWN = ["--model", "own_models:linen", "--data", "own_models:digits", *TINY]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits, and a finished run of the built-in path on them."""
    root = tmp_path_factory.mktemp("own")
    own_models.DATA_DIR = str(root / "data")
    options = ["--model.name", "made_models:dense", "--model.options", '{"features": [12, 10]}']
    built_in = ["--model", "resnet8", *options, "--data", "digits", "--data.data_dir", str(root / "data")]
    assert train.main([*built_in, *TINY, "--workdir", str(root / "built_in")]) == 0
    return root


def test_killed_and_resumed_it_ends_as_the_built_in_path_does(place, monkeypatch):
    """The same model and images through factories, stopped in joint training: the same files, to the last byte."""
    real, served = data.train_batches, []

    def stopping(*args, **kwargs):
        for batch in real(*args, **kwargs):
            served.append(1)
            if len(served) == 8 + 1 + 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(data, "train_batches", stopping)
    command = [*OWN, "--workdir", str(place / "own")]
    assert train.main(command) == 130
    assert not (place / "own" / "importance.json").exists()
    monkeypatch.setattr(data, "train_batches", real)
    assert train.main(command) == 0
    for name in ("importance.json", "indicators.json"):
        assert (place / "own" / name).read_bytes() == (place / "built_in" / name).read_bytes()


def test_a_loss_of_ones_own_from_float_training_to_the_report(tmp_path, capsys):
    """Two inputs, a stream of noise, a dict of outputs, no accuracy; a criterion without joint training."""
    run = ["--model", "own_models:distance", "--data", "own_models:points", *TINY, "--workdir", str(tmp_path / "run")]
    assert train.main([*run, "--float-only"]) == 0
    assert "validation loss" in capsys.readouterr().out
    criterion = ["--criterion", "output_fisher", "--budget", "size=W3"]
    assert search.main(["--workdir", str(tmp_path / "run"), *criterion]) == 0
    tuning = ["--policy", str(tmp_path / "run" / "policy.json"), "--finetune.start", "float"]
    assert train.main([*run, *tuning]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [None, None] and all(np.isfinite(row["loss"]) for row in rows)
    assert re.search(r"\| mixed \| – \|", (tmp_path / "run" / "report.md").read_text())
    table = load_importance(tmp_path / "run" / "importance_output_fisher.json")
    assert [layer.path for layer in table.layers] == ["dense0", "dense1", "head"]
    # The float row's loss is that of the whole test set, its last batch's padding not counted.
    found = stages.open_run(
        config_lib.from_json(json.loads((tmp_path / "run" / "config.json").read_text())["config"]), tmp_path / "run"
    )
    variables, test = stages.pretrain(found), own_models.points()["test"]
    outputs = own_models.Distance().apply(variables, test["a"].astype(np.float32), test["b"].astype(np.float32))
    by_hand = np.square(np.asarray(outputs["distance"], np.float64) - test["distance"]).mean()
    assert rows[0]["loss"] == pytest.approx(by_hand, rel=1e-4) and len(test["a"]) % 355 != 0


def test_trained_weights_are_used_and_kept(place, tmp_path, monkeypatch, capsys):
    """No step is trained; the run keeps the weights that it was started with, whatever the factory returns later, or the
    file holds. A checkpoint that is damaged is made again."""
    common = ["--data", "own_models:digits", *TINY, "--float-only", "--quantize.ends", "searched"]
    given = {
        "linen": own_models.trained_linen()[1],
        "nnx": nnx.to_pure_dict(nnx.state(own_models.trained_nnx().module, nnx.Param)),
    }
    file = tmp_path / "w.msgpack"
    models = {kind: [f"own_models:trained_{kind}"] for kind in given}
    models["file"], given["file"] = ["made_models:dense", "--model.weights", str(file)], given["linen"]
    for kind, wanted in given.items():
        command = ["--model", *models[kind], *common, "--workdir", str(tmp_path / kind)]
        monkeypatch.setattr(own_models, "WEIGHTS", 1.0)
        file.write_bytes(serialization.to_bytes(given["linen"]))
        assert train.main(command) == 0
        first = capsys.readouterr().out
        monkeypatch.setattr(own_models, "WEIGHTS", 0.0)
        file.write_bytes(serialization.to_bytes(jax.tree.map(lambda x: 0 * x, given["linen"])))
        assert train.main(command) == 0
        assert capsys.readouterr().out == first
        if kind == "linen":
            monkeypatch.setattr(own_models, "WEIGHTS", 1.0)
            (step,) = (each for each in (tmp_path / kind / "pretrain").iterdir() if each.name.isdigit())
            with next(path for path in step.glob("default/ocdbt.process_0/d/*") if path.stat().st_size).open(
                "ab"
            ) as broken:
                broken.write(b"x")
            assert train.main(command) == 0
            shown = capsys.readouterr()
            assert shown.out == first and "is damaged" in shown.err and step.is_dir()
        run = stages.open_run(
            config_lib.from_json(json.loads((tmp_path / kind / "config.json").read_text())["config"]), tmp_path / kind
        )
        params = wanted if kind == "nnx" else wanted["params"]
        jax.tree.map(np.testing.assert_array_equal, stages.finished_float(run)["params"], params)


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, words",
    [
        ("own_models.py:linen", "write own_models:linen"),
        ("own_modles:linen", "no module 'own_modles'"),
        ("own_models:lineen", "did you mean linen"),
        ("own_models:WEIGHTS", "is float, not a function"),
        ("own_models:returns_nothing", "returned None; return a Linen or NNX module"),
        ("own_models:returns_a_class", "returned the class Dense"),
        ("own_models:raises", r"failed: RuntimeError: no licence \(.*own_models.py:\d+\)"),
        ("own_models:needs_an_option", "needs 'depth'"),
        ("own_models:wants_rows", "takes 'rows', and the data have image, label"),
        ("own_models:wrong_flag", r"cannot be called with image float32\[1, 8, 8, 1\], training=False: TypeError"),
        ("own_models:takes_images_apart", r"needs logits \[2, classes\]"),
        ("own_models:half_a_model", "gives no variables"),
        ("own_models:other_weights", r"has shape \[13\], the model needs \[12\]"),
    ],
)
def test_mistakes_in_a_model(tmp_path, capsys, model, words):
    _refused(["--model", model, "--data", "own_models:small"], tmp_path, capsys, words)


@pytest.mark.parametrize(
    "model, words",
    [
        (
            "mean_loss",
            r"loss of --model own_models:mean_loss returned float32\[\] for 2 examples; return one number an",
        ),
        ("column_loss", r"returned \[2, 2\] for 2 examples and \[3, 3\] for 3, every example"),
        ("no_noise", r"cannot be called with .* is_training=True: InvalidRngError.*noise"),
        ("loss_that_fails", "loss of --model own_models:loss_that_fails failed .* KeyError: 'distnace'"),
        ("distance --pretrain.label_smoothing 0.1", "has a loss of its own; set it to 0"),
    ],
)
def test_mistakes_in_a_task(tmp_path, capsys, model, words):
    name, *more = model.split()
    _refused(["--model", f"own_models:{name}", "--data", "own_models:points", *more], tmp_path, capsys, words)


@pytest.mark.parametrize(
    "function, words",
    [
        ("pairs", "train is tuple of others; give a dict of named arrays"),
        ("no_test", "returned no 'test'"),
        ("uneven", "different lengths (image 40, label 3)"),
        ("other_shapes", "test has image float32[4, 4, 1]"),
        ("words", "train['label'] has entries of type <U3"),
        ("endless", "train is generator, which has no examples by number"),
        ("unlabelled", 'the data need a "label"'),
        ("returns_nothing", 'returned NoneType; return {"train"'),
        ("from_one", 'a "label" is 10, and there are 10 classes, numbered from 0 to 9'),
        ("from_minus_one", 'a "label" is -1, and there are 10 classes'),
        ("too_few_classes", 'a "label" is 9, and there are 7 classes'),
        ("lines_from_one", 'a "label" is 10, and there are 10 classes'),
        ("classes_in_words", "num_classes is 'ten'; give how many classes there are"),
        ("own_mask", "has an array 'valid', and batches have one of that name"),
        ("ragged", "the examples of train['image'] have different shapes"),
        ("unreadable", "train[0] cannot be read: KeyError: 0"),
        ("changed_in_place", "returned NoneType; return the batch"),
    ],
)
def test_mistakes_in_data(tmp_path, capsys, function, words):
    model = ["--model", "own_models:linen", "--model.options", '{"num_classes": 10}']
    _refused([*model, "--data", f"own_models:{function}"], tmp_path, capsys, re.escape(words))


def test_mistakes_in_options(tmp_path, capsys):
    _refused(["--data", "own_models:small"], tmp_path, capsys, "give --config, .* or your own --model")
    more = ["--model", "own_models:linen", "--model.options", '{"depth": 3}', "--data", "own_models:small"]
    _refused(more, tmp_path, capsys, "has no option 'depth'; it takes num_classes, features")
    _refused(["--model", "resnet8", "--data.options", '{"x": 1}'], tmp_path, capsys, "for a function of your own")
    tiny = ["--model", "made_models:dense", "--data", "own_models:small"]
    _refused(tiny, tmp_path, capsys, "none of the model's 2 layers is searched: all have fixed bits")
    tiny += ["--quantize.ends", "searched"]
    _refused([*tiny, "--data.validation_fraction", "0"], tmp_path, capsys, "the validation split is empty")
    _refused([*tiny, "--finetune.steps", "0"], tmp_path, capsys, "finetune.steps and finetune.epochs are both 0")
    more = ["--joint.accumulate", "6", "--joint.steps", "5"]
    _refused([*tiny, *more], tmp_path, capsys, "joint.accumulate is 6, and joint has 5 steps: no update would be made")
    more = ["--model", "made_models:dense", "--data", "own_models:from_minus_one"]
    _refused(more, tmp_path, capsys, "takes num_classes, and --data own_models:from_minus_one does not tell it")


def _refused(arguments, tmp_path, capsys, words):
    assert train.main([*arguments, "--workdir", str(tmp_path / "run"), "--pretrain.steps", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(words, error), error
    assert not (tmp_path / "run").exists()


# ---- where a command is started ------------------------------------------------------------------------------------


def block(title):
    """The Python on docs/own_model.md that begins with this comment."""
    page = (ROOT / "docs" / "own_model.md").read_text()
    return next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if code.startswith(f"# {title}\n"))


def test_an_installed_command_finds_modules_in_the_working_directory(tmp_path):
    """The page's own module; with -P Python puts no folder on the path, as for a command that pip installed."""
    (tmp_path / "mine.py").write_text(block("mine.py"))
    code = "import sys; from mpq_jax.commands.search import main; sys.exit(main(sys.argv[1:]))"
    asked = ["--model", "mine:model", "--data", "mine:data", "--describe", "--json"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    layers = {layer["path"]: layer for layer in json.loads(done.stdout)["layers"]}
    macs = {path: layer["macs"] for path, layer in layers.items()}
    assert macs == {"Conv_0": 64 * 9 * 16, "Conv_1": 64 * 9 * 16 * 16, "Dense_0": 16 * 5}, done.stderr


def test_the_page_s_lines_without_our_scripts():
    """What they leave behind: learned step sizes, a proven policy within the budget, logits under it."""
    rng = np.random.default_rng(0)
    images, net = rng.normal(size=(8, 4, 4, 1)).astype(np.float32), made_models.dense(3, (5, 4))
    batches = [{"image": images, "label": np.arange(8, dtype=np.int32) % 3}] * 3
    given = {"net": net, "trained": net.init(jax.random.key(0), images), "images": images, "batches": batches}
    exec(compile(block("without our scripts"), "own_model.md", "exec"), given)
    solution, model = given["solution"], given["model"]
    assert solution.status == "optimal" and given["logits"].shape == (8, 3) and np.isfinite(given["logits"]).all()
    macs = {layer.path: layer.macs for layer in model.layers}
    limit = sum(n * (64 if path in ("dense0", "head") else 12) for path, n in macs.items())
    assert sum(macs[path] * bits.w * bits.a for path, bits in solution.policy.items()) <= limit
    before, after = (tree["params"]["dense1"] for tree in (given["variables"], {"params": given["state"].params}))
    np.testing.assert_array_equal(before["kernel"], after["kernel"])
    assert (before["weight_step_size"] != after["weight_step_size"]).all()
