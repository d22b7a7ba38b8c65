"""Reads thousands of mutated files as the commands do: never a traceback, a hang, much memory, or code that is run.

python tests/soak/untrusted.py [--inputs 2000] [--seed 0] [--kinds importance policy latency pickle packed config indicators journal]

Each kind is read in a process of its own with 1 GiB of address space more than it starts with. The last line is JSON: for each
kind how many inputs were accepted, how many refused in one line, and the slowest. Exit code 1 where anything else came.
"""

import argparse
import collections
import contextlib
import ctypes
import faulthandler
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import mutations  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SECONDS, MEMORY = 5.0, 2**30
M_ARENA_MAX = -8  # of glibc's malloc.h
# None of what reads a file starts a program, opens a connection, or looks a name up for a pickle.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen", "webbrowser.open", "os.remove"),
)

# What comes back from the solver's own child.
ANSWER = (
    *(("mpq_jax.search.solvers", "Answer"), ("numpy", "dtype"), ("numpy", "ndarray")),
    ("numpy._core.multiarray", "_reconstruct"),
)

# read(bytes) -> None for a file that is accepted; raises Refusal, or what it should not
Reader = Callable[[bytes], None]
# (reader, make(rng) -> bytes, a valid file's bytes)
Case = tuple[Reader, Callable[[random.Random], bytes], bytes]


def plain(command: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Runs a command; Refusal where it said so in one line."""
    from mpq_jax.types import Refusal

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(arguments)
    lines = err.getvalue().splitlines()
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1100, lines
        raise Refusal(lines[0])
    assert code in (0, 1), code


def importance_value(place: Path, interactions: bool = False):
    from tables import made

    from mpq_jax.importance import save_importance
    from mpq_jax.types import Interaction

    table = made(3, layers=4, tied=True, narrowed=True)
    term = Interaction(("layer0", "w"), ("layer2", "a"), 0.01 * table.weight[:3, :3])
    rules = ("layer=w2/3/4,a2/3/4", "layer(3)=share a")
    terms = (term,) if interactions else ()
    save_importance(place / "good.json", table._replace(interactions=terms, rules=rules), {"made_from": {}})
    return json.loads((place / "good.json").read_text())


def importance_case(place: Path) -> Case:
    from mpq_jax.commands import search

    value, path = importance_value(place, interactions=True), place / "importance.json"

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.03:  # regexes that take for ever
            bad = {
                **value,
                "interactions": [],
                "rules": [rng.choice(["(a|a)*b=4/3/2", "(a+)+$=w2/3/4", "(.*a){25}c=share"])],
            }
            bad["layers"] = [{**layer, "path": "a" * 60 + str(i)} for i, layer in enumerate(value["layers"])]
            return json.dumps(bad).encode()
        return mutations.json_file(value, rng)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        budgets = ["--budget", "bitops=W3A3", "--budget", "size=W4", "--time-limit", "2", "--random", "1"]
        plain(search.main, ["--importance", str(path), *budgets, "--out", str(place / "out.json")])

    return read, make, json.dumps(value).encode()


def policy_case(place: Path) -> Case:
    from mpq_jax import workdir
    from mpq_jax.commands import search

    importance_value(place)
    good, path = place / "good.json", place / "policy.json"
    plain(search.main, ["--importance", str(good), "--budget", "bitops=W3A3", "--out", str(path), "--random", "0"])
    value = json.loads(path.read_text())
    (place / "importance.json").write_bytes(good.read_bytes())

    def read(content: bytes) -> None:
        path.write_bytes(content)
        workdir.check_policy(place, path, "float")
        plain(search.main, ["--importance", str(good), "--policy", str(path), "--check", "--time-limit", "2"])

    return read, lambda rng: mutations.json_file(value, rng), json.dumps(value).encode()


def latency_case(place: Path) -> Case:
    from mpq_jax.commands import search

    importance_value(place)
    widths = [*(f"{w},{a}" for w in (2, 3, 4) for a in (2, 3, 4)), "8,8", "32,32"]
    layers = {
        name: {key: 0.1 + 0.01 * len(key) for key in widths}
        for name in ("first", *(f"layer{i}" for i in range(4)), "last")
    }
    value = {"format": "mpq-latency", "version": 1, "device": "made", "unit": "ms", "layers": layers}
    path = place / "latency.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        options = ["--latency", str(path), "--budget", "latency=9ms", "--time-limit", "2", "--random", "1"]
        plain(search.main, ["--importance", str(place / "good.json"), *options, "--out", str(place / "out.json")])

    return read, lambda rng: mutations.json_file(value, rng), json.dumps(value).encode()


def pickle_case(place: Path) -> Case:
    from test_limpq import CONFIG, as_csv, made

    from mpq_jax import build, limpq

    # The model is not what is tried here, and takes a while to trace.
    layers, names = build.layer_table(CONFIG), build.torch_layer_names(CONFIG)
    build.layer_table, build.torch_layer_names = lambda config: layers, lambda config: dict(names)
    value, canary = made(), str(place / "canary")

    def read(content: bytes) -> None:
        csv = content.startswith(b"layer,")
        path = place / ("i.csv" if csv else "i.pkl")
        path.write_bytes(content)
        limpq.to_importance(limpq.read(path), CONFIG, str(path))

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.15:
            return mutations.mutated_text(as_csv(value), rng)
        return mutations.pickle_file(value, rng, canary)

    import pickle

    return read, make, pickle.dumps(value)


def packed_case(place: Path) -> Case:
    import jax
    import numpy as np
    from export_nets import case

    from mpq_jax import config as config_lib
    from mpq_jax.export import command, packed
    from mpq_jax.export.graph import graph
    from mpq_jax.types import Refusal

    cases = [case(*which) for which in (("net", "lsq", True), ("net", "lq_nets", False))]
    goods, path = [], place / "model.safetensors"
    for found in cases:
        network = graph(found.model, found.variables, found.policy, found.images, **found.kwargs)
        settings = {key: value for key, value in config_lib.to_json(config_lib.Config()).items() if key in command.KEPT}
        packed.save(path, network, found.model.quantizer.name, found.variables, settings)
        goods.append(path.read_bytes())
    shapes = [jax.eval_shape(lambda found=found: found.variables) for found in cases]

    def signed(header, data):
        types = {"U8": np.uint8, "I8": np.int8, "BOOL": np.bool_, "F32": np.float32, "I32": np.int32, "U32": np.uint32}
        tensors = {}
        with contextlib.suppress(KeyError, ValueError, TypeError):
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    tensors[name] = np.frombuffer(data[start:end], types[entry["dtype"]]).reshape(entry["shape"])
            header["__metadata__"]["sha256"] = packed._digest(header["__metadata__"], tensors)
        return header

    def read(content: bytes) -> None:
        path.write_bytes(content)
        file = packed.load(path)
        packed.sizes(path)
        for layer in file.layers:
            file.bits(layer)
            packed.values(file, layer)
        command.config_of(file, [])
        which = 1 if file.quantizer == "lq_nets" else 0
        packed.restore(file, cases[which].model, shapes[which])

    assert Refusal
    return read, lambda rng: mutations.safetensors_file(rng.choice(goods), rng, signed), goods[0]


def config_case(place: Path) -> Case:
    from mpq_jax import config as config_lib
    from mpq_jax import workdir
    from mpq_jax.criteria import files

    mine = config_lib.Config()
    run = place / "run"
    workdir.claim(run, mine, finetuning=False)
    value = json.loads((run / "config.json").read_text())

    def read(content: bytes) -> None:
        (run / "config.json").write_bytes(content)
        config = workdir.load_config(run)
        workdir.claim(run, mine, finetuning=False)
        with contextlib.suppress(workdir.Refusal):  # there is no float model: it always ends so, but in one line
            files.check_needs(run, "output_fisher", config)
        json.dumps(config_lib.to_json(config))

    return read, lambda rng: mutations.json_file(value, rng), json.dumps(value).encode()


def indicators_case(place: Path) -> Case:
    from tables import made

    from mpq_jax import pipeline

    table = made(3, layers=4)
    tables = {"weight": table.weight.tolist(), "activation": table.activation.tolist()}
    value = {
        "format": "mpq-indicators",
        "version": 1,
        "initial": tables,
        "learned": tables,
        "outliers": [["layer1", "weight", 3]],
    }

    def read(content: bytes) -> None:
        (place / "indicators.json").write_bytes(content)
        found = pipeline.indicators(place, table)
        for name in ("indicators", "initial"):
            assert {kind: len(rows) for kind, rows in found[name].items()} == {"weight": 4, "activation": 4}

    return read, lambda rng: mutations.json_file(value, rng), json.dumps(value).encode()


def journal_case(place: Path) -> Case:
    from tables import budgets_of, made

    from mpq_jax import Bits
    from mpq_jax.search.journal import Journal, Outcome
    from mpq_jax.search.journal import _bits_to_json as bits_to_json

    table = made(2, layers=2)
    budgets = budgets_of(table, "bitops=W4A4")
    policies = [{"layer0": Bits(2 + i % 3, 2), "layer1": Bits(2, 3)} for i in range(3)]
    path = place / "evaluations.jsonl"

    def opened() -> Journal:
        return Journal(path, table, budgets, lambda policy: Outcome(1.0, 0.5))

    def measure() -> None:
        journal = opened()
        for policy in policies:
            assert 0 <= journal.measure(policy).accuracy <= 1
        assert journal.elapsed >= 0

    measure()
    good = path.read_text()
    lines = [json.loads(line) for line in good.splitlines()]
    assert bits_to_json(policies[0])

    def read(content: bytes) -> None:
        path.write_bytes(content)
        measure()

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            changed = mutations.mutated_value(lines, rng)
            each = changed if isinstance(changed, list) else [changed]
            return "".join(json.dumps(line) + "\n" for line in each).encode("utf-8", "surrogatepass")
        return mutations.mutated_text(good, rng)

    return read, make, good.encode()


CASES = {
    "importance": importance_case,
    "policy": policy_case,
    "latency": latency_case,
    "pickle": pickle_case,
    "packed": packed_case,
    "config": config_case,
    "indicators": indicators_case,
    "journal": journal_case,
}


# ---- one kind, in this process ------------------------------------------------------------------------------------


def guard() -> list[str]:
    """Limits the process, and watches what it does. -> events that must not come"""
    # Else each of XLA's threads may reserve 64 MiB for itself that nothing has asked for: more of them, the more cores.
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, resource.RLIM_INFINITY))
    events: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        ours = event == "os.remove" and "/." in str(arguments[0])  # a temporary file
        ours = ours or (event == "pickle.find_class" and arguments in ANSWER)
        if event in FORBIDDEN and not ours:
            events.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)
    return events


def fuzz(kind: str, inputs: int, number: int) -> dict:
    """Reads so many mutated files. -> counts, and what went wrong"""
    from mpq_jax.types import Refusal

    warnings.simplefilter("ignore")
    place = Path(tempfile.mkdtemp(prefix=f"soak-{kind}-"))
    read, make, good = CASES[kind](place)
    read(good)  # what is mutated must be accepted as it is
    events, counts, wrong = guard(), collections.Counter(), []

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**62))
    def run(one: int) -> None:
        content = make(random.Random(one))
        faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
        began = time.monotonic()
        try:
            read(content)
            counts["accepted"] += 1
        except Refusal as refusal:
            counts["refused"] += 1
            assert str(refusal)
        except BaseException as error:
            import traceback

            last = traceback.extract_tb(error.__traceback__)[-1]
            wrong.append(
                f"{type(error).__name__}: {str(error)[:150]} at {last.filename.rpartition('/')[2]}:{last.lineno} (input {one})"
            )
        took = time.monotonic() - began
        faulthandler.cancel_dump_traceback_later()
        if took > counts["slowest_ms"] / 1000:
            counts["slowest_ms"], counts["slowest_input"] = round(1000 * took), one
        if took > SECONDS:
            wrong.append(f"{took:.1f} s (input {one})")
        wrong.extend(events)
        events.clear()
        if (place / "canary").exists():
            wrong.append(f"code was run (input {one})")
            (place / "canary").unlink()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    import shutil

    shutil.rmtree(place)
    return {"inputs": counts["accepted"] + counts["refused"] + len(wrong), **counts, "grown_mib": grown, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--together", action="store_true", help="all kinds in this process: their imports are shared")
    arguments = parser.parse_args()
    found, bad = {}, False
    if arguments.together:
        results = {kind: fuzz(kind, arguments.inputs, arguments.seed) for kind in arguments.kinds}
        for kind, result in results.items():
            print("\n".join(f"{kind}: {text}" for text in sorted(set(result["wrong"]))[:20]), file=sys.stderr)
        print(json.dumps({kind: {**result, "wrong": len(result["wrong"])} for kind, result in results.items()}))
        return 1 if any(result["wrong"] for result in results.values()) else 0
    for kind in arguments.kinds:
        command = [sys.executable, __file__, "--together", "--kinds", kind, "--inputs", str(arguments.inputs)]
        done = subprocess.run([*command, "--seed", str(arguments.seed)], capture_output=True, text=True, env=os.environ)
        if done.returncode not in (0, 1) or not done.stdout:
            print(f"{kind}: the process ended with {done.returncode}: {done.stderr[-3000:]}", file=sys.stderr)
            found[kind], bad = {"wrong": 1}, True
            continue
        print(done.stderr.strip(), file=sys.stderr)
        found[kind] = json.loads(done.stdout.splitlines()[-1])[kind]
        bad = bad or bool(found[kind]["wrong"])
    print(json.dumps(found))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
