"""Config files and overrides: what is taken, and what is refused in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_jax import Refusal
from mpq_jax import config as config_lib

CONFIGS = sorted(Path("configs").glob("*.py"))
WANTED = {"digits", "fashion_mnist_resnet8", "fashion_mnist_mobilenetv1", "cifar10_resnet20"}
WANTED |= {f"imagenet_{name}" for name in ("resnet18", "resnet50", "mobilenetv1")}


def test_all_configs_load():
    assert {path.stem for path in CONFIGS} >= WANTED
    for path in CONFIGS:
        assert isinstance(config_lib.load(path), config_lib.Config)
        assert f"configs/{path.name}" in path.read_text() or "make demo" in path.read_text()


def test_imagenet_configs_have_the_papers_settings():
    for name, epochs in (("resnet18", 5), ("resnet50", 3)):
        config = config_lib.load(f"configs/imagenet_{name}.py")
        assert config.quantize.bit_widths == (2, 3, 4, 5, 6) and config.quantize.ends == "8,8"
        joint = config.joint
        assert (joint.epochs, joint.learning_rate, joint.end_learning_rate) == (epochs, 0.01, 1e-5)
        assert (joint.momentum, joint.weight_decay, joint.clip, joint.label_smoothing) == (0.9, 2.5e-5, 1.0, 0.1)
        assert joint.weights == "trained" and joint.same_bits and joint.affine_per_row and joint.random_rows == 1
        assert config.finetune.learning_rate == 0.04 and config.finetune.start == "float"


def test_overrides():
    arguments = ["--joint.steps", "7", "--quantize.bit_widths=2,4", "--data.augment", "false", "--seed=3"]
    arguments += ["--model.options", '{"width": 0.5}', "--quantize.rules", "stem=8,8;head=float"]
    config = config_lib.override(config_lib.Config(), arguments)
    assert config.joint.steps == 7 and config.quantize.bit_widths == (2, 4) and config.seed == 3
    assert config.data.augment is False and config.model.options == {"width": 0.5}
    assert config.quantize.rules == ("stem=8,8", "head=float")
    # Given again they add up; of other options the last counts.
    more = ["--quantize.rules", "conv=4,4", "--joint.steps", "1", "--joint.steps", "2"]
    again = config_lib.override(config_lib.Config(), [*arguments, *more])
    assert again.quantize.rules == ("stem=8,8", "head=float", "conv=4,4") and again.joint.steps == 2
    again = config_lib.to_json(config)
    assert again["joint"]["steps"] == 7 and json.dumps(again)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--joint.stepz", "7"], "nearest is --joint.steps"),
        (["--joint.steps", "many"], "takes an integer"),
        (["--joint.steps"], "needs a value"),
        (["--data.augment", "maybe"], "true or false"),
        (["--quantize.bit_widths", "two"], "list such as"),
        (["--model.options", "[1]"], "JSON object"),
        (["joint.steps"], "stands alone"),
        (["--pretrain.learning_rate", "fast"], "takes a number"),
    ],
)
def test_refused_overrides(arguments, words):
    with pytest.raises(Refusal, match=words):
        config_lib.override(config_lib.Config(), arguments)


NUMBERS = [
    *(("checkpoint_every", "0"), ("log_every", "0"), ("joint.accumulate", "0"), ("finetune.accumulate", "0")),
    *(("joint.window", "0"), ("statistics_batches", "0"), ("joint.steps", "-3"), ("joint.average", "2")),
    *(("joint.batch_size", "0"), ("eval_batch_size", "-1"), ("pretrain.learning_rate", "nan"), ("seed", "-1")),
    *(
        ("finetune.label_smoothing", "1"),
        ("finetune.batch_size", "0"),
        ("joint.epochs", "inf"),
        ("pretrain.momentum", "1"),
        ("seed", str(2**31)),
    ),
]


@pytest.mark.parametrize("name, value", NUMBERS)
def test_numbers_that_no_setting_can_be(name, value):
    with pytest.raises(Refusal, match=f"^{name} is .*; give a (whole )?number"):
        config_lib.load("digits", [f"--{name}", value])


@pytest.mark.parametrize("stage", ["joint", "finetune"])
def test_labels_keep_a_share_of_the_loss_that_is_not_below_none(stage):
    with pytest.raises(Refusal, match=f"^{stage}.distill is 1.5; give a share from 0 to 1"):
        config_lib.load("digits", [f"--{stage}.distill", "1.5"])
    config_lib.load("digits", [f"--{stage}.distill", "1"])


def test_numbers_at_their_limits():
    config_lib.load(
        "digits", ["--parallel.process", "-1", "--joint.momentum", "0", "--pretrain.steps", "0", "--seed", "0"]
    )
    for name in ("digits", "fashion_mnist_resnet8", "imagenet_resnet50"):
        config_lib.load(name)


@pytest.mark.parametrize("text, words", [("config = 3", "must define"), ("1 / 0", "ZeroDivisionError")])
def test_refused_files(tmp_path, text, words):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(Refusal, match=words):
        config_lib.load(path)
    with pytest.raises(Refusal, match="does not exist"):
        config_lib.load(tmp_path / "other.py")


def test_help_lists_every_option():
    out = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"--{key} " in out for key in config_lib.options(config_lib.Config()))
