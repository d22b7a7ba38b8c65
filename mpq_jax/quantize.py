"""quantize(model, ...): finds the layers of an unmodified Flax model, and makes bits and step sizes its arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax import flax_seam, ops
from mpq_jax.interpret import Call
from mpq_jax.layers import (
    MAX_BITS,
    LayerSpec,
    check_reached,
    check_widths,
    choice_of,
    discover,
    in_order,
    interpreted,
    layer_paths,
    layer_table,
    spec_of,
)
from mpq_jax.mixture import mixture, one_hot
from mpq_jax.numerics import at_bits, wide
from mpq_jax.quantizers import lsq
from mpq_jax.rules import Candidates, Rules, check_rules
from mpq_jax.types import Bits, Layer, Policy, QuantizedModel, Quantizer, Refusal


def quantize(
    model: Any,
    *inputs: Any,
    bit_widths: Sequence[int] = (2, 3, 4, 5, 6),
    activation_bit_widths: Sequence[int] | None = None,
    quantizer: Quantizer | None = None,
    rules: Rules = (),
    ends: Bits | None = Bits(8, 8),
    tie_activations: bool = True,
    signed: Sequence[tuple[str, bool]] = (),
    count_products: bool = False,
    allow_unreached: bool = False,
    variables: Any = None,
    **kwargs: Any,
) -> QuantizedModel:
    """Finds every layer of a Linen or NNX model by tracing it, and returns it with bits and step sizes as arguments.

    inputs, kwargs: an example call, arrays or jax.ShapeDtypeStruct; costs are counted for one sample, the leading
        axis of the first input being the batch.
    bit_widths: candidates for weights, and for activations unless `activation_bit_widths` is given.
    quantizer: the method; `lsq()` by default.
    rules: ordered (regex over layer paths, value); see `rules.parse_value`. The first that matches wins.
    ends: bits of the first and the last layer in execution order, where no rule speaks of them; None: as any other.
    tie_activations: layers that read the same tensor get the same `tied` name, hence the same activation bits.
    signed: ordered (regex, bool) in place of what tracing finds (unsigned where the input is provably >= 0).
    count_products: products of two activations enter the layer table as layers in float, so that costs hold them.
    allow_unreached: leaves in float, without an error, what no rule excludes and tracing cannot reach.
    variables: the model's variables, or their shapes, where `model.init` should not be asked.

    Raises Refusal for a product with a parameter that was not reached, for rules that match nothing, and for
    bit-widths that no grid has.
    """
    quantizer = quantizer or lsq()
    widths = check_widths(bit_widths, "bit_widths")
    activation_widths = check_widths(activation_bit_widths or bit_widths, "activation_bit_widths")
    seam = flax_seam.seam(model)
    shapes = jax.eval_shape(lambda: variables) if variables is not None else seam.shapes(inputs, kwargs)
    float_paths = frozenset(flax_seam.flatten(shapes["params"]))

    def walk(variables, values, handler, inputs, kwargs, mutable=False, rngs=None):
        return interpreted(seam, _only(variables, float_paths), values, handler, inputs, kwargs, mutable, rngs)[:3]

    sites, trace = discover(seam, shapes, inputs, kwargs)
    paths = layer_paths(sites)
    order = in_order(sites, paths)
    every_path = [paths[leaf][i] for leaf, i in order]
    check_rules(rules, every_path + [leaf for _, _, leaves in trace.unreached for leaf in leaves])
    check_rules(signed, every_path, "signed rule")
    if not allow_unreached:
        check_reached(trace, rules)
    choices = {
        path: choice_of(path, every_path, rules, ends, Candidates(widths, activation_widths)) for path in every_path
    }
    specs = {leaf: spec_of(leaf, site, paths[leaf], choices, signed, quantizer) for leaf, site in sites.items()}
    batch = inputs[0].shape[0] if inputs and len(getattr(inputs[0], "shape", ())) else 1
    layers = layer_table(sites, specs, choices, order, batch, Candidates(widths, activation_widths), tie_activations)
    if count_products:
        layers += tuple(
            Layer(f"{where}/product{i}", 0, macs // batch, False, Bits(32, 32))
            for i, (where, macs) in enumerate(trace.products)
        )

    def apply(
        variables,
        policy,
        *inputs,
        mutable=False,
        rngs=None,
        kernels: ops.Kernels = "rows",
        with_error=False,
        float_bits=False,
        **kwargs,
    ):
        values = {} if policy is None else _values(specs, variables, policy)
        handler = _quantizing(specs, quantizer, kernels, with_error, float_bits)
        outputs, updates, taps = walk(variables, values, handler, inputs, kwargs, mutable, rngs)
        result = (outputs, updates) if mutable else (outputs,)
        if with_error:
            result += (sum(_error_of(specs[leaf], tap) for (leaf, _), tap in taps.items()),)
        return result if len(result) > 1 else outputs

    def calibrate(variables, *inputs, **kwargs):
        _, _, taps = walk(variables, {}, _calibrating(specs, quantizer), inputs, kwargs)
        return _with_leaves(specs, variables, taps)

    return QuantizedModel(
        layers=layers,
        specs=specs,
        products=tuple((where, macs // batch) for where, macs in trace.products),
        bit_widths=widths,
        activation_bit_widths=activation_widths,
        quantizer=quantizer,
        variables=seam.variables,
        apply=apply,
        calibrate=calibrate,
        walk=walk,
    )


# ---- applying -----------------------------------------------------------------------------------------------------


def _only(variables: Mapping[str, Any], float_paths: frozenset[str]) -> dict[str, Any]:
    """The variables as the user's model knows them: without the quantizer's leaves."""
    params = {path: leaf for path, leaf in flax_seam.flatten(variables["params"]).items() if path in float_paths}
    if missing := float_paths - set(params):
        raise Refusal(f"the variables lack parameter {min(missing)!r}: they belong to another model")
    return {**variables, "params": flax_seam.unflatten(params)}


def learned_leaves(specs: Mapping[str, LayerSpec], variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """leaf -> {"weight": {name: [*stack, K, ...]}, "activation": ...}, of the leaves that are not all in float.

    What `QuantizedModel.walk` takes as values, for handlers that put something else in the place of a layer.
    Raises Refusal where a layer has none yet.
    """
    flat = flax_seam.flatten(variables["params"])
    values = {}
    for leaf, spec in specs.items():
        if all(spec.in_float):
            continue
        chosen = {
            kind: {path[len(name) :]: leaf for path, leaf in flat.items() if path.startswith(name)}
            for kind, name in spec.names.items()
        }
        if not all(chosen.values()):
            raise Refusal(f"layer {spec.paths[0]!r} has no step sizes yet; call calibrate(variables, batch) first")
        values[leaf] = chosen
    return values


def _values(specs: Mapping[str, LayerSpec], variables: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
    """The quantizer's leaves and, beside them, "bits": Bits([*stack], [*stack])."""
    values = learned_leaves(specs, variables)
    return {leaf: value | {"bits": _stack_bits(specs[leaf], policy)} for leaf, value in values.items()}


def _stack_bits(spec: LayerSpec, policy: Policy) -> Bits:
    def bits_of(path: str, in_float: bool) -> Bits:
        if in_float:
            return Bits(32, 32)
        if path not in policy:
            raise Refusal(f"the policy has no bits for layer {path!r}; it belongs to another model")
        return policy[path]

    each = [bits_of(path, f) for path, f in zip(spec.paths, spec.in_float, strict=True)]
    w = jnp.broadcast_arrays(*(jnp.asarray(b.w, jnp.int32) for b in each))
    if w[0].ndim and w[0].shape != (spec.channels,):
        has = spec.channels or "no one number of"
        raise Refusal(
            f"layer {spec.paths[0]!r} has {has} output channels, and the policy gives its weights bits of shape "
            f"{w[0].shape}; give one number a channel, or one for all"
        )
    a = jnp.stack([jnp.asarray(b.a, jnp.int32) for b in each])
    return Bits(jnp.stack(w).reshape(*spec.stack, *w[0].shape), a.reshape(spec.stack))


def _broadcast(value: jax.Array, weight: jax.Array, channel_axes: Sequence[int]) -> jax.Array:
    """[] stays; [C], one entry an output channel, takes the weight operand's rank."""
    if value.ndim == 0:
        return value
    return value.reshape([n if i in channel_axes else 1 for i, n in enumerate(weight.shape)])


# (tensor, bits) -> the tensor on its grid
Grid = Callable[[jax.Array, Any], jax.Array]


def grids(
    spec: LayerSpec, quantizer: Quantizer, call: Call, weight: jax.Array, value: Mapping[str, Any]
) -> tuple[Grid, Grid]:
    """The grids of one layer's weight operand and of its activations, as functions (x, bits) -> x_hat. Bits of
    weights are [], or [C], one for each output channel.

    value: the layer's entry of `learned_leaves`, the part of its own place in the stack.
    """

    def place(leaf):
        return _broadcast(leaf, weight, call.channel_axes)

    def weight_grid(x, bits):
        if jnp.ndim(bits):
            return _by_channel(quantizer, spec, value["weight"], x, bits, place)
        at = {k: place(at_bits(v, spec.weight_bit_widths, bits)) for k, v in value["weight"].items()}
        return quantizer.weight.fake_quant(x, values=at, bits=bits, signed=True)

    def activation_grid(x, bits):
        at = {k: at_bits(v, spec.activation_bit_widths, bits) for k, v in value["activation"].items()}
        return quantizer.activation.fake_quant(x, values=at, bits=bits, signed=spec.signed)

    return weight_grid, activation_grid


def _by_channel(quantizer: Quantizer, spec: LayerSpec, leaves, x: jax.Array, bits: jax.Array, place) -> jax.Array:
    """A weight with bits [C], each output channel on a grid of its own.

    Every width's grid is made of the whole tensor, and each channel takes its own: for any quantizer the same values,
    and gradients, as the whole layer at that width.
    """
    widths = spec.weight_bit_widths
    shares = jax.vmap(place)(one_hot(bits, widths))
    on_grids = mixture(quantizer.weight, x, leaves, widths, shares, True, place)
    return jnp.where(shares.any(0), on_grids, jnp.nan)  # as in at_bits


def _relative_error(on_grid: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """mean (x_hat - x)^2 / mean x^2, []. Its gradient reaches the step size only."""
    x = wide(jax.lax.stop_gradient(x))
    power = jnp.square(x).mean()
    return jnp.square(on_grid(x) - x).mean() / jnp.where(power > 0, power, 1)


def _error_of(spec: LayerSpec, tap: jax.Array) -> jax.Array:
    """Sum over the layers of a stack, mean over repeated runs of the same layer. []"""
    return tap.mean(axis=spec.shared).sum() if spec.shared else tap.sum()


def _quantizing(
    specs: Mapping[str, LayerSpec],
    quantizer: Quantizer,
    kernels: ops.Kernels,
    with_error: bool,
    float_bits: bool = False,
) -> Callable[..., Any]:
    """The handler of `apply`: both operands on their grids, then the product; taps their relative errors if asked.

    float_bits: bits above MAX_BITS leave an operand in float, in layers that no rule left in float too. For
    evaluation: the gradient of an operand that was left so is not defined.
    """

    def handler(call: Call, lhs, rhs, value):
        spec = specs[call.leaf]
        product = ops.contract(call.primitive, call.params, kernels)
        if value is None:  # left in float by a rule, or the whole model run in float
            return product(lhs, rhs), None
        operands = [lhs, rhs]
        bits: Bits = value["bits"]
        weight, activation = operands[call.weight_side], operands[1 - call.weight_side]
        weight_grid, activation_grid = grids(spec, quantizer, call, weight, value)
        w_hat, a_hat = weight_grid(weight, bits.w), activation_grid(activation, bits.a)
        if float_bits or any(spec.in_float):
            in_float = _broadcast(bits.w > MAX_BITS, weight, call.channel_axes)
            w_hat, a_hat = jnp.where(in_float, weight, w_hat), jnp.where(bits.a > MAX_BITS, activation, a_hat)
        operands[call.weight_side], operands[1 - call.weight_side] = w_hat, a_hat
        if not with_error:
            return product(*operands), None
        # An eighth of the batch is enough to tell an activation's error.
        sample = activation[: max(1, activation.shape[0] // 8)]
        error = _relative_error(lambda x: weight_grid(x, bits.w), weight)
        return product(*operands), error + _relative_error(lambda x: activation_grid(x, bits.a), sample)

    return handler


def _calibrating(specs: Mapping[str, LayerSpec], quantizer: Quantizer) -> Callable[..., Any]:
    """The handler of `calibrate`: the float product, tapping each tensor's start values."""

    def handler(call: Call, lhs, rhs, _):
        spec = specs[call.leaf]
        out = ops.contract(call.primitive, call.params, "plain")(lhs, rhs)
        if all(spec.in_float):
            return out, None
        operands = (lhs, rhs)
        weight, activation = operands[call.weight_side], operands[1 - call.weight_side]
        return out, {
            "weight": quantizer.weight.init(weight, spec.weight_bit_widths, True, call.channel_axes),
            "activation": quantizer.activation.init(activation, spec.activation_bit_widths, spec.signed, ()),
        }

    return handler


def _with_leaves(specs: Mapping[str, LayerSpec], variables: Mapping[str, Any], taps: Mapping[Any, Any]) -> Any:
    """The variables with the tapped start values beside their parameters; several calls of a layer are averaged."""
    flat = flax_seam.flatten(variables["params"])
    for leaf, spec in specs.items():
        calls = [tap for (tapped, _), tap in taps.items() if tapped == leaf]
        for kind, name in spec.names.items():
            for value in calls[0][kind] if calls else ():
                each = [
                    call[kind][value].mean(axis=spec.shared) if spec.shared else call[kind][value] for call in calls
                ]
                flat[name + value] = sum(each) / len(each)
    return {**variables, "params": flax_seam.unflatten(flat)}
