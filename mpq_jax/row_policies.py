"""The policies of joint training's rows: stacks {path: Bits([P], [P])}, uniform ones and random ones."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.policy import stack, tied_candidates, uniform
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
    """The R random policies of `random_bits` as one stack {path: Bits(int32 [R], int32 [R])}."""
    return as_rows(random_bits(key, layers, bit_widths, activation_bit_widths, rows, same_bits), layers)


def random_bits(
    key: jax.Array,
    layers: Sequence[Layer],
    bit_widths: Sequence[int],
    activation_bit_widths: Sequence[int],
    rows: int,
    same_bits: bool = False,
) -> jax.Array:
    """R random policies, int32 [R, L, 2]: weight and activation bits of the searched layers in order; may be traced.

    Weight and activation bits are drawn independently, uniformly from each layer's candidates; layers with equal
    `tied` share the draw of their activation bits, from those that all of them may have. same_bits: both get the weights' draw, as in LIMPQ, in layers whose
    activations may have every width that their weights may have; others draw twice all the same.
    Raises Refusal where tied layers allow no activation bits in common.
    """
    searched = [i for i, layer in enumerate(layers) if layer.searched]
    if not searched:
        return jnp.zeros((rows, 0, 2), jnp.int32)
    shared = tied_candidates(layers, activation_bit_widths)
    candidates = [(layers[i].candidates("weight", bit_widths), shared[layers[i].path]) for i in searched]
    # One draw for all layers, each from a key of its own: one by one they were half of the joint step's program.
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(np.array(searched, np.uint32))
    counts = np.array([[len(each) for each in both] for both in candidates], np.int32)
    numbers = jax.vmap(jax.vmap(lambda key, count: jax.random.randint(key, (rows,), 0, count)))(keys, counts)
    table = np.zeros((*counts.shape, counts.max()), np.int32)
    sources = np.arange(counts.size).reshape(counts.shape)  # whose draw each takes
    first: dict[str, int] = {}
    for i, (layer, both) in enumerate(zip((layers[i] for i in searched), candidates, strict=True)):
        for kind, each in enumerate(both):
            table[i, kind, : len(each)] = each
        if same_bits and set(both[0]) <= set(both[1]):
            sources[i, 1] = sources[i, 0]
        if layer.tied is not None:
            sources[i, 1] = first.setdefault(layer.tied, sources[i, 1])
    bits = jnp.take_along_axis(jnp.asarray(table), numbers, axis=-1).reshape(-1, rows)
    return bits[sources.ravel()].reshape(*counts.shape, rows).transpose(2, 0, 1)


def as_rows(bits: jax.Array, layers: Sequence[Layer]) -> dict[str, Bits]:
    """int32 [P, L, 2], the bits of the searched layers in order, as a stack {path: Bits([P], [P])} of all layers."""
    searched = iter(range(bits.shape[1]))
    stacked = {}
    for layer in layers:
        if layer.bits is None:
            i = next(searched)
            stacked[layer.path] = Bits(bits[:, i, 0], bits[:, i, 1])
        else:
            stacked[layer.path] = Bits(*(jnp.full(bits.shape[0], b, jnp.int32) for b in layer.bits))
    return stacked


def concatenate(*stacks: Mapping[str, Bits]) -> dict[str, Bits]:
    """Stacks of policies, one after the other along the row axis."""
    return {
        path: Bits(*(jnp.concatenate(parts) for parts in zip(*(s[path] for s in stacks), strict=True)))
        for path in stacks[0]
    }
