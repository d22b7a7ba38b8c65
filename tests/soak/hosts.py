"""Kills one of several processes of a run during joint training: the others must end by themselves, and a rerun goes on.

python tests/soak/hosts.py --kills 6 [--processes 2] [--seed 0] [--alone] [--place DIR]

The processes are real ones, on this machine. In turn one is killed between two steps, process 0 while it writes a checkpoint,
one at a random time, and one gets SIGTERM, after which all must save the same step. The last line is JSON: how often each,
how the others ended, the slowest end, and what differed from a run that was left alone. Exit code 1 where anything did.
--alone: also one run in one process, to compare with; place/reference is that of all processes.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Children are forked: what is said here of devices holds for them. XLA's own flag may say other things in a developer's shell.
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import runs  # noqa: E402

WITHIN = 60.0  # seconds
ADVICE = "start all of them again: the run goes on from its last checkpoint"
JAX_SAYS = "another task died"  # where its coordination service is faster than the error of a collective operation
KINDS = ("between steps", "during a write", "at a random time", "SIGTERM")


def nothing() -> None:
    pass


def started(place: Path, run: Path, count: int, prepare: dict[int, Callable[[], None]]) -> list[int]:
    """Training up to the importance table in `count` processes, which write to place/out<i>.txt. -> their pids"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    name, arguments = runs.commands(place, run)["joint"]
    pids = []
    for i in range(count):
        more = ["--parallel.coordinator", f"localhost:{port}", "--parallel.processes", str(count)]
        more += ["--parallel.process", str(i), "--parallel.data", "0"]
        command = (name, [*arguments, *more] if count > 1 else arguments)
        pids.append(runs.start(command, place / f"out{i}.txt", prepare.get(i, nothing)))
    return pids


def said(place: Path, i: int) -> str:
    return (place / f"out{i}.txt").read_text(errors="replace")


def finish(place: Path, run: Path, count: int) -> None:
    """Runs training to its end; all processes must succeed."""
    pids = started(place, run, count, {})
    codes = [runs.ended(pid, 300.0) for pid in pids]
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
    assert not any(codes), [codes, *(said(place, i)[-2000:] for i in range(count))]


def after_step(at: int, number: int, note: Path) -> Callable[[], None]:
    """For a child: it sends itself a signal, once, when it has looked at the losses of step `at` of joint training."""

    def prepare() -> None:
        from mpq_jax.stages import loop

        settle = loop._settle

        def struck(stage, pending):
            found = settle(stage, pending)
            if stage.name == "joint" and pending[-1][0] >= at and not note.exists():
                note.write_text(str(time.monotonic()))
                os.kill(os.getpid(), number)
            return found

        loop._settle = struck

    return prepare


def trial(place: Path, kind: str, count: int, steps: int, rng: random.Random, counts) -> list[str]:
    """One joint training of which a process is killed once; then the run is finished. -> what went wrong"""
    run, note = runs.begin(place, "joint", "trial"), place / "struck"
    note.unlink(missing_ok=True)
    victim = 0 if kind == "during a write" else rng.randrange(count)
    prepare = {
        "between steps": after_step(rng.randrange(steps - 1), signal.SIGKILL, note),
        # Early enough: the others hear of it some steps later.
        "SIGTERM": after_step(rng.randrange(steps // 2), signal.SIGTERM, note),
        "during a write": runs.aimed(run, "joint", [signal.SIGKILL], note, rng),
    }
    pids = started(place, run, count, {victim: prepare[kind]} if kind in prepare else {})
    if kind == "at a random time":
        assert runs.wait_for(pids[victim], (run / "joint" / "log.jsonl").exists, 120.0) is None, said(place, victim)
        time.sleep(rng.uniform(0, 0.3))
        note.write_text(str(time.monotonic()))
        os.kill(pids[victim], signal.SIGKILL)
    counts[kind] += 1
    if kind == "SIGTERM":
        wrong = stopped(place, pids)
    else:
        code, wrong = runs.ended(pids[victim], 120.0), []
        if code != -signal.SIGKILL:
            wrong.append(f"process {victim} was to be killed, and ended with {code}: {said(place, victim)[-600:]}")
        counts["process 0 was killed"] += victim == 0
        for i, pid in enumerate(pids):
            if i != victim:
                wrong += survived(place, i, pid, note, counts)
    finish(place, run, count)
    return wrong + runs.in_child(lambda: runs.differences(run, place / "reference"))


def stopped(place: Path, pids: list[int]) -> list[str]:
    """Waits for all processes of a run of which one got SIGTERM. -> what is wrong with how they ended"""
    codes = [runs.ended(pid, WITHIN) for pid in pids]
    # Anywhere in the text: what process 0 has for standard output may come after it.
    lines = {
        tuple(line for line in said(place, i).splitlines() if line.startswith("stopped by SIGTERM: step "))
        for i in range(len(pids))
    }
    if any(code != 0 for code in codes) or len(lines) > 1 or not all(lines):
        return [f"exit codes {codes}: {sorted(lines)}"]
    return []


def survived(place: Path, i: int, pid: int, note: Path, counts) -> list[str]:
    """Waits for a process that was left. -> what is wrong with how it ended"""
    since = float(note.read_text()) if note.exists() else time.monotonic()
    code = runs.ended(pid, since + WITHIN - time.monotonic())
    if code is None:
        os.kill(pid, signal.SIGKILL)
        runs.ended(pid, 10.0)
        return [f"process {i} hangs: {said(place, i)[-600:]}"]
    counts["slowest end"] = max(counts["slowest end"], round(time.monotonic() - since, 2))
    text = said(place, i)
    if code == 2 and ADVICE in text and "Traceback" not in text:
        counts["ended with advice"] += 1
    elif code not in (0, None) and JAX_SAYS in text:
        counts["ended by JAX"] += 1
    else:
        return [f"process {i} ended with exit code {code}: {text[-600:]}"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    place = arguments.place or Path(tempfile.mkdtemp(prefix="soak-"))
    place.mkdir(parents=True, exist_ok=True)
    runs.import_all()
    (place / "tiny.py").write_text(runs.CONFIG.format(data=str(place / "data")))
    if arguments.alone:
        finish(place, place / "alone", 1)
    finish(place, place / "reference", arguments.processes)
    steps = runs.joint_steps(place / "reference")
    counts, wrong = collections.Counter(), []
    for number in range(arguments.kills):
        kind = arguments.kinds[number % len(arguments.kinds)]
        wrong += [f"{kind}: {each}" for each in trial(place, kind, arguments.processes, steps, rng, counts)]
    if arguments.place is None:
        shutil.rmtree(place)
    print("\n".join(wrong), file=sys.stderr)
    print(json.dumps({"processes": arguments.processes, **counts, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
