"""The joint step against the same method in PyTorch (torch_peer.py): same weights, step sizes, batch, machine and threads.

  python benchmarks/torch_step.py [--models resnet8 mobilenetv1 resnet18] [--batch 64] [--repeats 7]

Before anything is timed, the losses of all uniform rows are compared: the two do compute the same. Both run the paper's
step: six rows with BatchNorm of their own, all weights trained, ends in float, gradients clipped, SGD. Medians of
interleaved repetitions; nothing else should run meanwhile. On a GPU both run there, products in float32 (no TF32).
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import interleaved, medians, timed
from benchmarks.torch_peer import Net, float_step, joint_step
from mpq_jax import flax_seam, joint, models, optimizers, row_policies
from mpq_jax.quantized_model import quantize

# model -> (options, image size, channels, strides of its blocks, stem stride, pooled)
NETS = {
    "resnet8": ({}, 28, 1, [1, 2, 2], 1, False),
    "mobilenetv1": (
        {"width": 0.25, "small_images": True},
        28,
        1,
        [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1],
        1,
        False,
    ),
    "resnet18": ({}, 64, 3, [1, 1, 2, 1, 2, 1, 2, 1], 2, True),
}


def same_terms() -> str:
    """Products in float32 for both, and cuDNN's choices timed, as XLA times its own. -> where PyTorch is to run"""
    jax.config.update("jax_default_matmul_precision", "float32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def contestants(name: str, batch_size: int, device: str):
    """{name: a step without arguments}, and the largest difference of the two's losses in a uniform row."""
    options, size, channels, strides, stem_stride, pool = NETS[name]
    model = models.create(name, 10, **options)
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(batch_size, size, size, channels)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32),
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])
    quantized = quantize(model, batch["image"], rules=[("stem.*", "float"), ("head", "float")])
    calibrated = jax.jit(lambda v, x: quantized.calibrate(v, x))(variables, batch["image"])
    task, key = joint.classification(), jax.random.key(0)
    widths = quantized.bit_widths
    uniform = row_policies.uniform_rows(quantized.layers, widths, widths)
    sgd = optimizers.sgd(0.01, 0.9, 2.5e-5, 1.0)

    def step_of(model, variables, rows, fixed=None, **more):
        optimizer = optimizers.sgd(0.01, 0.9, 2.5e-5, 1.0)
        if fixed is not None:
            optimizer = optimizers.partition(quantized, sgd, optax.chain(sgd, optimizers.keep_positive()))
        state = joint.init_state(variables, optimizer, rows, affine_per_row=fixed is not None)
        step = jax.jit(joint.make_step(model, task, optimizer, **more))
        return functools.partial(step, state, batch, key, fixed)

    plain = quantized._replace(apply=functools.partial(quantized.apply, kernels="plain"))
    joint_of = functools.partial(step_of, quantized, calibrated, len(widths) + 1, uniform, random=1)
    ours = joint_of(rows_at_a_time=1)

    tree = flax_seam.unflatten({k: np.asarray(v) for k, v in flax_seam.flatten(calibrated["params"]).items()})
    net = Net(tree, strides, widths, stem_stride, pool)
    net.train().to(device, memory_format=torch.channels_last)
    images = torch.tensor(np.array(batch["image"]), device=device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(np.array(batch["label"]), dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=2.5e-5)
    draw = np.random.default_rng(1)
    theirs = joint_step(net, images, labels, optimizer, draw)
    mine = np.asarray(ours()[1]["losses"])[: len(widths)]
    apart = max(abs(mine[k] - theirs[str(b)]) / theirs[str(b)] for k, b in enumerate(widths))
    steps = {
        "float, ours": step_of(quantized, variables, 1),
        "float, XLA's kernels": step_of(plain, variables, 1),
        "float, PyTorch": lambda: float_step(net, images, labels, optimizer),
        "joint, ours": ours,
        **({"joint, ours, rows at once": joint_of()} if device != "cpu" else {}),
        "joint, PyTorch": lambda: joint_step(net, images, labels, optimizer, draw),
    }
    return steps, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    device = same_terms()
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else jax.devices()[0].device_kind
    print(f"torch {torch.__version__}, jax {jax.__version__}, {where}")
    for name in arguments.models:
        steps, apart = contestants(name, arguments.batch, device)
        for step in steps.values():
            timed(step)
        times = interleaved(steps, arguments.repeats)
        middle = medians(times)
        print(f"{name}, batch {arguments.batch}: losses of uniform rows apart by {apart:.1e} at most")
        for each, t in times.items():
            print(f"  {each:22} {1e3 * middle[each]:8.1f} ms ({1e3 * min(t):.1f} to {1e3 * max(t):.1f})")
        print(f"  PyTorch / ours: {middle['joint, PyTorch'] / middle['joint, ours']:.2f}", flush=True)


if __name__ == "__main__":
    main()
