"""The ImageNet configs at 224x224 on made JPEGs: real steps for two models, ahead-of-time compilation for ResNet-50.

  python benchmarks/imagenet_steps.py [--batch 4] [--recompute]

A set of made images in TFDS's format of imagenet2012 is written to a temporary folder; `train.py` runs two float and
two joint steps of ResNet-18 and of MobileNetV1 on it, with each config's own settings but for batch size and steps.
For ResNet-50 the joint step is compiled without data, one row at a time; XLA's own figures of memory and FLOPs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import made_data

import train
from mpq_jax import build, joint, row_policies, stages
from mpq_jax import config as config_lib


def real_steps(name: str, batch: int, data_dir: Path, workdir: Path) -> None:
    began = time.time()
    options = {
        "data.data_dir": data_dir,
        "data.validation_fraction": 0.2,
        "pretrain.steps": 2,
        "pretrain.batch_size": batch,
        "pretrain.warmup_steps": 0,
        "joint.steps": 2,
        "joint.batch_size": batch,
        "eval_batch_size": batch,
        "log_every": 1,
        "search.criterion": "learned",  # steps alone
    }
    overrides = [f"--{key}={value}" for key, value in options.items()]
    code = train.main(["--config", str(ROOT / f"configs/{name}.py"), "--workdir", str(workdir / name), *overrides])
    print(f"{name}: exit code {code}, two float and two joint steps of batch {batch} in {time.time() - began:.0f} s")


def ahead_of_time(name: str, batch: int, recompute: bool) -> None:
    config = config_lib.load(ROOT / f"configs/{name}.py")
    features, classes = build.features(config)
    source, shape = build.float_model(config, classes), features["image"][0]
    model = build.quantized(config, source, features)
    uniform = row_policies.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    optimizer = stages.joint_optimizer(model, config.joint, 1000)
    step = joint.make_step(
        model,
        joint.classification(0.1),
        optimizer,
        random=1,
        same_bits=True,
        rows_at_a_time=1,
        recompute=recompute,
    )
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def state(images):
        variables = source.module.init(jax.random.key(0), images[:1])
        calibrated = model.calibrate(variables, images, train=False)
        return joint.init_state(calibrated, optimizer, 6, affine_per_row=True)

    began = time.time()
    shapes = jax.eval_shape(state, images)
    key = jax.eval_shape(lambda: jax.random.key(0))
    lowered = jax.jit(step, donate_argnums=0).lower(shapes, {"image": images, "label": labels}, key, uniform)
    compiled = lowered.compile()
    memory, flops = compiled.memory_analysis(), compiled.cost_analysis().get("flops", float("nan"))
    print(
        f"{name}: joint step of batch {batch}, 6 rows one at a time, compiled ahead of time in {time.time() - began:.0f} s: "
        f"arguments {memory.argument_size_in_bytes / 2**20:.0f} MiB, temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB, "
        f"{flops / 1e9:.1f} GFLOP (XLA counts the body of a loop over rows once)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="ResNet-50 with --joint.recompute")
    parser.add_argument("--only", choices=["imagenet_resnet18", "imagenet_mobilenetv1", "imagenet_resnet50"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        made_data.make_imagenet2012(data_dir)
        for name in ("imagenet_resnet18", "imagenet_mobilenetv1"):
            if arguments.only in (None, name):
                real_steps(name, arguments.batch, data_dir, Path(folder))
        if arguments.only in (None, "imagenet_resnet50"):
            ahead_of_time("imagenet_resnet50", arguments.batch, arguments.recompute)


if __name__ == "__main__":
    main()
