"""The values that pass between the stages: data, no logic, no JAX.

Letters in shapes, here and in every docstring: L layers, K bit-widths (Kw for weights, Ka for activations where they
differ), P rows, B batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # annotations only: search, too, reads this file
    import jax


class Refusal(Exception):
    """A request that cannot be carried out.

    Its one line says what was found, what is possible, and what to type. The commands print it and exit with code 2.
    """


class Bits(NamedTuple):
    """Bit-widths of one layer: `w` of its weights, `a` of the activations it reads.

    Plain integers in a policy that is saved or searched for; int32 arrays ([] for one policy, [P] for a stack) where a
    policy is traced: bits are data, never a reason to compile again. `w` may be a tuple of integers, one for each
    output channel ([C], [P, C] where traced): one compilation for all such policies, too.
    """

    w: Any
    a: Any


# Layer path -> Bits. A pytree, so it can be stacked, mapped and traced.
Policy = Mapping[str, Bits]


class Layer(NamedTuple):
    """One row of the layer table: what costs and search know of a layer.

    path: where its kernel stands in the parameter tree, e.g. "block1/conv1".
    params: kernel elements (no bias, no normalisation, no step sizes).
    macs: multiply-accumulates for one sample.
    searched: whether its bits are to be chosen; if not, `bits` holds them (32, 32 for a layer left in float).
    tied: layers with the same name here read the same tensor, and get the same activation bits.
    inputs, outputs: elements of the layer's input and output for one sample; of a layer that is called several times, those
        of the call with the most.
    channels: output channels: how many weight bits a policy with bits per output channel gives the layer.
    weight_bit_widths, activation_bit_widths: the layer's own candidates, where a rule narrowed them.
    """

    path: str
    params: int
    macs: int
    searched: bool
    bits: Bits | None = None
    tied: str | None = None
    inputs: int | None = None
    outputs: int | None = None
    weight_bit_widths: tuple[int, ...] | None = None
    activation_bit_widths: tuple[int, ...] | None = None
    channels: int | None = None

    def candidates(self, kind: str, every: Sequence[int]) -> tuple[int, ...]:
        """The bit-widths that the layer may be given, of its weights or of its activations.

        kind: "weight" or "activation". every: those of the model, for a layer that has none of its own.
        """
        own: tuple[int, ...] | None = getattr(self, f"{kind}_bit_widths")
        return own or tuple(every)


class Interaction(NamedTuple):
    """Harm of two decisions together, beside the harm of each alone.

    a, b: (path of a searched layer, "w" or "a"): that layer's weight or activation bits.
    table: [K of a, K of b] float64, over the bit-widths of the importance that a and b choose from.
    """

    a: tuple[str, str]
    b: tuple[str, str]
    table: np.ndarray


class Importance(NamedTuple):
    """Any criterion's table: the harm of each searched layer at each of its bit-widths.

    weight: [L, Kw] float64 and activation: [L, Ka] float64, one row a *searched* layer in the order of `layers`; or
    pair: [L, Kw, Ka] float64 in place of both, where a criterion is not additive.
    alpha: what `weight` is multiplied by in the sum; None where both tables share a unit (then 1).
    rules: what searches must respect beside the layers' candidates; see search.constraints.
    interactions: terms of named pairs of decisions, added to the sum as they are (alpha is not theirs).
    """

    criterion: str
    bit_widths: tuple[int, ...]
    activation_bit_widths: tuple[int, ...]
    layers: tuple[Layer, ...]
    weight: np.ndarray | None
    activation: np.ndarray | None
    pair: np.ndarray | None = None
    alpha: float | None = None
    rules: tuple[str, ...] = ()
    interactions: tuple[Interaction, ...] = ()


class Budget(NamedTuple):
    """A cost table and a limit: sum over searched layers of table[l, i, j] + fixed <= limit.

    name: "bitops", "size", "latency", ...
    text: as the user typed it, e.g. "bitops=W3A4".
    table: [L, Kw, Ka], int64 for counted costs (exact), float64 for measured ones.
    fixed: what the layers that are not searched cost.
    limit: in the unit of the table.
    unit: "BitOps", "bytes", "ms", "bits".
    largest: the limit holds for the largest entry and for fixed, not for their sum.
    per: the weights' sum of a mean (mean bits); table, fixed and limit are divided by it to be shown. Else 1.
    """

    name: str
    text: str
    table: np.ndarray
    fixed: int | float
    limit: int | float
    unit: str
    largest: bool = False
    per: int = 1


class Solution(NamedTuple):
    """What a search found, and how sure it is.

    policy: bits of every layer, fixed ones included.
    objective: importance of the policy (of a search that measures: its loss on held-out data). bound: proven lower
    bound of it over all policies within the budgets; None where nothing is proved.
    status: "optimal" (objective equals bound) or "feasible" (the time ran out: the gap is objective - bound).
    seconds: wall-clock from tables in memory to the checked policy.
    used: budget name -> (used, limit), added up again from the policy and the budgets' tables in exact arithmetic; mean bits
    as means.
    """

    policy: dict[str, Bits]
    objective: float
    bound: float | None
    status: str
    solver: str
    seconds: float
    used: dict[str, tuple[int | float, int | float]]

    @property
    def gap(self) -> float | None:
        """(objective - bound) / |objective|; 0 where optimal, None without a bound."""
        if self.bound is None:
            return None
        apart = self.objective - self.bound
        return apart / abs(self.objective) if apart and self.objective else apart


class Decoding(NamedTuple):
    """How integer codes become values again (`numerics.decode`): table[code], or without a table scale * (code + offset).

    scale, offset: broadcast with the codes.
    table: [levels, ...], the value of every code; its other axes broadcast with the codes.
    """

    scale: Any = None
    offset: Any = 0.0
    table: Any = None


# A quantizer's leaves at one bit-width, by name, shaped to broadcast with the tensor.
Values = Mapping[str, "jax.Array"]
# The functions of a quantizer, by what they take; the bits are an int32 scalar, the bool says whether x can be negative.
OnTensor = Callable[["jax.Array", Values, "jax.Array", bool], "jax.Array"]  # x, values, bits, signed
OnValues = Callable[[Values, "jax.Array", bool], "jax.Array"]  # values, bits, signed
Decode = Callable[["jax.Array", Values, "jax.Array", bool], Decoding]
Update = Callable[["jax.Array", Values, "jax.Array", bool], dict[str, "jax.Array"]]
WithError = Callable[["jax.Array", Values, "jax.Array", bool, int], tuple["jax.Array", "jax.Array"]]
# x, bit_widths, signed, channel_axes
Init = Callable[["jax.Array", Sequence[int], bool, Sequence[int]], dict[str, "jax.Array"]]


class TensorQuantizer(NamedTuple):
    """How one kind of tensor (weights, or activations) is quantized: pure functions.

    Arguments common to all: `x` the float tensor; `values` the quantizer's leaves *at one bit-width* (for LSQ
    {"step_size": []} or, per output channel, [C] shaped to broadcast with x); `bits` an int32 scalar, traced; `signed`
    a Python bool.

    leaves: names of the leaves that gradients train; all of them are positive, and optimizers keep them so.
    state: names of the leaves that no gradient moves, but `update`.
    init(x, bit_widths, signed, channel_axes) -> {leaf: [K, ...]}: start values from a tensor, all K widths. A leaf of
        weights that has more axes holds an entry an output channel on its last one.
    fake_quant(x, values, bits, signed) -> x_hat: float to float on the grid, with the method's gradients.
    encode(x, values, bits, signed) -> codes: float to integer codes (int32).
    decoding(x, values, bits, signed) -> Decoding: what turns those codes into x_hat again.
    indicator(values, bits, signed) -> []: the learned indicator, the grid's spacing in input units; None where there
        is no such thing to learn.
    fit(x, values, bits, signed) -> x_hat in the units of x, with the gradients to the leaves that mean (x_hat - x)^2 is
        to be lowered by. Not asked for where `leaves` is empty.
    penalty(values, bits, signed) -> []: a term of the loss, for each time the layer is used; None: none.
    update(x, values, bits, signed) -> {state leaf: its next value}, once a training step; None where there is no state.
    with_error(x, values, bits, signed, samples) -> (x_hat, error []): fake_quant and, in the same pass over x, the sum of
        (fit - x)^2 over that of x^2, of the first `samples` of x's leading axis; the error's gradient reaches the leaves
        alone. It speaks for both fake_quant and fit: replace it with them. None: each has a pass of its own.
    """

    leaves: tuple[str, ...]
    state: tuple[str, ...]
    init: Init
    fake_quant: OnTensor
    encode: OnTensor
    decoding: Decode
    indicator: OnValues | None
    fit: OnTensor | None = None
    penalty: OnValues | None = None
    update: Update | None = None
    with_error: WithError | None = None


class Quantizer(NamedTuple):
    """A quantization method: one TensorQuantizer for weights, one for activations.

    max_bits: the widest grid that it has.
    """

    name: str
    weight: TensorQuantizer
    activation: TensorQuantizer
    max_bits: int = 16


# {collection: nested dict of arrays}, as Linen has them; "params" holds the quantizer's leaves, too.
Variables = Mapping[str, Any]


class Apply(Protocol):
    """The model as a function: `QuantizedModel.apply`."""

    def __call__(
        self,
        variables: Variables,
        policy: Policy | None,
        *inputs: Any,
        mutable: Sequence[str] | bool = False,
        rngs: "jax.Array | Mapping[str, jax.Array] | None" = None,
        kernels: Literal["rows", "smooth", "plain"] = "rows",
        terms: Sequence[str] = (),
        float_bits: bool = False,
        exact: bool = False,
        recompute: bool = False,
        **kwargs: Any,
    ) -> Any: ...


class Calibrate(Protocol):
    """`QuantizedModel.calibrate`."""

    def __call__(self, variables: Variables, *inputs: Any, **kwargs: Any) -> dict[str, Any]: ...


class Walk(Protocol):
    """`QuantizedModel.walk`."""

    def __call__(
        self,
        variables: Variables,
        values: Mapping[Any, Any],
        handler: Callable[..., tuple[Any, Any]],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        mutable: Sequence[str] | bool = False,
        rngs: "jax.Array | Mapping[str, jax.Array] | None" = None,
    ) -> tuple[Any, Variables, dict[tuple[str, int], Any]]: ...


class QuantizedModel(NamedTuple):
    """A Flax model, unmodified, with bits and the quantizer's leaves as arguments.

    layers: the layer table in execution order, fixed and float layers included.
    specs: parameter leaf path -> layers.LayerSpec: what applying needs to know of the layers that the leaf holds.
    products: products of two activations that were found: (where, macs); not quantized, not counted unless asked.
    bit_widths, activation_bit_widths: the global candidates.
    quantizer: the method.
    variables: the float model's own variables where it carries them (NNX), else None (Linen: from its `init`).
    apply(variables, policy, *inputs, mutable=False, rngs=None, kernels="rows", terms=(), float_bits=False, exact=False,
        recompute=False, **kwargs) -> outputs, or (outputs, updates) as Linen's. A policy of None runs the float model.
        kernels: see `ops`. float_bits=True: bits above 16 leave a tensor in float. exact=True multiplies integer codes
        and scales the sums after; both are for evaluation. recompute=True: the backward pass puts the operands on their
        grids once more in place of keeping them (reverse mode only). With `terms` (of "error", "penalty", "state") one more
        result, {term: value}: what the quantizers measured on the way; see `operands.TERMS`.
        Raises Refusal for variables or a policy of another model, and where `calibrate` was not called.
    calibrate(variables, *inputs, **kwargs) -> variables with the quantizer's leaves set from one batch.
    walk(variables, values, handler, inputs, kwargs, mutable, rngs) -> (outputs, updates, taps): what the two above
        are made of, for criteria that put something else in the place of a layer; see `interpret.interpret`.
    """

    layers: tuple[Layer, ...]
    specs: Mapping[str, Any]
    products: tuple[tuple[str, int], ...]
    bit_widths: tuple[int, ...]
    activation_bit_widths: tuple[int, ...]
    quantizer: Quantizer
    variables: Variables | None
    apply: Apply
    calibrate: Calibrate
    walk: Walk
