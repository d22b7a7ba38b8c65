"""Plain Flax models. Nothing here knows of quantization: they are what a user would bring.

Linen models are called as `model.apply(variables, x, train=False)`, the NNX one as `model(x, train=False)`; `x` is
[B, H, W, C] float, the result float32 logits [B, num_classes].
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from mpq_jax.models.cnn_nnx import CNN
from mpq_jax.models.mobilenet_v1 import MobileNetV1
from mpq_jax.models.resnet import BasicBlock, BottleneckBlock, ResNet
from mpq_jax.models.resnet_cifar import CifarResNet
from mpq_jax.models.vit import ViT

_BUILDERS: dict[str, Callable[..., Any]] = {
    "resnet8": partial(CifarResNet, blocks=1),
    "resnet20": partial(CifarResNet, blocks=3),
    "resnet18": partial(ResNet, block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=BottleneckBlock, depths=(3, 4, 6, 3)),
    "mobilenetv1": MobileNetV1,
    "vit": ViT,
    "cnn_nnx": CNN,
}
NAMES = tuple(_BUILDERS)


def create(name: str, num_classes: int, **options: Any) -> Any:
    """The model called `name`: a Linen module without variables, or for "cnn_nnx" the NNX module with its own.

    options: fields of the model, see `options_of`. Raises ValueError, in one line, for a name or an option that does
    not exist.
    """
    allowed = options_of(name)
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"{name} has no option {option!r}{_nearest(option, allowed)}; it has: {', '.join(allowed)}"
            )
    return _BUILDERS[name](num_classes=num_classes, **options)


def options_of(name: str) -> tuple[str, ...]:
    """The options that `create(name, …)` takes. Raises ValueError for a name that does not exist."""
    if name not in _BUILDERS:
        raise ValueError(f"no model is called {name!r}{_nearest(name, NAMES)}; possible: {', '.join(NAMES)}")
    builder = _BUILDERS[name]
    fixed = {"self", "num_classes", "parent", "name"}
    if isinstance(builder, partial):
        fixed |= set(builder.keywords)
        builder = builder.func
    # Of __init__, because NNX classes show (*args, **kwargs) themselves.
    return tuple(p for p in inspect.signature(builder.__init__).parameters if p not in fixed)


def _nearest(word: str, words: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
