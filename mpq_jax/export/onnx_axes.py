"""JAX's operations on axes in ONNX: shapes, slices, joins, reductions and windows. Each takes (writer, node)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mpq_jax.export.graph import Constant, Node, Value
from mpq_jax.export.onnx_writer import Writer, element_type

REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}


def transpose(w: Writer, node: Node) -> None:
    """Bookkeeping alone: the tensor stays as it is stored."""
    (x,), permutation = node.inputs, list(node.eqn.params["permutation"])
    if isinstance(x, Constant):
        w.put(node.outputs[0], w.emit("Transpose", w.full(x), perm=permutation))
    else:
        stored = w.values[x.number]
        w.put(node.outputs[0], stored.name, [permutation.index(axis) for axis in stored.order])


def reshape(w: Writer, node: Node) -> None:
    """Elements keep their order. Raises Refusal where a transpose is part of it."""
    if node.eqn.params.get("dimensions") is not None:
        raise w.refuse(node, "a reshape that transposes", "transpose first")
    x, out = node.inputs[0], node.outputs[0]
    w.put(out, w.reshape(w.full(x), x.shape, out.shape))


def broadcast(w: Writer, node: Node) -> None:
    """New axes by Unsqueeze, then Expand."""
    x, out = node.inputs[0], node.outputs[0]
    axes = node.eqn.params["broadcast_dimensions"]
    between = [x.shape[axes.index(i)] if i in axes else 1 for i in range(len(out.shape))]
    name = w.full(x)
    if new := [i for i in range(len(out.shape)) if i not in axes]:
        name = w.emit("Unsqueeze", name, w.integers(new))
    w.put(out, w.expand(name, between, out.shape))


def squeeze(w: Writer, node: Node) -> None:
    """Axes of length 1 that go."""
    w.put(node.outputs[0], w.emit("Squeeze", w.full(node.inputs[0]), w.integers(node.eqn.params["dimensions"])))


def concatenate(w: Writer, node: Node) -> None:
    """Along one axis, whatever order the tensors are stored in."""
    order = w.order(node.inputs)
    names = []
    for x in node.inputs:
        name = w.of(x, order)
        if isinstance(x, Constant):
            name = w.expand(name, [x.value.shape[i] for i in order], [x.shape[i] for i in order])
        names.append(name)
    w.put(node.outputs[0], w.emit("Concat", *names, axis=order.index(node.eqn.params["dimension"])), order)


def tile(w: Writer, node: Node) -> None:
    """Repeats along axes."""
    w.put(node.outputs[0], w.emit("Tile", w.full(node.inputs[0]), w.integers(node.eqn.params["reps"])))


def stack(w: Writer, node: Node) -> None:
    """Along a new axis."""
    axis = node.eqn.params["axis"]
    names = [w.emit("Unsqueeze", w.full(x), w.integers([axis])) for x in node.inputs]
    w.put(node.outputs[0], w.emit("Concat", *names, axis=axis))


def split(w: Writer, node: Node) -> None:
    """Along one axis, into parts of known lengths."""
    sizes = w.integers([int(n) for n in node.eqn.params["sizes"]])
    names = w.emit("Split", w.full(node.inputs[0]), sizes, outputs=len(node.outputs), axis=node.eqn.params["axis"])
    for out, name in zip(node.outputs, names, strict=True):
        w.put(out, name)


def cut(
    w: Writer, name: str, start: Sequence[Any], stop: Sequence[Any], step: Sequence[int], shape: Sequence[Any]
) -> str:
    """name[start:stop:step] on every axis; axes that stay whole are left out."""
    axes = [i for i, n in enumerate(shape) if not (step[i] == 1 and start[i] == 0 and stop[i] == n)]
    if not axes:
        return name
    return w.emit(
        "Slice",
        name,
        *(
            w.dimensions([int(n) if isinstance(n, np.integer) else n for n in each])
            for each in ([start[i] for i in axes], [stop[i] for i in axes])
        ),
        w.integers(axes),
        w.integers([step[i] for i in axes]),
    )


def slice_(w: Writer, node: Node) -> None:
    """A slice at a known place."""
    p, x = node.eqn.params, node.inputs[0]
    steps = p["strides"] or [1] * len(x.shape)
    w.put(node.outputs[0], cut(w, w.full(x), p["start_indices"], p["limit_indices"], steps, x.shape))


def dynamic_slice(w: Writer, node: Node) -> None:
    """A slice whose place turned out to be known. Raises Refusal where it depends on the input."""
    x, *starts = node.inputs
    sizes = node.eqn.params["slice_sizes"]
    places = [int(s.value) for s in starts if isinstance(s, Constant)]
    if len(places) < len(starts):
        raise w.refuse(node, "a slice whose place depends on the input", "take it at a fixed place")
    whole = [isinstance(n, int) and n != s for n, s in zip(x.shape, sizes, strict=True)]
    # JAX moves a start that is out of range back into it.
    start = [
        min(max(place, 0), n - s) if cuts else 0
        for place, n, s, cuts in zip(places, x.shape, sizes, whole, strict=True)
    ]
    stop = [a + s for a, s in zip(start, sizes, strict=True)]
    w.put(node.outputs[0], cut(w, w.full(x), start, stop, [1] * len(start), x.shape))


def reverse(w: Writer, node: Node) -> None:
    """Axes turned around: a Slice with steps of -1."""
    axes = list(node.eqn.params["dimensions"])
    ends = np.iinfo(np.int64)
    name = w.emit(
        "Slice",
        w.full(node.inputs[0]),
        w.integers([-1] * len(axes)),
        w.integers([ends.min + 1] * len(axes)),
        w.integers(axes),
        w.integers([-1] * len(axes)),
    )
    w.put(node.outputs[0], name)


def pad(w: Writer, node: Node) -> None:
    """At the ends of axes; negative padding cuts. Raises Refusal for padding between elements."""
    x, fill = node.inputs
    config = node.eqn.params["padding_config"]
    if any(inner for _, _, inner in config):
        raise w.refuse(node, "zeros between elements", "use a transposed convolution, or jnp.repeat")
    start = [max(-low, 0) for low, _, _ in config]
    stop = [n - max(-high, 0) for n, (_, high, _) in zip(x.shape, config, strict=True)]
    name = cut(w, w.full(x), start, stop, [1] * len(start), x.shape)
    pads = [max(low, 0) for low, _, _ in config] + [max(high, 0) for _, high, _ in config]
    w.put(node.outputs[0], w.emit("Pad", name, w.integers(pads), w.full(fill)) if any(pads) else name)


def gather(w: Writer, node: Node) -> None:
    """A gather with known places on all axes but one, which is what indexing makes: slices, then one Gather.

    Raises Refusal for any other.
    """
    x, indices = node.inputs
    numbers, sizes, out = node.eqn.params["dimension_numbers"], node.eqn.params["slice_sizes"], node.outputs[0]
    axes = numbers.start_index_map
    advice = "index with slices and one array, e.g. jnp.take(x, places, axis)"
    if numbers.operand_batching_dims:
        raise w.refuse(node, "an index for each sample", advice)
    columns = _columns(w, node, indices)
    start, stop = [0] * len(x.shape), list(x.shape)
    moving = []
    for axis, column in zip(axes, columns, strict=True):
        if isinstance(column, np.ndarray) and (column == column.flat[0]).all():
            start[axis] = min(max(int(column.flat[0]), 0), x.shape[axis] - sizes[axis])
            if start[axis] != column.flat[0] and node.eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP:
                raise w.refuse(node, f"places outside of an axis of length {x.shape[axis]}", "index inside of it")
            stop[axis] = start[axis] + sizes[axis]
        else:
            moving.append((axis, column))
    if len(moving) > 1 or any(axis not in numbers.collapsed_slice_dims for axis, _ in moving):
        raise w.refuse(node, "several axes indexed together", advice)
    cut_to = [b - a for a, b in zip(start, stop, strict=True)]
    if any(sizes[i] != cut_to[i] for i in range(len(sizes)) if i not in [m for m, _ in moving]):
        raise w.refuse(node, "a slice at a place that depends on the input", advice)
    name = cut(w, w.full(x), start, stop, [1] * len(start), x.shape)
    gone = [i for i in numbers.collapsed_slice_dims if i not in [axis for axis, _ in moving]]
    name = w.emit("Squeeze", name, w.integers(gone)) if gone else name
    offsets, batch = list(numbers.offset_dims), [i for i in range(len(out.shape)) if i not in numbers.offset_dims]
    if not moving:
        # One place for all indices: an axis of length 1 for each of theirs, then broadcast.
        kept = [sizes[i] for i in range(len(sizes)) if i not in numbers.collapsed_slice_dims]
        spread = [kept[offsets.index(i)] if i in offsets else 1 for i in range(len(out.shape))]
        name = w.emit("Unsqueeze", name, w.integers(batch)) if batch else name
        w.put(out, w.expand(name, spread, out.shape))
        return
    axis, places = moving[0]
    before = axis - sum(g < axis for g in gone)
    if isinstance(places, np.ndarray):
        if places.min() < 0 or places.max() >= x.shape[axis]:
            raise w.refuse(node, f"places outside of an axis of length {x.shape[axis]}", "index inside of it")
        places = w.constant(places.astype(np.int64))
    w.put(out, w.emit("Gather", name, places, axis=before), [*offsets[:before], *batch, *offsets[before:]])


def _columns(w: Writer, node: Node, indices: Value | Constant) -> list[np.ndarray | str]:
    """The indices of each axis: numbers where they are known, else the name of a tensor."""
    count = indices.shape[-1]
    if isinstance(indices, Constant):
        known = np.asarray(indices.full())
        return [known[..., i] for i in range(count)]
    names = [w.of(indices)] if count == 1 else []
    if count > 1:
        names = w.emit("Split", w.of(indices), w.integers([1] * count), outputs=count, axis=-1)
    return [w.emit("Squeeze", name, w.integers([len(indices.shape) - 1])) for name in names]


# ---- along axes ---------------------------------------------------------------------------------------------------


def _stored(w: Writer, x: Value | Constant) -> tuple[str, tuple[int, ...]]:
    if isinstance(x, Constant):
        return w.full(x), tuple(range(len(x.shape)))
    return w.values[x.number].name, w.values[x.number].order


def reduce(w: Writer, node: Node) -> None:
    """Sum, largest, least or product over axes, in the order that the tensor is stored in."""
    name, order = _stored(w, node.inputs[0])
    axes = node.eqn.params["axes"]
    if not axes:  # which ONNX takes for all
        w.put(node.outputs[0], name, order)
        return
    left = [a for a in order if a not in axes]
    places = sorted(order.index(a) for a in axes)
    w.put(node.outputs[0], w.reduce(REDUCTIONS[node.name], name, places), [sorted(left).index(a) for a in left])


def reduce_logical(w: Writer, node: Node) -> None:
    """All or any over axes: ONNX reduces numbers only, so by way of int32."""
    if not node.eqn.params["axes"]:
        w.put(node.outputs[0], w.full(node.inputs[0]))
        return
    numbers = w.emit("Cast", w.full(node.inputs[0]), to=element_type("int32"))
    op = "ReduceMin" if node.name == "reduce_and" else "ReduceMax"
    reduced = w.reduce(op, numbers, node.eqn.params["axes"])
    w.put(node.outputs[0], w.emit("Cast", reduced, to=element_type("bool")))


def arg(w: Writer, node: Node) -> None:
    """Where the largest or the least stands along an axis: the first of equals, in JAX and in ONNX."""
    op = {"argmax": "ArgMax", "argmin": "ArgMin"}[node.name]
    found = w.emit(op, w.full(node.inputs[0]), axis=node.eqn.params["axes"][0], keepdims=0)
    dtype = np.dtype(node.outputs[0].dtype).name
    w.put(node.outputs[0], found if dtype == "int64" else w.emit("Cast", found, to=element_type(dtype)))


def cumsum(w: Writer, node: Node) -> None:
    """Sums up to each place of an axis, from either end."""
    axis = w.constant(np.int64(node.eqn.params["axis"]))
    w.put(node.outputs[0], w.emit("CumSum", w.full(node.inputs[0]), axis, reverse=int(node.eqn.params["reverse"])))


def pool(w: Writer, node: Node) -> None:
    """Windows over some axes of a tensor of which the first and one more (the channels) are untouched.

    Raises Refusal where these are not, and for an average over a window with gaps.
    """
    p, x, out = node.eqn.params, node.inputs[0], node.outputs[0]
    windows, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    dilation = p["window_dilation"]
    still = [i for i in range(len(windows)) if windows[i] == 1 and strides[i] == 1 and tuple(padding[i]) == (0, 0)]
    if 0 not in still or len(still) < 2 or any(d != 1 for d in p["base_dilation"]):
        raise w.refuse(node, f"windows {windows} over the batch or over every axis", "pool over spatial axes only")
    channel = still[-1]
    spatial = [i for i in range(len(windows)) if i not in (0, channel)]
    if any(dilation[i] != 1 for i in spatial) and node.name == "reduce_window_sum":
        raise w.refuse(node, "an average over a window with gaps", "use a convolution")
    order = (0, channel, *spatial)
    attributes: dict[str, Any] = {
        "kernel_shape": [windows[i] for i in spatial],
        "strides": [strides[i] for i in spatial],
        "pads": [padding[i][end] for end in (0, 1) for i in spatial],
    }
    name = w.of(x, order) if isinstance(x, Value) else w.emit("Transpose", w.full(x), perm=order)
    if node.name == "reduce_window_max":
        w.put(out, w.emit("MaxPool", name, dilations=[dilation[i] for i in spatial], **attributes), order)
        return
    mean = w.emit("AveragePool", name, count_include_pad=1, **attributes)
    w.put(out, w.emit("Mul", mean, w.constant(np.asarray(math.prod(windows), np.dtype(out.dtype)))), order)


def iota(w: Writer, node: Node) -> None:
    """0, 1, 2, … along one axis of a symbolic shape; iotas of known shapes are constants of the graph."""
    out, axis = node.outputs[0], node.eqn.params["dimension"]
    dtype = np.dtype(out.dtype)
    length = out.shape[axis]
    if isinstance(length, int):
        line = w.constant(np.arange(length, dtype=dtype))
    else:
        scalar = w.emit("Squeeze", w.dimensions([length]), w.integers([0]))
        line = w.emit("Range", w.constant(np.int64(0)), scalar, w.constant(np.int64(1)))
        line = w.emit("Cast", line, to=element_type(dtype.name))
    if others := [i for i in range(len(out.shape)) if i != axis]:
        line = w.emit("Unsqueeze", line, w.integers(others))
    w.put(out, w.expand(line, [length if i == axis else 1 for i in range(len(out.shape))], out.shape))


def dimension(w: Writer, node: Node) -> None:
    """The length of a symbolic dimension, worked out when the model runs."""
    scalar = w.emit("Squeeze", w.dimensions([node.eqn.params["dim"]]), w.integers([0]))
    w.put(node.outputs[0], w.emit("Cast", scalar, to=element_type(np.dtype(node.outputs[0].dtype).name)))
