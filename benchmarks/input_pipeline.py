"""Whether reading ever holds up training: steps on real batches against the same steps on one batch held in memory.

  python benchmarks/input_pipeline.py [--data-dir data] [--sets digits fashion_mnist jpeg] [--repeats 5]

Float and joint steps in turn, blocks of them on batches as `train.py` reads them (shuffled, decoded, augmented) and on
the first of those batches; medians of interleaved blocks. "jpeg": 224x224 crops of made JPEGs of 500x375 under
imagenet2012's name, ResNet-18. Fashion-MNIST must be under --data-dir (`python train.py --config
configs/fashion_mnist_resnet8.py` prepares it).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import made_data

from mpq_jax import config as config_lib
from mpq_jax import data, joint, optimizers, row_policies, stages

# set -> (config, batch size, float steps in a block, joint steps in a block)
SETS = {
    "digits": ("digits", 64, 60, 20),
    "fashion_mnist": ("fashion_mnist_resnet8", 64, 40, 10),
    "jpeg": ("imagenet_resnet18", 16, 3, 1),
}


def steps_of(run: stages.Run, batch: Any) -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """{"float", "joint": (compiled step, state, fixed policies)}."""
    model, task = run.model, run.task()
    sgd = optimizers.sgd(0.01, 0.9, 1e-4)
    adam = stages.joint_optimizer(model, config_lib.Joint(), 1000)
    calibrated = jax.jit(lambda v, x: model.calibrate(v, *x, **task.eval_kwargs))(run.variables, task.inputs(batch))
    uniform = row_policies.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    rows = len(jax.tree.leaves(uniform)[0]) + 1
    return {
        "float": (jax.jit(joint.make_step(model, task, sgd)), joint.init_state(run.variables, sgd, 1), None),
        "joint": (
            jax.jit(joint.make_step(model, task, adam, random=1, error_weight=1.0, rows_at_a_time=1)),
            joint.init_state(calibrated, adam, rows),
            uniform,
        ),
    }


def block(step, state, fixed, batches: Iterator[Any], steps: int) -> float:
    """Seconds a step."""
    key = jax.random.key(0)
    began = time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, next(batches), key, fixed)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


def measure(name: str, data_dir: Path, workdir: Path, repeats: int) -> None:
    config_name, batch_size, *counts = SETS[name]
    config = config_lib.load(ROOT / f"configs/{config_name}.py")
    config = config_lib.override(config, [f"--data.data_dir={data_dir}", f"--data.validation_fraction={0.1}"])
    run = stages.open_run(config, workdir)

    def real() -> Iterator[Any]:
        return iter(data.train_batches(run.dataset, batch_size, seed=0, workers=config.data.workers))

    batch = next(real())

    def held() -> Iterator[Any]:
        while True:
            yield batch

    for (kind, (step, state, fixed)), count in zip(steps_of(run, batch).items(), counts, strict=True):
        jax.block_until_ready(step(state, batch, jax.random.key(0), fixed))
        streams = {"real": real(), "held": held()}
        times: dict[str, list[float]] = {each: [] for each in streams}
        for each in streams:
            next(streams[each])  # its threads are started
        for _ in range(repeats):
            for each, stream in streams.items():
                times[each].append(block(step, state, fixed, stream, count))
        medians = {each: 1e3 * float(np.median(t)) for each, t in times.items()}
        print(
            f"{name}, batch {batch_size}, {kind} step: {medians['real']:.1f} ms on real batches, {medians['held']:.1f} "
            f"on one held in memory: {medians['real'] / medians['held']:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sets:
            data_dir = arguments.data_dir
            if name == "jpeg":
                data_dir = Path(folder) / "data"
                made_data.make_imagenet2012(data_dir)
            measure(name, data_dir, Path(folder) / name, arguments.repeats)


if __name__ == "__main__":
    main()
