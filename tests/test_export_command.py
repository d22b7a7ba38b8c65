"""`python -m mpq_jax.export`, on a finished run: what it writes and prints, and what it refuses."""

import json
import re

import numpy as np
import pytest

import search
import train
from mpq_jax.export import packed, replay
from mpq_jax.export.__main__ import main
from mpq_jax.pipeline import finetuned
from mpq_jax.workdir import load_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="made_models:dense", options={{"features": [12, 10]}}),
    quantize=Quantize(bit_widths=(2, 3, 4)),
    pretrain=Pretrain(steps=20, batch_size=32, warmup_steps=2),
    joint=Joint(steps=6, batch_size=16),
    finetune=Finetune(steps=4, batch_size=16, compare=False),
    statistics_batches=2,
)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: trained, searched, fine-tuned."""
    root = tmp_path_factory.mktemp("export")
    (root / "tiny.py").write_text(CONFIG.format(data=str(root / "data")))
    at = ["--config", str(root / "tiny.py"), "--workdir", str(root / "run")]
    assert train.main(at) == 0
    assert search.main(["--workdir", str(root / "run"), "--budget", "size=W3"]) == 0
    assert train.main([*at, "--policy", str(root / "run" / "policy.json")]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def written(run):
    assert main(["--workdir", str(run), "--c-header", "--check", "0"]) == 0
    return run / "export"


def test_writes_what_the_search_promised_and_checks_it(run, capsys):
    assert main(["--workdir", str(run), "--out", str(run / "checked"), "--fold", "--check", "all"]) == 0
    shown = capsys.readouterr().out
    size = (run / "checked" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes" in shown and "as the search promised" in shown
    total = re.search(r"weights ([\d,]+) \+ other tensors ([\d,]+) \+ header ([\d,]+) bytes", shown)
    assert sum(int(part.replace(",", "")) for part in total.groups()) == size
    exact = re.search(
        r"integers against exact=True: (\d+) of ([\d,]+) codes differ, top-1 differs on (\d+) of (\d+)", shown
    )
    assert exact[1] == exact[3] == "0" and int(exact[4]) == 355
    assert "integers against fake-quantized" in shown


def test_evaluate_gives_the_accuracy_of_the_report(run, written, capsys):
    """The file alone, run with integers, is as good as the fine-tuned model was on the same test set."""
    command = ["--evaluate", str(written / "model.safetensors"), "--check", "all"]
    assert main(command) == 2 and "whose code would be run" in capsys.readouterr().err
    assert main([*command, "--model.name", "made_models:dense"]) == 0
    accuracy = float(re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[1]) / 100
    rows = {row["name"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert abs(accuracy - rows["mixed"]["accuracy"]) <= 1 / 355 + 1e-4
    assert accuracy > 0.3


def test_file_holds_the_fine_tuned_weights(run, written):
    """Each weight of the file lies within half a step of the checkpoint's, or at an end of its grid."""
    file = packed.load(written / "model.safetensors")
    _, variables, _ = finetuned(load_config(run), run, run / "policy.json")
    for path in file.layers:
        codes, decoding = file.weight(path)
        kernel, bits = np.asarray(variables["params"][path]["kernel"]), file.bits(path).w
        near = np.abs(kernel - packed.values(file, path)) <= float(decoding.scale) * (0.5 + 1e-5)
        assert (near | (codes == -(2 ** (bits - 1))) | (codes == 2 ** (bits - 1) - 1)).all()
    policy = json.loads((run / "policy.json").read_text())["bits"]
    assert {path: list(file.bits(path)) for path in file.layers} == policy
    assert (written / "model.h").read_text().count("_codes[") == len(file.layers)


def test_what_integers_cannot_hold_is_run_fake_quantized(run, written, capsys, monkeypatch):
    """Sums beyond int32, or levels from a table: the file is written, compared and measured all the same, and it is said."""
    whole = ["--evaluate", str(written / "model.safetensors"), "--check", "all", "--model.name", "made_models:dense"]
    assert main(whole) == 0
    integers = capsys.readouterr().out
    monkeypatch.setattr(replay, "largest_sum", lambda *_: 2**31)
    monkeypatch.setattr(replay, "integer", None)
    assert main(["--workdir", str(run), "--out", str(run / "wide"), "--formats", "packed,stablehlo"]) == 0
    shown = capsys.readouterr().out
    assert (
        "note: not run with integers: layer 'dense0' can come to sums of 2.15e+09, which int32 does not hold\n" in shown
    )
    assert "exact=True" not in shown and (run / "wide" / "model.stablehlo").is_file()
    assert "the file fake-quantized against fake-quantized: 0 of" in shown
    assert main(whole) == 0
    shown = capsys.readouterr().out
    right = [re.search(r"([\d,]+) of 355 right", text)[1] for text in (integers, shown)]
    assert "(the file fake-quantized, " in shown and "(integers, " in integers
    assert abs(int(right[0]) - int(right[1])) <= 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--workdir", "RUN", "--check", "²"], "a number, or all"),
        ([], "either --workdir"),
        (["--workdir", "RUN", "--evaluate", "x"], "either --workdir"),
        (["--workdir", "RUN", "--formats", "packd"], "choose of packed"),
        (["--workdir", "RUN", "--check", "some"], "a number, or all"),
        (["--workdir", "RUN", "--polcy", "x"], "nearest is --policy"),
        (["--workdir", "nowhere"], "does not exist"),
        (["--workdir", "RUN", "--policy", "missing.json"], "does not exist"),
        (["--workdir", "RUN", "--finetune.steps", "9"], "no finished fine-tuning"),
        (["--evaluate", "missing.safetensors"], "does not exist"),
        (["--evaluate", "RUN/config.json"], "damaged or no safetensors"),
        (["--workdir", "RUN", "--out", "RUN/config.json"], "is a file"),
        (["--workdir", "RUN", "--c-header", "--formats", "onnx"], "add packed"),
    ],
)
def test_refusals(run, capsys, arguments, words):
    before = sorted(run.rglob("*"))
    assert main([word.replace("RUN", str(run)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert sorted(run.rglob("*")) == before


def test_policy_of_other_bits_is_refused(run, capsys, tmp_path):
    saved = json.loads((run / "policy.json").read_text())
    path = next(p for p, bits in saved["bits"].items() if bits != [8, 8])
    saved["bits"][path] = [2 if saved["bits"][path][0] != 2 else 3, saved["bits"][path][1]]
    (tmp_path / "other.json").write_text(json.dumps(saved))
    assert main(["--workdir", str(run), "--policy", str(tmp_path / "other.json")]) == 2
    assert "no finished fine-tuning" in capsys.readouterr().err


def test_an_edited_file_is_refused(written, tmp_path, capsys):
    raw = bytearray((written / "model.safetensors").read_bytes())
    raw[-3] ^= 4
    (tmp_path / "edited.safetensors").write_bytes(bytes(raw))
    assert main(["--evaluate", str(tmp_path / "edited.safetensors")]) == 2
    assert "checksum" in capsys.readouterr().err
    assert np.frombuffer(bytes(raw[:8]), "<u8")[0] < 65536
