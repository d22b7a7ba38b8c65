"""A quantized model's weights as integer codes in the narrowest container, and the model run from them.

The codes are worked out once, ahead; the program that holds them is the model's own, with the decoded codes in the place
of each weight operand. Letters: N elements of one layer's weight operand; [*lead] the scans that slice its leaf.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops, policy
from mpq_jax.interpret import Call, Handler, Taps
from mpq_jax.mixture import one_hot
from mpq_jax.numerics import decode
from mpq_jax.operands import Operand, operand_of
from mpq_jax.quantized_model import layer_values
from mpq_jax.types import Bits, Decoding, Policy, QuantizedModel

CONTAINERS = (2, 4, 8, 16)  # bits that a code is held in


class Container(NamedTuple):
    """How the codes of a weight operand are held.

    shape: of the operand. bits: what a code takes; those under 8 share bytes if `packed`, the first code in the
    lowest bits. signed: codes in two's complement. floats: [F, *shape], the operands of those layers of a stack that
    are left in float; None where there are none.
    """

    shape: tuple[int, ...]
    bits: int
    signed: bool
    packed: bool
    floats: np.ndarray | None


# A leaf, where all its calls have the same codes; else (leaf, call number). As QuantizedModel.walk takes values.
Key = str | tuple[str, int]


class Coded(NamedTuple):
    """A model's codes under one policy: values and containers, both by Key.

    values: what the handler gets with a layer, NumPy arrays [*lead, …]: "codes", "decoding" (a Decoding), "activation"
    (the activation quantizer's leaves at the policy's bits), "bits" (of the activations) and, where some layers of the
    stack are left in float, "slot" (their place in Container.floats, -1 for the others).
    """

    values: dict[Key, dict[str, Any]]
    containers: dict[Key, Container]

    @property
    def payload(self) -> int:
        """Bytes of all codes in their containers."""
        return sum(
            -(-value["codes"].size * jnp.iinfo(value["codes"].dtype).bits // 8) for value in self.values.values()
        )


# ---- working the codes out ----------------------------------------------------------------------------------------


def coded(
    model: QuantizedModel, variables: Any, bits: Policy, sample: Any, packed: bool = True, **kwargs: Any
) -> Coded:
    """The codes of every quantized weight operand, and what decodes them: one compiled walk of the model.

    sample: an input of any batch size, array or jax.ShapeDtypeStruct; its values do not matter. kwargs: of the model's call.
    packed: False holds codes of up to 4 bits as int4 or uint4.
    Raises Refusal for a policy of another model, and for variables without the quantizer's leaves.
    """
    bits = policy.completed(bits, model.layers, model.bit_widths, model.activation_bit_widths)
    arrays = {path: Bits(*(np.asarray(b, np.int32) for b in each)) for path, each in bits.items()}
    calls: dict[tuple[str, int], tuple[Call, tuple[int, ...]]] = {}

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        out = ops.contract(call.primitive, call.params, "plain")(lhs, rhs)
        if value is None:
            return out, None
        spec, pair = model.specs[call.leaf], (lhs, rhs)
        weight, x = pair[call.weight_side], pair[1 - call.weight_side]
        calls[call.leaf, call.number] = call, weight.shape
        weights = operand_of(call, spec, model.quantizer, "weight", weight, value)
        inputs = operand_of(call, spec, model.quantizer, "activation", x, value)
        codes, decoding = _by_channel(weights) if jnp.ndim(weights.bits) else _whole(weights)
        tap = {"codes": codes, "decoding": decoding, "activation": inputs.values, "bits": inputs.grid_bits}
        return out, tap | ({"float": weight, "in_float": inputs.in_float} if any(spec.in_float) else {})

    @jax.jit
    def ahead(variables: Any, arrays: Policy) -> Taps:
        values = layer_values(model.specs, model.quantizer, variables, arrays)
        return model.walk(variables, values, handler, (jnp.zeros(sample.shape, sample.dtype),), kwargs)[2]

    taps = jax.tree.map(np.asarray, ahead(variables, arrays))
    result = Coded({}, {})
    for leaf in dict.fromkeys(leaf for leaf, _ in taps):
        for key, tap in _shared(leaf, taps, calls).items():
            shape = calls[key if isinstance(key, tuple) else (leaf, 0)][1]
            result.values[key], result.containers[key] = _held(tap, shape, packed)
    return result


def _whole(operand: Operand) -> tuple[jax.Array, Decoding]:
    quantizer = operand.quantizer
    return operand.call(quantizer.encode), _with_arrays(operand.call(quantizer.decoding))


def _by_channel(operand: Operand) -> tuple[jax.Array, Decoding]:
    """As `_whole`, each output channel with the codes and the decoding of the whole tensor at the channel's bits."""
    hits = jax.vmap(operand.place)(one_hot(operand.grid_bits, operand.widths)) > 0
    each = [_whole(operand.at_width(k)) for k in range(len(operand.widths))]
    chosen = each[0]
    for hit, other in zip(hits[1:], each[1:], strict=True):
        chosen = jax.tree.map(lambda new, old, hit=hit: jnp.where(hit, new, old), other, chosen)
    return chosen


def _with_arrays(decoding: Decoding) -> Decoding:
    return decoding._replace(offset=jnp.asarray(decoding.offset, jnp.float32))


def _shared(leaf: str, taps: Mapping[Any, Any], calls: Mapping[Any, tuple[Call, tuple[int, ...]]]) -> dict[Key, Any]:
    """The taps of one leaf: under its own key if all its calls, and all turns of scans that do not slice it, agree."""
    own = {key: tap for key, tap in taps.items() if key[0] == leaf}
    found = []
    for key, tap in own.items():
        call = calls[key][0]
        repeats = tuple(depth for depth in range(len(call.scans)) if depth not in call.stack)
        first = jax.tree.map(
            lambda x, axes=repeats: x[tuple(0 if i in axes else slice(None) for i in range(x.ndim))], tap
        )
        if not _agree(jax.tree.map(lambda x, axes=repeats: np.expand_dims(x, axes), first), tap):
            return own
        found.append(first)
    return {leaf: found[0]} if all(_agree(found[0], other, alike=True) for other in found[1:]) else own


def _agree(a: Any, b: Any, alike: bool = False) -> bool:
    """Whether the trees hold the same numbers; a's arrays may broadcast to b's, unless they are to be alike."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all((x.shape == y.shape or not alike) and bool((x == y).all()) for x, y in pairs)


def _held(tap: dict[str, Any], shape: tuple[int, ...], packed: bool) -> tuple[dict[str, Any], Container]:
    """One entry of Coded.values and of Coded.containers."""
    codes, decoding = tap["codes"], tap["decoding"]
    lead = codes.shape[: codes.ndim - len(shape)]
    low, high = int(codes.min()), int(codes.max())
    bits = next(c for c in CONTAINERS if (-low <= 2 ** (c - 1) > high if low < 0 else high < 2**c))
    if decoding.table is not None:
        # Only the levels that these codes name: a basis has those of its layer's widest candidate.
        kept = decoding.table[(slice(None),) * len(lead) + (slice(2 ** high.bit_length()),)]
        decoding = Decoding(offset=None, table=kept)
    value = {"codes": contained(codes.reshape(*lead, -1), bits, low < 0, packed), "decoding": decoding}
    value |= {"activation": tap["activation"], "bits": tap["bits"]}
    floats = None
    if "float" in tap:
        in_float = tap["in_float"]
        floats = tap["float"][in_float]
        value["slot"] = np.where(in_float, np.cumsum(in_float).reshape(in_float.shape) - 1, -1).astype(np.int32)
    return value, Container(shape, bits, low < 0, packed, floats)


# ---- containers ---------------------------------------------------------------------------------------------------


def contained(codes: np.ndarray, bits: int, signed: bool, packed: bool = True) -> np.ndarray:
    """Codes int32 [*lead, N] in their containers: uint8 [*lead, ceil(N bits / 8)], or [*lead, N] of an integer type."""
    if bits >= 8 or not packed:
        return codes.astype(jnp.dtype(f"{'' if signed else 'u'}int{max(bits, 4)}"))
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padding)]) & (2**bits - 1)
    shifted = padded.reshape(*codes.shape[:-1], -1, per_byte) << (bits * np.arange(per_byte))
    return shifted.sum(-1).astype(np.uint8)


def unpacked(held: jax.Array, container: Container) -> jax.Array:
    """int32 codes in the operand's shape, from one layer's part of what `contained` gives."""
    if container.bits >= 8 or not container.packed:
        return held.astype(jnp.int32).reshape(container.shape)
    # Shifts and masks of whole bytes, and no sub-byte types: XLA 0.10 on CPU folds a constant's bitcast to int4 wrongly.
    per_byte = 8 // container.bits
    shifts = jnp.asarray(container.bits * np.arange(per_byte), jnp.uint8)
    codes = ((held[:, None] >> shifts) & jnp.uint8(2**container.bits - 1)).astype(jnp.int32)
    codes = codes.reshape(-1)[: int(np.prod(container.shape))].reshape(container.shape)
    half = 2 ** (container.bits - 1)
    return (codes ^ half) - half if container.signed else codes


# ---- running from codes -------------------------------------------------------------------------------------------


def from_codes(model: QuantizedModel, containers: Mapping[Key, Container]) -> Handler:
    """The handler of `QuantizedModel.walk` that takes Coded.values: as `apply`, but for where the weights come from.

    A barrier before unpacking keeps XLA from working the constants out, which would hold the weights in float again.
    """

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        product = ops.contract(call.primitive, call.params, "plain")
        if value is None:
            return product(lhs, rhs), None
        container = containers.get((call.leaf, call.number)) or containers[call.leaf]
        pair = [lhs, rhs]
        kernel, x = pair[call.weight_side], pair[1 - call.weight_side]
        codes = unpacked(jax.lax.optimization_barrier(jnp.asarray(value["codes"])), container)
        decoding = jax.tree.map(jnp.asarray, value["decoding"])
        w_hat = decode(codes, decoding).astype(kernel.dtype)
        signed = model.specs[call.leaf].signed
        leaves, bits = jax.tree.map(jnp.asarray, (value["activation"], value["bits"]))
        x_hat = model.quantizer.activation.fake_quant(x, leaves, bits, signed)
        if container.floats is not None:
            slot = value["slot"]
            w_hat = jnp.where(slot >= 0, jnp.asarray(container.floats)[jnp.maximum(slot, 0)], w_hat)
            x_hat = jnp.where(slot >= 0, x, x_hat)
        pair[call.weight_side], pair[1 - call.weight_side] = w_hat, x_hat
        return product(*pair), None

    return handler
