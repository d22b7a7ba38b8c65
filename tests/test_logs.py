"""log.jsonl, TensorBoard, Weights & Biases and profiles. What a whole run logs is in test_pipeline.py."""

import json
import struct
import sys
import types

import numpy as np
import pytest

from mpq_jax import logs
from mpq_jax.config import Config, Logs
from mpq_jax.types import Refusal

NAMES = ["W2A2", "random1"]


def metrics(step):
    """Losses and a scalar that are known functions of the step; an array that is no scalar."""
    return {
        "losses": np.array([1 / (step + 1), step], np.float32),
        "gradient_norm": np.float32(step**2),
        "policies": np.zeros((1, 3, 2), np.int32),
    }


def expected(step):
    """The line after `step` steps, without its seconds."""
    return {
        "step": step,
        "losses": {"W2A2": float(np.float32(1 / step)), "random1": float(step - 1)},
        "gradient_norm": float((step - 1) ** 2),
    }


def record(folder, first, last, sinks=()):
    recorder = logs.recorder("joint", folder, NAMES, 3, sinks)
    recorder.load(first)
    for step in range(first, last):
        recorder.add(step, metrics(step))
    recorder.flush()
    recorder.close()


def lines(folder):
    found = logs.read(folder / "log.jsonl")
    assert all(line.pop("seconds") >= 0 for line in found)
    return found


def test_a_line_each_so_many_steps(tmp_path):
    record(tmp_path, 0, 10)
    assert lines(tmp_path) == [expected(3), expected(6), expected(9)]


@pytest.mark.parametrize("checkpoint", [0, 4, 6, 7])
def test_resumed_lines_are_those_of_a_run_that_was_not_stopped(tmp_path, checkpoint):
    """Stopped at step 8, the last line cut in the middle, resumed from an earlier checkpoint."""
    record(tmp_path, 0, 8)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "los')
    record(tmp_path, checkpoint, 13)
    assert lines(tmp_path) == [expected(step) for step in (3, 6, 9, 12)]


def scalars(folder):
    """[(tag, step, value)] of TensorBoard's event files, parsed here: length, CRC, record, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = [], []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                purged.append(event.step)
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found, purged


def test_tensorboard_gets_the_same(tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is an option, and is not installed")
    sinks = logs.sinks(Config(logs=Logs(tensorboard=True)), tmp_path)
    record(tmp_path / "joint", 0, 7, sinks)
    found, _ = scalars(tmp_path / "tensorboard" / "joint")
    flat = [
        (tag, line["step"], value)
        for line in lines(tmp_path / "joint")
        for tag, value in [
            *((f"loss/{name}", value) for name, value in line["losses"].items()),
            ("gradient_norm", line["gradient_norm"]),
        ]
    ]
    assert found == flat and len(found) == 6
    record(tmp_path / "joint", 4, 7, sinks)
    assert 4 in scalars(tmp_path / "tensorboard" / "joint")[1], "a resumed run purges from its step on"


def test_wandb_gets_the_same(tmp_path, monkeypatch):
    """Its calls, taken down by a stand-in for the package: one run a workdir, a step axis for each stage."""
    calls = []

    class Run:
        def define_metric(self, name, step_metric=None):
            calls.append(("metric", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

    def init(**options):
        calls.append(("init", options["project"], options["id"], options["resume"], options["config"]["seed"]))
        return Run()

    wandb = types.ModuleType("wandb")
    wandb.init = init
    wandb.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = Config(seed=4, logs=Logs(wandb="bits"))
    record(tmp_path / "joint", 0, 4, logs.sinks(config, tmp_path))
    logs.sinks(config, tmp_path)
    identity = (tmp_path / "wandb_id").read_text().strip()
    assert len(identity) == 16
    assert calls == [
        ("init", "bits", identity, "allow", 4),
        ("metric", "joint/step", None),
        ("metric", "joint/*", "joint/step"),
        (
            "log",
            {
                "joint/step": 3,
                "joint/loss/W2A2": float(np.float32(1 / 3)),
                "joint/loss/random1": 2.0,
                "joint/gradient_norm": 4.0,
            },
        ),
        ("init", "bits", identity, "allow", 4),
    ]


@pytest.mark.parametrize(
    ("options", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "bits"}, "wandb")]
)
def test_a_missing_package_is_refused_at_once(tmp_path, monkeypatch, options, package):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=f"pip install {package}") as refusal:
        logs.sinks(Config(logs=Logs(**options)), tmp_path)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "count", "stop", "calls"),
    [
        (10, 3, None, ["0", "1", "start", "2", "3", "4", "end", "5", "6", "7", "8", "9"]),
        (4, 5, None, ["0", "1", "start", "2", "3", "end"]),
        (10, 5, 3, ["0", "1", "start", "2", "3", "end"]),
        (3, 0, None, ["0", "1", "2"]),
        (1, 3, None, ["0", "start", "end"]),
    ],
    ids=["inside", "steps end first", "closed", "none", "too few steps"],
)
def test_which_steps_are_traced(tmp_path, monkeypatch, steps, count, stop, calls):
    """The order of trace and steps; everything that was started is waited for on both sides of the trace."""
    import contextlib

    import jax

    seen = []

    @contextlib.contextmanager
    def trace(folder):
        assert folder == tmp_path and seen[-1] == "settle"
        seen.append("start")
        try:
            yield
        finally:
            assert seen[-1] == "settle"
            seen.append("end")

    monkeypatch.setattr(jax.profiler, "trace", trace)
    todo = logs.traced(range(steps), count, tmp_path, settle=lambda: seen.append("settle"))
    with contextlib.closing(todo):
        for step in todo:
            seen.append(str(step))
            if step == stop:
                break
    assert [each for each in seen if each != "settle"] == calls


def test_log_is_plain_json(tmp_path):
    """Every line is JSON that any reader takes: numbers, no NumPy, no NaN (training stops before one is logged)."""
    record(tmp_path, 0, 4)
    for text in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(name))
