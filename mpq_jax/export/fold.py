"""Folding what follows a layer, channel by channel, into one multiplier and one offset: BatchNorm and biases."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from mpq_jax.codes import output_channel_axes
from mpq_jax.export.graph import Constant, Graph, Node, Value

_AFFINE = ("add", "sub", "mul", "div")


def fold(graph: Graph) -> Graph:
    """The graph with  y = A x + B  in place of the additions and multiplications by constants behind each layer.

    Constants that vary along the layer's output channels, or not at all. In float64, then rounded: A and B are what
    BatchNorm and the bias together do, but not to the last digit.
    """
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            if isinstance(value, Value):
                readers.setdefault(value.number, []).append(node)
    final = {o.number for o in graph.outputs if isinstance(o, Value)}
    folded: set[int] = set()
    nodes = []
    for node in graph.nodes:
        if id(node) in folded:
            continue
        if node.product is None:
            nodes.append(node)
            continue
        product = node.product
        at = (product.primitive, product.params, product.side, product.operand.ndim, len(node.outputs[0].shape))
        channels = output_channel_axes(*at)
        out, multiplier, offset, chain = node.outputs[0], np.float64(1), np.float64(0), []
        while out.number not in final and len(readers.get(out.number, ())) == 1:
            step = _affine(readers[out.number][0], out, channels)
            if step is None:
                break
            chain.append(readers[out.number][0])
            multiplier, offset = multiplier * step[0], offset * step[0] + step[1]
            out = chain[-1].outputs[0]
        if chain:
            folded |= {id(each) for each in chain}
            a, b = np.broadcast_arrays(multiplier, offset)
            pair = (a.astype(np.float32), b.astype(np.float32))
            node = node._replace(outputs=(out,), product=node.product._replace(affine=pair))
        nodes.append(node)
    return graph._replace(nodes=tuple(nodes))


def _affine(node: Node, value: Value, channels: list[int]) -> tuple[Any, Any] | None:
    """(a, b) of a node that computes a x + b of `value`, each varying along `channels` at most; None where it does not."""
    if node.name not in _AFFINE or len(node.inputs) != 2 or node.product is not None:
        return None
    at = [i for i, x in enumerate(node.inputs) if isinstance(x, Value)]
    if len(at) != 1 or not jnp.issubdtype(value.dtype, jnp.floating):
        return None
    other = node.inputs[1 - at[0]]
    assert isinstance(other, Constant)
    if any(n > 1 and i not in channels for i, n in enumerate(np.shape(other.value))) or len(other.shape) not in (
        0,
        len(value.shape),
    ):
        return None
    constant = np.asarray(other.value, np.float64)
    one, nothing = np.float64(1), np.float64(0)
    if node.name == "add":
        return one, constant
    if node.name == "mul":
        return constant, nothing
    if node.name == "sub":
        return (one, -constant) if at[0] == 0 else (-one, constant)
    return (1 / constant, nothing) if at[0] == 0 else None
