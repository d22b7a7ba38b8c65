"""What the agents of HAQ and AutoQ see of a layer: its shape, from one abstract trace, and its weights' spread."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import ops
from mpq_jax.interpret import Call
from mpq_jax.search.problem import Problem
from mpq_jax.types import QuantizedModel


def row_features(
    problem: Problem,
    model: QuantizedModel,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> np.ndarray:
    """[L, 8] of the problem's rows, each column min-max normalised over them; a column of one value is 0.

    Depthwise, channels in, channels out, stride, kernel size, weights, positions of the input, index: HAQ's state but
    for the action before and the flag (of a dense layer, stride 0 and kernel 1, as in HAQ's code). Of a row of several
    layers, those of its first.
    """
    seen = layer_features(model, variables, inputs, kwargs)
    rows = np.array([[*seen[paths[0]], row] for row, paths in enumerate(problem.paths)], np.float64)
    return normalised(rows)


def normalised(rows: np.ndarray) -> np.ndarray:
    """(x - min) / (max - min) of each column; 0 where all are equal."""
    low, high = rows.min(0), rows.max(0)
    return (rows - low) / np.where(high > low, high - low, 1)


def layer_features(
    model: QuantizedModel, variables: Mapping[str, Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """path -> (depthwise, channels in, channels out, stride, kernel, weights, positions), from shapes alone."""
    found: dict[str, tuple[int, ...]] = {}

    def record(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, None]:
        spec = model.specs[call.leaf]
        weight, activation = (lhs, rhs) if call.weight_side == 0 else (rhs, lhs)
        shape = _shape(call, weight.shape, activation.shape)
        for path in spec.paths:
            found.setdefault(path, (int(spec.kind == "depthwise"), *shape))
        return ops.contract(call.primitive, call.params, "plain")(lhs, rhs), None

    def trace(variables: Any, *inputs: Any) -> Any:
        return model.walk(variables, {}, record, inputs, kwargs)[0]

    jax.eval_shape(trace, variables, *inputs)
    return found


def _shape(call: Call, weight: tuple[int, ...], activation: tuple[int, ...]) -> tuple[int, ...]:
    """(channels in, channels out, stride, kernel, weights, positions) of one product."""
    weights = int(np.prod(weight))
    channels_out = int(np.prod([weight[i] for i in call.channel_axes]))
    if call.primitive == "conv_general_dilated":
        numbers = call.params["dimension_numbers"]
        channels_in = activation[numbers.lhs_spec[1]]
        stride, kernel = call.params["window_strides"][0], weight[numbers.rhs_spec[2]]
        positions = int(np.prod([activation[i] for i in numbers.lhs_spec[2:]]))
        return channels_in, channels_out, stride, kernel, weights, positions
    channels_in = weights // channels_out
    return channels_in, channels_out, 0, 1, weights, int(np.prod(activation[1:])) // channels_in


def channel_spreads(
    problem: Problem,
    model: QuantizedModel,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[np.ndarray]:
    """Per row [C]: the variance of each output channel's weights, min-max normalised within the layer (0 if equal).

    Of a row of several layers, those of its first. What AutoQ tells channels apart by.
    """

    def variance(call: Call, lhs: jax.Array, rhs: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        weight = lhs if call.weight_side == 0 else rhs
        axes = tuple(i for i in range(weight.ndim) if i not in call.channel_axes)
        return ops.contract(call.primitive, call.params, "plain")(lhs, rhs), weight.var(axes).reshape(-1)

    def run(variables: Any) -> Any:
        zeros = [jnp.zeros(x.shape, x.dtype) for x in inputs]
        return model.walk(variables, {}, variance, zeros, kwargs)[2]

    taps = jax.jit(run)(variables)
    spreads = {}
    for spec in model.specs.values():
        tap = np.asarray(taps[spec.leaf, 0], np.float64)
        each = tap.mean(spec.shared) if spec.shared else tap
        for path, values in zip(spec.paths, each.reshape(len(spec.paths), -1), strict=True):
            spreads[path] = normalised(values[:, None])[:, 0]
    return [spreads[paths[0]] for paths in problem.paths]
