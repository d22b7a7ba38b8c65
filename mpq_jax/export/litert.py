"""A quantized model as a LiteRT (.tflite) file, by litert-converter: StableHLO in, no TensorFlow.

What is called of litert-converter (0.5) has no documentation; it is what litert-torch is built on. Install it with
`pip install --no-deps litert-converter`: what it needs here is in this project's extra "export", and other parts of it
pin old versions of common packages. The converter works every weight out in float; `narrowed` puts the codes back.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend import core

from mpq_jax.export.coded import Coded, coded, contained, unpacked
from mpq_jax.export.stablehlo import make_program
from mpq_jax.jaxprs import bind, called, loop, outputs_of
from mpq_jax.types import Policy, QuantizedModel, Refusal

# Operators of StableHLO that LiteRT's interpreter has kernels for.
RUN = (
    "add",
    "case",
    "composite",
    "gather",
    "maximum",
    "minimum",
    "multiply",
    "pad",
    "reduce_window",
    "scatter",
    "shift_left",
)
TYPES = (4, 8, 16)  # bits of TFLite's integers
INSTALL = "pip install --no-deps litert-converter"


class LiteRT(NamedTuple):
    """content: the bytes of the .tflite file. in_float: keys of weights that stand in it as float32, see `narrowed`."""

    content: bytes
    in_float: tuple[str, ...]


class IntegerWeight(NamedTuple):
    """One layer's weights as TFLite can hold them: scale * integers. name: the leaf. scale: float32 [] or [C]."""

    name: str
    scale: np.ndarray
    integers: np.ndarray


def litert(
    model: QuantizedModel,
    variables: Any,
    policy: Policy,
    sample_shape: Sequence[int],
    dtype: Any = jnp.float32,
    *,
    batch: int = 1,
    **kwargs: Any,
) -> LiteRT:
    """The file of x [batch, *sample_shape] -> outputs of `model.apply(variables, policy, x, **kwargs)`.

    Activations stay fake-quantized: products are in float32. Raises Refusal without litert-converter, and where it has
    no form for an operation of the model.
    """
    sample = jax.ShapeDtypeStruct((batch, *sample_shape), dtype)
    codes = coded(model, variables, policy, sample, packed=False, **kwargs)
    program = make_program(model, variables, codes, sample, **kwargs)
    closed = jax.make_jaxpr(program)(sample)
    exported = export.export(jax.jit(lambda x: straight_line(closed, x)), platforms=("cpu",))(sample)
    every, others = integer_weights(codes)
    content, missed = narrowed(converted(exported.mlir_module()), every)
    return LiteRT(content, (*others, *missed))


def converted(text: str) -> bytes:
    """A .tflite file from the text of a StableHLO module without loops and with fixed shapes."""
    try:
        from litert_converter import converter_api_ext as converter
        from litert_converter.mlir import ir, passmanager
    except ImportError as error:
        raise Refusal(f"LiteRT files need litert-converter ({error}); install it with: {INSTALL}") from None
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        module = ir.Module.parse(text)
        try:
            converter.run_convert_to_tfl_passes(module, passmanager.PassManager(), converter.ConvertToTFLConfig())
            content = converter.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:  # bindings raise of every kind; their text is pages of MLIR
            names = sorted(set(re.findall(r"\btf\.\w+|'(?:tfl|stablehlo|chlo)\.\w+'", str(error))))
            raise _no_form(", ".join(names) or " ".join(str(error).split())[:150]) from None
    if left := _left(content):
        raise _no_form(", ".join(left))
    return content


def _no_form(what: str) -> Refusal:
    return Refusal(f"LiteRT has no form of its own for {what}; use stablehlo or ONNX")


def _left(content: bytes) -> list[str]:
    """Operators of a file that the converter has left as StableHLO's, and that LiteRT's interpreter does not run."""
    from litert_converter import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.startswith("STABLEHLO_")}
    used = {each.builtinCode for each in schema.ModelT.InitFromPackedBuf(content, 0).operatorCodes}
    left = {names[code].removeprefix("STABLEHLO_").lower() for code in used if code in names}
    return sorted(f"stablehlo.{name}" for name in left - set(RUN))


# ---- weights as integers ------------------------------------------------------------------------------------------


def integer_weights(codes: Coded) -> tuple[list[IntegerWeight], list[str]]:
    """The weights of all layers, and the names of those that cannot be: of levels in a table, or wider than 16 bits."""
    found, others = [], []
    for key, value in codes.values.items():
        name, container, decoding = key if isinstance(key, str) else key[0], codes.containers[key], value["decoding"]
        if decoding.table is not None:
            others.append(name)
            continue
        held = value["codes"]
        lead = held.shape[:-1]
        for at in np.ndindex(*lead):
            integers = np.asarray(unpacked(jnp.asarray(held[at]), container)).ravel()
            scale, offset = np.squeeze(decoding.scale[at]).reshape(-1), decoding.offset[at]
            if np.any(offset):  # an offset of 1/2: the odd numbers on a grid of half the spacing
                integers, scale = 2 * integers + 1, scale / 2
            if not _holds(TYPES[-1], integers):
                others.append(name)
                continue
            found.append(
                IntegerWeight(name, (scale if scale.size > 1 else scale.reshape(())).astype(np.float32), integers)
            )
    return found, others


def _holds(bits: int, integers: np.ndarray) -> bool:
    return bool(integers.min() >= -(2 ** (bits - 1)) and integers.max() < 2 ** (bits - 1))


def integers_in(values: np.ndarray, weight: IntegerWeight) -> tuple[np.ndarray, int] | None:
    """(integers of values' shape, axis of the channels), if the weight's own integers give these values to the last bit."""
    if values.size != weight.integers.size:
        return None
    axes = [0] if weight.scale.ndim == 0 else [i for i, n in enumerate(values.shape) if n == weight.scale.size]
    for axis in axes:
        scale = weight.scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        integers = np.rint(values / scale)
        alike = np.array_equal((integers.astype(np.float32) * scale).astype(np.float32), values)
        if alike and np.array_equal(np.sort(integers.ravel()), np.sort(weight.integers)):
            return integers.astype(np.int32), axis
    return None


def narrowed(content: bytes, every: Iterable[IntegerWeight]) -> tuple[bytes, list[str]]:
    """The file with each float32 weight that is one of `every` as int4, int8 or int16 and a DEQUANTIZE before its use.

    Returns the names of those that no constant of the file is; the converter may have put another factor into it.
    """
    import flatbuffers
    from litert_converter import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph, left = model.subgraphs[0], list(every)
    for index in range(len(graph.tensors)):
        tensor = graph.tensors[index]
        data = model.buffers[tensor.buffer].data
        if tensor.type != schema.TensorType.FLOAT32 or data is None or not len(data):
            continue
        values = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
        for place, weight in enumerate(left):
            if (found := integers_in(values, weight)) is not None:
                _replace(model, schema, index, *found, weight.scale)
                del left[place]
                break
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output()), [weight.name for weight in left]


def _replace(model: Any, schema: Any, index: int, integers: np.ndarray, axis: int, scale: np.ndarray) -> None:
    """Tensor `index` of the graph becomes the output of a DEQUANTIZE of a new constant."""
    graph, tensor = model.subgraphs[0], model.subgraphs[0].tensors[index]
    bits = next(b for b in TYPES if _holds(b, integers))
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(contained(integers.reshape(1, -1), bits, True).tobytes(), np.uint8)
    model.buffers.append(buffer)
    constant = schema.TensorT()
    constant.shape, constant.name, constant.buffer = tensor.shape, tensor.name + b"/codes", len(model.buffers) - 1
    constant.type = {4: schema.TensorType.INT4, 8: schema.TensorType.INT8, 16: schema.TensorType.INT16}[bits]
    constant.quantization = schema.QuantizationParametersT()
    constant.quantization.scale = scale.reshape(-1)
    constant.quantization.zeroPoint = np.zeros(scale.size, np.int64)
    constant.quantization.quantizedDimension = axis
    graph.tensors.append(constant)
    code = schema.BuiltinOperator.DEQUANTIZE
    known = [each.builtinCode for each in model.operatorCodes]
    if code not in known:
        added = schema.OperatorCodeT()
        # Readers of the first version of the schema look at the deprecated field. Version 6 knows int4.
        added.builtinCode, added.deprecatedBuiltinCode, added.version = code, code, 6
        model.operatorCodes.append(added)
        known.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = known.index(code)
    operator.inputs, operator.outputs = [len(graph.tensors) - 1], [index]
    operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
    operator.builtinOptions = schema.DequantizeOptionsT()
    graph.operators.insert(0, operator)
    model.buffers[tensor.buffer].data = None
    tensor.buffer = 0


# ---- a program without loops --------------------------------------------------------------------------------------


def _transposed(eqn: Any, ins: Sequence[Any]) -> list[Any]:
    """A transposed convolution with the padding that jax.lax has for "VALID", cut to what it is with its own.

    The converter (0.5) makes something else of other paddings, "SAME" with a stride of one less than the kernel among them,
    and of dilated ones. Raises Refusal for what cannot be had so.
    """
    p, strides = eqn.params, eqn.params["lhs_dilation"]
    numbers = p["dimension_numbers"]
    kernel = [eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec[2:]]
    valid = [(k - 1, max(k, s) - 1) for k, s in zip(kernel, strides, strict=True)]
    cut = [(a - b, c - d) for (a, c), (b, d) in zip(valid, p["padding"], strict=True)]
    if len(strides) != 2 or any(n != 1 for n in (*p["rhs_dilation"], *p["window_strides"])) or min(map(min, cut)) < 0:
        raise _no_form("a transposed convolution with dilation, or with wide padding, or of other than two axes")
    out = eqn.primitive.bind(*ins, **{**p, "padding": tuple(valid)})
    start, stop = [0] * out.ndim, list(out.shape)
    for axis, (first, last) in zip(numbers.out_spec[2:], cut, strict=True):
        start[axis], stop[axis] = first, out.shape[axis] - last
    return [jax.lax.slice(out, start, stop)]


def straight_line(closed: core.ClosedJaxpr, *arguments: Any) -> Any:
    """The jaxpr's outputs, with calls and loops of known length written out and what depends on constants worked out.

    Under a trace: a value that no argument takes part in stays an array. What lies behind a barrier does not.
    """
    outs = _evaluate(closed, arguments)
    return outs[0] if len(outs) == 1 else tuple(outs)


def _evaluate(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    return outputs_of(closed.jaxpr, [*closed.consts, *arguments], lambda literal: literal.val, _equation)


def _equation(eqn: Any, ins: list[Any]) -> list[Any]:
    name, known = eqn.primitive.name, not any(isinstance(x, jax.core.Tracer) for x in ins)
    if (body := called(eqn)) is not None:
        return _evaluate(body, ins)
    if name == "scan" and not known:
        there = loop(eqn, ins)
        return there.unrolled(
            lambda _, operands: _evaluate(there.body, operands), lambda x, i: x[i], lambda ys: jnp.stack(ys)
        )
    if known and name != "optimization_barrier":
        with jax.ensure_compile_time_eval():
            return bind(eqn, ins)
    if name == "conv_general_dilated" and any(n != 1 for n in eqn.params["lhs_dilation"]):
        return _transposed(eqn, ins)
    return bind(eqn, ins)
