"""Runs on a disk that is full, and on one that cannot be written: one line each, nothing lost, and on it goes.

python tests/soak/disk.py [--sizes 40] [--place DIR]

A disk is a small tmpfs in a mount namespace of the child's own; where the system does not allow that, a limit on the size of
files and a folder of another user stand for it, and the counts say so.
"""

import argparse
import collections
import contextlib
import ctypes
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import runs  # noqa: E402

_NEWNS = 0x00020000


class Disk:
    """A folder whose room and permission can be changed. `kind` says by what."""

    def __init__(self, folder: Path):
        self.folder = folder
        libc = ctypes.CDLL(None, use_errno=True)
        self.kind = "tmpfs"
        try:
            if (
                libc.unshare(_NEWNS)
                or self._mount("--make-rprivate", "/")
                or self._mount("-t", "tmpfs", "tmpfs", str(folder))
            ):
                self.kind = "limits"
        except OSError:
            self.kind = "limits"
        if self.kind == "limits":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def _mount(self, *arguments: str) -> int:
        return subprocess.run(["mount", *arguments], capture_output=True).returncode

    def room(self, kib: int | None) -> None:
        """So many KiB for the whole folder (as limits: for each file); None: plenty."""
        if self.kind == "tmpfs":
            assert not self._mount("-o", f"remount,rw,size={kib or 100_000}k", str(self.folder))
        else:
            limit = resource.RLIM_INFINITY if kib is None else 1024 * max(1, kib // 40)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    @contextlib.contextmanager
    def read_only(self):
        if self.kind == "tmpfs":
            assert not self._mount("-o", "remount,ro", str(self.folder))
            yield
            assert not self._mount("-o", "remount,rw", str(self.folder))
        else:
            for path in [self.folder, *self.folder.rglob("*")]:
                path.chmod(0o555 if path.is_dir() else 0o444)
            user = os.geteuid()
            if user == 0:
                os.seteuid(65534)
            yield
            os.seteuid(user)
            for path in [self.folder, *self.folder.rglob("*")]:
                path.chmod(0o755 if path.is_dir() else 0o644)


def said(command: tuple[str, list[str]]) -> tuple[int, list[str]]:
    """Runs a command in this process. -> (exit code, lines on stderr that are no progress, whoever wrote them there)"""
    from mpq_jax.commands import search, train

    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):
        real = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            code = {"train": train, "search": search}[command[0]].main(command[1])
            gc.collect()  # tasks that failed say so when they are collected
            time.sleep(0.2)
            sys.stderr.flush()
        finally:
            os.dup2(real, 2)
            os.close(real)
        file.seek(0)
        lines = file.read().decode(errors="replace").splitlines()
    return code, [line[:300] for line in lines if not line.startswith(("pretrain ", "joint ", "finetune ", "writing "))]


def full(place: Path, phase: str, kib: int, counts: collections.Counter) -> list[str]:
    """A phase on a disk with so much room left, then the same with plenty; in a child. -> what went wrong"""
    source = runs.begin(place, phase, "full")

    def child() -> list[str]:
        run, wrong = place / "disk", []
        run.mkdir(exist_ok=True)
        disk = Disk(run)
        shutil.copytree(source, run, dirs_exist_ok=True)
        before = sum(-(-path.stat().st_size // 4096) * 4 for path in run.rglob("*") if path.is_file()) + 4
        command = runs.commands(place, run)[phase]
        disk.room(before + kib)
        code, lines = said(command)
        if code not in (0, 2) or (code == 2 and (len(lines) != 1 or not lines[0].startswith("error: "))):
            wrong.append(f"{phase} with {kib} KiB: exit code {code}, {lines}")
        disk.room(None)
        again, lines = said(command)
        if again != 0:
            wrong.append(f"{phase} after {kib} KiB: exit code {again}, {lines}")
        if phase in ("float", "joint"):
            wrong += [] if said(runs.commands(place, run)["policy"])[0] == 0 else ["no policy"]
        expected = runs.trimmed(place, phase)
        return [f"by {disk.kind}", f"code {code}", *wrong, *runs.differences(run, expected)]

    found = runs.in_child(child)
    kinds = [each for each in found if each.startswith(("by ", "code "))]
    counts["full disks"] += 1
    counts["that stopped a run"] += "code 2" in kinds
    counts[kinds[0] if kinds else "by nothing"] += 1
    return [f"full disk, {each}" for each in found if each not in kinds]


def read_only(place: Path, counts: collections.Counter) -> list[str]:
    """Every command in a finished run's folder that cannot be written: one line, nothing changed; in a child."""

    def child() -> list[str]:
        run, wrong = place / "disk", []
        run.mkdir(exist_ok=True)
        disk = Disk(run)
        shutil.copytree(place / "reference", run, dirs_exist_ok=True)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with disk.read_only():
            for name, command in runs.commands(place, run).items():
                code, lines = said(command)
                if code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
                    wrong.append(f"{name}: exit code {code}, {lines}")
        after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        return wrong + [str(path) for path in {*before, *after} if before.get(path) != after.get(path)]

    counts["read-only folders"] += 1
    return [f"read-only, {each}" for each in runs.in_child(child)]


# ---- damaged checkpoints, two runs --------------------------------------------------------------------------------


def _flipped(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": lambda file, rng: os.truncate(file, rng.randrange(file.stat().st_size)),
    "a bit flipped": _flipped,
    "missing": lambda file, rng: file.unlink(),
}


def damaged(place: Path, phase: str, damage: str, rng: random.Random, counts: collections.Counter) -> list[str]:
    """A finished phase whose newest checkpoint is damaged in one file: the one before is taken, and all ends the same."""
    run = place / "damaged"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(place / "reference", run)
    stages = sorted({path.parent for path in (run / runs.FOLDERS[phase]).rglob("*.sha256")})
    stage = rng.choice(stages)
    newest = max((path for path in stage.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    file = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    DAMAGES[damage](file, rng)
    output = place / "damaged.txt"
    counts[f"checkpoints {damage}"] += 1
    runs.finish(runs.commands(place, run)[phase], output)
    text = output.read_text()
    if phase == "float":  # its checkpoint is another file now, and so is the table that was measured on it
        runs.finish(runs.commands(place, run)["policy"], place / "search.txt")
    wrong = [] if "is damaged (" in text and "is taken in its place" in text else [f"{phase} {damage}: {text[-500:]}"]
    return wrong + [
        f"{phase} {damage}: {each}" for each in runs.in_child(lambda: runs.differences(run, place / "reference"))
    ]


def two_runs(place: Path, counts: collections.Counter) -> tuple[Path, list[str]]:
    """A second run in a folder that is in use is refused in one line; then the first is killed. -> (folder, what went wrong)"""
    run = runs.begin(place, "joint", "two")
    command = runs.commands(place, run)["joint"]
    held = (run / ".lock").read_text()  # the reference's, of a run that has ended
    first = runs.start(command, place / "first.txt")
    runs.wait_for(first, lambda: (run / ".lock").read_text() not in ("", held), 60.0)
    second = runs.start(command, place / "second.txt")
    code, text = runs.ended(second, 60.0), (place / "second.txt").read_text()
    os.kill(first, signal.SIGKILL)
    runs.ended(first, 10.0)
    counts["two runs in one folder"] += 1
    if code != 2 or text.count("\n") != 1 or f"is in use by process {first} on {os.uname().nodename}" not in text:
        return run, [f"the second of two runs: exit code {code}: {text[-500:]}"]
    return run, []


def after_two(place: Path, run: Path) -> list[str]:
    """What the kill left of the folder does not keep the next run out, which ends as it should."""
    for name in ("joint", "policy"):
        runs.finish(runs.commands(place, run)[name], place / "second.txt")
    return [
        f"after two runs: {each}" for each in runs.in_child(lambda: runs.differences(run, runs.trimmed(place, "joint")))
    ]


def short(place: Path, rng: random.Random, counts: collections.Counter) -> list[str]:
    """One of each."""
    wrong = full(place, "joint", 150, counts) + read_only(place, counts) + two_runs(place, counts)[1]
    return wrong + damaged(place, "float", rng.choice(list(DAMAGES)), rng, counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, default=40, help="full disks of random sizes")
    parser.add_argument("--damages", type=int, default=20, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), collections.Counter()
    place = arguments.place or Path(tempfile.mkdtemp(prefix="soak-"))
    runs.import_all()
    runs.reference(place)
    wrong = short(place, rng, counts)
    run, more = two_runs(place, counts)
    wrong += more + after_two(place, run)
    for number in range(arguments.sizes):
        wrong += full(
            place, runs.PHASES[number % 4], rng.choice([0, 4, 16, 50, 100, 200, 400, 800]) + rng.randrange(16), counts
        )
    for number in range(arguments.damages):
        wrong += damaged(place, ("float", "joint", "finetune")[number % 3], list(DAMAGES)[number // 3 % 3], rng, counts)
    if arguments.place is None:
        shutil.rmtree(place)
    print("\n".join(wrong), file=sys.stderr)
    print(json.dumps({**counts, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
