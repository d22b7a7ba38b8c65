"""Compile time of the joint step against the float step, ResNet-50 at 224x224, one row at a time, without a cache.

  python benchmarks/compile_time.py [--models resnet50 resnet8 mobilenetv1] [--repeats 3]

Tracing, lowering and compiling, from Python function to executable, in turn; medians. The joint step is the default
one of `train.py`: six rows, weights still, error term. Without data: shapes are enough.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.timing import interleaved, medians
from mpq_jax import joint, models, optimizers, row_policies, stages
from mpq_jax.config import Joint
from mpq_jax.quantized_model import quantize

# model -> (options, classes, image shape, batch)
NETS = {
    "resnet50": ({}, 1000, (224, 224, 3), 4),
    "resnet8": ({}, 10, (28, 28, 1), 64),
    "mobilenetv1": ({"width": 0.25, "small_images": True}, 10, (28, 28, 1), 64),
}


def contestants(name: str):
    """{name: a function that lowers and compiles anew}."""
    options, classes, shape, size = NETS[name]
    model = models.create(name, classes, **options)
    images = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((size,), jnp.int32)}
    quantized = quantize(model, images)
    uniform = row_policies.uniform_rows(quantized.layers, quantized.bit_widths, quantized.bit_widths)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sgd, adam = optimizers.sgd(0.01, 0.9, 1e-4), stages.joint_optimizer(quantized, Joint(), 300)
    step_sizes = optimizers.quantizer_leaves(quantized, "leaves")

    def initial(images):
        return model.init(jax.random.key(0), images[:1], train=False)

    def compiled(optimizer, state_of, fixed, **more):
        def run() -> None:
            jax.clear_caches()
            step = jax.jit(joint.make_step(quantized, joint.classification(), optimizer, **more), donate_argnums=0)
            step.lower(state, batch, key, fixed).compile()

        state = jax.eval_shape(state_of, images)
        return run

    def calibrated(images):
        variables = quantized.calibrate(initial(images), images, train=False)
        return joint.init_state(variables, adam, len(quantized.bit_widths) + 1)

    return {
        "float": compiled(sgd, lambda images: joint.init_state(initial(images), sgd, 1), None),
        "joint": compiled(adam, calibrated, uniform, random=1, error_weight=1.0, rows_at_a_time=1, trained=step_sizes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NETS, default=["resnet50"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    for name in arguments.models:
        steps = contestants(name)
        times = interleaved(steps, arguments.repeats)
        middle = medians(times)
        print(f"{name}, jax {jax.__version__}, {jax.default_backend()}")
        for each, t in times.items():
            print(f"  {each} step: {middle[each]:.1f} s ({min(t):.1f} to {max(t):.1f})")
        print(f"  joint / float: {middle['joint'] / middle['float']:.2f}", flush=True)


if __name__ == "__main__":
    main()
