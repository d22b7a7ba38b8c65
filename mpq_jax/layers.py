"""Finding the layers of a model: one abstract trace tells which products meet a parameter, their shapes and MACs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from mpq_jax import flax_seam, ops
from mpq_jax.interpret import Call, Handler, Taps, Trace, interpret
from mpq_jax.rules import Candidates, Rules, RuleValue, first_match, parse_value
from mpq_jax.types import Bits, Layer, Quantizer, Refusal, TensorQuantizer, Variables

MAX_BITS = 16  # float32 holds every code and every product of a code and a step size up to here


class LayerSpec(NamedTuple):
    """What applying needs to know of the layers that one parameter leaf holds (one, or a scanned stack of N).

    leaf: path of the parameter, e.g. "block1/conv1/kernel".
    names: {"weight": prefix, "activation": prefix} of the quantizer's leaves beside it, full paths.
    paths: layer paths, N of them in stack order.
    stack: lengths of the scans that slice the leaf; () where there is no stack.
    shared: positions, among all surrounding scans, of those that run the same layer again.
    weight_bit_widths, activation_bit_widths: widths that leaves are kept for (K of them).
    signed: whether the activations can be negative.
    in_float: per path, whether it is left in float.
    kind: "dense", "conv" or "depthwise".
    channels: output channels of one layer; None where the calls of the leaf disagree on which axes they are.
    """

    leaf: str
    names: Mapping[str, str]
    paths: tuple[str, ...]
    stack: tuple[int, ...]
    shared: tuple[int, ...]
    weight_bit_widths: tuple[int, ...]
    activation_bit_widths: tuple[int, ...]
    signed: bool
    in_float: tuple[bool, ...]
    kind: str
    channels: int | None

    def widths(self, kind: str) -> tuple[int, ...]:
        """Those of "weight" or of "activation"."""
        return self.weight_bit_widths if kind == "weight" else self.activation_bit_widths


def leaf_paths(spec: LayerSpec, quantizer: Quantizer, kind: str, which: str = "all") -> dict[str, str]:
    """{leaf name: its path in the parameter tree} of a layer's quantizer leaves.

    kind: "weight" or "activation". which: "leaves" (trained by gradients), "state" (not), or "all". Empty for a layer
    that is left in float.
    """
    if all(spec.in_float):
        return {}
    tensor: TensorQuantizer = getattr(quantizer, kind)
    names = (*tensor.leaves, *tensor.state) if which == "all" else getattr(tensor, which)
    return {name: spec.names[kind] + name for name in names}


class Site(NamedTuple):
    """What one trace tells of a leaf: its calls, and the shapes of their operands.

    weight: of the first call; weights: the shapes of all, for each call one. inputs, outputs: elements of the call that has
    the most.
    """

    calls: list[Call]
    weight: jax.ShapeDtypeStruct
    weights: list[tuple[int, ...]]
    inputs: int
    outputs: int


def check_widths(widths: Sequence[int], what: str) -> tuple[int, ...]:
    """The widths in ascending order. Raises Refusal, naming `what`, unless they are distinct integers from 2 to 16."""
    given, widths = tuple(widths), tuple(int(b) for b in widths)
    if given != widths or not widths or len(set(widths)) < len(widths) or not all(2 <= b <= MAX_BITS for b in widths):
        raise Refusal(f"{what} {given} must be distinct integers from 2 to {MAX_BITS}, e.g. (2, 3, 4, 5, 6)")
    return tuple(sorted(widths))


def check_grids(specs: Mapping[str, LayerSpec], quantizer: Quantizer) -> None:
    """Raises Refusal for a layer with bit-widths that the quantizer has no grid for."""
    for spec in specs.values():
        widest = max((*spec.weight_bit_widths, *spec.activation_bit_widths), default=0)
        if widest > quantizer.max_bits:
            raise Refusal(
                f"layer {spec.paths[0]!r} may get {widest} bits, {quantizer.name} has grids of up to "
                f"{quantizer.max_bits}; give it fewer, or choose another quantizer, e.g. --quantizer lsq"
            )


def interpreted(
    seam: flax_seam.Seam,
    variables: Variables,
    values: Mapping[Any, Any],
    handler: Handler,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    mutable: flax_seam.Mutable,
    rngs: flax_seam.Rngs,
) -> tuple[Any, Variables, Taps, Trace]:
    """Traces the model's call and interprets the jaxpr with the handler. -> (outputs, updates, taps, Trace)

    variables: the model's own, without a quantizer's leaves. values: what the handler gets, see `interpret.interpret`.
    """
    arrays, rebuild = flax_seam.split_arrays((variables, tuple(inputs), dict(kwargs), rngs))

    def call(arrays: Sequence[Any]) -> tuple[Any, Variables]:
        variables, inputs, kwargs, rngs = rebuild(arrays)
        return seam.run(variables, inputs, kwargs, mutable, rngs)

    jaxpr, shape = jax.make_jaxpr(call, return_shape=True)(arrays)
    # Parameters come first among the arrays, under the paths they have in the tree.
    marked = {
        collection: (flax_seam.unflatten({p: p for p in flax_seam.flatten(tree)}) if collection == "params" else tree)
        for collection, tree in variables.items()
    }
    own = [leaf if isinstance(leaf, str) else "" for leaf in jax.tree.leaves(marked)]
    leaves = [*own, *[None] * (len(arrays) - len(own))]
    flat, taps, trace = interpret(jaxpr, arrays, leaves, values, handler)
    outputs, updates = jax.tree.unflatten(jax.tree.structure(shape), flat)
    return outputs, updates, taps, trace


def discover(
    seam: flax_seam.Seam, shapes: Variables, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Site], Trace]:
    """One abstract walk: leaf -> Site, in execution order. Raises Refusal for a model without any layer."""
    calls: dict[tuple[str, int], tuple[Call, Any, int, int]] = {}
    traces = []

    def record(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, None]:
        operands = (lhs, rhs)
        weight, activation = operands[call.weight_side], operands[1 - call.weight_side]
        out = ops.contract(call.primitive, call.params, "plain")(lhs, rhs)
        calls[call.leaf, call.number] = (
            call,
            jax.ShapeDtypeStruct(weight.shape, weight.dtype),
            activation.size,
            out.size,
        )
        return out, None

    arrays, rebuild = flax_seam.split_arrays((shapes, tuple(inputs), dict(kwargs)))

    def trace(arrays: Sequence[Any]) -> Any:
        variables, inputs, kwargs = rebuild(arrays)
        outputs, _, _, trace = interpreted(seam, variables, {}, record, inputs, kwargs, False, None)
        traces.append(trace)
        return outputs

    jax.eval_shape(trace, arrays)
    sites: dict[str, Site] = {}
    for (leaf, _), (call, weight, n_in, n_out) in calls.items():
        if leaf in sites:
            site = sites[leaf]
            site.calls.append(call)
            site.weights.append(weight.shape)
            if n_in + n_out > site.inputs + site.outputs:
                sites[leaf] = site._replace(inputs=n_in, outputs=n_out)
        else:
            sites[leaf] = Site([call], weight, [weight.shape], n_in, n_out)
    if not sites:
        raise Refusal("the model has no product of data with a parameter: there is nothing to quantize")
    return sites, traces[-1]


def in_order(sites: Mapping[str, Site], paths: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(leaf, position in its stack) of every layer in execution order: a stack's first iteration before its second."""
    # Neighbouring leaves under the same scans form one stack.
    groups = itertools.groupby(sites, key=lambda leaf: (sites[leaf].calls[0].scans, sites[leaf].calls[0].stack))
    order = []
    for _, group in groups:
        leaves = list(group)
        order += [(leaf, i) for i in range(len(paths[leaves[0]])) for leaf in leaves]
    return order


def check_reached(trace: Trace, rules: Rules) -> None:
    """Raises Refusal for a product with a parameter that the walk could not reach and no rule leaves in float."""
    for where, primitive, leaves in trace.unreached:
        if not all(parse_value(first_match(rules, leaf) or (2, 2)) == "float" for leaf in leaves):
            raise Refusal(
                f"a product with parameter {leaves[0]!r} lies inside a {primitive} (at {where}) and cannot be quantized; "
                f'leave it in float with the rule ("{leaves[0]}", "float"), or pass allow_unreached=True'
            )


def layer_paths(sites: Mapping[str, Site]) -> dict[str, tuple[str, ...]]:
    """leaf -> layer paths: the module's path, or the leaf's where a module has several; "[i]" within a stack."""
    modules = [leaf.rpartition("/")[0] for leaf in sites]
    result = {}
    for leaf, site in sites.items():
        module = leaf.rpartition("/")[0]
        base = module if module and modules.count(module) == 1 else leaf
        result[leaf] = tuple(base + index for index in _stack_indices(_stack_lengths(site.calls[0])))
    return result


def _stack_lengths(call: Call) -> tuple[int, ...]:
    return tuple(call.scans[depth] for depth in call.stack)


def _stack_indices(stack: tuple[int, ...]) -> list[str]:
    indices = [""]
    for length in stack:
        indices = [f"{prefix}[{i}]" for prefix in indices for i in range(length)]
    return indices


def choice_of(path: str, paths: Sequence[str], rules: Rules, ends: Bits | None, default: Candidates) -> RuleValue:
    """What the layer at `path` may be given: by the first rule that matches, as an end of `paths`, or by default.

    Raises Refusal for a rule whose value is not known, or whose bits no grid has.
    """
    value = first_match(rules, path)
    if value is None:
        return ends if ends is not None and path in (paths[0], paths[-1]) else default
    value = parse_value(value)
    if isinstance(value, Candidates):
        return Candidates(
            check_widths(value.w, f"rule for {path}: weight bits"),
            check_widths(value.a, f"rule for {path}: activation bits"),
        )
    if isinstance(value, Bits):
        check_widths((value.w,), f"rule for {path}: weight bits")
        check_widths((value.a,), f"rule for {path}: activation bits")
    return value


def spec_of(
    leaf: str,
    site: Site,
    paths: tuple[str, ...],
    choices: Mapping[str, RuleValue],
    signed: Sequence[tuple[str, bool]],
) -> LayerSpec:
    """The spec of a leaf. paths: of its layers. choices: path -> what each layer may be given.

    signed: ordered (regex, bool) over paths, in place of what tracing found.
    """
    call = site.calls[0]
    weight_widths: set[int] = set()
    activation_widths: set[int] = set()
    for path in paths:
        choice = choices[path]
        if not isinstance(choice, str):
            w, a = choice if isinstance(choice, Candidates) else ((choice.w,), (choice.a,))
            weight_widths |= set(w)
            activation_widths |= set(a)
    module, _, name = leaf.rpartition("/")
    prefix = f"{module}/" if module else ""
    own = "" if paths[0].split("[")[0] == module else f"{name}_"
    override = next((v for v in (first_match(signed, p) for p in paths) if v is not None), None)
    return LayerSpec(
        leaf=leaf,
        names={"weight": f"{prefix}{own}weight_", "activation": f"{prefix}{own}activation_"},
        paths=paths,
        stack=_stack_lengths(call),
        shared=tuple(d for d in range(len(call.scans)) if d not in call.stack),
        weight_bit_widths=tuple(sorted(weight_widths)),
        activation_bit_widths=tuple(sorted(activation_widths)),
        signed=override if override is not None else not all(c.activation.nonnegative for c in site.calls),
        in_float=tuple(choices[path] == "float" for path in paths),
        kind=_kind(call, site.weight),
        channels=_channels(site),
    )


def _channels(site: Site) -> int | None:
    # A transposed weight has its channels on the same axis, but others.
    places = {(call.channel_axes, shape) for call, shape in zip(site.calls, site.weights, strict=True)}
    return math.prod(site.weight.shape[i] for i in site.calls[0].channel_axes) if len(places) == 1 else None


def _kind(call: Call, weight: jax.ShapeDtypeStruct) -> str:
    if call.primitive == "dot_general":
        return "dense"
    groups = call.params["feature_group_count"]
    per_group = weight.shape[call.params["dimension_numbers"].rhs_spec[1]]
    return "depthwise" if groups > 1 and per_group == 1 else "conv"


def layer_table(
    sites: Mapping[str, Site],
    specs: Mapping[str, LayerSpec],
    choices: Mapping[str, RuleValue],
    order: Sequence[tuple[str, int]],
    batch: int,
    default: Candidates,
    tie: bool,
) -> tuple[Layer, ...]:
    """The layer table in `order` (of `in_order`), its counts those of one sample of the `batch` that was traced.

    default: the candidates of a layer that no rule narrowed. tie: whether readers of one tensor get one `tied` name.
    """
    readers: dict[int, list[str]] = {}
    for leaf, site in sites.items():
        for call in site.calls:
            group = readers.setdefault(call.activation.tensor, [])
            if leaf not in group:
                group.append(leaf)
    tied = {
        leaf: specs[group[0]].paths[0].split("[")[0] + "/in"
        for group in readers.values()
        if len(group) > 1
        for leaf in group
    }
    layers = []
    for leaf, i in order:
        spec, site, path = specs[leaf], sites[leaf], specs[leaf].paths[i]
        choice, macs = choices[path], sum(c.macs * math.prod(c.scans) for c in site.calls) // len(spec.paths) // batch
        params, channels = math.prod(site.weight.shape), spec.channels
        searched = isinstance(choice, Candidates)
        layers.append(
            Layer(
                path=path,
                params=params,
                macs=macs,
                searched=searched,
                bits=None if isinstance(choice, Candidates) else Bits(32, 32) if isinstance(choice, str) else choice,
                tied=tied[leaf] + _stack_indices(spec.stack)[i] if tie and searched and leaf in tied else None,
                inputs=site.inputs // batch,
                outputs=site.outputs // batch,
                weight_bit_widths=choice.w if isinstance(choice, Candidates) and choice.w != default.w else None,
                activation_bit_widths=choice.a if isinstance(choice, Candidates) and choice.a != default.a else None,
                channels=None if channels is None or params % channels or macs % channels else channels,
            )
        )
    return tuple(layers)
