"""quantize(model, ...): finds the layers of an unmodified Flax model, and makes bits and step sizes its arguments.

"Leaves" are what a quantizer keeps for each layer and bit-width: step sizes for LSQ, others for other methods.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax import flax_seam, ops
from mpq_jax.codes import product_of_codes
from mpq_jax.interpret import Call, Handler, Taps
from mpq_jax.layers import (
    LayerSpec,
    check_grids,
    check_reached,
    check_widths,
    choice_of,
    discover,
    in_order,
    interpreted,
    layer_paths,
    layer_table,
    leaf_paths,
    spec_of,
)
from mpq_jax.operands import Operand, gathered, looked_up, operand_of, samples, tapped
from mpq_jax.quantizers import lsq
from mpq_jax.recompute import recomputed
from mpq_jax.rules import Candidates, Rules, check_rules, parse_value
from mpq_jax.types import (
    Apply,
    Bits,
    Calibrate,
    Layer,
    Policy,
    QuantizedModel,
    Quantizer,
    Refusal,
    Variables,
    Walk,
)


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

    Raises Refusal for a model that is neither Linen nor NNX or has no layer, for a product with a parameter that was
    not reached, for rules that match nothing, and for bit-widths that no grid has.
    """
    quantizer = quantizer or lsq()
    widths = check_widths(bit_widths, "bit_widths")
    of_activations = bit_widths if activation_bit_widths is None else activation_bit_widths
    activation_widths = check_widths(of_activations, "activation_bit_widths")
    ends = _checked_ends(ends)
    seam = flax_seam.seam(model)
    shapes = jax.eval_shape(lambda: variables) if variables is not None else seam.shapes(inputs, kwargs)

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
    specs = {leaf: spec_of(leaf, site, paths[leaf], choices, signed) for leaf, site in sites.items()}
    check_grids(specs, quantizer)
    batch = inputs[0].shape[0] if inputs and len(getattr(inputs[0], "shape", ())) else 1
    layers = layer_table(sites, specs, choices, order, batch, Candidates(widths, activation_widths), tie_activations)
    if count_products:
        layers += tuple(
            Layer(f"{where}/product{i}", 0, macs // batch, False, Bits(32, 32))
            for i, (where, macs) in enumerate(trace.products)
        )

    walk = _walk_of(seam, shapes)
    apply, calibrate = _calls(walk, specs, quantizer)
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


def _checked_ends(ends: Any) -> Bits | None:
    if ends is None:
        return None
    found = parse_value(ends)
    if not isinstance(found, Bits):
        raise Refusal(f"ends is {ends!r}; give the bits of the first and the last layer, e.g. Bits(8, 8), or None")
    return Bits(
        *(
            check_widths((bits,), f"ends: {kind} bits")[0]
            for kind, bits in (("weight", found.w), ("activation", found.a))
        )
    )


# ---- applying -----------------------------------------------------------------------------------------------------


def _walk_of(seam: flax_seam.Seam, shapes: Variables) -> Walk:
    """The model's `QuantizedModel.walk`. shapes: of the float model's own variables."""
    own = {path: leaf.shape for path, leaf in flax_seam.flatten(shapes["params"]).items()}

    def walk(
        variables: Variables,
        values: Mapping[Any, Any],
        handler: Handler,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        mutable: flax_seam.Mutable = False,
        rngs: flax_seam.Rngs = None,
    ) -> tuple[Any, Variables, Taps]:
        return interpreted(seam, _only(variables, own), values, handler, inputs, kwargs, mutable, rngs)[:3]

    return walk


def _calls(walk: Walk, specs: Mapping[str, LayerSpec], quantizer: Quantizer) -> tuple[Apply, Calibrate]:
    """The model's `QuantizedModel.apply` and `QuantizedModel.calibrate`."""

    def apply(
        variables: Variables,
        policy: Policy | None,
        *inputs: Any,
        mutable: flax_seam.Mutable = False,
        rngs: flax_seam.Rngs = None,
        kernels: ops.Kernels = "rows",
        terms: Sequence[str] = (),
        float_bits: bool = False,
        exact: bool = False,
        recompute: bool = False,
        **kwargs: Any,
    ) -> Any:
        values = {} if policy is None else layer_values(specs, quantizer, variables, policy, float_bits)
        handler = _quantizing(specs, quantizer, kernels, terms, float_bits, exact, recompute)
        outputs, updates, taps = walk(variables, values, handler, inputs, kwargs, mutable, rngs)
        result: tuple[Any, ...] = (outputs, updates) if mutable else (outputs,)
        if terms:
            result += ({term: gathered(term, specs, quantizer, taps) for term in terms},)
        return result if len(result) > 1 else outputs

    def calibrate(variables: Variables, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        _, _, taps = walk(variables, {}, _calibrating(specs, quantizer), inputs, kwargs)
        return _with_leaves(specs, quantizer, variables, taps)

    return apply, calibrate


def _only(variables: Variables, own: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The variables as the user's model knows them: without the quantizer's leaves. own: {path: shape} of its parameters."""
    params = {path: leaf for path, leaf in flax_seam.flatten(variables["params"]).items() if path in own}
    if missing := set(own) - set(params):
        raise Refusal(f"the variables lack parameter {min(missing)!r}: they belong to another model")
    if other := [path for path, leaf in params.items() if jnp.shape(leaf) != own[path]]:
        raise Refusal(
            f"parameter {other[0]!r} has shape {jnp.shape(params[other[0]])}, the model's has {own[other[0]]}: the variables "
            "belong to another model"
        )
    return {**variables, "params": flax_seam.unflatten(params)}


def learned_leaves(
    specs: Mapping[str, LayerSpec], quantizer: Quantizer, variables: Variables
) -> dict[str, dict[str, Any]]:
    """leaf -> {"weight": {name: [*stack, K, ...]}, "activation": ...}, of the leaves that are not all in float.

    What `QuantizedModel.walk` takes as values, for handlers that put something else in the place of a layer.
    Raises Refusal where a layer has none yet.
    """
    flat = flax_seam.flatten(variables["params"])
    values = {}
    for leaf, spec in specs.items():
        if all(spec.in_float):
            continue
        chosen: dict[str, Any] = {}
        for kind in spec.names:
            paths = leaf_paths(spec, quantizer, kind)
            if missing := [path for path in paths.values() if path not in flat]:
                raise Refusal(
                    f"layer {spec.paths[0]!r} has no {missing[0]!r}, which {quantizer.name} needs; "
                    "call calibrate(variables, batch) first"
                )
            chosen[kind] = {name: flat[path] for name, path in paths.items()}
            count = len(spec.widths(kind))
            if other := [path for path in paths.values() if jnp.shape(flat[path])[len(spec.stack) :][:1] != (count,)]:
                raise Refusal(
                    f"{other[0]!r} has shape {jnp.shape(flat[other[0]])}, and layer {spec.paths[0]!r} has {count} widths: the "
                    "variables were calibrated for others; calibrate them again"
                )
        values[leaf] = chosen
    return values


def layer_values(
    specs: Mapping[str, LayerSpec],
    quantizer: Quantizer,
    variables: Variables,
    policy: Policy,
    float_bits: bool = False,
) -> dict[str, Any]:
    """`learned_leaves`, and what `operands.looked_up` adds for a policy: what `operands.operand_of` takes a layer's of."""
    leaves = learned_leaves(specs, quantizer, variables)
    known = {path for spec in specs.values() for path in spec.paths}
    # Products of two activations are in layer tables (count_products), and have no spec.
    if unknown := [path for path in policy if path not in known and not re.search(r"/product\d+$", path)]:
        raise Refusal(
            f"the policy names layer {unknown[0]!r}, which this model does not have: it belongs to another model"
        )
    bits = {leaf: _stack_bits(specs[leaf], policy) for leaf in leaves}
    return looked_up(specs, leaves, bits, float_bits)


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
    a = [jnp.asarray(b.a, jnp.int32) for b in each]
    if not spec.stack:
        return Bits(w[0], a[0])
    return Bits(jnp.stack(w).reshape(*spec.stack, *w[0].shape), jnp.stack(a).reshape(spec.stack))


def _quantizing(
    specs: Mapping[str, LayerSpec],
    quantizer: Quantizer,
    kernels: ops.Kernels,
    terms: Sequence[str],
    float_bits: bool = False,
    exact: bool = False,
    recompute: bool = False,
) -> Handler:
    """The handler of `apply`: both operands on their grids, then the product; taps the terms that are asked for.

    float_bits: bits above MAX_BITS leave an operand in float, in layers that no rule left in float too. For
    evaluation: the gradient of an operand that was left so is not defined.
    exact: the product is one of integer codes in float32, multiplied by the two scales after it, as integer arithmetic
    does it: the same sums in any order, as long as they stay below 2^24. For evaluation.
    recompute: the backward pass keeps the operands as they are before their quantizers, and none on its grid.
    """

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, value: Any) -> tuple[jax.Array, Any]:
        spec = specs[call.leaf]
        product = ops.contract(call.primitive, call.params, kernels)
        if value is None:  # left in float by a rule, or the whole model run in float
            return product(lhs, rhs), None

        def operands_of(sides: tuple[jax.Array, jax.Array], value: Any) -> dict[str, Operand]:
            x = {"weight": sides[call.weight_side], "activation": sides[1 - call.weight_side]}
            return {kind: operand_of(call, spec, quantizer, kind, x[kind], value, float_bits) for kind in x}

        def product_of(weight: jax.Array, activation: jax.Array) -> jax.Array:
            return product(weight, activation) if call.weight_side == 0 else product(activation, weight)

        def product_on_grids(operands: Mapping[str, Operand]) -> jax.Array:
            return product_of(operands["weight"].on_grid(), operands["activation"].on_grid())

        operands = operands_of((lhs, rhs), value)
        if exact and all(each.in_float is None for each in operands.values()):
            encoded = (operands["weight"].encoded(), operands["activation"].encoded())
            at = (call.primitive, call.params, call.weight_side, call.channel_axes)
            # As the product itself would give it, of a model that computes in bfloat16 too.
            dtype = jax.eval_shape(product, lhs, rhs).dtype
            return product_of_codes(*at, *encoded, spec.paths[0]).astype(dtype), None
        together = "error" in terms and not recompute
        tap = {term: tapped(term, operands, value) for term in terms if not (together and term == "error")}
        if together:
            each = {kind: x.on_grid_with_error(samples(kind, x)) for kind, x in operands.items()}
            (weight, of_weight), (activation, of_activation) = each["weight"], each["activation"]
            return product_of(weight, activation), tap | {"error": of_weight + of_activation}
        if not recompute:
            return product_on_grids(operands), tap or None
        moving = {name: part for name, part in value.items() if name != "bits"}
        run = recomputed(lambda moving, bits: product_on_grids(operands_of(moving[0], moving[1] | {"bits": bits})))
        return run(((lhs, rhs), moving), value["bits"]), tap or None

    return handler


# ---- calibrating --------------------------------------------------------------------------------------------------


def _calibrating(specs: Mapping[str, LayerSpec], quantizer: Quantizer) -> Handler:
    """The handler of `calibrate`: the float product, tapping each tensor's start values."""

    def handler(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, Any]:
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


def _with_leaves(
    specs: Mapping[str, LayerSpec], quantizer: Quantizer, variables: Variables, taps: Taps
) -> dict[str, Any]:
    """The variables with the tapped start values beside their parameters; several calls of a layer are averaged.

    Raises Refusal for start values an output channel where the calls of one weight have other channels each.
    """
    flat = flax_seam.flatten(variables["params"])
    for leaf, spec in specs.items():
        calls = [tap for (tapped, _), tap in taps.items() if tapped == leaf]
        for kind in spec.names if calls else ():
            for name, path in leaf_paths(spec, quantizer, kind).items():
                each = [call[kind][name].mean(axis=spec.shared) if spec.shared else call[kind][name] for call in calls]
                if len({value.shape for value in each}) > 1:
                    raise Refusal(
                        f"the {kind} of layer {spec.paths[0]!r} is used in several products with output channels of "
                        f"their own ({', '.join(str(value.shape[-1]) for value in each)}), so that it has no {name} a "
                        "channel; take a quantizer with one for all (per_channel=False), or leave the layer in float by a rule"
                    )
                flat[path] = sum(each) / len(each)
    return {**variables, "params": flax_seam.unflatten(flat)}
