"""A user's float model: the module as it is, and the little that has to be known of it. No JAX until one is made."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mpq_jax.types import Refusal

# Keywords by which modules are told whether they are in training, and what they are then.
FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


class FloatModel(NamedTuple):
    """A float model and how it is called. All but `module` may be left out.

    module: a Linen or an NNX module, as its owner wrote it.
    variables: trained variables of a Linen module, {"params": …, "batch_stats": …}: then it is not trained again.
    trained: an NNX module holds trained parameters: then it is not trained again.
    inputs: names of the arrays in a batch that the module is called with, in order.
    train_kwargs, eval_kwargs: keyword arguments of the call in training and in evaluation. None: what the call's
        signature has of train, training, is_training, deterministic, use_running_average, inference; NNX modules get
        train() and eval() too.
    rngs: random streams that a Linen module asks for in training.
    loss(outputs, batch) -> [B, ...]: of each example, in nats or what you like; further axes are averaged. None:
        cross-entropy of logits [B, classes] against "label", int [B].
    correct(outputs, batch) -> [B, ...]: what is right of each example, 0 to 1, where the loss is your own. None: the
        reports show losses only.
    """

    module: Any
    variables: Mapping[str, Any] | None = None
    trained: bool = False
    inputs: tuple[str, ...] = ("image",)
    train_kwargs: Mapping[str, Any] | None = None
    eval_kwargs: Mapping[str, Any] | None = None
    rngs: tuple[str, ...] = ("dropout",)
    loss: Callable[[Any, Mapping[str, Any]], Any] | None = None
    correct: Callable[[Any, Mapping[str, Any]], Any] | None = None

    @property
    def is_trained(self) -> bool:
        return self.trained or self.variables is not None


WANTED = "a Linen or NNX module, (module, variables) with trained weights, or mpq_jax.FloatModel(…)"


def float_model(found: Any, where: str) -> FloatModel:
    """What a factory returned, as a FloatModel with its keyword arguments filled in.

    where: the factory, for messages. Raises Refusal for anything that is none of WANTED.
    """
    from flax import linen, nnx

    if isinstance(found, FloatModel):
        model = found
    elif isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        model = FloatModel(found[0], found[1])
    else:
        model = FloatModel(found)
    module = model.module
    if inspect.isclass(module):
        raise Refusal(f"{where} returned the class {module.__name__}, not a model of it; return {module.__name__}(…)")
    if not isinstance(module, (linen.Module, nnx.Module)):
        raise Refusal(f"{where} returned {_described(found)}; return {WANTED}")
    is_nnx = isinstance(module, nnx.Module)
    if is_nnx and model.variables is not None:
        raise Refusal(
            f"{where} gave variables beside an NNX module, which holds its own; use FloatModel(…, trained=True)"
        )
    if not is_nnx and model.trained and model.variables is None:
        raise Refusal(f"{where} says trained=True and gives no variables; return FloatModel(module, variables)")
    if model.variables is not None and "params" not in model.variables:
        names = ", ".join(map(str, list(model.variables)[:3])) or "nothing"
        raise Refusal(f'{where} gave variables of {names}; a Linen model has {{"params": …, "batch_stats": …}}')
    inputs = (model.inputs,) if isinstance(model.inputs, str) else tuple(model.inputs)
    rngs = (model.rngs,) if isinstance(model.rngs, str) else tuple(model.rngs)
    if not inputs:
        raise Refusal(
            f'{where} names no inputs; name the arrays of a batch that the module takes, e.g. inputs=("image",)'
        )
    for name in ("loss", "correct"):
        if getattr(model, name) is not None and not callable(getattr(model, name)):
            raise Refusal(
                f"{where} gave {_described(getattr(model, name))} as {name}; give a function of (outputs, batch)"
            )
    if model.correct is not None and model.loss is None:
        raise Refusal(f"{where} gave correct without loss; give both, or neither for classification by label")
    modes = call_flags(module, is_nnx)

    def kwargs(given: Mapping[str, Any] | None, mode: Mapping[str, bool]) -> dict[str, Any]:
        if given is None:
            return dict(mode)
        # An NNX module's own mode has to be set where the call's arguments do not say it.
        return {**mode, **given} if is_nnx and not set(given) & set(FLAGS) else dict(given)

    train_kwargs, eval_kwargs = kwargs(model.train_kwargs, modes[0]), kwargs(model.eval_kwargs, modes[1])
    return model._replace(inputs=inputs, rngs=rngs, train_kwargs=train_kwargs, eval_kwargs=eval_kwargs)


def call_flags(module: Any, is_nnx: bool) -> tuple[dict[str, bool], dict[str, bool]]:
    """The module's keyword arguments in training and in evaluation, by the names that its call has."""
    parameters = inspect.signature(type(module).__call__).parameters
    named = {flag: value for flag, value in FLAGS.items() if flag in parameters}
    if not named and is_nnx:
        named = {"train": True}  # the seam makes the module's own mode of it
    return named, {flag: not value for flag, value in named.items()}


def _described(found: Any) -> str:
    if found is None:
        return "None"
    name = type(found).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
