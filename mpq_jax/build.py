"""From a config to the model, the quantizer and the layer table."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax import models
from mpq_jax.config import Config, Quantize
from mpq_jax.pretrained import load_safetensors, torch_names
from mpq_jax.quantized_model import quantize
from mpq_jax.quantizers import QUANTIZERS
from mpq_jax.quantizers.starts import STARTS
from mpq_jax.rules import Rules, parse_value
from mpq_jax.types import Bits, Layer, QuantizedModel, Quantizer, Refusal

# Sample shape and classes of the sets that --describe knows without opening them.
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "imagenet2012": ((224, 224, 3), 1000),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def float_model(config: Config, num_classes: int) -> Any:
    """The user's model: a name in mpq_jax.models, or "package.module:factory" called with (num_classes, **options).

    Raises Refusal for a name or an option that does not exist.
    """
    if config.model.dtype not in DTYPES:
        raise Refusal(f"model.dtype {config.model.dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    options = dict(config.model.options)
    if config.model.dtype != "float32":
        options["dtype"] = DTYPES[config.model.dtype]
    name = config.model.name
    try:
        if ":" not in name:
            return models.create(name, num_classes, **options)
        module, _, factory = name.partition(":")
        return getattr(importlib.import_module(module), factory)(num_classes=num_classes, **options)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise Refusal(f"model {name!r} cannot be made: {str(error).splitlines()[0]}") from None


def quantizer(config: Config) -> Quantizer:
    """The quantizer that the config names, with those options of `quantize` that it takes.

    Raises Refusal for one that does not exist, and for an option of another one that was set.
    """
    settings = config.quantize
    if settings.quantizer not in QUANTIZERS:
        raise Refusal(f"quantizer {settings.quantizer!r} is not known; choose one of {', '.join(QUANTIZERS)}")
    if settings.start not in STARTS:
        raise Refusal(f"quantize.start {settings.start!r} is not known; choose one of {', '.join(STARTS)}")
    takes: dict[str, set[str]] = {name: set(inspect.signature(make).parameters) for name, make in QUANTIZERS.items()}
    mine = takes[settings.quantizer]
    options = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for name in sorted(set().union(*takes.values()) & set(options) - mine):
        if options[name] != getattr(Quantize(), name):
            owners = " and ".join(other for other in takes if name in takes[other])
            raise Refusal(
                f"quantize.{name} is an option of {owners}, not of {settings.quantizer}; leave it out, "
                f"or choose --quantizer {owners.split()[0]}"
            )
    return QUANTIZERS[settings.quantizer](**{name: value for name, value in options.items() if name in mine})


def rules(config: Config) -> Rules:
    """The config's "regex=value" rules as (regex, value) pairs. Raises Refusal for one without "="."""
    pairs = []
    for rule in config.quantize.rules:
        pattern, equals, value = rule.rpartition("=")
        if not equals:
            raise Refusal(f'rule {rule!r} has no "="; write regex=8,8 or regex=float or regex=w2/4/8,a4/8')
        pairs.append((pattern, parse_value(value)))
    return pairs


def quantized(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> QuantizedModel:
    """The config's model, quantized as it says. Only shapes are computed."""
    settings = config.quantize
    ends: Bits | None = None
    if settings.ends != "searched":
        parsed = parse_value(settings.ends) if re.fullmatch(r"\d+,\d+", settings.ends) else None
        if not isinstance(parsed, Bits):
            raise Refusal(f'quantize.ends {settings.ends!r} must be bits such as "8,8", or "searched"')
        ends = parsed
    return quantize(
        float_model(config, num_classes),
        jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
        bit_widths=settings.bit_widths,
        activation_bit_widths=settings.activation_bit_widths or None,
        quantizer=quantizer(config),
        rules=rules(config),
        ends=ends,
        tie_activations=settings.tie_activations,
        train=False,
    )


def float_variables(
    config: Config, model: QuantizedModel, num_classes: int, image_shape: tuple[int, int, int]
) -> Mapping[str, Any]:
    """The float model's variables: its own (NNX), or initialised from the seed; then `model.weights` where given."""
    variables = model.variables
    if variables is None:
        x = jnp.zeros((1, *image_shape), jnp.float32)
        variables = jax.jit(float_model(config, num_classes).init)(jax.random.key(config.seed), x)
    if config.model.weights:
        variables = load_safetensors(config.model.weights, config.model.name, variables)
    return variables


def layer_table(config: Config) -> tuple[Layer, ...]:
    """The layer table of a config, from shapes alone: no data, no training.

    Raises Refusal for a data set whose shape is not known without opening it.
    """
    shape, num_classes = sample_shape(config)
    return quantized(config, num_classes, shape).layers


def sample_shape(config: Config) -> tuple[tuple[int, int, int], int]:
    """((height, width, channels), classes) of a config's data, without opening it.

    Raises Refusal for a data set whose shape is not known.
    """
    if config.data.name not in SHAPES:
        raise Refusal(f"the image shape of {config.data.name!r} is not known here; known are {', '.join(SHAPES)}")
    shape, num_classes = SHAPES[config.data.name]
    size = config.data.image_size
    return (size, size, shape[2]) if size else shape, num_classes


def torch_layer_names(config: Config) -> dict[str, str]:
    """Torch's module name -> path of our layer; see pretrained.torch_names. From shapes alone."""
    shape, num_classes = sample_shape(config)
    model, x = float_model(config, num_classes), jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return torch_names(config.model.name, jax.eval_shape(model.init, jax.random.key(0), x))


def uniform_name(bits: int) -> str:
    """ "W3A3"."""
    return f"W{bits}A{bits}"


__all__ = [
    "float_model",
    "float_variables",
    "layer_table",
    "quantized",
    "quantizer",
    "rules",
    "sample_shape",
    "torch_layer_names",
    "uniform_name",
]
