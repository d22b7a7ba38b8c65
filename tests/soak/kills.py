"""Kills real runs at random moments, resumes them, and compares them with a run that was left alone.

python tests/soak/kills.py --kills 50 [--signal KILL|TERM|TWICE] [--seed 0] [--place DIR]

The last line is JSON: the kills of each phase, how many came during a write, and what differed. Exit code 1
where anything did.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import disk  # noqa: E402

import runs  # noqa: E402


def strike(pid: int, how: str, rng: random.Random) -> None:
    """Sends the signal, or two."""
    os.kill(pid, signal.SIGKILL if how == "KILL" else signal.SIGTERM)
    if how == "TWICE":
        time.sleep(rng.uniform(0, 0.3))
        os.kill(pid, rng.choice([signal.SIGTERM, signal.SIGINT]))


def wrong_end(how: str, code: int | None, seconds: float, said: str) -> str | None:
    """What is wrong with how a child ended after its signal."""
    if how == "KILL":
        return None if code == -signal.SIGKILL else f"exit code {code}"
    if code is None or seconds > 10:
        return f"SIGTERM took {seconds:.1f} s"
    allowed = (0, 130) if how == "TWICE" else (0,)
    if code not in allowed:
        return f"exit code {code} after {how}: {said[-600:]}"
    if code == 0 and "the same command goes on from there" not in said and "policy: " not in said:
        return f"no line that says how to go on: {said[-600:]}"
    return None


def struck(
    place: Path, run: Path, phase: str, how: str, aimed: bool, seconds: dict[str, float], rng: random.Random, counts
) -> list[str] | None:
    """Starts a phase's command and strikes it once. -> what went wrong; None where it ended before"""
    output, note = place / "trial.txt", place / "struck"
    note.unlink(missing_ok=True)
    command = runs.commands(place, run)[phase]
    if aimed:
        numbers = {"KILL": [signal.SIGKILL], "TERM": [signal.SIGTERM]}
        pair = [signal.SIGTERM, rng.choice([signal.SIGTERM, signal.SIGINT])]
        pid = runs.start(command, output, runs.aimed(run, phase, numbers.get(how, pair), note, rng))
        code = runs.ended(pid, 120.0)
    else:
        pid = runs.start(command, output)
        code = runs.ended(pid, rng.uniform(0, seconds[phase]))
        if code is None:
            note.write_text(str(time.monotonic()))
            strike(pid, how, rng)
            code = runs.ended(pid, 120.0)
    if not note.exists():
        counts["ended before"] += 1
        assert code == 0, f"{phase}: exit code {code}: {output.read_text()[-2000:]}"
        return None
    took = time.monotonic() - float(note.read_text())
    counts[phase] += 1
    counts["during a write"] += aimed or runs.writing(run, phase)
    counts["left a write unfinished"] += runs.writing(run, phase) and phase != "search"
    counts["slowest end"] = max(counts["slowest end"], round(took, 2))
    fault = wrong_end(how, code, took, output.read_text())
    return [f"{phase}: {fault}"] if fault else []


def chain(place: Path, hows: list[str], seconds: dict[str, float], rng: random.Random, counts) -> list[str]:
    """One whole run, struck once in each phase, during a checkpoint's write; then compared. -> what went wrong"""
    run, wrong = runs.begin(place, "float", "chain"), []
    todo = runs.commands(place, run)
    for phase, how in zip(runs.PHASES, hows, strict=True):
        wrong += struck(place, run, phase, how, True, seconds, rng, counts) or []
        if phase != "float":  # the command of joint training is the same one
            runs.finish(todo[phase], place / "trial.txt")
        if phase == "joint":
            runs.finish(todo["policy"], place / "trial.txt")
    return wrong + runs.in_child(lambda: runs.differences(run, place / "reference"))


def trial(place: Path, phase: str, how: str, aims: list[bool], seconds: dict[str, float], rng: random.Random, counts):
    """One run from the beginning of a phase, struck once for each of `aims`, then finished. -> what went wrong"""
    run, output, wrong = runs.begin(place, phase, "trial"), place / "trial.txt", []
    for aimed in aims:
        found = struck(place, run, phase, how, aimed, seconds, rng, counts)
        if found is None:
            break
        wrong += found
    todo = runs.commands(place, run)
    after = {"float": ("float", "policy", "search", "finetune"), "joint": ("joint", "policy", "search", "finetune")}
    # The later phases of a killed float or joint training are what its parameters lead to: now and then they are run, too.
    names = after.get(phase, (phase,)) if rng.random() < 0.25 else (phase, *(("policy",) if phase in after else ()))
    for name in names:
        runs.finish(todo[name], output)
    expected = runs.trimmed(place, phase) if len(names) <= 2 else place / "reference"
    return wrong + [f"{phase}: {each}" for each in runs.in_child(lambda: runs.differences(run, expected))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=("KILL", "TERM", "TWICE"), default="KILL")
    parser.add_argument("--phases", nargs="+", choices=runs.PHASES, default=list(runs.PHASES))
    parser.add_argument("--each", type=int, default=0, help="kills of one run before it is let finish; 0: one to three")
    parser.add_argument(
        "--chain", nargs=4, metavar="HOW", help="one run only, struck once in each phase: KILL, TERM, …"
    )
    parser.add_argument("--disk", action="store_true", help="also one of each of disk.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    place = arguments.place or Path(tempfile.mkdtemp(prefix="soak-"))
    runs.import_all()
    seconds = runs.reference(place)
    counts, wrong, turn = collections.Counter(), [], 0
    if arguments.chain:
        wrong, turn, arguments.kills = chain(place, arguments.chain, seconds, rng, counts), 1, 0
    if arguments.disk:
        wrong += disk.short(place, rng, counts)
    while sum(counts[phase] for phase in runs.PHASES) < arguments.kills:
        phase = arguments.phases[turn % len(arguments.phases)]
        aims = [rng.random() < 0.5 or turn < len(arguments.phases) for _ in range(arguments.each or rng.randint(1, 3))]
        wrong += trial(place, phase, arguments.signal, aims, seconds, rng, counts)
        turn += 1
        if len(wrong) > 20:
            break
    if arguments.place is None:
        shutil.rmtree(place)
    print("\n".join(wrong), file=sys.stderr)
    print(json.dumps({"signal": arguments.chain or arguments.signal, "runs": turn, **counts, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
