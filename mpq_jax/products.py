"""The products that a model's layers are made of: their shapes, and running them in the types that a device has.

A kernel is a product in one type: int4, int8, bfloat16 or float32 operands, accumulated and written in 32 bits (int32 or
float32). Whether the device has one is found by running it and comparing with NumPy, for every shape by itself.
Only CPUs have run this; it is written for GPUs and TPUs as well.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpq_jax import ops
from mpq_jax.interpret import Call, contraction_macs
from mpq_jax.layers import MAX_BITS
from mpq_jax.progress import progress
from mpq_jax.types import Bits, QuantizedModel, Refusal

Clock = Callable[[], float]
# A measurement runs a product this many times inside one call, so that what a call costs does not count: as often as
# these multiply-accumulates allow (a few milliseconds), but no more than MOST_CALLS.
MACS_A_CALL, MACS_A_CALL_ON_CPU, MOST_CALLS = 2**33, 2**28, 64


class Kernel(NamedTuple):
    """A product in one type. bits: the widest codes that its operands hold exactly. sums: the type of its result."""

    name: str
    bits: int
    sums: str


# From narrow to wide. bfloat16 has 8 significant bits, float32 24; int8 comes first where both hold a width.
KERNELS = (
    Kernel("int4", 4, "int32"),
    Kernel("int8", 8, "int32"),
    Kernel("bfloat16", 8, "float32"),
    Kernel("float32", MAX_BITS, "float32"),
)


def kernel_for(bits: Bits, has: Collection[str], own: str) -> str:
    """The narrowest kernel among `has` that holds both widths; for a layer left in float, the model's `own` type.

    Both operands are of one type: W4A8 runs as int8. Unsigned codes count as their width: integer runtimes shift them
    by half their range (the zero point). Raises Refusal where nothing holds them.
    """
    widest = max(bits)
    if widest > MAX_BITS:
        return own if own in has else "float32"
    found = next((kernel.name for kernel in KERNELS if kernel.bits >= widest and kernel.name in has), None)
    if found is None:
        raise Refusal(f"no product here holds {widest} bits; there are {', '.join(has) or 'none'}: use fewer bits")
    return found


# ---- which products a model has -----------------------------------------------------------------------------------


class ProductShape(NamedTuple):
    """What tells one product from another: the operation, its operands' shapes, and the operation's parameters."""

    primitive: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]

    def function(self, sums: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """(lhs, rhs) -> out: JAX's own operation, as the float model calls it, with results in the type `sums`."""
        params = dict(self.params) | {"preferred_element_type": jnp.dtype(sums)}
        if jnp.issubdtype(jnp.dtype(sums), jnp.integer):
            params["precision"] = None
        return ops.contract(self.primitive, params, "plain")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole product."""
        lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (self.lhs, self.rhs))
        out = jax.eval_shape(self.function("float32"), lhs, rhs)
        return contraction_macs(self.primitive, dict(self.params), lhs, rhs, out)

    def __str__(self) -> str:
        """ "conv 1x8x8x16 * 3x3x16x32 stride 2"."""
        shapes = f"{'x'.join(map(str, self.lhs))} * {'x'.join(map(str, self.rhs))}"
        if self.primitive == "dot_general":
            return f"dot {shapes}"
        params, notes = dict(self.params), ""
        for name, word in (("window_strides", "stride"), ("lhs_dilation", "up"), ("rhs_dilation", "dilation")):
            if any(n != 1 for n in params[name]):
                notes += f" {word} {'x'.join(map(str, dict.fromkeys(params[name])))}"
        if params["feature_group_count"] > 1:
            notes += f" groups {params['feature_group_count']}"
        return f"conv {shapes}{notes}"


class Use(NamedTuple):
    """A product that a layer runs so many times for one batch, in a float model of type `own`."""

    product: ProductShape
    runs: int
    own: str


def uses(model: QuantizedModel, variables: Any, *inputs: Any, **kwargs: Any) -> dict[str, list[Use]]:
    """Layer path -> the products it runs, from one abstract walk of the model: shapes in, nothing computed.

    variables, inputs: arrays or jax.ShapeDtypeStruct; the inputs' leading axis is the batch that shapes are made for.
    """
    found: dict[tuple[str, int], tuple[Use, tuple[int, ...]]] = {}

    def record(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, Any]:
        fields = ops.FIELDS[call.primitive]
        params = tuple((name, call.params[name]) for name in fields if name != "preferred_element_type")
        product = ProductShape(call.primitive, lhs.shape, rhs.shape, params)
        found[call.leaf, call.number] = Use(product, 1, jnp.result_type(lhs, rhs).name), call.scans
        return ops.contract(call.primitive, call.params, "plain")(lhs, rhs), None

    jax.eval_shape(lambda variables, *inputs: model.walk(variables, {}, record, inputs, kwargs)[0], variables, *inputs)
    result: dict[str, list[Use]] = {}
    for (leaf, _), (use, scans) in found.items():
        paths = model.specs[leaf].paths
        for path in paths:
            # Scans that slice the parameter give a layer each; the others run the same layer again.
            result.setdefault(path, []).append(use._replace(runs=math.prod(scans) // len(paths)))
    return result


# ---- one product, in JAX and in NumPy -----------------------------------------------------------------------------


def codes(product: ProductShape, kernel: Kernel, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Operands of random integers, int8 [lhs shape] and [rhs shape], over all that the kernel holds; 8 bits at most."""
    half = 2 ** (min(kernel.bits, 8) - 1)
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(-half, half, shape, np.int8) for shape in (product.lhs, product.rhs))  # type: ignore[return-value]


def reference(product: ProductShape, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The product of integer codes in NumPy, float64: exact below 2^53."""
    lhs, rhs, params = lhs.astype(np.float64), rhs.astype(np.float64), dict(product.params)
    return (_dot if product.primitive == "dot_general" else _convolution)(lhs, rhs, params)


def _dot(lhs: np.ndarray, rhs: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """out[batch, free of lhs, free of rhs]: the sum over the contracted axes."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = params["dimension_numbers"]
    lhs_free = [i for i in range(lhs.ndim) if i not in (*lhs_sum, *lhs_batch)]
    rhs_free = [i for i in range(rhs.ndim) if i not in (*rhs_sum, *rhs_batch)]
    batch, left, right = (
        tuple(x.shape[i] for i in axes) for x, axes in ((lhs, lhs_batch), (lhs, lhs_free), (rhs, rhs_free))
    )
    length = math.prod(lhs.shape[i] for i in lhs_sum)
    a = lhs.transpose(*lhs_batch, *lhs_free, *lhs_sum).reshape(math.prod(batch), math.prod(left), length)
    b = rhs.transpose(*rhs_batch, *rhs_sum, *rhs_free).reshape(math.prod(batch), length, math.prod(right))
    return (a @ b).reshape(*batch, *left, *right)


def _convolution(lhs: np.ndarray, rhs: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    """out[b, o, p] = sum over c, k of x[b, c, stride p + dilation k] w[o, c, k], the groups of channels apart."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    x, w = lhs.transpose(numbers.lhs_spec), rhs.transpose(numbers.rhs_spec)
    if (split := params["batch_group_count"]) > 1:  # groups of samples: the same as groups of channels
        x = np.moveaxis(x.reshape(split, -1, *x.shape[1:]), 0, 1)
        x, groups = x.reshape(x.shape[0], -1, *x.shape[3:]), split
    for axis, (step, (low, high)) in enumerate(zip(params["lhs_dilation"], params["padding"], strict=True), start=2):
        spread = np.zeros((*x.shape[:axis], (x.shape[axis] - 1) * step + 1, *x.shape[axis + 1 :]))
        spread[(slice(None),) * axis + (slice(None, None, step),)] = x
        spread = np.pad(spread, [(max(low, 0), max(high, 0)) if i == axis else (0, 0) for i in range(x.ndim)])
        x = spread.take(range(max(-low, 0), spread.shape[axis] - max(-high, 0)), axis)  # negative padding cuts
    windows = zip(x.shape[2:], w.shape[2:], params["window_strides"], params["rhs_dilation"], strict=True)
    size = [(n - (k - 1) * dilation - 1) // stride + 1 for n, k, stride, dilation in windows]
    x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    w = w.reshape(groups, -1, *w.shape[1:])
    out = np.zeros((x.shape[0], groups, w.shape[1], math.prod(size)))
    for at in np.ndindex(*w.shape[3:]):
        starts = [k * dilation for k, dilation in zip(at, params["rhs_dilation"], strict=True)]
        window = tuple(
            slice(start, start + (n - 1) * stride + 1, stride)
            for start, n, stride in zip(starts, size, params["window_strides"], strict=True)
        )
        taken = x[(slice(None),) * 3 + window]
        out += w[(slice(None),) * 3 + at] @ taken.reshape(*taken.shape[:3], -1)
    out = out.reshape(out.shape[0], -1, *size)
    return out.transpose(np.argsort(numbers.out_spec))


def repeated(product: ProductShape, kernel: Kernel, calls: int) -> Callable[..., Any]:
    """(lhs, rhs) -> (out, []): the product `calls` times, one after another, in one compiled program.

    Each run's operands pass a barrier together with a sum over the runs before it, so that XLA can neither run the
    product once for all nor leave a part of it out.
    """
    function = product.function(kernel.sums)

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
        def again(_: int, seen: jax.Array) -> jax.Array:
            a, b, seen = lax.optimization_barrier((lhs, rhs, seen))
            return seen + lax.optimization_barrier(function(a, b)).ravel()[0]

        seen = lax.fori_loop(0, calls - 1, again, jnp.zeros((), kernel.sums))
        a, b, seen = lax.optimization_barrier((lhs, rhs, seen))
        return function(a, b), seen

    return run


# ---- measuring ----------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """What was measured of one product: kernel name -> milliseconds of each round; kernel name -> why it is missing."""

    calls: int
    rounds: dict[str, list[float]]
    missing: dict[str, str]


def calls_of(product: ProductShape) -> int:
    """How many times a measurement runs the product."""
    allowed = MACS_A_CALL_ON_CPU if jax.default_backend() == "cpu" else MACS_A_CALL
    return max(1, min(MOST_CALLS, allowed // max(1, product.macs)))


def _on_device(product: ProductShape, kernel: Kernel) -> list[jax.Array]:
    return [jax.device_put(x.astype(jnp.dtype(kernel.name))) for x in codes(product, kernel)]


def fault(product: ProductShape, kernel: Kernel, run: Callable[..., Any]) -> str | None:
    """Why the device does not have this kernel for this product, in one line; None where its result is NumPy's.

    Floating results are compared after rounding: they are integers, and fast convolutions may leave some noise.
    """
    try:
        out = np.asarray(run(*_on_device(product, kernel))[0]).astype(np.float64)
    except Exception as error:  # whatever a backend says of a type that it lacks
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    wrong = np.count_nonzero(np.rint(out) != reference(product, *codes(product, kernel)))
    return f"{wrong} of {out.size} numbers of its result are wrong" if wrong else None


def measure(
    products: Iterable[ProductShape], rounds: int, clock: Clock = time.perf_counter
) -> dict[ProductShape, Times]:
    """Each product once, in every kernel that the device has for it.

    Compiled once and checked; then in each round, product by product, each kernel is called once untimed and once
    timed, so that a slow spell of the machine meets all alike. Operands are made anew in each round: those of one
    product only are held at a time. clock() -> seconds.
    Raises Refusal where a product does not run in float32.
    """
    results: dict[ProductShape, Times] = {}
    runs: dict[ProductShape, dict[Kernel, Callable[..., Any]]] = {}
    different = list(dict.fromkeys(products))
    with progress(different, len(different), "compiled and checked") as bar:
        for product in bar:
            results[product] = Times(calls_of(product), {}, {})
            runs[product] = {}
            for kernel in KERNELS:
                run = repeated(product, kernel, results[product].calls)
                why = fault(product, kernel, run)
                if why is None:
                    runs[product][kernel] = run
                    results[product].rounds[kernel.name] = []
                else:
                    results[product].missing[kernel.name] = why
            if "float32" in results[product].missing:
                raise Refusal(
                    f"{product} does not run in float32 ({results[product].missing['float32']}); try a smaller --batch, "
                    "or another device with JAX_PLATFORMS"
                )
    with progress(itertools.product(range(rounds), different), rounds * len(different), "measured") as bar:
        for _, product in bar:
            operands = {kernel: _on_device(product, kernel) for kernel in runs[product]}
            for kernel, run in runs[product].items():
                seconds = _seconds(run, operands[kernel], clock)
                results[product].rounds[kernel.name].append(1000 * seconds / results[product].calls)
    return results


def _seconds(run: Callable[..., Any], operands: Sequence[jax.Array], clock: Clock) -> float:
    jax.block_until_ready(run(*operands))
    start = clock()
    jax.block_until_ready(run(*operands))
    return clock() - start
