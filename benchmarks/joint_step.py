"""The joint step against K+1 float steps of the same net, and against plain vmap: time, memory, compilation.

  python benchmarks/joint_step.py [--model resnet8] [--batch 64] [--repeats 7] [--skip-vmap]

The float step uses our kernels or XLA's own, whichever is faster. The joint step is the default one: K uniform rows
and one random row, weights still or trained, all rows at once or one at a time, with operands kept for the backward pass or
put on their grids once more. Medians of interleaved repetitions;
nothing else should run meanwhile. Memory is what XLA plans for one call, arguments and results included.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import timed
from mpq_jax import joint, models, optimizers, row_policies
from mpq_jax.quantized_model import quantize

JOINT = "joint step, weights trained (the paper's loss)"


class Step(NamedTuple):
    run: Callable[[], Any]
    compile_seconds: float
    memory: int  # bytes at the peak


def planned(memory: Any) -> int:
    """Bytes of one call: arguments, results that do not lie in them, and all that lies between."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--skip-vmap", action="store_true", help="leave out plain vmap (slow to compile and to run)")
    arguments = parser.parse_args()
    options = {"width": 0.25, "small_images": True} if arguments.model == "mobilenetv1" else {}
    model = models.create(arguments.model, 10, **options)
    rng = np.random.default_rng(0)
    shape = (arguments.batch, arguments.size, arguments.size, 1)
    batch = {
        "image": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, arguments.batch), jnp.int32),
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])
    quantized = quantize(model, batch["image"])
    plain = quantized._replace(apply=functools.partial(quantized.apply, kernels="plain"))
    calibrated = jax.jit(lambda v, x: quantized.calibrate(v, x))(variables, batch["image"])
    task, key = joint.classification(), jax.random.key(0)
    uniform = row_policies.uniform_rows(quantized.layers, quantized.bit_widths, quantized.bit_widths)
    rows = len(quantized.bit_widths) + 1
    sgd = optimizers.sgd(0.01, 0.9, 1e-4)
    ours = optimizers.partition(quantized, optax.set_to_zero(), optimizers.log_space(optax.adam(0.01, b2=0.95)))
    paper = optimizers.partition(quantized, sgd, optax.chain(sgd, optimizers.keep_positive()))

    def step_of(model, optimizer, variables, count, fixed=None, error=0.0, **more) -> Step:
        state = joint.init_state(variables, optimizer, count)
        jitted = jax.jit(joint.make_step(model, task, optimizer, error_weight=error, **more))
        began = time.perf_counter()
        compiled = jitted.lower(state, batch, key, fixed).compile()
        return Step(
            functools.partial(compiled, state, batch, key, fixed),
            time.perf_counter() - began,
            planned(compiled.memory_analysis()),
        )

    trained = functools.partial(step_of, quantized, paper, calibrated, rows, fixed=uniform, random=1)
    contestants = {
        "float step, our kernels": step_of(quantized, sgd, variables, 1),
        "float step, XLA's kernels": step_of(plain, sgd, variables, 1),
        JOINT: trained(),
        "joint step, the same, one row at a time": trained(rows_at_a_time=1),
        "joint step, the same, recomputing": trained(recompute=True),
        "joint step, the same, one row, recomputing": trained(rows_at_a_time=1, recompute=True),
        "joint step, weights still, with the error term": step_of(
            quantized, ours, calibrated, rows, error=1.0, fixed=uniform, random=1
        ),
    }
    if not arguments.skip_vmap:
        contestants["joint step, plain vmap"] = step_of(plain, paper, calibrated, rows, fixed=uniform, random=1)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(arguments.repeats + 1):
        for name, step in contestants.items():
            if "plain vmap" in name and repeat > 3:
                continue  # two orders of magnitude need no seven repetitions
            times[name].append(timed(step.run))
    medians = {name: float(np.median(t[1:])) for name, t in times.items()}
    print(
        f"{arguments.model}, batch {arguments.batch}, {rows} rows, {jax.devices()[0].platform}, jax {jax.__version__}"
    )
    for name, (_, seconds, memory) in contestants.items():
        t = times[name][1:]
        print(
            f"  {name:48} {1e3 * medians[name]:8.1f} ms ({1e3 * min(t):.1f} to {1e3 * max(t):.1f}), "
            f"{memory / 2**20:7.1f} MiB, compiled in {seconds:.1f} s"
        )
    floats = rows * min(medians["float step, our kernels"], medians["float step, XLA's kernels"])
    least = min(step.memory for name, step in contestants.items() if name.startswith("float"))
    for name, step in contestants.items():
        if name.startswith("joint"):
            print(
                f"  {name}: {medians[name] / floats:.2f} of {rows} float steps' time, "
                f"{step.memory / least:.2f} times one float step's memory"
            )
    print(
        f"  one row at a time / all at once: {medians['joint step, the same, one row at a time'] / medians[JOINT]:.2f}"
    )
    if not arguments.skip_vmap:
        print(f"  plain vmap / ours: {medians['joint step, plain vmap'] / medians[JOINT]:.1f}")
    print(f"  compilations for 20 different policies: {compilations(quantized, calibrated, batch)}")


def compilations(quantized, variables, batch) -> int:
    """How often a jitted forward and backward pass is traced for 20 random policies."""
    traces = []

    @jax.jit
    def run(params, policy):
        traces.append(1)

        def loss(params):
            outputs = quantized.apply({**variables, "params": params}, policy, batch["image"])
            return joint.classification().loss(outputs, batch)

        return jax.value_and_grad(loss)(params)

    layers, widths = quantized.layers, quantized.bit_widths
    for seed in range(20):
        drawn = row_policies.random_rows(jax.random.key(seed), layers, widths, widths, 1)
        jax.block_until_ready(run(variables["params"], jax.tree.map(lambda b: b[0], drawn)))
    return len(traces)


if __name__ == "__main__":
    main()
