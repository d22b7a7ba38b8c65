"""What onnxruntime makes of a standard ONNX file, against the fake-quantized model in JAX."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import replay
from mpq_jax.export.graph import Graph, graph
from mpq_jax.export.onnx_writer import CODES, helper, onnx
from mpq_jax.tasks import answer_of
from mpq_jax.types import Policy, QuantizedModel, Refusal

CLOSE = 1e-4  # of the largest logit


class Run(NamedTuple):
    """One way of running the file.

    close: share of images whose logits are all within 1e-4 of the largest |logit| of the set. top1: share of images
    with the same largest logit. worst: the largest difference of a logit, in units of the largest |logit|.
    flips: codes at quantized inputs that differ from JAX's, of `codes` in all; by_layer: {layer path: flips}.
    """

    close: float
    top1: float
    worst: float
    flips: int
    codes: int
    by_layer: Mapping[str, int]


class Comparison(NamedTuple):
    """off, on: with onnxruntime's graph optimisations off, and with all of them."""

    images: int
    off: Run
    on: Run


def compare(
    proto: Any,
    model: QuantizedModel,
    variables: Any,
    policy: Policy | None,
    images: np.ndarray,
    *,
    batch: int = 100,
    **kwargs: Any,
) -> Comparison:
    """Runs a file of `standard` on images [N, ...] and compares it with `model.apply`, `batch` images at a time.

    A code differs where a value lies so near the middle of two levels that the order in which float32 sums were taken
    decides: convolutions and means sum in another order, and BatchNorm's factors may be multiplied into a kernel first.
    JAX's codes are those of a run operation by operation. onnxruntime's are read in a second run with all of them as
    outputs, which may leave its optimisations less to do. Of several outputs the logits are compared, or else the first.
    """
    images = np.asarray(images, np.float32)
    batch = min(batch, len(images))

    def made(n: int) -> Graph:
        return graph(model, variables, policy, jax.ShapeDtypeStruct((n, *images.shape[1:]), jnp.float32), **kwargs)

    like = jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
    answer = answer_of(jax.tree.structure(jax.eval_shape(lambda x: model.apply(variables, policy, x, **kwargs), like)))
    run = replay.runner(made, replay.fake_quantized, answer)
    apply = jax.jit(lambda x: jax.tree.leaves(model.apply(variables, policy, x, **kwargs))[answer])
    record = {name: (path, order) for name, (path, order) in json.loads(_metadata(proto)[CODES]).items()}
    sessions = {
        level: (_session(proto, level), _session(_with_codes(proto, list(record)), level)) for level in ("off", "on")
    }
    logits: dict[str, list[np.ndarray]] = {"jax": [], "off": [], "on": []}
    flips = {level: [0] * len(record) for level in sessions}
    total = 0
    for start in range(0, len(images), batch):
        taken = images[start : start + batch]
        # The last ones are filled up: one compilation.
        x = np.concatenate([taken, np.repeat(taken[-1:], batch - len(taken), axis=0)])
        logits["jax"].append(np.asarray(apply(x))[: len(taken)])
        expected = [codes[: len(taken)] for _, codes in run(x)[1]]
        total += sum(codes.size for codes in expected)
        for level, (plain, telling) in sessions.items():
            logits[level].append(plain.run(None, {plain.get_inputs()[0].name: taken})[answer])
            if not record:
                continue
            found = telling.run([f"{name}_int32" for name in record], {telling.get_inputs()[0].name: taken})
            for i, ((_, order), theirs, ours) in enumerate(zip(record.values(), found, expected, strict=True)):
                flips[level][i] += int((theirs.reshape(-1) != ours.transpose(order).reshape(-1)).sum())
    whole = {name: np.concatenate(parts) for name, parts in logits.items()}
    paths = [path for path, _ in record.values()]
    return Comparison(
        len(images), *(_run(whole["jax"], whole[level], flips[level], paths, total) for level in ("off", "on"))
    )


def _run(ours: np.ndarray, theirs: np.ndarray, flips: list[int], paths: list[str], total: int) -> Run:
    apart = np.abs(ours - theirs) / np.abs(ours).max()
    by_layer = dict.fromkeys(paths, 0)
    for path, n in zip(paths, flips, strict=True):
        by_layer[path] += n
    return Run(
        close=float((apart.reshape(len(apart), -1).max(1) <= CLOSE).mean()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        worst=float(apart.max()),
        flips=sum(flips),
        codes=total,
        by_layer=by_layer,
    )


# ---- onnxruntime --------------------------------------------------------------------------------------------------


def _metadata(proto: Any) -> dict[str, str]:
    found = {entry.key: entry.value for entry in proto.metadata_props}
    if CODES not in found:
        raise Refusal("the file says nothing of its codes; compare takes what mpq_jax.export.onnx.standard makes")
    return found


def _with_codes(proto: Any, names: list[str]) -> Any:
    """The file with the codes as further outputs, int32 (Python knows no 4-bit arrays)."""
    told = onnx.ModelProto()
    told.CopyFrom(proto)
    for name in names:
        told.graph.node.append(helper.make_node("Cast", [name], [f"{name}_int32"], to=onnx.TensorProto.INT32))
        told.graph.output.append(helper.make_empty_tensor_value_info(f"{name}_int32"))
    return told


def _session(proto: Any, level: str) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise Refusal("running ONNX files needs onnxruntime; type: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if level == "off" else levels.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
