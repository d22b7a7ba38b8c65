"""Real runs in child processes: started, signalled, resumed, and compared with a run that nothing happened to.

Children are forked from a process that has imported everything and started nothing of JAX: each is a whole process that
can be killed, without the seconds that imports take.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mpq_jax.importance import sha256

CONFIG = """
from mpq_jax.config import *
config = Config(
    data=Data(name="digits", augment=False, data_dir={data!r}),
    model=Model(name="cnn_nnx", options={{"width": 0.5}}),
    quantize=Quantize(bit_widths=(2, 3, 4)),
    pretrain=Pretrain(steps=12, batch_size=32, warmup_steps=2),
    joint=Joint(steps=10, batch_size=16),
    finetune=Finetune(steps=8, batch_size=16, random_policies=1),
    eval_batch_size=355,
    statistics_batches=2,
    checkpoint_every=2,
    log_every=2,
)
"""
PHASES = ("float", "joint", "search", "finetune")
# Where each phase keeps what it makes, and what a folder must lose to stand at its beginning.
FOLDERS = {"float": "pretrain", "joint": "joint", "search": "search_evolution", "finetune": "finetune"}
MADE_AFTER = {
    "float": ("pretrain", "joint", "search_evolution", "finetune"),
    "joint": ("joint", "search_evolution", "finetune"),
    "search": ("search_evolution",),
    "finetune": ("finetune",),
}
LEARNED = ("importance.json", "importance_output_fisher.json", "indicators.json")
FILES_AFTER = {
    "float": (*LEARNED, "policy.json", "evolved.json", "results.json", "report.md"),
    "joint": (*LEARNED, "policy.json", "evolved.json", "results.json", "report.md"),
    "search": ("evolved.json",),
    "finetune": ("results.json", "report.md"),
}


def import_all() -> None:
    """What the commands import, before the first fork; no device is touched."""
    import grain  # noqa: F401
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot
    import tensorflow_datasets  # noqa: F401

    import mpq_jax.pipeline
    import mpq_jax.search.evolution
    import mpq_jax.search.measure
    import mpq_jax.search.run  # noqa: F401


def commands(place: Path, run: Path) -> dict[str, tuple[str, list[str]]]:
    """phase -> (command, arguments): what is typed, and typed again after a kill."""
    train = ["--config", str(place / "tiny.py"), "--workdir", str(run)]
    evolution = ["--method", "evolution", "--evaluations", "6", "--evolution.population", "4", "--evolution.top", "2"]
    evolution += ["--evolution.mutations", "2", "--evolution.crossovers", "2", "--out", str(run / "evolved.json")]
    return {
        "float": ("train", train),
        "joint": ("train", train),
        "policy": ("search", ["--workdir", str(run), "--budget", "bitops=W3A3", "--random", "2"]),
        "search": ("search", ["--workdir", str(run), "--budget", "bitops=W3A3", *evolution]),
        "finetune": ("train", [*train, "--policy", str(run / "policy.json")]),
    }


def start(command: tuple[str, list[str]], output: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts a command in a forked child. -> its pid. output: the file that its stdout and stderr go to."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        prepare()
        from mpq_jax.commands import search, train

        code = {"train": train, "search": search}[command[0]].main(command[1])
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a child (negative: the signal that ended it), None where it is not done in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def finish(command: tuple[str, list[str]], output: Path, seconds: float = 300.0) -> float:
    """Runs a command to its end; it must succeed. -> seconds it took"""
    began = time.monotonic()
    pid = start(command, output)
    code = ended(pid, seconds)
    if code is None:
        os.kill(pid, signal.SIGKILL)
    assert code == 0, f"exit code {code}: {output.read_text()[-3000:]}"
    return time.monotonic() - began


def reference(place: Path) -> dict[str, float]:
    """A whole run in place/reference that nothing happens to. -> seconds of each command"""
    place.mkdir(parents=True, exist_ok=True)
    (place / "tiny.py").write_text(CONFIG.format(data=str(place / "data")))
    todo = commands(place, place / "reference")
    seconds = {name: finish(todo[name], place / "out.txt") for name in ("float", "policy", "search", "finetune")}
    return {**seconds, "joint": seconds["float"]}


def begin(place: Path, phase: str, name: str) -> Path:
    """A copy of the reference that stands at the beginning of a phase."""
    run = place / name
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(place / "reference", run)
    for folder in MADE_AFTER[phase]:
        shutil.rmtree(run / folder, ignore_errors=True)
    for file in FILES_AFTER[phase]:
        (run / file).unlink(missing_ok=True)
    return run


def trimmed(place: Path, phase: str) -> Path:
    """What a run of the phase alone must equal: of a float or joint training, the reference without what comes after."""
    if phase not in ("float", "joint"):
        return place / "reference"
    expected = place / "trained"
    if not expected.exists():
        shutil.copytree(place / "reference", expected)
        for folder in ("search_evolution", "finetune"):
            shutil.rmtree(expected / folder)
        for file in ("evolved.json", "results.json"):
            (expected / file).unlink()
    return expected


def joint_steps(run: Path) -> int:
    """Steps of a finished joint training."""
    return int(np.load(run / "joint" / "random_rows.npz")["step"].max()) + 1


def wait_for(pid: int, moment: Callable[[], bool], seconds: float) -> int | None:
    """Waits until `moment` is true, for `seconds` at most; None then, or the child's exit code if that came first."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not moment():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


# ---- when ---------------------------------------------------------------------------------------------------------


def writing(run: Path, phase: str) -> bool:
    """Whether a checkpoint of the phase is being written right now (of a search: whether it has begun its journal)."""
    folder = run / FOLDERS[phase]
    if phase == "search":
        return any(folder.glob("*/evaluations.jsonl"))
    stages = folder.glob("*") if phase == "finetune" else [folder]
    return any("orbax-checkpoint-tmp" in name for stage in stages if stage.is_dir() for name in os.listdir(stage))


def aimed(run: Path, phase: str, signals: list[int], note: Path, rng: random.Random) -> Callable[[], None]:
    """For a child: it sends itself the signals while it writes a checkpoint of the phase, or a search its journal.

    The moments are of Python's audit events (every file that is opened, made or renamed is one): the first signal comes
    at a random one of the first 40 after a random one of the first three writes began, the others soon after.
    note: gets the time of the first, once it has been sent.
    """
    skipped, at = rng.randrange(3), rng.randint(1, 40)
    moments = [at]
    for _ in signals[1:]:
        moments.append(moments[-1] + rng.randint(1, 40))
    folder, seen = str(run / FOLDERS[phase]), {"writes": 0, "events": 0}

    def begins(event: str, what: str) -> bool:
        if phase == "search":
            return event == "open" and what.endswith("evaluations.jsonl")
        return event == "os.mkdir" and what.startswith(folder) and what.count("orbax-checkpoint-tmp") == 1

    def hook(event: str, arguments: tuple) -> None:
        if not moments:
            return
        if event in ("open", "os.mkdir") and begins(event, str(arguments[0])):
            seen["writes"] += 1
        seen["events"] += seen["writes"] > skipped
        if seen["events"] >= moments[0]:
            number = signals[len(signals) - len(moments)]
            moments.pop(0)
            if not note.exists():
                note.write_text(str(time.monotonic()))
            os.kill(os.getpid(), number)

    return lambda: sys.addaudithook(hook)


# ---- what must be the same ----------------------------------------------------------------------------------------


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint, by its path."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # of metadata that a checkpoint of one item does not have
    with ocp.PyTreeCheckpointer() as checkpointer:
        held = checkpointer.metadata(checkpoint / "default").item_metadata.tree
        # As NumPy arrays: the checkpoint may be of more processes than read it.
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held)
        tree = checkpointer.restore(checkpoint / "default", args=ocp.args.PyTreeRestore(restore_args=wanted))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def without_clock(path: Path):
    """A JSON or JSON-lines file without its wall-clock fields, those of checkpoints that it has digests of among them.

    A policy's digest of its table is replaced by the table's name: it must be one that lies beside it.
    """
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    values = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
    for value in values:
        if "made_from" in value.get("about", {}):
            del value["about"]["made_from"]["files"]
        if "importance_sha256" in value:
            tables = {sha256(file): file.name for file in path.parent.glob("importance*.json")}
            value["importance_sha256"] = tables.get(value["importance_sha256"], "no table that is there")
    return values


def differences(run: Path, expected: Path) -> list[str]:
    """What of a finished run is not, to the last bit, what it is in `expected`; wall-clock fields aside."""
    found = []
    for stage in sorted(path for path in expected.glob("**/*") if path.is_dir() and path.name.isdigit()):
        name = stage.relative_to(expected)
        if stage.name != str(max(int(p.name) for p in stage.parent.iterdir() if p.name.isdigit())):
            continue  # the checkpoint before the last may be of another step after a stop
        if not (run / name).is_dir():
            found.append(f"{name} is missing")
            continue
        mine, theirs = arrays(run / name), arrays(stage)
        if mine.keys() != theirs.keys():
            found.append(f"{name}: other leaves")
        found += [f"{name}{key}" for key in theirs if mine.get(key, np.nan).tobytes() != theirs[key].tobytes()]
    for file in sorted(path for path in expected.glob("**/*.json*") if path.name != "search.json"):
        name = file.relative_to(expected)
        if any(part.isdigit() for part in name.parts):
            continue
        if not (run / name).is_file() or without_clock(run / name) != without_clock(file):
            found.append(str(name))
    logs = [np.load(folder / "joint" / "random_rows.npz") for folder in (run, expected)]
    found += [f"random_rows {key}" for key in logs[1].files if logs[0][key].tobytes() != logs[1][key].tobytes()]
    left = [str(path.relative_to(run)) for path in run.glob("**/*.orbax-checkpoint-tmp*")]
    return found + [f"left behind: {path}" for path in left]


def in_child(function: Callable[[], list[str]]) -> list[str]:
    """function() in a forked child, where JAX may be started."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            found = function()
        except BaseException as error:
            found = [f"{type(error).__name__}: {error}"]
        os.write(sender, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return json.loads(answer)
