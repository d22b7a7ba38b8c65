"""Somebody else's model from PyPI, unmodified: nano-moe-jax's mixture-of-experts language model.

pip install nano-moe-jax
python -m examples.mixture_of_experts --workdir runs/mixture_of_experts

Its call has `deterministic` in place of `train` (found by its name) and gives logits and a loss that balances the
experts; its query, key and value are one dense layer. All that has to be said is which of the batch it is called with,
and its loss. Here without joint training: the float model's gradients say which layers matter (output_fisher).

About four and a half minutes of one CPU core. On the test text: float 1.796 nats a character, uniform W2A4 (the best that fits W3A3's
BitOps) 1.856, a random policy 1.950, mixed 1.825. One seed: an example, not evidence.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import optax
from nano_moe import NanoMoE, NanoMoEConfig

from examples.text import LENGTH, alphabet
from mpq_jax import FloatModel
from mpq_jax.commands import search, train


def loss(outputs: tuple[jax.Array, jax.Array], batch: dict) -> jax.Array:
    """[B, T]: nats of each character, and the package's weight of the balancing loss."""
    logits, balance = outputs
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return nats + NanoMoEConfig.aux_loss_coeff * balance


def correct(outputs: tuple[jax.Array, jax.Array], batch: dict) -> jax.Array:
    return outputs[0].argmax(-1) == batch["targets"]


def model(d_model: int = 64, n_layers: int = 2, n_experts: int = 4) -> FloatModel:
    """What --model names."""
    config = NanoMoEConfig(
        vocab_size=len(alphabet()),
        d_model=d_model,
        d_ff=2 * d_model,
        n_layers=n_layers,
        n_experts=n_experts,
        block_size=LENGTH,
    )
    return FloatModel(NanoMoE(config), inputs=("tokens",), loss=loss, correct=correct)


SETTINGS = [
    *("--pretrain.optimizer", "adamw", "--pretrain.learning_rate", "0.003", "--pretrain.steps", "800"),
    *("--pretrain.batch_size", "32", "--joint.batch_size", "16", "--finetune.batch_size", "32"),
    *("--finetune.optimizer", "adamw", "--finetune.learning_rate", "0.0005", "--finetune.steps", "200"),
    *("--eval_batch_size", "100", "--finetune.start", "float", "--criteria.samples", "256"),
    *("--quantize.ends", "searched", "--quantize.rules", "^Dense_0=8,8"),
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/mixture_of_experts")
    parser.add_argument("--budget", default="bitops=W3A3")
    options, overrides = parser.parse_known_args(argv)  # any value of the config: --pretrain.steps 100
    of_model = ["--model", "examples.mixture_of_experts:model", "--data", "examples.text:windows"]
    run = [*of_model, "--workdir", options.workdir, *SETTINGS, *overrides]
    criterion = ["--criterion", "output_fisher"]
    return (
        train.main([*run, "--float-only"])
        or search.main(["--workdir", options.workdir, "--budget", options.budget, *criterion])
        or train.main([*run, "--policy", f"{options.workdir}/policy.json"])
    )


if __name__ == "__main__":
    sys.exit(main())
