"""One training on one device and on many: how far apart its losses, gradients, step sizes, parameters and policy end.

python -m benchmarks.many_devices                          all jobs of SUITE, 50 steps each: some ten minutes of one core
python -m benchmarks.many_devices --layouts 8x1,1x6        these, in one process with virtual devices, float64
python -m benchmarks.many_devices --layouts 4x2f --processes 2 --steps 10 --variant distilled --quantizer lq_nets
python -m benchmarks.many_devices --layouts 8x1 --precision 32

A line of JSON for each layout, and exit code 1 where one is not `within` what is asked of it. Layouts are data x row, with f for
parameters split over data; "1x6 from 4x2f" takes the checkpoint that 4x2f wrote half way. In float64 all that was trained must
be within 1e-9 of one device's, and the policy the same. In float32 the first step's losses and gradients must be within 1e-5, or
no further away than the furthest two of PERMUTED one-device runs, whose batches are permuted inside, are apart; and so must
the end: where a value stands at the threshold of two codes, another order of a sum gives it the other code.
"""

import argparse
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BATCH, SAMPLES, WIDTHS = 48, 96, (2, 3, 4, 5, 6)
PERMUTED = 8


class Job(NamedTuple):
    """One training. origin: the layout whose checkpoint it takes. permuted: not 0: of its batches' order inside.

    seed: of its images.
    """

    layout: str
    processes: int = 1
    precision: int = 64
    quantizer: str = "lsq"
    variant: str = "plain"
    steps: int = 50
    origin: str = ""
    permuted: int = 0
    seed: int = 0

    @property
    def parts(self) -> tuple[int, int, bool]:
        """ "4x2f" -> (data 4, row 2, fsdp)."""
        data, _, row = self.layout.removesuffix("f").partition("x")
        return int(data), int(row), self.layout.endswith("f")

    @property
    def devices(self) -> int:
        return self.parts[0] * self.parts[1]

    @property
    def name(self) -> str:
        return "_".join(str(value) for value in self)


FOUR = ("8x1", "4x2f", "1x6", "1x6 from 4x2f")
SUITE = [
    ({}, (*FOUR, "4x2")),
    ({"processes": 2}, FOUR),
    ({"processes": 4}, ("8x1", "4x2f", "2x6", "8x1 from 4x2f")),  # six devices are no four processes'
    ({"precision": 32}, FOUR),
    ({"precision": 32, "processes": 2}, ("8x1", "1x6")),
    *(({"variant": v, "steps": 10}, ("8x1", "4x2f", "1x6")) for v in ("all rows at once", "distilled", "sliced")),
    ({"variant": "recompute", "steps": 10}, ("4x2f",)),
    ({"quantizer": "lq_nets", "steps": 10}, ("8x1", "4x2f", "1x6")),
    ({"quantizer": "pact", "steps": 10}, ("4x2f",)),
]


def jobs_of(given: dict[str, Any], layouts: tuple[str, ...]) -> list[Job]:
    found = [text.partition(" from ") for text in layouts]
    return [Job(layout=layout, origin=origin, **given) for layout, _, origin in found]


# ---- the children: one or several processes, each of which runs some jobs -------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Trains in this process, as one of `processes`; process 0 writes <out>/<name>.npz and .json of each job."""
    from mpq_jax import processes
    from mpq_jax.config import Parallel

    jobs = [Job(*each) for each in json.loads(arguments.jobs)]
    settings = Parallel()
    if jobs[0].processes > 1:
        settings = Parallel(coordinator=arguments.coordinator, processes=jobs[0].processes, process=arguments.process)
    with processes.started(settings):
        import jax

        jax.config.update("jax_enable_x64", jobs[0].precision == 64)
        for job in jobs:
            _train(job, Path(arguments.out))


def _net(dtype: Any) -> Any:
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            kind: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
            x = nn.relu(nn.Conv(8, (3, 3), name="stem", **kind)(x))
            x = nn.Conv(16, (3, 3), use_bias=False, name="conv", **kind)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn", **kind)(x))
            x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise", **kind)(x))
            x = nn.Conv(16, (1, 1), name="conv2", **kind)(x)
            return nn.Dense(3, name="head", **kind)(x.mean((1, 2)))

    return Net()


def _chosen(job: Job, step: int) -> np.ndarray:
    """The samples of batch number `step`, in their order."""
    chosen = np.random.default_rng(step).permutation(SAMPLES)[:BATCH]
    if not job.permuted:
        return chosen
    # The quantization error is that of a batch's first eighth: it keeps its samples.
    order = np.random.default_rng([job.permuted, step])
    return np.concatenate([order.permutation(chosen[: BATCH // 8]), order.permutation(chosen[BATCH // 8 :])])


def _train(job: Job, out: Path) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from mpq_jax import checkpoint, costs, joint, optimizers, parallel, processes, quantizers, row_policies
    from mpq_jax.config import Parallel
    from mpq_jax.criteria.learned import learned, unlearnable
    from mpq_jax.quantized_model import quantize
    from mpq_jax.search import solve

    data, row, fsdp = job.parts
    dtype = jnp.float64 if job.precision == 64 else jnp.float32
    rng = np.random.default_rng(job.seed)
    images, labels = rng.normal(size=(SAMPLES, 8, 8, 2)).astype(dtype), (np.arange(SAMPLES) % 3).astype(np.int32)
    net = _net(dtype)
    quantizer = getattr(quantizers, job.quantizer)()
    model = quantize(net, jnp.asarray(images[:16]), bit_widths=WIDTHS, quantizer=quantizer)
    start = model.calibrate(net.init(jax.random.key(0), images[:16]), jnp.asarray(images[:16]))
    # Flax starts running statistics in float32, whatever the model's type.
    start = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, start)

    def loss(logits: Any, batch: Any) -> Any:  # joint.classification's is float32 always
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    task = joint.classification()._replace(loss=loss)
    layout = parallel.layout(Parallel(data=data, row=row, fsdp=fsdp))
    rows = len(WIDTHS) + 1
    key, fixed = parallel.place(layout, (jax.random.key(3), row_policies.uniform_rows(model.layers, WIDTHS, WIDTHS)))
    index, count = parallel.block(layout)
    variant: dict[str, Any] = {
        "plain": {"rows_at_a_time": 1},
        "all rows at once": {},
        "distilled": {"distill": joint.Distill(0.5), "average": 0.9},
        "sliced": {"sliced": True, "rows_at_a_time": 1},
        "recompute": {"recompute": True, "rows_at_a_time": 1},
    }[job.variant]

    def batch(step: int) -> Any:
        mine = _chosen(job, step).reshape(count, -1)[index]
        return parallel.place_batch(layout, {"image": images[mine], "label": labels[mine]})

    def begun(optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
        step = joint.make_step(model, task, optimizer, random=1, error_weight=1.0, layout=layout, **variant)
        state = joint.init_state(start, optimizer, rows, affine_per_row=True, average="average" in variant)
        return jax.jit(step, donate_argnums=0), parallel.place_state(layout, state)

    found: dict[str, Any] = {}
    if job.precision == 32 and not job.origin:
        keeps = optax.chain(optax.trace(0.0), optax.set_to_zero())  # its state is the gradient
        step, state = begun(keeps)
        _flat(found, "gradient", parallel.whole(layout, step(state, batch(0), key, fixed)[0].optimizer))
    optimizer = optimizers.partition(model, optax.sgd(0.02, 0.9), optimizers.log_space(optax.adam(0.03, b2=0.95)))
    (step, state), first, losses = begun(optimizer), 0, []
    if job.origin:
        with checkpoint.manager(out / job._replace(layout=job.origin, origin="").name) as manager:
            restored = checkpoint.restore(manager, state)
        assert restored is not None, f"{job.origin} left no checkpoint"
        first, state = restored
    for i in range(first, job.steps):
        state, metrics = step(state, batch(i), key, fixed)
        losses.append(np.asarray(metrics["losses"]))
        if not job.origin and i + 1 == job.steps // 2:
            with checkpoint.manager(out / job.name) as manager:
                checkpoint.save(manager, i + 1, state)
    end = parallel.whole(layout, state)
    _flat(found, "params", end.params)
    _flat(found, "rows", end.rows)
    about: dict[str, Any] = {"compilations": step._cache_size(), "policy": None}
    if not unlearnable(model.quantizer):
        table = learned(model, joint.row_variables(end, 0))
        policy = solve(table, costs.parse_budgets(["bitops=W4A4"], table.layers, WIDTHS, WIDTHS)).policy
        about["policy"] = {path: list(bits) for path, bits in policy.items()}
    if processes.first():
        np.savez(out / f"{job.name}.npz", losses=np.array(losses), **found)
        (out / f"{job.name}.json").write_text(json.dumps(about))


def _flat(found: dict[str, Any], name: str, tree: Any) -> None:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[name + jax.tree_util.keystr(path)] = np.asarray(leaf)


# ---- starting them --------------------------------------------------------------------------------------------------


def together(job: Job) -> tuple[int, int, int]:
    """Jobs with the same can share a child: several processes have no device to spare."""
    return job.processes, job.precision, job.devices if job.processes > 1 else 8


def start(jobs: list[Job], out: str) -> None:
    """Runs jobs in as many children as they have processes. Raises RuntimeError where one fails."""
    processes, _, devices = together(jobs[0])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices // processes)}
    command = [sys.executable, "-m", "benchmarks.many_devices", "--jobs", json.dumps(jobs), "--out", out]
    command += ["--coordinator", f"localhost:{port}"]
    children = [subprocess.Popen([*command, "--process", str(i)], env=environment) for i in range(processes)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError(f"{jobs}: exit codes {codes}")


def run(jobs: list[Job], out: str) -> list[dict[str, Any]]:
    """Runs the jobs and what they are compared with. -> a line for each"""
    alone = [job._replace(layout="1x1", processes=1, origin="") for job in jobs]
    others = [
        job._replace(permuted=i + 1) for job in dict.fromkeys(alone) if job.precision == 32 for i in range(PERMUTED)
    ]
    todo = list(dict.fromkeys([*alone, *others, *jobs]))
    for resumed in (False, True):  # after those whose checkpoints they take
        part = sorted((job for job in todo if bool(job.origin) == resumed), key=together)
        for _, group in itertools.groupby(part, together):
            start(list(group), out)
    return [compared(Path(out), one, job, others) for one, job in zip(alone, jobs, strict=True)]


# ---- comparing ------------------------------------------------------------------------------------------------------


def apart(out: Path, one: Job, other: Job) -> dict[str, float]:
    """The largest differences of two jobs: of losses; of step sizes, each relative to itself; and of gradients, parameters
    and rows, relative to the largest number in each array, or to 1 where that is smaller."""
    a, b = np.load(out / f"{one.name}.npz"), np.load(out / f"{other.name}.npz")
    names = [name for name in a.files if a[name].dtype.kind == "f" and a[name].size and name != "losses"]

    def largest(floor: float, *parts: str, of_each: bool = False) -> float:
        found = 0.0
        for name in names:
            if name in b.files and all(part in name for part in parts):
                size = np.abs(a[name]) if of_each else np.abs(a[name]).max()
                found = max(found, float((np.abs(a[name] - b[name]) / np.maximum(size, floor)).max()))
        return found

    steps = len(b["losses"])
    return {
        "first_losses": 0.0 if other.origin else float(np.abs(a["losses"][0] - b["losses"][0]).max()),
        "gradients": largest(1.0, "gradient"),
        "losses": float(np.abs(a["losses"][-steps:] - b["losses"]).max()),
        "step_sizes": max(largest(1e-30, "params", part, of_each=True) for part in ("step_size", "basis", "clip")),
        "params": largest(1.0, "params"),
        "rows": largest(1.0, "rows"),
    }


ENDS = ("losses", "step_sizes", "params", "rows")
FIRST = ("first_losses", "gradients")


@functools.cache
def permuted(out: Path, jobs: tuple[Job, ...]) -> dict[str, float]:
    """How far apart the furthest two of some jobs begin and end."""
    pairs = [apart(out, a, b) for a, b in itertools.combinations(jobs, 2)]
    return {key: max(pair[key] for pair in pairs) for key in (*FIRST, *ENDS)}


def compared(out: Path, one: Job, other: Job, others: list[Job]) -> dict[str, Any]:
    """A line: how far a job ended from `one`, and whether that is within what is asked."""
    difference = apart(out, one, other)
    about = [json.loads((out / f"{job.name}.json").read_text()) for job in (one, other)]
    line: dict[str, Any] = {**other._asdict(), "devices": other.devices, **difference}
    line |= {"same_policy": about[0]["policy"] == about[1]["policy"], "compilations": about[1]["compilations"]}
    if other.precision == 64:
        line["within"] = max(difference.values()) < 1e-9 and line["same_policy"]
    else:
        line["permuted"] = permuted(out, tuple(job for job in others if job._replace(permuted=0) == one))
        first = all(difference[key] <= max(1e-5, line["permuted"][key]) for key in FIRST)
        line["within"] = first and all(difference[key] <= line["permuted"][key] for key in ENDS)
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="", help='e.g. "8x1,4x2f,1x6 from 4x2f"; default: all of SUITE')
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    parser.add_argument("--precision", type=int, choices=(32, 64), default=64)
    parser.add_argument("--quantizer", default="lsq")
    parser.add_argument("--variant", default="plain", help='or "all rows at once", "distilled", "sliced", "recompute"')
    parser.add_argument("--out", default="", help="where results are kept; default: nowhere")
    for hidden in ("--jobs", "--coordinator"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.jobs:
        work(arguments)
        return 0
    given = {
        key: getattr(arguments, key) for key in ("processes", "steps", "precision", "quantizer", "variant", "seed")
    }
    suite = [(given, tuple(arguments.layouts.split(",")))] if arguments.layouts else SUITE
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or folder
        Path(out).mkdir(parents=True, exist_ok=True)
        for options, layouts in suite:
            for line in run(jobs_of(options, layouts), out):
                print(json.dumps(line), flush=True)
                wrong += not line["within"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
