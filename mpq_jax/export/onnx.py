"""A model with a policy as an ONNX file: standard operators for runtimes, or QONNX's for hardware compilers.

Both hold the same network: inputs of layers are rounded to their grids, weights are integers times scales, and all
between runs in float32, as in the fake-quantized model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax.export.graph import Graph, graph, of_any_batch
from mpq_jax.export.onnx_compare import Comparison, Run, compare
from mpq_jax.export.onnx_grids import QONNX, QUANT, STANDARD, codes_record
from mpq_jax.export.onnx_ops import write
from mpq_jax.export.onnx_products import Form, write_product
from mpq_jax.export.onnx_writer import BATCH, CODES, Writer, helper, onnx
from mpq_jax.files import whole
from mpq_jax.origins import CONTRACTIONS
from mpq_jax.types import Policy, QuantizedModel, Refusal

OPSET = 21  # the first with 4-bit and 16-bit QuantizeLinear
QONNX_OPSET = 13  # what its tools are written for


def standard(
    model: QuantizedModel,
    variables: Any,
    policy: Policy | None,
    sample_shape: Sequence[int],
    *,
    opset: int = OPSET,
    **kwargs: Any,
) -> Any:
    """The onnx.ModelProto with QuantizeLinear and DequantizeLinear, float32 [batch, *sample_shape] to the model's outputs.

    Weights are integers of the narrowest type that holds their width (4, 8 or 16 bits; from opset 25 on 2 too), never
    floats; a layer's input is clipped first where its width is not that of a type.
    policy: None writes the float model. sample_shape: of one input, without the batch. kwargs: further arguments of the
    model.
    Raises Refusal, with the module path, for operations and grids that standard ONNX has no form for.
    """
    if opset < 13 or opset > onnx.defs.onnx_opset_version():
        raise Refusal(f"opset {opset} cannot be written; give one from 13 to {onnx.defs.onnx_opset_version()}")
    (batch,) = jax.export.symbolic_shape(BATCH)
    w, graph_ = _written(model, variables, policy, (batch, *sample_shape), STANDARD, opset, kwargs)
    return w.model(graph_, {}, {CODES: codes_record(w)}, "mpq_jax")


def qonnx(
    model: QuantizedModel,
    variables: Any,
    policy: Policy | None,
    sample_shape: Sequence[int],
    *,
    batch: int = 1,
    **kwargs: Any,
) -> Any:
    """The onnx.ModelProto with QONNX's Quant nodes, for any width: float32 [batch, *sample_shape] to the model's outputs.

    As QONNX wants it: weights are floats on their grids, each with a Quant node that says scale, offset and bits; every
    tensor has its shape, hence the fixed batch. A layer whose channels have several widths gets a Quant for each.
    Raises Refusal as `standard` does.
    """
    w, graph_ = _written(model, variables, policy, (batch, *sample_shape), QUANT, QONNX_OPSET, kwargs)
    proto = w.model(graph_, {QONNX: 1}, {}, "mpq_jax")
    proto.graph.value_info.extend(_shapes(proto))
    return proto


def save(proto: Any, path: str | Path) -> None:
    """Writes the file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())


def _written(
    model: QuantizedModel,
    variables: Any,
    policy: Policy | None,
    shape: Sequence[Any],
    form: Form,
    opset: int,
    kwargs: Any,
) -> tuple[Writer, Graph]:
    image = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    with of_any_batch():
        graph_ = graph(model, variables, policy, image, **kwargs)
    w = Writer(opset)
    for value in graph_.inputs:
        w.put(value, w.names.fresh("images"))
        w.input = value
    for node in graph_.nodes:
        w.where = "" if " " in node.where else node.where
        narrow = [str(out.dtype) for out in node.outputs if str(out.dtype) in ("bfloat16", "float16")]
        if narrow:  # scales are float32, which QuantizeLinear wants of its data too
            raise w.refuse(
                node, f"{narrow[0]}, which the files have no numbers of", "make the model with dtype float32"
            )
        if node.product is not None or node.name in CONTRACTIONS:
            write_product(w, node, form)
        else:
            write(w, node)
    return w, graph_


def _shapes(proto: Any) -> list[Any]:
    """The shapes of all tensors between nodes. ONNX knows nothing of Quant; its output has the shape of its input."""
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    for node in plain.graph.node:
        if node.domain == QONNX:
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output, name=node.name))
    return list(onnx.shape_inference.infer_shapes(plain, strict_mode=True).graph.value_info)


__all__ = ["Comparison", "Run", "compare", "qonnx", "save", "standard"]
