"""One training on one device and on many: how far apart its losses, step sizes, gradients and policy end.

python -m benchmarks.many_devices                                 8 virtual devices of this CPU, float64, 50 steps
python -m benchmarks.many_devices --processes 2                   the same in 2 processes on this host
python -m benchmarks.many_devices --precision 32                  float32; beside it, two one-device runs whose batches
                                                                  are permuted inside

Layouts are data x row, with f for parameters split over data. "from AxB" takes the checkpoint that layout A x B
wrote half way. With several processes a layout's devices are shared out evenly among them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS = ("8x1", "4x2f", "1x6", "1x6 from 4x2f")
BATCH, SAMPLES, WIDTHS = 48, 96, (2, 3, 4, 5, 6)


def parse(text: str) -> tuple[int, int, bool]:
    """ "4x2f" -> (data 4, row 2, fsdp)."""
    data, _, row = text.removesuffix("f").partition("x")
    return int(data), int(row), text.endswith("f")


# ---- one process of one layout ------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace) -> None:
    """Trains in this process, as one of `processes`; process 0 writes <out>/<name>.npz and .json."""
    from mpq_jax import processes
    from mpq_jax.config import Parallel

    settings = Parallel()
    if arguments.processes > 1:
        settings = Parallel(coordinator=arguments.coordinator, processes=arguments.processes, process=arguments.process)
    with processes.started(settings):
        import jax

        jax.config.update("jax_enable_x64", arguments.precision == 64)
        _train(arguments.layouts, arguments)


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


def _train(job: str, arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from mpq_jax import checkpoint, costs, joint, optimizers, parallel, processes, quantizers
    from mpq_jax.config import Parallel
    from mpq_jax.criteria.learned import learned, unlearnable
    from mpq_jax.quantized_model import quantize
    from mpq_jax.search import solve

    name, _, origin = job.partition(" from ")
    permuted, name = name.endswith("p"), name.removesuffix("p")
    data, row, fsdp = parse(name)
    dtype = jnp.float64 if arguments.precision == 64 else jnp.float32
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(SAMPLES, 8, 8, 2)).astype(dtype), (np.arange(SAMPLES) % 3).astype(np.int32)
    net = _net(dtype)
    model = quantize(
        net, jnp.asarray(images[:16]), bit_widths=WIDTHS, quantizer=getattr(quantizers, arguments.quantizer)()
    )
    start = model.calibrate(net.init(jax.random.key(0), images[:16]), jnp.asarray(images[:16]))

    def loss(logits: Any, batch: Any) -> Any:  # joint.classification's is float32 always
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    task = joint.classification()._replace(loss=loss)
    layout = parallel.layout(Parallel(data=data, row=row, fsdp=fsdp))
    optimizer = optimizers.partition(model, optax.sgd(0.02, 0.9), optimizers.log_space(optax.adam(0.03, b2=0.95)))
    rows = len(WIDTHS) + 1
    uniform = joint.uniform_rows(model.layers, WIDTHS, WIDTHS)
    key, fixed = parallel.place(layout, (jax.random.key(3), uniform))
    index, count = parallel.block(layout)

    def batch(step: int) -> Any:
        chosen = np.random.default_rng(step).permutation(SAMPLES)[:BATCH]
        if permuted:
            # The quantization error is that of a batch's first eighth: it keeps its samples.
            order = np.random.default_rng(1000 + step)
            chosen = np.concatenate([order.permutation(chosen[: BATCH // 8]), order.permutation(chosen[BATCH // 8 :])])
        mine = chosen.reshape(count, -1)[index]
        return parallel.place_batch(layout, {"image": images[mine], "label": labels[mine]})

    def state_of(chosen: optax.GradientTransformation) -> Any:
        return parallel.place_state(layout, joint.init_state(start, chosen, rows, affine_per_row=True))

    def stepper(chosen: optax.GradientTransformation) -> Any:
        step = joint.make_step(model, task, chosen, random=1, error_weight=1.0, layout=layout)
        return jax.jit(step, donate_argnums=0)

    found: dict[str, Any] = {}
    if arguments.gradients:
        keeps = optax.trace(0.0)  # its state is the gradient
        state, _ = stepper(optax.chain(keeps, optax.set_to_zero()))(
            state_of(optax.chain(keeps, optax.set_to_zero())), batch(0), key, fixed
        )
        _flat(found, "gradient", parallel.whole(layout, state.optimizer))
    step, state, first, losses = stepper(optimizer), state_of(optimizer), 0, []
    folder = Path(arguments.out) / "checkpoints"
    if origin:
        with checkpoint.manager(folder / origin) as manager:
            restored = checkpoint.restore(manager, state)
        assert restored is not None, f"{origin} left no checkpoint"
        first, state = restored
    for i in range(first, arguments.steps):
        state, metrics = step(state, batch(i), key, fixed)
        losses.append(np.asarray(metrics["losses"]))
        if not origin and i + 1 == arguments.steps // 2:
            with checkpoint.manager(folder / job) as manager:
                checkpoint.save(manager, i + 1, state)
    end = parallel.whole(layout, state)
    _flat(found, "params", end.params)
    _flat(found, "rows", end.rows)
    about: dict[str, Any] = {"compilations": step._cache_size(), "devices": layout.mesh.size}
    if not unlearnable(model.quantizer):
        table = learned(model, joint.row_variables(end, 0))
        policy = solve(table, costs.parse_budgets(["bitops=W4A4"], table.layers, WIDTHS, WIDTHS)).policy
        about["policy"] = {path: list(bits) for path, bits in policy.items()}
    if processes.first():
        np.savez(Path(arguments.out) / f"{arguments.layouts}.npz", losses=np.array(losses), **found)
        (Path(arguments.out) / f"{arguments.layouts}.json").write_text(json.dumps(about))


def _flat(found: dict[str, Any], name: str, tree: Any) -> None:
    import jax

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[name + jax.tree_util.keystr(path)] = np.asarray(leaf)


# ---- starting them, and comparing ---------------------------------------------------------------------------------


def start(job: str, processes: int, arguments: argparse.Namespace) -> None:
    """Runs a layout in `processes` children, each with its share of the devices. Raises RuntimeError where one fails."""
    data, row, _ = parse(job.partition(" ")[0].removesuffix("p"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(data * row // processes)}
    command = [sys.executable, "-m", "benchmarks.many_devices", "--layouts", job, "--processes", str(processes)]
    for option in ("steps", "precision", "quantizer", "out"):
        command += [f"--{option}", str(getattr(arguments, option))]
    command += ["--gradients"] * arguments.gradients
    children = [
        subprocess.Popen([*command, "--coordinator", f"localhost:{port}", "--process", str(i)], env=environment)
        for i in range(processes)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise RuntimeError(f"{job}: exit codes {codes}")


def here(job: str, processes: int, arguments: argparse.Namespace) -> None:
    """Runs a layout in this process."""
    assert processes == 1, "several processes are children"
    work(argparse.Namespace(**{**vars(arguments), "layouts": job}))


def compared(out: Path, one: str, other: str) -> dict[str, Any]:
    """The largest differences between two layouts' results: losses, gradients, and everything that was trained.

    Relative to the largest number in each array, or 1 where that is smaller.
    """
    a, b = np.load(out / f"{one}.npz"), np.load(out / f"{other}.npz")

    def apart(prefix: str) -> float:
        names = [name for name in a.files if name.startswith(prefix) and a[name].dtype.kind == "f"]
        return max(
            (float(np.abs(a[n] - b[n]).max() / max(np.abs(a[n]).max(), 1)) for n in names if a[n].size), default=0.0
        )

    about = [json.loads((out / f"{name}.json").read_text()) for name in (one, other)]
    return {
        "layout": other,
        "devices": about[1]["devices"],
        "first_loss": float(np.abs(a["losses"][0] - b["losses"][0]).max())
        if len(a["losses"]) == len(b["losses"])
        else 0.0,
        "losses": float(np.abs(a["losses"][-len(b["losses"]) :] - b["losses"]).max()),
        "step_sizes": max(apart_of(a, b, "step_size"), apart_of(a, b, "basis")),
        "gradients": apart("gradient"),
        "params": apart("params"),
        "rows": apart("rows"),
        "same_policy": about[0].get("policy") == about[1].get("policy"),
    }


def apart_of(a: Any, b: Any, part: str) -> float:
    """The largest relative difference of parameters whose path has `part` in it, element by element."""
    names = [name for name in a.files if name.startswith("params") and part in name]
    floor = np.finfo(np.float32).tiny
    return max((float((np.abs(a[n] - b[n]) / np.maximum(np.abs(a[n]), floor)).max()) for n in names), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--precision", type=int, choices=(32, 64), default=64)
    parser.add_argument("--quantizer", default="lsq")
    parser.add_argument("--gradients", action="store_true", help="also compare one step's gradients, leaf by leaf")
    parser.add_argument("--out", default="", help="where results are kept; default: nowhere")
    parser.add_argument(
        "--one-child", action="store_true", help="all layouts in this process, on the first of its devices"
    )
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process >= 0:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.out = arguments.out or folder
        Path(arguments.out).mkdir(parents=True, exist_ok=True)
        jobs = arguments.layouts.split(",")
        run = here if arguments.one_child else start
        run("1x1", 1, arguments)
        for job in jobs:
            run(job, arguments.processes, arguments)
        if arguments.precision == 32:
            run("1x1p", 1, arguments)
            jobs = ["1x1p", *jobs]
        for job in jobs:
            print(json.dumps(compared(Path(arguments.out), "1x1", job)), flush=True)


if __name__ == "__main__":
    main()
