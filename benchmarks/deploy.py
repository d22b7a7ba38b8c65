"""How fast the deployed forms run on this CPU: float32, int8 only (W8A8) and a mixed policy, in XLA and in onnxruntime.

  python benchmarks/deploy.py [--batches 1 64] [--rounds 21] [--threads 2] [--out runs/deploy.jsonl]

The model is ResNet-8 on 28x28x1 with initial weights, its grids calibrated on random normal images: speed does not
depend on the weights. In XLA: the float model, the fake-quantized one, the StableHLO program read back from its file, and
its layers' products alone, in the narrowest type that holds their bits (products.py). In onnxruntime: the standard ONNX
export, graph optimisations on. Per batch size all contestants run once in every round, in turn; medians, lowest and
highest. One JSON line a result is added to --out; a second call measures only the batch sizes that are not there yet.
The process keeps to --threads cores. Nothing else should run meanwhile.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPE, MIXED = (28, 28, 1), (2, 3, 4, 5, 6)


def made(seed: int = 0):
    """(model, variables, {name: policy}): every layer at W8A8; and random bits of 2 to 6 with 8 at both ends."""
    import jax

    from mpq_jax import models, policy
    from mpq_jax.quantized_model import quantize
    from mpq_jax.types import Bits

    net = models.create("resnet8", 10)
    images = np.random.default_rng(seed).normal(size=(64, *SHAPE)).astype(np.float32)
    model = quantize(net, images, bit_widths=(*MIXED, 8), train=False)
    variables = jax.jit(net.init)(jax.random.key(seed), images[:1])
    variables = jax.jit(lambda v, x: model.calibrate(v, x, train=False))(variables, images)
    rng, tied = np.random.default_rng(seed), {}

    def drawn(layer):
        return Bits(int(rng.choice(MIXED)), tied.setdefault(layer.tied or layer.path, int(rng.choice(MIXED))))

    mixed = {layer.path: layer.bits or drawn(layer) for layer in model.layers}
    return model, variables, {"int8": policy.uniform(model.layers, 8, 8), "mixed": mixed}


# ---- XLA ----------------------------------------------------------------------------------------------------------


def in_xla(model, variables, policies, batch: int, folder: Path) -> dict[tuple[str, str], Callable[[], Any]]:
    """(form, bits) -> a call that runs it to its end."""
    import jax

    from mpq_jax.export import stablehlo

    x = jax.device_put(np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32))

    def fake_quantized(policy):
        run = jax.jit(lambda variables, x: model.apply(variables, policy, x, train=False))
        return lambda: jax.block_until_ready(run(variables, x))

    def program(policy, path):
        stablehlo.save(path, stablehlo.stablehlo(model, variables, policy, SHAPE, train=False))
        run = jax.jit(stablehlo.load(path).call)
        return lambda: jax.block_until_ready(run(x))

    calls = {("XLA, float model", "float32"): fake_quantized(None)}
    for name, policy in policies.items():
        calls["XLA, fake-quantized", name] = fake_quantized(policy)
        calls["XLA, StableHLO file", name] = program(policy, folder / f"{name}.stablehlo")
    return calls


def products_alone(model, variables, policies, batch: int, rounds: int) -> tuple[list[dict[str, Any]], set[str]]:
    """Rows of the layers' products without anything between them, and the kernels that all of them have."""
    import jax

    from mpq_jax import products
    from mpq_jax.types import Bits

    used = products.uses(model, variables, jax.ShapeDtypeStruct((batch, *SHAPE), np.float32), train=False)
    measured = products.measure([use.product for uses in used.values() for use in uses], rounds)
    has = set.intersection(*(set(each.rounds) for each in measured.values()))
    every = {"float32": dict.fromkeys(used, Bits(32, 32)), **policies}
    rows = []
    for name, policy in every.items():
        totals, kernels = np.zeros(rounds), Counter()
        for path, uses in used.items():
            for use in uses:
                kernel = products.kernel_for(policy[path], measured[use.product].rounds, use.own)
                totals += use.runs * np.asarray(measured[use.product].rounds[kernel])
                kernels[kernel] += 1
        rows.append(row("XLA, products alone", name, batch, totals.tolist(), kernels=dict(kernels)))
    return rows, has


# ---- onnxruntime --------------------------------------------------------------------------------------------------


def in_onnxruntime(model, variables, policies, batch: int, threads: int, folder: Path):
    """({(form, bits): call}, {bits: operators of the optimised graph}, {bits: why it is not available})."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    operators: dict[str, dict[str, int]] = {}
    missing: dict[str, str] = {}
    x = np.random.default_rng(1).normal(size=(batch, *SHAPE)).astype(np.float32)
    for name, policy in {"float32": None, **policies}.items():
        try:
            import onnx
            import onnxruntime

            from mpq_jax.export.onnx import standard

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.optimized_model_filepath = str(folder / f"{name}.onnx")
            content = standard(model, variables, policy, SHAPE).SerializeToString()
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: x}
            session.run(None, feed)
            operators[name] = dict(Counter(node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node))
            calls["onnxruntime", name] = lambda session=session, feed=feed: session.run(None, feed)
        except Exception as error:  # the exporter is not there, or has no form for this policy: said, not hidden
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return calls, operators, missing


# ---- measuring ----------------------------------------------------------------------------------------------------


def row(form: str, bits: str, batch: int, milliseconds: list[float], **more: Any) -> dict[str, Any]:
    figures = {"median": median(milliseconds), "lowest": min(milliseconds), "highest": max(milliseconds)}
    return {"form": form, "bits": bits, "batch": batch, **{k: round(v, 4) for k, v in figures.items()}, **more}


def interleaved(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Milliseconds of each call, all of them in turn in every round; one untimed round before."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for counted in [False] + [True] * rounds:
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            if counted:
                times[key].append(1e3 * (time.perf_counter() - began))
    return times


def measure(batch: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """All rows of one batch size."""
    model, variables, policies = made()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls = in_xla(model, variables, policies, batch, folder)
        more, operators, missing = in_onnxruntime(model, variables, policies, batch, threads, folder)
        times = interleaved(calls | more, rounds)
    rows = [
        row(form, bits, batch, each, **({"operators": operators[bits]} if form == "onnxruntime" else {}))
        for (form, bits), each in times.items()
    ]
    rows += [
        {"form": "onnxruntime", "bits": bits, "batch": batch, "not available": why} for bits, why in missing.items()
    ]
    alone, has = products_alone(model, variables, policies, batch, rounds)
    return [*rows, *alone, {"form": "kernels", "batch": batch, "shared": shared(has)}]


def shared(has: set[str]) -> dict[str, str]:
    """Kernel -> the bit-widths that run in it, where weights and activations have the same."""
    from mpq_jax import products
    from mpq_jax.types import Bits

    of = {bits: products.kernel_for(Bits(bits, bits), has, "float32") for bits in (*range(2, 9), 16)}
    return {kernel: ", ".join(str(b) for b in of if of[b] == kernel) for kernel in dict.fromkeys(of.values())}


def show(rows: list[dict[str, Any]]) -> None:
    for each in rows:
        if each["form"] == "kernels":
            for kernel, widths in each["shared"].items():
                print(f"  XLA: {widths} bits share the kernel {kernel}")
        elif "not available" in each:
            print(f"  {each['form']:24} {each['bits']:8} not available: {each['not available']}")
        else:
            note = each.get("operators") or each.get("kernels") or ""
            print(
                f"  {each['form']:24} {each['bits']:8} {each['median']:9.3f} ms "
                f"({each['lowest']:.3f} to {each['highest']:.3f}) {', '.join(f'{n} {k}' for k, n in dict(note or {}).items())}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("runs/deploy.jsonl"))
    arguments = parser.parse_args()
    # Before JAX starts its threads: it takes as many as there are cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    import jax

    exporter = importlib.util.find_spec("mpq_jax.export.onnx") is not None
    asked = {"rounds": arguments.rounds, "threads": arguments.threads, "jax": jax.__version__, "onnx": exporter}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for batch in arguments.batches:
        rows = [line for line in known if line["batch"] == batch and asked.items() <= line.items()]
        # The kernels' row is a batch size's last: without it the measurement was cut short.
        if not any(line["form"] == "kernels" for line in rows):
            rows = [line | asked for line in measure(batch, arguments.rounds, arguments.threads)]
            with arguments.out.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in rows))
        print(
            f"resnet8, batch {batch}, {arguments.threads} threads, {arguments.rounds} rounds, {jax.devices()[0].platform}"
        )
        show(rows)


if __name__ == "__main__":
    main()
