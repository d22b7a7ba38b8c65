"""The policies of joint training's rows: stacks {path: Bits([P], [P])}, uniform ones and random ones."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from mpq_jax.policy import stack, uniform
from mpq_jax.types import Bits, Layer


def uniform_rows(
    layers: Sequence[Layer], bit_widths: Sequence[int], activation_bit_widths: Sequence[int]
) -> dict[str, Bits]:
    """The K uniform policies as one stack {path: Bits(int32 [K], int32 [K])}; K is the number of distinct widths.

    A layer without that width takes the candidate nearest to it (the lower of two).
    """
    every = sorted({*bit_widths, *activation_bit_widths})
    rows = [uniform(layers, b, b, bit_widths, activation_bit_widths) for b in every]
    return jax.tree.map(jnp.asarray, stack(rows))


def random_rows(
    key: jax.Array,
    layers: Sequence[Layer],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
    rows: int,
    same_bits: bool = False,
) -> dict[str, Bits]:
    """R random policies as one stack {path: Bits(int32 [R], int32 [R])}, drawn inside the compiled step.

    Weight and activation bits are drawn independently, uniformly from each layer's candidates; layers with equal
    `tied` share the draw of their activation bits. same_bits: both get the weights' draw, as in LIMPQ.
    """
    drawn: dict[str, Bits] = {}
    groups: dict[str, jax.Array] = {}
    for i, layer in enumerate(layers):
        if layer.bits is not None:
            drawn[layer.path] = Bits(*(jnp.full(rows, b, jnp.int32) for b in layer.bits))
            continue
        key_w, key_a = jax.random.split(jax.random.fold_in(key, i))
        w = _draw(key_w, layer.candidates("weight", bit_widths), rows)
        candidates = layer.candidates("activation", activation_bit_widths)
        a = w if same_bits and candidates == tuple(bit_widths) else _draw(key_a, candidates, rows)
        if layer.tied is not None:
            # Where a rule narrowed one of the tied layers, it keeps its own draw.
            a = groups.setdefault(f"{layer.tied} {candidates}", a)
        drawn[layer.path] = Bits(w, a)
    return drawn


def _draw(key: jax.Array, candidates: Sequence[int], rows: int) -> jax.Array:
    return jnp.asarray(candidates, jnp.int32)[jax.random.randint(key, (rows,), 0, len(candidates))]


def concatenate(*stacks: Mapping[str, Bits]) -> dict[str, Bits]:
    """Stacks of policies, one after the other along the row axis."""
    return {
        path: Bits(*(jnp.concatenate(parts) for parts in zip(*(s[path] for s in stacks), strict=True)))
        for path in stacks[0]
    }


def policy_array(policies: Mapping[str, Bits], layers: Sequence[Layer]) -> jax.Array:
    """int32 [P, L, 2]: the weight and activation bits of every row, in the order of `layers`."""
    return jnp.stack([jnp.stack([policies[layer.path].w, policies[layer.path].a], -1) for layer in layers], 1)
