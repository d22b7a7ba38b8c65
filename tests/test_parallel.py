"""Many devices: layouts against one device, in a child with 8 virtual CPU devices; processes against one process.

`python -m benchmarks.many_devices` and tests/soak/hosts.py are the long forms.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
import yaml

from mpq_jax import Refusal, parallel, processes
from mpq_jax import config as config_lib
from mpq_jax.config import Parallel

ROOT = Path(__file__).parents[1]


def environment(devices: int) -> dict[str, str]:
    """XLA's own flag may have other values in a developer's shell; JAX's is ours alone."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}


def test_layouts_equal_one_device(tmp_path):
    """float64: data x row = 8x1, 4x2 with split parameters, 1x6, and 1x6 from the checkpoint of 4x2, within 1e-9."""
    layouts = ["8x1", "4x2f", "1x6", "1x6 from 4x2f"]
    command = [sys.executable, "-m", "benchmarks.many_devices", "--layouts", ",".join(layouts), "--steps", "4"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env=environment(8) | quick.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["devices"] for line in found] == [8, 8, 6, 6]
    for line in found:
        assert max(line[key] for key in ("losses", "step_sizes", "params", "rows")) < 1e-9, line
        assert line["same_policy"] and line["within"] and line["compilations"] == 1, line
    trained, resumed = (np.load(next(tmp_path.glob(f"{name}.npz")))["losses"] for name in ("8x1_*", "1x6_*_4x2f_*"))
    assert trained.shape == (4, 6) and resumed.shape == (2, 6) and not np.allclose(trained[0], trained[-1], atol=1e-3)


def test_two_processes_train_what_one_does_and_survive_a_kill(tmp_path):
    """Process 1 is killed in joint training: process 0 ends within 60 s, and after a rerun all is, to the last bit, what
    two processes train that are left alone. Those train what one does, within float32's rounding."""
    command = [sys.executable, str(ROOT / "tests" / "soak" / "hosts.py"), "--alone", "--place", str(tmp_path)]
    command += ["--kills", "1", "--kinds", "between steps", "--seed", "0"]
    # Programs are compiled once for all the runs, and quickly: they are small.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    children = {**environment(1), **cache, **quick.environment()}
    done = subprocess.run(command, env=children, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["between steps"] == 1 and counts["process 0 was killed"] == 0 == counts["wrong"], counts
    assert counts["ended with advice"] == 1 and counts["slowest end"] < 60
    both = [(tmp_path / f"out{i}.txt").read_text() for i in range(2)]
    assert "importance of 2 layers" in both[0] and "importance" not in both[1]
    runs = [tmp_path / "alone", tmp_path / "reference"]
    files = [sorted(str(path.relative_to(run)) for path in run.iterdir()) for run in runs]
    assert files[0] == files[1]
    for table in ("importance.json", "importance_output_fisher.json"):
        one, two = (json.loads((run / table).read_text()) for run in runs)
        for kind in ("weight", "activation"):
            np.testing.assert_allclose(one[kind], two[kind], rtol=1e-3)
    rows = [np.load(run / "joint" / "random_rows.npz") for run in runs]
    np.testing.assert_array_equal(rows[0]["policies"], rows[1]["policies"])
    np.testing.assert_allclose(rows[0]["loss"], rows[1]["loss"], rtol=1e-3)


LOST = """
import os, signal, sys
from mpq_jax import processes
from mpq_jax.config import Parallel
with processes.started(Parallel(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))):
    assert processes.from_first({"bits": [2, [3, 4]]} if processes.first() else None) == {"bits": [2, [3, 4]]}
    agreed = processes.agreement(2)
    flags = [agreed(i == 1 and not processes.first()) for i in range(5)]
    assert flags == [False, False, False, True, False], flags
    print("ready", flush=True)
    if not processes.first():
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        agreed(False)
"""


# Process 1 is slow to hear that the last barrier is passed.
SLOW = """
import sys, time
from mpq_jax import processes
from mpq_jax.config import Parallel
farewell = processes._farewell
if sys.argv[2] == "1":
    processes._farewell = lambda: (time.sleep(1.5), print(time.time(), file=sys.__stdout__), farewell())
with processes.started(Parallel(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))):
    pass
print(time.time())
"""


# Process 0 ends without any farewell of Python's or JAX's, and process 1 lives on.
ABRUPT = """
import os, sys, time
from mpq_jax import processes
from mpq_jax.config import Parallel
with processes.started(Parallel(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))):
    pass
if sys.argv[2] == "1":
    time.sleep(1.5)
os._exit(0)
"""


def two(script: Path, text: str) -> list[subprocess.Popen]:
    """Two processes of a script, each given the address of process 0 and its own number."""
    script.write_text(text)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, str(script), address, str(i)], env=environment(1), **pipes) for i in range(2)
    ]


def test_process_0_goes_when_the_others_know_that_all_is_done(tmp_path):
    said = [process.communicate(timeout=300) for process in two(tmp_path / "slow.py", SLOW)]
    (first,), (told, _) = ([float(line) for line in out.splitlines()] for out, _ in said)
    assert first > told, said


def test_process_0_may_go_without_more_ado_when_all_is_done(tmp_path):
    pair = two(tmp_path / "abrupt.py", ABRUPT)
    said = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said


def test_a_lost_process_ends_the_others(tmp_path):
    """The survivor ends with an error of one line within 60 s. Before that: what process 0 says reaches the other, and a
    flag that one raises reaches both at the same call."""
    first, second = two(tmp_path / "lost.py", LOST)
    said = second.communicate(timeout=300)
    assert second.returncode == -9, said
    lost = time.monotonic()
    out, errors = first.communicate(timeout=60)
    assert time.monotonic() - lost < 60 and "ready" in out
    assert first.returncode == 2, errors
    assert "start all of them again" in errors and "Traceback" not in errors


def options(text: str) -> set[str]:
    """The options of train.py that a text names."""
    return set(re.findall(r"--(parallel\.\w+)", text))


def test_recipes_are_read_by_their_shells_and_name_options_that_are_there():
    launch = ROOT / "docs" / "launch"
    known = config_lib.options(config_lib.Config())
    for name in ("tpu_pod.sh", "slurm.sbatch"):
        text = (launch / name).read_text()
        subprocess.run(["bash", "-n", str(launch / name)], check=True)
        assert options(text) == {"parallel.distributed", "parallel.data"} <= known.keys()
    text = (launch / "jobset.yaml").read_text()
    (workers,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (train,) = job["template"]["spec"]["containers"]
    values = {each["name"]: each["value"] for each in train["env"]}
    assert job["completions"] == job["parallelism"] == int(values["PROCESSES"]) and workers["replicas"] == 1
    subprocess.run(["bash", "-n"], input=train["command"][-1], text=True, check=True)
    assert options(text) == {f"parallel.{n}" for n in ("data", "coordinator", "processes", "process")} <= known.keys()
    port = train["ports"][0]["containerPort"]
    assert f"--parallel.coordinator mpq-{workers['name']}-0-0.mpq:{port}" in train["command"][-1]


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


def test_devices_of_a_process_stand_together():
    slice_ = [types.SimpleNamespace(id=i, process_index=i // 4 % 2) for i in range(16)]
    ordered = [(device.process_index, device.id) for device in processes.in_order(slice_)]
    assert ordered == [(0, i) for i in (0, 1, 2, 3, 8, 9, 10, 11)] + [(1, i) for i in (4, 5, 6, 7, 12, 13, 14, 15)]


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
