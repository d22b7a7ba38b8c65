"""From a config to the model, the quantizer and the layer table."""

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpq_jax import data, factories, models, trial, weights
from mpq_jax.config import Config, Quantize
from mpq_jax.data.opening import image_features
from mpq_jax.float_model import FloatModel
from mpq_jax.float_model import float_model as checked
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


# Array name -> (shape, dtype) of one example in a batch.
Features = Mapping[str, tuple[tuple[int, ...], Any]]


def float_model(config: Config, num_classes: int | None) -> FloatModel:
    """The config's model: a name in mpq_jax.models, or the user's "package.module:factory".

    A factory is called with model.options, and with num_classes where it takes that.
    Raises Refusal for a name or an option that does not exist, and for what is no model.
    """
    if config.model.dtype not in DTYPES:
        raise Refusal(f"model.dtype {config.model.dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    options, name = dict(config.model.options), config.model.name
    if config.model.dtype != "float32":
        options["dtype"] = DTYPES[config.model.dtype]
    if factories.is_factory(name):
        offered = {} if num_classes is None else {"num_classes": num_classes}
        try:
            return checked(factories.made("--model", name, options, offered), f"--model {name}")
        except factories.Needed as error:
            if error.option != "num_classes":
                raise
            raise Refusal(
                f"--model {name} takes num_classes, and --data {config.data.name} does not tell it: number the labels from 0, "
                'or give "num_classes" beside the splits'
            ) from None
    if num_classes is None:
        raise Refusal(f"model {name!r} needs to know the classes, and --data {config.data.name} has no integer label")
    try:
        return checked(models.create(name, num_classes, **options), f"--model {name}")
    except (TypeError, ValueError) as error:
        raise Refusal(f"model {name!r} cannot be made: {str(error).splitlines()[0]}") from None


def open_data(config: Config) -> data.Dataset | data.OwnData:
    """The config's data set, or the user's own. Raises Refusal for what is not there or cannot be used."""
    settings = config.data
    common: dict[str, Any] = {
        "validation_fraction": settings.validation_fraction,
        "seed": config.seed,
        "augment": settings.augment,
    }
    if factories.is_factory(settings.name):
        found = factories.made("--data", settings.name, settings.options)
        return data.open_own(settings.name, found, **common)
    if settings.options:
        raise Refusal(
            f"data.options are for a function of your own (--data my_pkg.module:function), not for {settings.name}"
        )
    return data.open_dataset(
        settings.name, data_dir=settings.data_dir or None, image_size=settings.image_size or None, **common
    )


def example(model: FloatModel, features: Features, count: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of what the model is called with, for `count` examples. Raises Refusal for an input the data lack."""
    if missing := [name for name in model.inputs if name not in features]:
        raise Refusal(
            f"the model takes {missing[0]!r}, and the data have {', '.join(features)}; name what it takes: "
            "mpq_jax.FloatModel(…, inputs=(…,))"
        )
    return tuple(jax.ShapeDtypeStruct((count, *features[name][0]), features[name][1]) for name in model.inputs)


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


def quantized(config: Config, model: FloatModel, features: Features) -> QuantizedModel:
    """The model, quantized as the config says. Only shapes are computed."""
    settings = config.quantize
    ends: Bits | None = None
    if settings.ends != "searched":
        parsed = parse_value(settings.ends) if re.fullmatch(r"\d+,\d+", settings.ends) else None
        if not isinstance(parsed, Bits):
            raise Refusal(f'quantize.ends {settings.ends!r} must be bits such as "8,8", or "searched"')
        ends = parsed
    inputs = example(model, features)
    shapes = trial.shapes(model, inputs, config.model.name)
    found = quantize(
        model.module,
        *inputs,
        bit_widths=settings.bit_widths,
        activation_bit_widths=settings.activation_bit_widths or None,
        quantizer=quantizer(config),
        rules=rules(config),
        ends=ends,
        tie_activations=settings.tie_activations,
        variables=shapes,
        **(model.eval_kwargs or {}),
    )
    if factories.is_factory(config.model.name):
        trial.check_calls(model, found, shapes, features, config.model.name)
    return found


def float_variables(
    config: Config, model: FloatModel, quantized: QuantizedModel, features: Features
) -> Mapping[str, Any]:
    """The float model's variables: its own, or initialised from the seed; then `model.weights` where given."""
    inputs = example(model, features)
    variables = quantized.variables
    if model.variables is not None:
        variables = weights.owned(model, trial.shapes(model, inputs, config.model.name), config.model.name)
    elif variables is None:
        variables = jax.jit(lambda: trial.init(model, jax.random.key(config.seed), inputs))()
    if not config.model.weights:
        return variables
    if factories.is_factory(config.model.name):
        return weights.load(config.model.weights, variables)
    return load_safetensors(config.model.weights, config.model.name, variables)


def layer_table(config: Config) -> tuple[Layer, ...]:
    """The layer table of a config, from shapes alone: no training, and no data but a user's own.

    Raises Refusal for a data set whose shape is not known without opening it.
    """
    found, num_classes = features(config)
    return quantized(config, float_model(config, num_classes), found).layers


def features(config: Config) -> tuple[Features, int | None]:
    """(features, classes) of a config's data, without opening it where it is not the user's own.

    Raises Refusal for a data set whose shape is not known.
    """
    if factories.is_factory(config.data.name):
        opened = open_data(config)
        return opened.features, opened.num_classes
    if config.data.name not in SHAPES:
        raise Refusal(f"the image shape of {config.data.name!r} is not known here; known are {', '.join(SHAPES)}")
    shape, num_classes = SHAPES[config.data.name]
    size = config.data.image_size
    return image_features((size, size, shape[2]) if size else shape), num_classes


def torch_layer_names(config: Config) -> dict[str, str]:
    """Torch's module name -> path of our layer; see pretrained.torch_names. From shapes alone."""
    found, num_classes = features(config)
    model = float_model(config, num_classes)
    return torch_names(config.model.name, trial.shapes(model, example(model, found), config.model.name))


def uniform_name(bits: int) -> str:
    """ "W3A3"."""
    return f"W{bits}A{bits}"


__all__ = [
    "example",
    "features",
    "float_model",
    "float_variables",
    "layer_table",
    "open_data",
    "quantized",
    "quantizer",
    "rules",
    "torch_layer_names",
    "uniform_name",
]
