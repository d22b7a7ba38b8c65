"""The worked examples, each run from its command's `main` with few steps of a small network."""

import importlib.util
import json
import math
import re

import pytest

from examples import text
from mpq_jax.commands import export
from mpq_jax.importance import load_importance

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEW = [
    *("--quantize.bit_widths", "2,4", "--joint.steps", "4", "--finetune.steps", "3", "--statistics_batches", "1"),
    *("--joint.batch_size", "8", "--finetune.batch_size", "8", "--finetune.random_policies", "0", "--log_every", "4"),
    *("--joint.random_rows", "0", "--criteria.samples", "16", "--criteria.batch_size", "8"),
]

QUICK = ["--pretrain.learning_rate", "0.01", "--pretrain.warmup_steps", "5"]


def rows_of(workdir):
    return {row["name"]: row for row in json.loads((workdir / "results.json").read_text())["rows"]}


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed; make setup installs it"
    )


@needs("xtrain")
def test_resnet_in_a_training_loop_of_another_library(capsys):
    from examples import resnet_own_loop

    options = ["--steps", "60", "6", "6", "--width", "6", "--blocks", "1", "--bit-widths", "2", "4"]
    assert resnet_own_loop.main([*options, "--budget", "bitops=W4A4"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert float(re.fullmatch(r"float: ([\d.]+)% right on the test set", shown[0])[1]) > 30  # of ten classes
    assert [line.partition(":")[0] for line in shown[1:]] == ["uniform W4A4", "mixed", "optimal"]
    costs = [float(line.split()[-3]) for line in shown[1:3]]
    assert 0 < costs[1] <= costs[0]


def test_vision_transformer_in_nnx(tmp_path):
    from examples import vit_nnx

    small = ["--model.options", '{"dim": 12, "depth": 1, "heads": 2}', "--pretrain.steps", "60", *QUICK]
    assert vit_nnx.main(["--workdir", str(tmp_path), *small, *FEW]) == 0
    rows = rows_of(tmp_path)
    assert next(iter(rows)) == "float" and list(rows)[-1] == "mixed" and rows["float"]["accuracy"] > 0.3
    assert len([layer for layer in load_importance(tmp_path / "importance.json").layers if layer.searched]) == 6


def test_language_model_learns_shares_bits_and_is_exported(tmp_path, capsys):
    from examples import language_model

    small = [
        "--model.options",
        '{"dim": 16, "depth": 1, "heads": 2}',
        "--data.options",
        '{"length": 16, "limit": 20000}',
    ]
    assert language_model.main(["--workdir", str(tmp_path), *small, *FEW, "--pretrain.steps", "80", *QUICK]) == 0
    assert "nats a character: guessing 4.5" in capsys.readouterr().out
    guessing, rows = math.log(len(text.alphabet())), rows_of(tmp_path)
    assert rows["float"]["loss"] < 0.75 * guessing and 0.1 < rows["float"]["accuracy"] < 1
    assert any(name.startswith("uniform") for name in rows) and math.isfinite(rows["mixed"]["loss"])
    bits = json.loads((tmp_path / "policy.json").read_text())["bits"]
    assert len({tuple(bits[f"block0_attention/{name}"]) for name in ("query", "key", "value")}) == 1
    assert bits["head"] == [8, 8]
    asked = ["--workdir", str(tmp_path), "--check", "3"]
    assert export.main(asked) == 0
    shown = capsys.readouterr().out
    assert (
        "integers against exact=True: 0 of" in shown and "of 48 answers" in shown and "as the search promised" in shown
    )
    assert export.main([*asked, "--formats", "onnx"]) == 2
    assert "takes models of float32 input, this one takes int32" in capsys.readouterr().err


def test_the_text_is_english_and_its_parts_do_not_overlap():
    """The splits put together again are the text, character by character."""
    whole, known = text.text(), text.alphabet()
    assert " the " in whole and len(whole) > 100_000 and len(known) < 128
    splits = text.windows(length=50, limit=30_000)
    assert {name: len(split["tokens"]) for name, split in splits.items()} == {
        "train": 479,
        "validation": 59,
        "test": 59,
    }
    for split, start in zip(splits.values(), (0, 24_000, 27_000), strict=True):
        read = "".join(known[code] for code in split["tokens"].ravel())
        assert whole[start : start + len(read)] == read
        assert "".join(known[code] for code in split["targets"].ravel()) == whole[start + 1 : start + 1 + len(read)]


@needs("nano_moe")
def test_a_model_from_pypi_as_it_is(tmp_path):
    from examples import mixture_of_experts

    small = ["--model.options", '{"d_model": 16, "n_layers": 1, "n_experts": 2}', "--pretrain.steps", "60", *QUICK]
    data = ["--data.options", '{"length": 16, "limit": 20000}']
    assert mixture_of_experts.main(["--workdir", str(tmp_path), *small, *data, *FEW]) == 0
    rows = rows_of(tmp_path)
    assert rows["float"]["loss"] < 0.9 * math.log(len(text.alphabet())) and math.isfinite(rows["mixed"]["loss"])
    paths = [layer.path for layer in load_importance(tmp_path / "importance_output_fisher.json").layers]
    assert sum("expert_" in path for path in paths) == 4 and any("Router_0" in path for path in paths)
