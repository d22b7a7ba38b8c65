"""Many devices: layouts against one device, in children with 8 virtual CPU devices; processes against one process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from mpq_jax import Refusal, parallel, processes
from mpq_jax.config import Parallel

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """XLA's own flag may have other values in a developer's shell; JAX's is ours alone."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_layouts_equal_one_device(tmp_path):
    """float64: data x row = 8x1, 4x2 with split parameters, 1x6, and 1x6 from the checkpoint of 4x2, within 1e-9."""
    command = [sys.executable, "-m", "benchmarks.many_devices", "--steps", "4", "--out", str(tmp_path), "--one-child"]
    done = subprocess.run(command, env=environment(8), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["layout"], line["devices"]) for line in found] == [
        ("8x1", 8),
        ("4x2f", 8),
        ("1x6", 6),
        ("1x6 from 4x2f", 6),
    ]
    for line in found:
        assert max(line[key] for key in ("losses", "step_sizes", "params", "rows")) < 1e-9, line
        assert line["same_policy"]
    trained, start = (np.load(tmp_path / f"{name}.npz")["losses"] for name in ("8x1", "1x6 from 4x2f"))
    assert trained.shape == (4, 6) and start.shape == (2, 6) and not np.allclose(trained[0], trained[-1], atol=1e-3)


CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="cnn_nnx", options={{"width": 0.5}}),
    quantize=Quantize(bit_widths=(2, 3, 4)),
    pretrain=Pretrain(steps=4, batch_size=32, warmup_steps=2),
    joint=Joint(steps=4, batch_size=16),
    eval_batch_size=355,
    checkpoint_every=2,
    log_every=2,
)
"""


def started(place: Path, run: str, count: int, *more: str) -> list[subprocess.Popen]:
    """train.py in `count` processes of one device each."""
    command = [sys.executable, "train.py", "--config", str(place / "tiny.py"), "--workdir", str(place / run), *more]
    port = free_port()
    children = []
    for i in range(count):
        several = ["--parallel.coordinator", f"localhost:{port}", "--parallel.processes", str(count)]
        each = [*command, *several, "--parallel.process", str(i)] if count > 1 else command
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen(each, env=environment(1), cwd=ROOT, **pipes))
    return children


def test_two_processes_train_what_one_does(tmp_path):
    """The same table within float32's rounding, the same random rows; process 0 alone prints and writes."""
    (tmp_path / "tiny.py").write_text(CONFIG.format(data=str(tmp_path / "data")))
    (one,) = started(tmp_path, "one", 1)
    said = one.communicate(timeout=600)
    assert one.returncode == 0, said[1][-2000:]
    two = started(tmp_path, "two", 2, "--parallel.data", "2")
    both = [child.communicate(timeout=600) for child in two]
    assert [child.returncode for child in two] == [0, 0], both
    assert "importance of 2 layers" in both[0][0] and "importance" not in both[1][0]
    runs = [tmp_path / "one", tmp_path / "two"]
    files = [sorted(str(p.relative_to(run)) for p in run.iterdir()) for run in runs]
    assert files[0] == files[1]
    tables = [json.loads((run / "importance.json").read_text()) for run in runs]
    for kind in ("weight", "activation"):
        np.testing.assert_allclose(tables[0][kind], tables[1][kind], rtol=1e-4)
    rows = [np.load(run / "joint" / "random_rows.npz") for run in runs]
    np.testing.assert_array_equal(rows[0]["assignment"], rows[1]["assignment"])
    np.testing.assert_allclose(rows[0]["loss"], rows[1]["loss"], rtol=1e-4)


LOST = """
import os, signal, sys, time
from mpq_jax import processes
from mpq_jax.config import Parallel
with processes.started(Parallel(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))):
    assert processes.from_first({"bits": [2, [3, 4]]} if processes.first() else None) == {"bits": [2, [3, 4]]}
    agreed = processes.agreement(2)
    flags = [agreed(i == 1 and not processes.first()) for i in range(5)]
    assert flags == [False, False, False, True, False], flags
    print("ready", flush=True)
    if not processes.first():
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lost_process_ends_the_others(tmp_path):
    """The survivor ends with an error of one line within 60 s. Before that: what process 0 says reaches the other, and a
    flag that one raises reaches both at the same call."""
    (tmp_path / "lost.py").write_text(LOST)
    address = f"localhost:{free_port()}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen([sys.executable, str(tmp_path / "lost.py"), address, str(i)], env=environment(1), **pipes)
        for i in range(2)
    )
    said = second.communicate(timeout=300)
    assert second.returncode == -9, said
    lost = time.monotonic()
    out, errors = first.communicate(timeout=60)
    assert time.monotonic() - lost < 60 and "ready" in out
    assert first.returncode == processes.LOST, errors
    assert "start all of them again" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "given, advice",
    [
        ({"data": 3}, "more than the 1 there are; data x row may be 1x1"),
        ({"row": 0}, "give numbers from 1"),
        ({"data": 2, "row": 4}, "is 8 devices"),
    ],
)
def test_layouts_that_do_not_fit(given, advice):
    if jax.device_count() > 1:
        pytest.fail("this test is of one device")
    with pytest.raises(Refusal, match=advice):
        parallel.layout(Parallel(**given))


def test_sizes_that_do_not_divide():
    class Wide:
        data, row = 4, 2

    parallel.check_rows(Wide, 6, 3)
    parallel.check_batch(Wide, 64, "joint.batch_size")
    with pytest.raises(Refusal, match=r"does not divide the 5 rows; choose one of \[1, 5\]"):
        parallel.check_rows(Wide, 5)
    with pytest.raises(Refusal, match=r"does not divide the 3 rows of a device; choose one of \[1, 3\]"):
        parallel.check_rows(Wide, 6, 2)
    with pytest.raises(Refusal, match=r"--joint.batch_size 30 cannot be split .* choose 28 or 32"):
        parallel.check_batch(Wide, 30, "joint.batch_size")
    assert parallel.up_to(Wide, 355) == 356 and parallel.up_to(Wide, 8) == 8


@pytest.mark.parametrize(
    "given, advice",
    [
        ({"coordinator": "here"}, "write host:port"),
        ({"coordinator": "here:1", "processes": 2}, "--parallel.process 0 to N-1"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "found 2 and 2"),
    ],
)
def test_processes_that_cannot_be(given, advice):
    with pytest.raises(Refusal, match=advice), processes.started(Parallel(**given)):
        pass


def test_one_process_asks_nobody():
    with processes.started(Parallel()):
        assert processes.first() and processes.alone()
        assert processes.first_alone(lambda: 3) == processes.from_first(3) == processes.first_only(lambda: 3)
        assert processes.agreement(2)(True) is True
