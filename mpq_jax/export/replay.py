"""Running a graph: fake-quantized, with exact products of codes, or with integers alone.

Operation by operation, so that all three round everything between the products alike: compiled as a whole, XLA fuses
what surrounds a product differently in each, and a last digit can carry a value over to the next code.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.codes import largest_sum, multiples, product_of_codes
from mpq_jax.export.graph import Constant, Graph, Node, Product, Value
from mpq_jax.jaxprs import bind
from mpq_jax.numerics import decode, integer_range
from mpq_jax.types import Decoding, Refusal

# (layer, its data) -> its output, before what was folded in
Arithmetic = Callable[[Product, jax.Array], jax.Array]


def run(
    graph: Graph, arithmetic: Arithmetic, *inputs: Any, seen: Callable[[Product, jax.Array], None] | None = None
) -> list[Any]:
    """The graph's outputs. inputs: arrays of the shapes it was made with. seen(layer, data): called at each layer."""
    env: dict[int, Any] = {v.number: jnp.asarray(x) for v, x in zip(graph.inputs, inputs, strict=True)}

    def read(x: Value | Constant) -> Any:
        return x.full() if isinstance(x, Constant) else env[x.number]

    for node in graph.nodes:
        ins = [read(i) for i in node.inputs]
        outs = [_layer(node, ins[0], arithmetic, seen)] if node.product else bind(node.eqn, ins)
        env.update((v.number, out) for v, out in zip(node.outputs, outs, strict=True))
    return [read(o) for o in graph.outputs]


def _layer(node: Node, data: jax.Array, arithmetic: Arithmetic, seen: Any) -> jax.Array:
    product = node.product
    assert product is not None
    if seen:
        seen(product, data)
    out = arithmetic(product, data)
    if product.affine is not None:
        multiplier, offset = product.affine
        out = out * multiplier + offset
    return out.astype(node.outputs[0].dtype)


# ---- arithmetics --------------------------------------------------------------------------------------------------


def _floating(product: Product, weight: Any, data: Any) -> jax.Array:
    pair = (weight, data) if product.side == 0 else (data, weight)
    return ops.contract(product.primitive, dict(product.params), "plain")(*pair)


def fake_quantized(product: Product, data: jax.Array) -> jax.Array:
    """Both operands on their grids, then a floating-point product."""
    x: Any = data
    if product.activation is not None:
        x = _decoded(*product.activation.encoded(data), dtype=data.dtype)
    return _floating(product, weight_values(product), x)


@functools.partial(jax.jit, static_argnames="dtype")
def _decoded(codes: jax.Array, decoding: Decoding, dtype: Any) -> jax.Array:
    return decode(codes, decoding).astype(dtype)


def weight_values(product: Product) -> np.ndarray:
    """The float values that a layer's weight codes stand for, in the layout and type of its product."""
    if product.weight is None:
        return product.operand
    # In NumPy, float32 as in `decode`: this is done for every layer of every run.
    codes, (scale, offset, table) = product.weight
    if table is None:
        values = (codes.astype(np.float32) + np.float32(offset)) * np.float32(scale)
    else:
        values = table[codes] if table.ndim == 1 else np.take_along_axis(table, codes[None], axis=0)[0]
    return values.astype(product.operand.dtype)


def of_codes(product: Product, data: jax.Array, integers: bool) -> jax.Array:
    """The product of codes, scales after it; layers with an operand in float run in float."""
    if product.activation is None or product.weight is None:
        return fake_quantized(product, data)
    return product_of_codes(
        product.primitive,
        product.params,
        product.side,
        product.channel_axes,
        tuple(product.weight),  # type: ignore[arg-type]
        product.activation.encoded(data),
        product.path,
        integers,
    )


def exact(product: Product, data: jax.Array) -> jax.Array:
    """`apply(exact=True)`: codes as float32 numbers."""
    return of_codes(product, data, integers=False)


def integer(product: Product, data: jax.Array) -> jax.Array:
    """int32 codes, int32 sums."""
    return of_codes(product, data, integers=True)


class Inexact(NamedTuple):
    """A layer whose sums can pass 2^24, so that float32 may round them. largest: the largest sum possible."""

    path: str
    largest: int


def inexact(graph: Graph) -> list[Inexact]:
    """Layers whose sums of codes float32 may not hold exactly. Raises Refusal for one whose sums int32 cannot hold."""
    found = []
    for node in graph.products:
        product = node.product
        if product is None or product.weight is None or product.activation is None:
            continue
        numbers, _ = multiples(*product.weight, f"the weight of layer {product.path!r}")
        low, high = integer_range(jnp.int32(product.activation.bits), product.activation.signed)
        most = largest_sum(np.asarray(numbers), int(max(low, high)), product.channel_axes)
        if most >= 2**31:
            raise Refusal(
                f"layer {product.path!r} can come to sums of {most:.3g}, which int32 does not hold; give it fewer bits"
            )
        if most > 2**24:
            found.append(Inexact(product.path, most))
    return found


# ---- comparing ----------------------------------------------------------------------------------------------------


class Differences(NamedTuple):
    """Two runs of a graph over the same images.

    codes: {layer path: (codes that differ, codes in all)} at quantized inputs. top1: (answers with another top-1, answers),
        one an image, or one a position where the model gives more.
    largest: the largest difference of a logit. accuracy: of the two runs, where labels were given.
    """

    codes: dict[str, tuple[int, int]]
    top1: tuple[int, int]
    largest: float
    accuracy: tuple[float, float] | None

    @property
    def differing(self) -> int:
        """Codes that differ, over all layers."""
        return sum(differ for differ, _ in self.codes.values())

    @property
    def all_codes(self) -> int:
        """Codes that were compared, over all layers."""
        return sum(count for _, count in self.codes.values())


# images [B, ...] -> (logits [B, classes], [(layer path, int32 codes at its input)])
Runner = Callable[[np.ndarray], tuple[np.ndarray, list[tuple[str, np.ndarray]]]]


def runner(make: Callable[[int], Graph], arithmetic: Arithmetic, answer: int = 0) -> Runner:
    """make(B) -> the graph for batches of B. answer: which of its outputs are the logits."""
    graphs: dict[int, Graph] = {}

    def one(x: np.ndarray) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
        if len(x) not in graphs:
            graphs[len(x)] = make(len(x))
        codes: list[tuple[str, np.ndarray]] = []

        def keep(product: Product, data: jax.Array) -> None:
            if product.activation is not None:
                codes.append((product.path, np.asarray(product.activation.encode(data))))

        logits = run(graphs[len(x)], arithmetic, x, seen=keep)[answer]
        return np.asarray(logits, np.float64), codes

    return one


class _Tally:
    """Differences of two runs, batch by batch."""

    def __init__(self) -> None:
        self.codes: dict[str, tuple[int, int]] = {}
        self.flips, self.answers, self.largest, self.right, self.labelled = 0, 0, 0.0, np.zeros(2, int), True

    def add(self, ours: Any, theirs: Any, labels: np.ndarray | None) -> None:
        (a, a_codes), (b, b_codes) = ours, theirs
        for (path, mine), (_, others) in zip(a_codes, b_codes, strict=True):
            differ, count = self.codes.get(path, (0, 0))
            self.codes[path] = (differ + int((mine != others).sum()), count + mine.size)
        top = [each.argmax(-1) for each in (a, b)]
        self.flips += int((top[0] != top[1]).sum())
        self.answers += top[0].size
        self.largest = max(self.largest, float(np.abs(a - b).max()))
        self.labelled = self.labelled and labels is not None
        self.right += [0 if labels is None else int((t == labels).sum()) for t in top]

    def differences(self) -> Differences:
        accuracy = tuple(self.right / self.answers) if self.labelled and self.answers else None
        return Differences(self.codes, (self.flips, self.answers), self.largest, accuracy)


def compare(
    one: Runner, others: Sequence[Runner], batches: Iterable[tuple[np.ndarray, np.ndarray | None]]
) -> list[Differences]:
    """`one` against each of `others`, over batches (images [B, ...], labels [B] or None); every one runs once."""
    tallies = [_Tally() for _ in others]
    for x, labels in batches:
        ours = one(x)
        for tally, other in zip(tallies, others, strict=True):
            tally.add(ours, other(x), labels)
    return [tally.differences() for tally in tallies]
