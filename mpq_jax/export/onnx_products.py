"""Layers in ONNX, and products of two activations: convolutions, transposed ones, and dot products over any axes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.export.encoding import Activation
from mpq_jax.export.graph import Constant, Node, Product, Value
from mpq_jax.export.onnx_writer import Writer

# From a layer's weight layout to ONNX's; for codes, scales and float weights alike.
Arrange = Callable[[np.ndarray], np.ndarray]
# (name of the data as the product wants it, order of its axes) -> the name of the same on its grid
OntoGrid = Callable[[str, Sequence[int]], str]


class Laid(NamedTuple):
    """A layer's weight as ONNX wants it: value = scale (codes + offset).

    codes: int32. scale, offset: [] or, one an output channel, [C] along `axis`. bits: of the whole tensor, or [C].
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    bits: int | np.ndarray
    axis: int


class Form(NamedTuple):
    """How quantized tensors are written.

    activation(w, node, x, order, activation, name) -> the name of x on its grid; x: a tensor's name, of which the axes
        (before any were joined) are those of the layer's input in this order.
    weight(w, node, laid, name) -> the name of the weight's tensor.
    """

    activation: Callable[[Writer, Node, str, Sequence[int], Activation, str], str]
    weight: Callable[[Writer, Node, Laid, str], str]


def write_product(w: Writer, node: Node, form: Form) -> None:
    """Adds a layer, or a product of two activations."""
    product = node.product
    if product is None:
        operands = node.inputs
        if node.name == "dot_general":
            _dot(w, node, node.eqn.params["dimension_numbers"], operands, None, 1, _as_it_is)
        else:
            _convolution(
                w, node, node.eqn.params, operands[0], operands[1].shape, _kernel(w, node, operands[1]), _as_it_is
            )
        return
    (x,) = node.inputs
    if isinstance(x, Constant):  # the zeros that a recurrent cell starts from
        held = Value(-node.outputs[0].number, tuple(x.shape), x.value.dtype)
        w.put(held, w.full(x))
        x = held

    def onto_grid(name: str, order: Sequence[int]) -> str:
        # Last of all before the product: runtimes look for the pair of nodes right there.
        if product.activation is None:
            return name
        return form.activation(w, node, name, order, product.activation, f"{product.path}/input")

    def weight(arrange: Arrange) -> str:
        if product.weight is None:
            return w.constant(arrange(product.operand), product.leaf)
        return form.weight(w, node, laid(w, node, product, arrange), product.path)

    if product.primitive == "dot_general":
        sides = (x, product.operand) if product.side else (product.operand, x)
        _dot(w, node, product.params["dimension_numbers"], sides, weight, product.side, onto_grid)
    elif product.side != 1:
        raise w.refuse(node, f"the kernel of {product.path!r} is the image of its convolution", "swap the two")
    else:
        _convolution(w, node, product.params, x, product.operand.shape, weight, onto_grid)


def _as_it_is(name: str, order: Sequence[int]) -> str:
    del order
    return name


def laid(w: Writer, node: Node, product: Product, arrange: Arrange) -> Laid:
    """A layer's codes and scales in ONNX's layout. Raises Refusal for a grid that is not evenly spaced."""
    assert product.weight is not None
    codes, decoding = product.weight
    if decoding.table is not None:
        raise w.refuse(
            node,
            f"the levels of {product.path!r} are not evenly spaced, which ONNX has no form for",
            "export the packed file or StableHLO, or train with --quantizer lsq",
        )
    parts: list[np.ndarray] = [np.asarray(decoding.scale, np.float32), np.asarray(decoding.offset, np.float32)]
    if np.ndim(product.bits.w):
        channels = [n if i in product.channel_axes else 1 for i, n in enumerate(codes.shape)]
        parts.append(np.asarray(product.bits.w, np.int32).reshape(channels))
    full = [arrange(np.broadcast_to(part, codes.shape)) for part in parts]
    ranges = [_axes_of_change(part) for part in full]
    changing = sorted(set().union(*ranges))
    if len(changing) > 1:
        raise w.refuse(node, f"{product.path!r} has scales along several axes", "use one a tensor or an output channel")
    axis = changing[0] if changing else 0
    lines = [
        np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1)[:, 0] if changes else part.flat[0]
        for part, changes in zip(full, ranges, strict=True)
    ]
    bits = lines[2] if len(lines) > 2 else product.bits.w
    return Laid(arrange(codes), np.asarray(lines[0]), np.asarray(lines[1]), bits if np.ndim(bits) else int(bits), axis)


def _axes_of_change(x: np.ndarray) -> set[int]:
    return {i for i in range(x.ndim) if (x != x.take([0], axis=i)).any()}


def _kernel(w: Writer, node: Node, x: Value | Constant) -> Callable[[Arrange], str]:
    """The kernel of a convolution that is no layer's weight: known, or computed from the input."""

    def of(arrange: Arrange) -> str:
        if isinstance(x, Constant):
            return w.constant(arrange(np.asarray(x.full())))
        if any(d != 1 for d in node.eqn.params["lhs_dilation"]):
            raise w.refuse(node, "a transposed convolution with a kernel from the input", "make the kernel a parameter")
        return w.of(x, node.eqn.params["dimension_numbers"].rhs_spec)

    return of


# ---- convolutions -------------------------------------------------------------------------------------------------


def _convolution(
    w: Writer,
    node: Node,
    p: Any,
    x: Value | Constant,
    kernel: Sequence[int],
    weight: Callable[[Arrange], str],
    onto_grid: OntoGrid,
) -> None:
    """conv_general_dilated with these parameters. kernel: its shape. weight(arrange) -> its name."""
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        raise w.refuse(node, "a convolution in groups of the batch", "use groups of channels")
    if any(side < 0 for pair in p["padding"] for side in pair):
        raise w.refuse(node, f"the negative padding {p['padding']}", "cut the image with a slice before it")
    data = onto_grid(_axes_in(w, x, numbers.lhs_spec), numbers.lhs_spec)
    size = [kernel[i] for i in numbers.rhs_spec[2:]]
    if any(d != 1 for d in p["lhs_dilation"]):
        name = _transposed(w, node, p, data, size, weight)
    else:
        name = w.emit(
            "Conv",
            data,
            weight(lambda k: k.transpose(numbers.rhs_spec)),
            kernel_shape=size,
            strides=list(p["window_strides"]),
            pads=[pair[end] for end in (0, 1) for pair in p["padding"]],
            dilations=list(p["rhs_dilation"]),
            group=p["feature_group_count"],
        )
    w.put(node.outputs[0], name, numbers.out_spec)


def _transposed(w: Writer, node: Node, p: Any, data: str, size: Sequence[int], weight: Callable[[Arrange], str]) -> str:
    """A convolution over an image with zeros between its pixels: ConvTranspose, which turns its kernel around.

    With a kernel that reaches over r = dilation (k - 1) + 1 pixels, padding p of the one is padding r - 1 - p of the
    other; less than 0 at the end is output padding.
    """
    spec = p["dimension_numbers"].rhs_spec
    reach = [d * (k - 1) for d, k in zip(p["rhs_dilation"], size, strict=True)]
    begin = [r - low for r, (low, _) in zip(reach, p["padding"], strict=True)]
    end = [r - high for r, (_, high) in zip(reach, p["padding"], strict=True)]
    if any(s != 1 for s in p["window_strides"]) or p["feature_group_count"] != 1 or any(b < 0 for b in begin):
        raise w.refuse(
            node,
            "a transposed convolution with strides, groups or more padding than its kernel reaches",
            "use a plain one",
        )

    def arrange(k: np.ndarray) -> np.ndarray:
        spatial = tuple(range(2, k.ndim))
        return np.flip(k.transpose(spec), spatial).swapaxes(0, 1)

    return w.emit(
        "ConvTranspose",
        data,
        weight(arrange),
        kernel_shape=list(size),
        strides=list(p["lhs_dilation"]),
        dilations=list(p["rhs_dilation"]),
        pads=[max(n, 0) for n in (*begin, *end)],
        output_padding=[max(-n, 0) for n in end],
    )


# ---- dot products -------------------------------------------------------------------------------------------------


def _dot(
    w: Writer,
    node: Node,
    numbers: Any,
    operands: Sequence[Any],
    weight: Callable[[Arrange], str] | None,
    side: int,
    onto_grid: OntoGrid,
) -> None:
    """dot_general as MatMul: [batch, free, contracted] times [batch, contracted, free].

    side: the operand that comes second; a weight always does. Without batch axes the first keeps all its free ones.
    """
    contracted, batch = numbers
    free = [[i for i in range(len(operands[s].shape)) if i not in contracted[s] and i not in batch[s]] for s in (0, 1)]
    first, second = 1 - side, side
    a, b = operands[first], operands[second]
    left = [a.shape[i] for i in free[first]]
    right = [b.shape[i] for i in free[second]]
    shared = [a.shape[i] for i in batch[first]]
    depth = [a.shape[i] for i in contracted[first]]
    rows = left if not shared else [_product(left)]

    order = (*batch[first], *free[first], *contracted[first])
    name = w.reshape(_axes_in(w, a, order), [*shared, *left, *depth], [*shared, *rows, _product(depth)])
    name = onto_grid(name, order)
    order = (*batch[second], *contracted[second], *free[second])
    matrix = [*shared, _product(depth), _product(right)]
    if weight is None:
        other = w.reshape(_axes_in(w, b, order), [*shared, *depth, *right], matrix)
    else:
        other = weight(lambda k: k.transpose(order).reshape(matrix))
    name = w.emit("MatMul", name, other)
    name = w.reshape(name, [*shared, *rows, _product(right)], [*shared, *left, *right])
    axes = list(range(len(node.outputs[0].shape)))
    if side == 0:
        # The value has the axes of the weight before those of the data.
        start, middle = len(shared), len(shared) + len(right)
        axes = [*axes[:start], *axes[middle:], *axes[start:middle]]
    w.put(node.outputs[0], name, axes)


def _axes_in(w: Writer, x: Value | Constant, order: Sequence[int]) -> str:
    if isinstance(x, Value):
        return w.of(x, order)
    return w.emit("Transpose", w.full(x), perm=list(order))


def _product(dims: Sequence[Any]) -> Any:
    total = 1
    for n in dims:
        total = total * n
    return total
