"""What layers and policies cost, in exact integers, and the same in words. No JAX."""

from collections.abc import Callable, Sequence
from typing import Any

from mpq_jax.types import Bits, Layer, Policy, Refusal

# ---- a layer ------------------------------------------------------------------------------------------------------


def layer_bitops(layer: Layer, bits: Bits) -> int:
    """macs * w * a (LIMPQ section 3.3); with bits per output channel, the sum of macs / channels * w * a over them."""
    return times_weight_bits(layer, layer.macs, bits) * int(bits.a)


def layer_size(layer: Layer, bits: Bits) -> int:
    """Bytes of the packed kernel: ceil(params * w / 8); of bits per output channel, their sum is rounded up once."""
    return -(-layer_weight_bits(layer, bits) // 8)


def layer_weight_bits(layer: Layer, bits: Bits) -> int:
    """Bits of the kernel: params * w."""
    return times_weight_bits(layer, layer.params, bits)


def times_weight_bits(layer: Layer, count: int, bits: Bits) -> int:
    """count * w; or the sum over output channels, each having an equal share of `count` (macs or params): exact.

    Raises Refusal for a list of bits that is not one for each output channel.
    """
    # Python's integers, whatever they come as: a stack's are of 32 bits, which products of these overflow.
    if not isinstance(bits.w, Sequence) and not getattr(bits.w, "ndim", 0):
        return count * int(bits.w)
    check_channels(layer, len(bits.w))
    return count // len(bits.w) * sum(int(b) for b in bits.w)


def check_channels(layer: Layer, found: int) -> None:
    """Raises Refusal unless a list of `found` weight bits can be one for each output channel of the layer."""
    if layer.channels not in (None, found) or not found or layer.params % found or layer.macs % found:
        has = f"{layer.channels} output channels" if layer.channels else f"{layer.params} weights, {layer.macs} MACs"
        raise Refusal(
            f"layer {layer.path!r} is given weight bits for {found} output channels; it has {has}: "
            "write one number a channel, or one for all"
        )


def layer_memory(layer: Layer, bits: Bits) -> int:
    """Bytes of the layer's input and output for one sample at its activation bits: ceil((inputs + outputs) * a / 8)."""
    return -(-(elements(layer, "inputs") + elements(layer, "outputs")) * int(bits.a) // 8)


def elements(layer: Layer, name: str) -> int:
    """The layer's "inputs" or "outputs". Raises Refusal for a table that does not have them."""
    count = getattr(layer, name)
    if count is None:
        raise Refusal(
            f'layer {layer.path!r} has no "{name}" in the table, which memory and abits budgets need; add the number '
            "of elements for one sample"
        )
    return count


# ---- a policy --------------------------------------------------------------------------------------------------------


def policy_cost(cost: Callable[[Layer, Bits], Any], layers: Sequence[Layer], policy: Policy) -> Any:
    """The sum of cost(layer, bits) over all layers, fixed ones at theirs."""
    return sum(cost(layer, layer.bits if layer.bits is not None else policy[layer.path]) for layer in layers)


def bitops(layers: Sequence[Layer], policy: Policy) -> int:
    """BitOps of a policy for one sample, sum_l macs_l w_l a_l (LIMPQ section 3.3), fixed layers included.

    With weight bits per output channel, see `layer_bitops`. Raises KeyError for a searched layer that the policy lacks,
    and Refusal for a list of bits that is not one for each output channel.
    """
    return policy_cost(layer_bitops, layers, policy)


def size(layers: Sequence[Layer], policy: Policy) -> int:
    """Bytes of all packed kernels of a policy, sum_l ceil(params_l w_l / 8), fixed layers included.

    Raises as `bitops` does.
    """
    return policy_cost(layer_size, layers, policy)


def uniform_bits(layers: Sequence[Layer], w: int, a: int) -> dict[str, Bits]:
    """W{w}A{a} for every layer; what costs a policy leaves fixed layers at theirs."""
    return {layer.path: Bits(w, a) for layer in layers}


# ---- describing ---------------------------------------------------------------------------------------------------


def describe(layers: Sequence[Layer]) -> dict[str, Any]:
    """{"layers": [...], "uniform": {"W3A3": {"bitops", "size_bytes", "compression"}}} for every width from 2 to 8."""
    float_bytes = 4 * sum(layer.params for layer in layers)
    uniform = {}
    for w in range(2, 9):
        for a in range(2, 9):
            policy = uniform_bits(layers, w, a)
            bytes_ = size(layers, policy)
            uniform[f"W{w}A{a}"] = {
                "bitops": bitops(layers, policy),
                "size_bytes": bytes_,
                "compression": round(float_bytes / bytes_, 4),
            }
    return {
        "layers": [
            {"path": layer.path, "params": layer.params, "macs": layer.macs, "searched": layer.searched}
            for layer in layers
        ],
        "uniform": uniform,
    }


def describe_text(layers: Sequence[Layer]) -> str:
    """The same as a table for people: layers, then the uniform policies of equal widths."""
    width = max(len(layer.path) for layer in layers)
    lines = [f"{'layer':{width}}  {'params':>12}  {'MACs':>14}  bits"]
    for layer in layers:
        bits = "searched" if layer.bits is None else "float" if layer.bits.w > 16 else f"W{layer.bits.w}A{layer.bits.a}"
        tied = f"  (reads {layer.tied})" if layer.tied else ""
        lines.append(f"{layer.path:{width}}  {layer.params:12,}  {layer.macs:14,}  {bits}{tied}")
    macs, params = sum(layer.macs for layer in layers), sum(layer.params for layer in layers)
    lines += [f"{'all':{width}}  {params:12,}  {macs:14,}", "", "uniform   BitOps         size           compression"]
    for name, cost in describe(layers)["uniform"].items():
        w, a = name[1:].split("A")
        if w == a or name == "W3A4":
            lines.append(
                f"{name:8}  {human(cost['bitops'], 'BitOps'):13}  {human(cost['size_bytes'], 'bytes'):13}  "
                f"{cost['compression']:.2f}x"
            )
    return "\n".join(lines)


def human(value: int | float, unit: str) -> str:
    """ "55.31 G" BitOps, "1.24 MB", "3.200 ms", "3.200 bits"."""
    if unit == "bytes":
        for size_unit, factor in (("MB", 2**20), ("KB", 2**10)):
            if value >= factor:
                return f"{value / factor:.2f} {size_unit}"
        return f"{value} B"
    if unit == "BitOps":
        for prefix, factor in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("K", 10**3)):
            if value >= factor:
                return f"{value / factor:.2f} {prefix}"
        return f"{value}"
    return f"{value:.3f} {unit}"
