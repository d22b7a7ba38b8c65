"""A Linen ResNet in a training loop that is not ours: xtrain's Trainer trains it in float and fine-tunes it in mixed bits.

pip install xtrain
python -m examples.resnet_own_loop

Between the two stand the only lines that are about bits: quantize, output_fisher, solve, make_step. No config, no run folder.

About two minutes of one CPU core. On the test set (360 scans, so that a quarter of a point is one of them): float 99.72 % right,
uniform W3A3 98.89, mixed 99.44 at the same BitOps. One seed: an example, not evidence.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xtrain
from flax import linen as nn

import mpq_jax
from examples.vit_nnx import digits


class Block(nn.Module):
    """[B, H, W, C] -> [B, H / stride, W / stride, width]."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(self.normed(nn.Conv(self.width, (3, 3), self.stride, use_bias=False, name="conv1")(x), train))
        y = self.normed(nn.Conv(self.width, (3, 3), use_bias=False, name="conv2")(y), train)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), self.stride, use_bias=False, name="shortcut")(x)
        return nn.relu(x + y)

    def normed(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class ResNet(nn.Module):
    """[B, 8, 8, 1] -> logits [B, 10]."""

    width: int = 16
    blocks: int = 3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(self.width, (3, 3), name="stem")(x))
        for i in range(self.blocks):
            x = Block(self.width * 2**i, 1 if i == 0 else 2, name=f"block{i + 1}")(x, train)
        return nn.Dense(10, name="head")(x.mean((1, 2)))


# ---- somebody's training code, which knows nothing of bits --------------------------------------------------------


def batches(split: Mapping[str, np.ndarray], steps: int, size: int = 64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(split["label"]), size)
        yield split["image"][rows], split["label"][rows]


def cross_entropy(batch: tuple[Any, Any], logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def trained(model: Any, split: Mapping[str, np.ndarray], steps: int, rate: float, start: Any = None) -> dict:
    """The variables after `steps` of xtrain's Trainer. model: anything with Flax's init and apply."""
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), 0.9)
    trainer = xtrain.Trainer(model, cross_entropy, optimizer, mutable="batch_stats")
    loop = trainer.train(list(batches(split, steps)), init_vars=start, train=True)
    for _ in loop:
        pass
    return {"params": loop.parameters, **loop.variables}


def accuracy(apply: Any, variables: Any, split: Mapping[str, np.ndarray]) -> float:
    logits = jax.jit(lambda v, x: apply(v, x, train=False))(variables, split["image"])
    return float((logits.argmax(-1) == split["label"]).mean())


# ---- and what makes it a model of mixed bits ----------------------------------------------------------------------


class WithBits(NamedTuple):
    """The quantized model under one policy, with Flax's `apply`: what a Trainer asks of a model."""

    model: mpq_jax.QuantizedModel
    policy: Mapping[str, mpq_jax.Bits]

    def apply(self, variables, *inputs, mutable=False, rngs=None, capture_intermediates=False, method=None, **kwargs):
        return self.model.apply(variables, self.policy, *inputs, mutable=[mutable] if mutable else False, **kwargs)


def importance_of(model: mpq_jax.QuantizedModel, variables: Any, split: Mapping[str, np.ndarray]) -> mpq_jax.Importance:
    """How much each layer suffers at each bit-width, of the float model's gradients on 1,024 images."""
    seen = [{"image": image, "label": jnp.asarray(label)} for image, label in batches(split, 16)]
    importance, _ = mpq_jax.repair(mpq_jax.output_fisher(model, mpq_jax.classification(), variables, seen).importance)
    return importance


def joint_trained(model: mpq_jax.QuantizedModel, variables: Any, split: Mapping[str, np.ndarray], steps: int) -> Any:
    """The variables with step sizes for all bit-widths learned at once, the weights held still."""
    step_sizes = mpq_jax.log_space(optax.adam(optax.cosine_decay_schedule(0.1, steps), b2=0.95))
    optimizer = mpq_jax.partition(model, optax.set_to_zero(), step_sizes)
    settings = {"random": 1, "error_weight": 1.0, "error_steps": min(60, steps // 4)}
    step = jax.jit(mpq_jax.make_step(model, mpq_jax.classification(), optimizer, **settings))
    uniform = mpq_jax.uniform_rows(model.layers, model.bit_widths, model.activation_bit_widths)
    state = mpq_jax.init_state(variables, optimizer, rows=len(model.bit_widths) + 1)
    for image, label in batches(split, steps):
        state, _ = step(state, {"image": image, "label": jnp.asarray(label)}, jax.random.key(0), uniform)
    return mpq_jax.row_variables(state, -1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="bitops=W3A3")
    parser.add_argument("--steps", type=int, nargs=3, default=(400, 200, 200), help="float, joint, fine-tuning")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--bit-widths", type=int, nargs="+", default=(2, 3, 4, 5, 6))
    options = parser.parse_args(argv)
    sets, net = digits(), ResNet(options.width, options.blocks)
    example = sets["train"]["image"][:256]

    float_variables = trained(net, sets["train"], options.steps[0], 0.05)

    model = mpq_jax.quantize(net, example, bit_widths=options.bit_widths, train=False)
    start = model.calibrate(float_variables, example, train=False)
    importance = importance_of(model, start, sets["train"])
    learned = joint_trained(model, start, sets["train"], options.steps[1])
    (budget,) = mpq_jax.parse_budgets([options.budget], model.layers, model.bit_widths, model.activation_bit_widths)
    solution = mpq_jax.solve(importance, [budget])
    name, uniform = mpq_jax.best_uniform(importance, [budget])

    print(f"float: {accuracy(net.apply, float_variables, sets['test']):.2%} right on the test set")
    for what, policy in ((f"uniform {name}", uniform), ("mixed", solution.policy)):
        with_bits = WithBits(model, policy)
        tuned = trained(with_bits, sets["train"], options.steps[2], 0.01, start=dict(learned))
        right = accuracy(with_bits.apply, tuned, sets["test"])
        print(f"{what}: {right:.2%} right, {mpq_jax.bitops(model.layers, policy) / 1e6:.2f} M BitOps")
    print(f"{solution.status}: " + ", ".join(f"{path} W{w}A{a}" for path, (w, a) in solution.policy.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
