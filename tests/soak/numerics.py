"""Trains step sizes at ten times the learning rate for thousands of steps, and quantizes tensors at the edge of floats.

python tests/soak/numerics.py [--steps 10000] [--recipes log_adam sgd]

The last line is JSON: the smallest and the largest value of any step size (or clipping level, interval, power) of each
quantizer over all steps, and what went wrong. Exit code 1 where anything did.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from criteria_nets import Net, batches, calibrated, start  # noqa: E402

from mpq_jax import flax_seam, joint, optimizers, row_policies, stages  # noqa: E402
from mpq_jax.config import Joint  # noqa: E402
from mpq_jax.quantized_model import quantize  # noqa: E402
from mpq_jax.quantizers import QUANTIZERS  # noqa: E402

WIDTHS = (2, 4, 8)
LEARNERS = {
    "lsq": QUANTIZERS["lsq"](),
    "lsq per channel": QUANTIZERS["lsq"](per_channel=True),
    "lsq power of two": QUANTIZERS["lsq"](power_of_two=True),
    "lsq ewgs narrow": QUANTIZERS["lsq"](ewgs=True, narrow=True),
    "pact": QUANTIZERS["pact"](),
    "qil": QUANTIZERS["qil"](),
    "lq_nets": QUANTIZERS["lq_nets"](),
}
# Ten times the defaults, and ten times the paper's.
RECIPES = {
    "log_adam": Joint(step_size_learning_rate=1.0),
    "sgd": Joint(weights="trained", learning_rate=0.1, step_size_optimizer="sgd", error_weight=0.0, error_steps=0),
}
IMAGES = {
    "normal": lambda x: x,
    "zeros": jnp.zeros_like,
    "constant": lambda x: jnp.full_like(x, 0.7),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
}


@functools.lru_cache
def trainer(learner: str, recipe: str, steps: int):
    """run(images) -> what `train` returns but for the names. One compilation for all images and numbers of steps."""
    settings, first = RECIPES[recipe], batches(sizes=(8,) * 4)
    model = quantize(Net(), jnp.asarray(first[0]["image"]), bit_widths=WIDTHS, quantizer=LEARNERS[learner])
    optimizer = stages.joint_optimizer(model, settings, steps)
    step = joint.make_step(
        model,
        joint.classification(train_kwargs={}, eval_kwargs={}),
        optimizer,
        random=1,
        error_weight=settings.error_weight,
        error_steps=settings.error_steps,
    )
    fixed = row_policies.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    trained = sorted(optimizers.quantizer_leaves(model, "leaves"))
    watched = trained or sorted(optimizers.quantizer_leaves(model, "state"))

    def one(i, carry, stacked):
        state, least, largest, stopped = carry
        batch = jax.tree.map(lambda x: x[i % len(first)], stacked)
        state, metrics = step(state, batch, jax.random.key(0, impl="rbg"), fixed)
        flat = flax_seam.flatten(state.params)
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in [*flat.values(), metrics["losses"]]]).all()
        values = jnp.concatenate([flat[path].ravel() for path in watched])
        # Before a stop only: what comes after it no program ever sees.
        running = stopped < 0
        least = jnp.where(running & finite, jnp.minimum(least, values.min()), least)
        largest = jnp.where(running & finite, jnp.maximum(largest, values.max()), largest)
        return state, least, largest, jnp.where(running & ~finite, i, stopped)

    @jax.jit
    def loop(variables, stacked, count):
        state = joint.init_state(variables, optimizer, len(WIDTHS) + 1)
        begin = (state, jnp.float32(jnp.inf), jnp.float32(-jnp.inf), jnp.int32(-1))
        return jax.lax.fori_loop(0, count, lambda i, carry: one(i, carry, stacked), begin)[1:]

    def run(images: str, count: int) -> dict:
        data = [{**batch, "image": IMAGES[images](jnp.asarray(batch["image"]))} for batch in first]
        variables = calibrated(model, start(Net(), jnp.asarray(first[0]["image"])), data[0]["image"])
        least, largest, stopped = (
            x.item() for x in loop(variables, jax.tree.map(lambda *x: jnp.stack(x), *data), count)
        )
        return {
            "least": least,
            "largest": largest,
            "stopped": None if stopped < 0 else stopped,
            "trained": bool(trained),
        }

    return run


def train(learner: str, recipe: str, images: str, steps: int, of: int) -> dict:
    """The first `steps` of a joint training of `of` steps. -> {"least", "largest": of all trained leaves over all steps,
    "stopped": the first step whose loss or parameters were not finite, where the program stops; None}"""
    return trainer(learner, recipe, of)(images, steps)


def faults(name: str, found: dict, may_stop: bool) -> list[str]:
    """What is wrong with one training: a step size that is not positive and finite, or a stop that nothing explains."""
    wrong = []
    if found["stopped"] is not None and not may_stop:
        wrong.append(f"{name}: not finite at step {found['stopped']}")
    ran = found["stopped"] != 0
    if ran and not (np.isfinite(found["largest"]) and (found["least"] > 0 or not found["trained"])):
        wrong.append(f"{name}: from {found['least']} to {found['largest']}")
    return wrong


# ---- tensors at the edge ------------------------------------------------------------------------------------------

TENSORS = {
    "zeros": np.zeros((3, 3, 4, 8), np.float32),
    "constant": np.full((3, 3, 4, 8), 0.3, np.float32),
    "minus": np.full((3, 3, 4, 8), -0.3, np.float32),
    "one element": np.full((1,), 0.5, np.float32),
    "one zero": np.zeros((1,), np.float32),
    "huge": np.linspace(-1e30, 1e30, 288, dtype=np.float32).reshape(3, 3, 4, 8),
    "largest": np.linspace(-3e38, 3e38, 288, dtype=np.float32).reshape(3, 3, 4, 8),
    "tiny": np.linspace(-1e-30, 1e-30, 288, dtype=np.float32).reshape(3, 3, 4, 8),
    "subnormal": np.full((3, 3, 4, 8), 1e-42, np.float32),
    "an outlier": np.r_[np.linspace(-1, 1, 287), 1e20].astype(np.float32).reshape(3, 3, 4, 8),
    "float16": np.linspace(-65504, 65504, 288, dtype=np.float16).reshape(3, 3, 4, 8),
    "bfloat16": np.linspace(-1, 1, 288).astype(jnp.bfloat16).reshape(3, 3, 4, 8),
}


@functools.lru_cache
def _at_the_edge(learner: str, kind: str, signed: bool):
    tensor = getattr(LEARNERS[learner], kind)
    widths = tuple(b for b in WIDTHS)

    @functools.partial(jax.jit, static_argnums=0)
    def look(axes, x):
        leaves = tensor.init(x, widths, signed, axes)
        found = {"leaves": leaves, "values": [], "gradients": []}
        for k, bits in enumerate(widths):
            at = {name: leaf[k] for name, leaf in leaves.items()}
            if axes:  # as operands.Operand.place does: channels are the last axis
                shape = [1] * (x.ndim - 1) + [-1]
                at = {
                    n: v.reshape(*v.shape[:-1], *shape) if v.ndim and v.shape[-1] == x.shape[-1] else v
                    for n, v in at.items()
                }

            def total(x, at, bits=bits):
                out = tensor.fake_quant(x, at, jnp.int32(bits), signed)
                return (out.astype(jnp.float32) / out.size).sum(), out

            grads, out = jax.grad(total, argnums=(0, 1), has_aux=True)(x, at)
            found["values"].append(out)
            found["gradients"].append(grads)
        return found

    return look


def edge(learner: str, kind: str, signed: bool, name: str) -> list[str]:
    """What is not finite, or not positive, when a tensor is started on, quantized and differentiated."""
    x = jnp.asarray(TENSORS[name] if signed else np.abs(TENSORS[name]))
    axes = (x.ndim - 1,) if kind == "weight" and x.ndim == 4 else ()
    found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), _at_the_edge(learner, kind, signed)(axes, x))
    where = f"{learner} {kind} {'signed' if signed else 'unsigned'} {name}"
    wrong = []
    for leaf, value in found["leaves"].items():
        positive = getattr(LEARNERS[learner], kind).leaves
        if not np.isfinite(value).all() or (leaf in positive and not (value > 0).all()):
            wrong.append(f"{where}: {leaf} starts at {value.min()} to {value.max()}")
    wrong += [f"{where}: {part} not finite" for part in ("values", "gradients") if not _finite(found[part])]
    return wrong


def _finite(tree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


# Beyond float32's squares and their inverses: there a run stops, as its first loss or parameters are not finite.
BEYOND = ("huge", "largest", "tiny", "an outlier")


def edges() -> tuple[int, int, list[str]]:
    """All quantizers on all tensors. -> (how many, how many of them were not finite beyond float32's squares, what went
    wrong)"""
    count, beyond, wrong = 0, 0, []
    for learner in LEARNERS:
        for kind, signed in (("weight", True), ("activation", True), ("activation", False)):
            for name in TENSORS:
                count, found = count + 1, edge(learner, kind, signed, name)
                if name in BEYOND:
                    beyond += bool(found)
                else:
                    wrong += found
    return count, beyond, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--images", nargs="+", choices=list(IMAGES), default=list(IMAGES))
    parser.add_argument("--no-edges", action="store_true")
    arguments = parser.parse_args()
    wrong, ranges = [], {}
    for learner in arguments.learners:
        for recipe in arguments.recipes:
            for images in arguments.images:
                # Thousands of steps on ordinary images; the others either stand or fall in the first hundreds.
                steps = arguments.steps if images == "normal" else min(arguments.steps, 500)
                found = train(learner, recipe, images, steps, arguments.steps)
                name = f"{learner}, {recipe}, {images}"
                wrong += faults(name, found, may_stop=images in ("huge", "tiny"))
                ranges[name] = [found["least"], found["largest"], found["stopped"]]
    tensors, beyond, more = (0, 0, []) if arguments.no_edges else edges()
    print("\n".join(wrong + more), file=sys.stderr)
    print(
        json.dumps(
            {
                "steps": arguments.steps,
                "ranges": ranges,
                "tensors": tensors,
                "stops": beyond,
                "wrong": len(wrong + more),
            }
        )
    )
    return 1 if wrong or more else 0


if __name__ == "__main__":
    sys.exit(main())
