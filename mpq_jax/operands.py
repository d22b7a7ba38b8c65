"""A layer's two operands in front of their product, each with its quantizer, and what is measured of them on the way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mpq_jax import flax_seam
from mpq_jax.interpret import Call
from mpq_jax.layers import MAX_BITS, LayerSpec, leaf_paths
from mpq_jax.mixture import mixture, one_hot
from mpq_jax.numerics import at_bits, wide
from mpq_jax.types import Bits, Decoding, Quantizer, Refusal, TensorQuantizer, Values

T = TypeVar("T")

# What `apply` measures on the way when asked to, over the layers that a policy quantizes:
# "error": the sum of mean (x_hat - x)^2 / mean x^2 of weights and of activations, [], with gradients to trained leaves
#     only; tensors without such leaves are left out, their error moves nothing.
# "penalty": the sum of the quantizers' penalties, [].
# "state": {path of a state leaf: (sum of the values that the calls move it to, how many they were)}, both [*stack, K, ...]
#     and [*stack, K]: each call counts for the entry of its own bits.
TERMS = ("error", "penalty", "state")


class Operand(NamedTuple):
    """A tensor in front of its product, with what its quantizer takes.

    leaves: {name: [K, ...]}, the quantizer's leaves of this layer. chosen: {name: [...]}, those at grid_bits; {} where each
    output channel has bits of its own. place: shapes a leaf at one width to broadcast with x.
    bits: as the policy has them, int32 [], or [C] for a weight with bits per output channel. grid_bits: the same, but a
    width that a grid exists for where the policy says float, and which of them: in_float, or None where none can be.
    """

    quantizer: TensorQuantizer
    x: jax.Array
    leaves: Mapping[str, jax.Array]
    chosen: Mapping[str, jax.Array]
    place: Callable[[jax.Array], jax.Array]
    widths: tuple[int, ...]
    bits: jax.Array
    grid_bits: jax.Array
    in_float: jax.Array | None
    signed: bool

    @property
    def values(self) -> dict[str, jax.Array]:
        """The leaves at the bits of this call, one width for the whole tensor."""
        return {name: self.place(leaf) for name, leaf in self.chosen.items()}

    def call(self, function: Callable[[jax.Array, Values, jax.Array, bool], T], x: jax.Array | None = None) -> T:
        """One of the quantizer's functions on the tensor, or on `x` in its place."""
        return function(self.x if x is None else x, self.values, self.grid_bits, self.signed)

    def on_grid(self) -> jax.Array:
        """x_hat; x itself where the bits say float."""
        if jnp.ndim(self.bits):
            return self._or_float(self._by_channel())
        x_hat = self.call(self.quantizer.fake_quant)
        if not self.quantizer.leaves:  # no leaf is NaN that shows in x_hat, as `at_bits` makes it
            x_hat = jnp.where(self._known(), x_hat, jnp.nan)
        return self._or_float(x_hat)

    def _known(self) -> jax.Array:
        """Whether the bits are a candidate's, []."""
        return (jnp.asarray(self.widths, jnp.int32) == self.grid_bits).any()

    def on_grid_with_error(self, samples: int) -> tuple[jax.Array, jax.Array]:
        """(x_hat as above, `error` of it), in one pass over x where the quantizer has such a thing."""
        if self.quantizer.with_error is None or jnp.ndim(self.bits):
            return self.on_grid(), self.error(samples)
        x_hat, error = self.quantizer.with_error(self.x, self.values, self.grid_bits, self.signed, samples)
        return self._or_float(x_hat), self.if_on_grid(error)

    def error(self, samples: int) -> jax.Array:
        """sum (x_hat - x)^2 / sum x^2 over the first `samples` of the leading axis, []; its gradient reaches the trained
        leaves only. 0 where there are none. Raises Refusal for bits per output channel."""
        if not self.quantizer.leaves:
            return jnp.zeros(())
        if jnp.ndim(self.bits):
            raise Refusal('the term "error" is of weights with one bit-width, not of bits per output channel')
        assert self.quantizer.fit is not None
        x = wide(jax.lax.stop_gradient(self.x[:samples]))
        power = jnp.square(x).sum()
        error = jnp.square(self.call(self.quantizer.fit, x) - x).sum() / jnp.where(power > 0, power, x.size)
        return self.if_on_grid(error)

    def _or_float(self, x_hat: jax.Array) -> jax.Array:
        return x_hat if self.in_float is None else jnp.where(self.place(self.in_float), self.x, x_hat)

    def if_on_grid(self, term: jax.Array) -> jax.Array:
        return term if self.in_float is None else jnp.where(self.in_float, 0, term)

    def at_width(self, k: int) -> "Operand":
        """The whole tensor at the k-th of its widths."""
        bits = jnp.int32(self.widths[k])
        return self._replace(bits=bits, grid_bits=bits, chosen={name: leaf[k] for name, leaf in self.leaves.items()})

    def encoded(self) -> tuple[jax.Array, Decoding]:
        """(codes, their decoding); bits per output channel: each channel's own. For tensors that are not in float."""
        if not jnp.ndim(self.bits):
            decoding = self.call(self.quantizer.decoding)
            if decoding.scale is not None:
                decoding = decoding._replace(scale=jnp.where(self._known(), decoding.scale, jnp.nan))
            return self.call(self.quantizer.encode), decoding
        codes, scale, offset = jnp.zeros(self.x.shape, jnp.int32), jnp.full((), jnp.nan), 0.0
        for k, width in enumerate(self.widths):
            whole, mine = self.at_width(k), self.place(self.bits == width)
            decoding = whole.call(self.quantizer.decoding)
            if decoding.table is not None:
                return codes, decoding  # which products of codes refuse
            codes = jnp.where(mine, whole.call(self.quantizer.encode), codes)
            scale, offset = jnp.where(mine, decoding.scale, scale), decoding.offset
        return codes, Decoding(scale, offset)

    def _by_channel(self) -> jax.Array:
        """Each output channel on a grid of its own.

        Every width's grid is made of the whole tensor, and each channel takes its own: for any quantizer the same
        values, and gradients, as the whole layer at that width.
        """
        shares = jax.vmap(self.place)(one_hot(self.grid_bits, self.widths))
        on_grids = mixture(self.quantizer, self.x, self.leaves, self.widths, shares, self.signed, self.place)
        return jnp.where(shares.any(0), on_grids, jnp.nan)  # as in at_bits


def operand_of(
    call: Call, spec: LayerSpec, quantizer: Quantizer, kind: str, x: jax.Array, value: Any, float_bits: bool = False
) -> Operand:
    """One operand of a layer's product. value: an entry of `looked_up`. float_bits: whether any bits may say float."""
    weight = kind == "weight"
    widths, bits = spec.widths(kind), value["bits"].w if weight else value["bits"].a
    in_float = bits > MAX_BITS if float_bits or any(spec.in_float) else None

    def place(leaf: jax.Array) -> jax.Array:
        return place_on_channels(leaf, x, call.channel_axes) if weight else leaf

    return Operand(
        quantizer=getattr(quantizer, kind),
        x=x,
        leaves=value[kind],
        chosen=value["chosen"][kind],
        place=place,
        widths=widths,
        bits=bits,
        grid_bits=bits if in_float is None else _on_some_grid(bits, widths),
        in_float=in_float,
        signed=weight or spec.signed,
    )


def _on_some_grid(bits: jax.Array, widths: Sequence[int]) -> jax.Array:
    """Where one layer of a stack is left in float its grid is worked out all the same, and not used."""
    return jnp.where(bits > MAX_BITS, widths[0], bits)


def looked_up(
    specs: Mapping[str, LayerSpec],
    leaves: Mapping[str, Mapping[str, Mapping[str, jax.Array]]],
    bits: Mapping[str, Bits],
    float_bits: bool = False,
) -> dict[str, dict[str, Any]]:
    """leaf -> its quantizers' leaves, "bits", and "chosen": the leaves at those bits, as `operand_of` takes them.

    leaves: as `quantized_model.learned_leaves` has them. bits: of each, Bits([*stack], [*stack]), or w [*stack, C].
    float_bits: as `operand_of` is given it afterwards.
    """

    def chosen(leaf: str, kind: str, width: jax.Array) -> dict[str, jax.Array]:
        spec = specs[leaf]
        if jnp.ndim(width) > len(spec.stack):  # an output channel each
            return {}
        widths = spec.widths(kind)
        some = _on_some_grid(width, widths) if float_bits or any(spec.in_float) else width
        return {name: at_bits(value, widths, some) for name, value in leaves[leaf][kind].items()}

    return {
        leaf: {
            **of,
            "bits": bits[leaf],
            "chosen": {
                "weight": chosen(leaf, "weight", bits[leaf].w),
                "activation": chosen(leaf, "activation", bits[leaf].a),
            },
        }
        for leaf, of in leaves.items()
    }


# (tensor, bits) -> the tensor on its grid
FakeQuant = Callable[[jax.Array, jax.Array], jax.Array]


def fake_quants(
    spec: LayerSpec, quantizer: Quantizer, call: Call, weight: jax.Array, value: Mapping[str, Any]
) -> tuple[FakeQuant, FakeQuant]:
    """(of the weight, of the activations): what puts one layer's operands on their grids, (x, bits) -> x_hat.

    value: the layer's entry of `quantized_model.learned_leaves`, the part of its own place in the stack.
    """

    def weight_grid(x: jax.Array, bits: jax.Array) -> jax.Array:
        at = {name: at_bits(leaf, spec.weight_bit_widths, bits) for name, leaf in value["weight"].items()}
        at = {name: place_on_channels(leaf, weight, call.channel_axes) for name, leaf in at.items()}
        return quantizer.weight.fake_quant(x, at, bits, True)

    def activation_grid(x: jax.Array, bits: jax.Array) -> jax.Array:
        at = {name: at_bits(leaf, spec.activation_bit_widths, bits) for name, leaf in value["activation"].items()}
        return quantizer.activation.fake_quant(x, at, bits, spec.signed)

    return weight_grid, activation_grid


def place_on_channels(value: jax.Array, weight: Any, channel_axes: Sequence[int]) -> jax.Array:
    """[] stays; [..., C], an entry an output channel on the last axis, gets the weight operand's rank behind the rest."""
    if value.ndim == 0:
        return value
    channels = [n if i in channel_axes else 1 for i, n in enumerate(weight.shape)]
    return value.reshape(*value.shape[:-1], *channels)


def tapped(term: str, operands: Mapping[str, Operand], value: Any) -> Any:
    """One layer's part of a term."""
    if term == "state":
        return {kind: _next_state(operand, value[kind]) for kind, operand in operands.items()}
    if term == "penalty":
        parts = [_penalty(operand) for operand in operands.values()]
    else:
        parts = [operand.error(samples(kind, operand)) for kind, operand in operands.items()]
    return sum(parts, jnp.zeros(()))


def samples(kind: str, operand: Operand) -> int:
    """How many entries of the leading axis an operand's error is measured on: an eighth of a batch is enough to tell."""
    size = operand.x.shape[0]
    return size if kind == "weight" else max(1, size // 8)


def _penalty(operand: Operand) -> jax.Array:
    if operand.quantizer.penalty is None:
        return jnp.zeros(())
    return operand.if_on_grid(operand.quantizer.penalty(operand.values, operand.grid_bits, operand.signed))


def _next_state(operand: Operand, leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{state leaf: ([K, ...], [K])}: its next value at the row of this call's bits, else 0; and which row that is."""
    update = operand.quantizer.update
    if update is None:
        return {}
    if jnp.ndim(operand.bits):
        # Bits per output channel: no width's basis is that of the whole tensor, and all stay as they are.
        return {
            name: (jnp.zeros_like(leaves[name]), jnp.zeros(len(operand.widths), leaves[name].dtype))
            for name in operand.quantizer.state
        }
    x, values = jax.lax.stop_gradient((operand.x, operand.values))
    hit = jnp.asarray(operand.widths, jnp.int32) == operand.bits

    def placed(new: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = new.reshape(leaf.shape[1:]).astype(leaf.dtype)
        return jnp.where(hit.reshape(-1, *[1] * new.ndim), new, 0), hit.astype(leaf.dtype)

    return {name: placed(v, leaves[name]) for name, v in update(x, values, operand.grid_bits, operand.signed).items()}


def gathered(term: str, specs: Mapping[str, LayerSpec], quantizer: Quantizer, taps: Mapping[Any, Any]) -> Any:
    """The sum of a term over layers; a layer that runs repeatedly counts once with its mean, or with all its states."""
    if term != "state":
        parts = (
            (tap[term].mean(axis=specs[leaf].shared) if specs[leaf].shared else tap[term]).sum()
            for (leaf, _), tap in taps.items()
        )
        return sum(parts, jnp.zeros(()))
    total: dict[str, tuple[jax.Array, jax.Array]] = {}
    for (leaf, _), tap in taps.items():
        spec = specs[leaf]
        for kind, states in tap["state"].items():
            paths = leaf_paths(spec, quantizer, kind, "state")
            for name, state in states.items():
                path, summed = paths[name], jax.tree.map(lambda x, axes=spec.shared: x.sum(axis=axes), state)
                total[path] = jax.tree.map(jnp.add, total[path], summed) if path in total else summed
    return total


def with_state(params: Any, moved: Mapping[str, tuple[jax.Array, jax.Array]]) -> Any:
    """The parameters with state leaves moved on: to the mean of the values in `moved` (TERMS, "state"), where any."""
    if not moved:
        return params
    flat = flax_seam.flatten(params)
    for path, (total, count) in moved.items():
        leaf = flat[path]
        count = count.reshape(*count.shape, *[1] * (leaf.ndim - count.ndim))
        flat[path] = jnp.where(count > 0, total / jnp.maximum(count, 1), leaf)
    return flax_seam.unflatten(flat)
