"""A small decoder-only transformer, character by character, on text that comes with Python. Its loss is its own.

python -m examples.language_model --workdir runs/language_model

Query, key and value of a block get the same bits: one rule. Losses are in nats a character.

About three and a half minutes of one CPU core. On the test text: float 1.510 nats a character, uniform W3A3 1.771, a random policy
1.904, mixed 1.645 at the same BitOps and 0.82 of uniform's size; guessing has 4.543. One seed: an example, not evidence.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from examples.text import LENGTH, alphabet
from mpq_jax import FloatModel
from mpq_jax.commands import search, train


class Decoder(nn.Module):
    """Characters int [B, T] -> logits [B, T, characters]: each position sees itself and what is before it."""

    characters: int
    dim: int
    depth: int
    heads: int
    length: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.characters, self.dim, name="embed")(tokens)
        x = x + self.param("places", nn.initializers.normal(0.02), (self.length, self.dim))[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for i in range(self.depth):
            y = nn.LayerNorm(name=f"block{i}_norm1")(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads, name=f"block{i}_attention")(y, mask=mask)
            y = nn.Dense(4 * self.dim, name=f"block{i}_up")(nn.LayerNorm(name=f"block{i}_norm2")(x))
            x = x + nn.Dense(self.dim, name=f"block{i}_down")(nn.relu(y))
        return nn.Dense(self.characters, name="head")(nn.LayerNorm(name="norm")(x))


def loss(logits: jax.Array, batch: dict) -> jax.Array:
    """[B, T]: nats of each character."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["targets"])


def correct(logits: jax.Array, batch: dict) -> jax.Array:
    """[B, T]: whether the likeliest character is the right one."""
    return logits.argmax(-1) == batch["targets"]


def model(dim: int = 64, depth: int = 2, heads: int = 4, length: int = LENGTH) -> FloatModel:
    """What --model names: the module, what it is called with, and its loss."""
    decoder = Decoder(len(alphabet()), dim, depth, heads, length)
    return FloatModel(decoder, inputs=("tokens",), loss=loss, correct=correct)


SETTINGS = [
    *("--pretrain.optimizer", "adamw", "--pretrain.learning_rate", "0.003", "--pretrain.steps", "1000"),
    *("--pretrain.batch_size", "32", "--joint.batch_size", "16", "--finetune.batch_size", "32"),
    *("--finetune.optimizer", "adamw", "--finetune.learning_rate", "0.0005", "--finetune.steps", "300"),
    *("--eval_batch_size", "100", "--joint.steps", "100"),
    *("--quantize.ends", "searched", "--quantize.rules", "head=8,8"),  # the first product is one of three alike
]
SHARED = r"(block\d+)_attention/(?:query|key|value)=share"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", default="runs/language_model")
    parser.add_argument("--budget", default="bitops=W3A3")
    options, overrides = parser.parse_known_args(argv)  # any value of the config: --pretrain.steps 100
    of_model = ["--model", "examples.language_model:model", "--data", "examples.text:windows"]
    run = [*of_model, "--workdir", options.workdir, *SETTINGS, *overrides]
    code = (
        train.main(run)
        or search.main(["--workdir", options.workdir, "--budget", options.budget, "--rule", SHARED])
        or train.main([*run, "--policy", f"{options.workdir}/policy.json"])
    )
    if not code:
        rows = json.loads(Path(options.workdir, "results.json").read_text())["rows"]
        print(f"nats a character: guessing {math.log(len(alphabet())):.3f}", end="")
        print("".join(f", {row['name']} {row['loss']:.3f}" for row in rows))
    return code


if __name__ == "__main__":
    sys.exit(main())
