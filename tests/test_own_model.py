"""A user's own model and data: as good as the built-in ones, resumed exactly, mistakes in one line."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import made_models
import numpy as np
import own_models
import pytest
import safetensors.numpy
from flax import nnx, serialization, traverse_util

import search
import train
from mpq_jax import FloatModel, Refusal, by_example, data, joint, stages, weights
from mpq_jax import config as config_lib
from mpq_jax.data.own import open_own
from mpq_jax.float_model import call_flags
from mpq_jax.importance import load_importance

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
    real, served = stages.data.train_batches, []

    def stopping(*args, **kwargs):
        for batch in real(*args, **kwargs):
            served.append(1)
            if len(served) == 8 + 1 + 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(stages.data, "train_batches", stopping)
    command = [*OWN, "--workdir", str(place / "own")]
    assert train.main(command) == 130
    assert not (place / "own" / "importance.json").exists()
    monkeypatch.setattr(stages.data, "train_batches", real)
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
    """No step is trained; the run keeps the weights that it was started with, whatever the factory returns later."""
    common = ["--data", "own_models:digits", *TINY, "--float-only"]
    given = {
        "linen": own_models.trained_linen()[1],
        "nnx": nnx.to_pure_dict(nnx.state(own_models.trained_nnx().module, nnx.Param)),
    }
    for kind, wanted in given.items():
        command = ["--model", f"own_models:trained_{kind}", *common, "--workdir", str(tmp_path / kind)]
        monkeypatch.setattr(own_models, "WEIGHTS", 1.0)
        assert train.main(command) == 0
        first = capsys.readouterr().out
        monkeypatch.setattr(own_models, "WEIGHTS", 0.0)
        assert train.main(command) == 0
        assert capsys.readouterr().out == first
        run = stages.open_run(
            config_lib.from_json(json.loads((tmp_path / kind / "config.json").read_text())["config"]), tmp_path / kind
        )
        params = wanted["params"] if kind == "linen" else wanted
        jax.tree.map(np.testing.assert_array_equal, stages.finished_float(run)["params"], params)


class State(NamedTuple):
    params: jax.Array
    fresh: jax.Array


def test_a_stage_that_starts_from_a_checkpoint_compiles_its_step_once(tmp_path):
    """Arrays of a checkpoint are tied to a device, fresh ones are not; a step must not be compiled for each mixture."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    kept = jax.device_put(np.ones(3, np.float32), jax.devices()[0])
    state = State(kept, jax.numpy.zeros(3))
    step = stages.compile_step(
        lambda state, batch, key, fixed: (jax.tree.map(lambda x: x + batch, state), {"losses": state.params[:1]})
    )
    config = config_lib.Config(checkpoint_every=9, log_every=9)
    run = types.SimpleNamespace(config=config, workdir=tmp_path, sinks=())
    before_step = []

    def batches(_):
        for i in range(3):
            before_step.append(len(compiled))
            yield np.float32(i)

    end = stages.train(run, "stage", state, step, 3, batches, ["row"])
    np.testing.assert_array_equal(end.fresh, [3, 3, 3])
    assert before_step[0] < before_step[1] == before_step[2]


# ---- weights from files --------------------------------------------------------------------------------------------


def _nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


TREE = {
    "params": _nested(
        {"dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "dense/bias": np.ones(3, np.float32)}
    ),
    "batch_stats": _nested({"norm/mean": np.full(3, 2.0, np.float32)}),
}


def test_weights_from_files_of_every_kind(tmp_path):
    """Each form that Flax weights are kept in fills the same leaves; random streams of NNX stay as they were."""
    import orbax.checkpoint as ocp

    empty = {**jax.tree.map(np.zeros_like, TREE), "RngCount": {"dropout": {"count": np.uint32(7)}}}
    flat = traverse_util.flatten_dict(TREE, sep="/")
    safetensors.numpy.save_file(
        {k: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}, tmp_path / "a.safetensors"
    )
    one_tree = {k.partition("/")[2]: np.ascontiguousarray(v, np.float32) for k, v in flat.items()}
    safetensors.numpy.save_file(one_tree, tmp_path / "nnx.safetensors")
    (tmp_path / "b.msgpack").write_bytes(serialization.msgpack_serialize(TREE))
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((tmp_path / "c").absolute(), {**TREE, "step": 4, "opt_state": [np.zeros(2)]})
        writer.save((tmp_path / "d").absolute(), {k: {"value": v} for k, v in one_tree.items()})
    for name in ("a.safetensors", "nnx.safetensors", "b.msgpack", "c", "d"):
        loaded = weights.load(tmp_path / name, empty)
        assert loaded.pop("RngCount") == empty["RngCount"]
        jax.tree.map(np.testing.assert_array_equal, loaded, TREE)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda flat: flat.pop("params/dense/bias"), "lack params/dense/bias"),
        (
            lambda flat: flat.update({"params/more/kernel": np.ones(2)}),
            "have params/more/kernel, which the model has not",
        ),
        (lambda flat: flat.update({"params/dense/bias": np.ones(4)}), r"shape \[4\], the model needs \[3\]"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, words):
    flat = traverse_util.flatten_dict(TREE, sep="/")
    change(flat)
    (tmp_path / "w.msgpack").write_bytes(serialization.msgpack_serialize(_nested(flat)))
    with pytest.raises(Refusal, match=words):
        weights.load(tmp_path / "w.msgpack", TREE)
    for name, content in (("no.msgpack", b"\x00\x01"), ("w.pickle", b"x"), ("w.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal, match=r"give a \.safetensors file of Flax paths"):
            weights.load(tmp_path / name, TREE)


# ---- data ----------------------------------------------------------------------------------------------------------


def opened(name, **options):
    return open_own(f"own_models:{name}", getattr(own_models, name)(), **options)


def test_every_example_once_an_epoch_and_any_step_on_its_own():
    dataset = opened("small", validation_fraction=0.2)
    assert dataset.sizes == {"train": 32, "validation": 8, "test": 23} and dataset.num_classes == 10
    stream = data.train_batches(dataset, 8, seed=3)
    epoch = [next(stream) for _ in range(4)]
    seen = np.concatenate([batch["image"] for batch in epoch])
    assert len(np.unique(seen.reshape(32, -1), axis=0)) == 32
    held = np.concatenate([b["image"][b["valid"]] for b in data.eval_batches(dataset, "validation", 5)])
    assert not {x.tobytes() for x in held} & {x.tobytes() for x in seen}
    later = next(data.train_batches(dataset, 8, seed=3, first_step=3))
    jax.tree.map(np.testing.assert_array_equal, later, epoch[3])
    halves = [next(data.train_batches(dataset, 8, seed=3, process_index=i, process_count=2)) for i in (0, 1)]
    np.testing.assert_array_equal(
        np.concatenate([h["label"] for h in halves]), [*epoch[0]["label"][::2], *epoch[0]["label"][1::2]]
    )


def test_examples_by_number_are_the_same_batches():
    arrays, lines = opened("small"), opened("by_number", validation_fraction=0.1)
    for one, other in zip(data.eval_batches(arrays, "test", 8), data.eval_batches(lines, "test", 8), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    batches = list(data.eval_batches(lines, "test", 8))
    assert [int(batch["valid"].sum()) for batch in batches] == [8, 8, 7]
    assert batches[-1]["label"][-1] == -1 and not batches[-1]["image"][-1].any()
    assert next(data.train_batches(lines, 8, seed=0))["label"].dtype == np.int32


def test_augmentation_depends_on_seed_and_step_alone():
    dataset, small = (opened(name, validation_fraction=0) for name in ("flipped", "small"))
    signs = [
        np.sign((a["image"] * b["image"]).sum()) for a, b in zip(_steps(dataset, 12), _steps(small, 12), strict=True)
    ]
    assert set(signs) == {-1.0, 1.0}
    jax.tree.map(
        np.testing.assert_array_equal,
        _steps(dataset, 12)[7],
        next(data.train_batches(dataset, 8, seed=1, first_step=7)),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        _steps(opened("flipped", augment=False, validation_fraction=0), 3),
        _steps(small, 3),
    )
    with pytest.raises(Refusal, match="augment of --data own_models:shrinking made"):
        _steps(opened("shrinking"), 1)


def _steps(dataset, count):
    return [batch for _, batch in zip(range(count), data.train_batches(dataset, 8, seed=1), strict=False)]


# ---- tasks ---------------------------------------------------------------------------------------------------------


def test_means_over_examples_leave_padding_out():
    """Against NumPy: further axes are averaged, padded examples are in no mean."""
    rng = np.random.default_rng(0)
    outputs, valid = rng.normal(size=(5, 4)).astype(np.float32), np.array([True, True, True, False, False])
    batch = {"x": np.zeros((5, 4)), "y": rng.normal(size=(5, 4)).astype(np.float32), "valid": valid}
    task = by_example(lambda o, b: (o - b["y"]) ** 2, lambda o, b: o > 0, ("x",), {}, {})
    np.testing.assert_allclose(task.loss(outputs, batch), ((outputs - batch["y"])[:3] ** 2).mean(), rtol=1e-6)
    right, count = task.correct(outputs, batch)
    np.testing.assert_allclose(right / count, (outputs[:3] > 0).mean(), rtol=1e-6)
    del batch["valid"]
    np.testing.assert_allclose(task.loss(outputs, batch), ((outputs - batch["y"]) ** 2).mean(), rtol=1e-6)
    no_answers = by_example(lambda o, b: o, None, ("x",), {}, {})
    assert np.isnan(no_answers.correct(outputs, batch)[0]) and no_answers.correct(outputs, batch)[1] == 5


def test_distillation_of_logits_with_a_time_axis():
    """[P, B, T, V]: the mean over examples and time of the divergence from the teacher, against NumPy."""
    rng = np.random.default_rng(0)
    mine, teacher = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    losses = np.array([1.0, 2.0], np.float32)
    mixed = joint._distilled(joint.Distill(0.25, "given"), losses, mine, {}, {"teacher": teacher})
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher.astype(np.float64), mine.astype(np.float64)))
    divergence = (p * (np.log(p) - np.log(q))).sum(-1).mean((1, 2))
    np.testing.assert_allclose(mixed, 0.75 * losses + 0.25 * divergence, rtol=1e-5)


def test_flags_are_found_by_their_names():
    module = own_models.linen(10)
    assert call_flags(module, False) == ({"deterministic": False}, {"deterministic": True})
    assert call_flags(own_models.Distance(), False) == ({"is_training": True}, {"is_training": False})
    assert call_flags(own_models.Net(10, 4, nnx.Rngs(0)), True) == ({"train": True}, {"train": False})
    import flax.linen as nn

    assert call_flags(nn.Dense(3), False) == ({}, {})
    assert FloatModel(module, inputs=("x",)).is_trained is False


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
