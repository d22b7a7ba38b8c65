"""Float weights from a `.safetensors` file in timm/torchvision naming, without torch.

Every leaf of our tree has a source: a tensor of the file, or a part of one (timm fuses query, key and value; a scanned
ViT stacks its blocks). Sources are found from the leaf's path, so the file must hold exactly what the tree needs.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from mpq_jax.types import Refusal

# Blocks in each of the five groups of timm's MobileNetV1, which are the runs of equal channel counts.
_MOBILENET_GROUPS = (1, 2, 2, 6, 2)
_TENSORS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class _Source(NamedTuple):
    """Where one leaf, or one block of a scanned leaf, comes from.

    module: torch's name of the module ("" for a parameter of the model itself). tensor: full name in the file.
    part: 0, 1, 2 for query, key, value of a fused tensor, else None.
    """

    module: str
    tensor: str
    part: int | None = None


def load_safetensors(path: str | Path, model_name: str, variables: Any) -> Any:
    """`variables` with every weight, bias and statistic of the float model taken from a file.

    path: a `.safetensors` file in the naming of torchvision or timm: "resnet18", "resnet34" and "resnet50" (conv1,
    layer1.0.conv1, layer1.0.downsample.0, fc), "mobilenetv1" as timm's mobilenetv1_100 (conv_stem, blocks.0.0.conv_dw,
    classifier; timm trained it with ReLU6, so create it with relu6=True), "vit" (patch_embed.proj, blocks.0.attn.qkv,
    head); and "resnet8", "resnet20" named like resnet18 (`linear` for fc and `shortcut` for downsample are also read).
    A leading "module." and num_batches_tracked are ignored.
    variables: {"params", "batch_stats"} of the model `model_name`, arrays or shapes (jax.eval_shape). Leaves that a
    float model does not have, such as step sizes, are kept as they are.

    Raises Refusal for a model without such naming, a file that is missing or not whole, tensors that are missing or
    left over, and tensors of another shape.
    """
    tensors = _normalised(_read(path), model_name)
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    sources = [_sources(model_name, _names(key), leaf) for key, leaf in leaves]
    _check_names(path, model_name, tensors, {s.tensor for found in sources for s in found})
    filled = [_fill(path, tensors, _names(k), leaf, s) for (k, leaf), s in zip(leaves, sources, strict=True)]
    return jax.tree_util.tree_unflatten(tree, filled)


def torch_names(model_name: str, variables: Any) -> dict[str, str]:
    """Torch's module name -> path of our layer, for every layer with a kernel, sorted by torch's name.

    variables: as for `load_safetensors`. The three layers of a fused attention projection are told apart as
    "blocks.0.attn.qkv.query" (key, value); the layers of a scanned stack are "blocks/attn/query[0]", ….

    Raises Refusal for a model without such naming.
    """
    found: dict[str, str] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        names = _names(key)
        if names[-1] != "kernel":
            continue
        sources = _sources(model_name, names, leaf)
        for i, source in enumerate(sources):
            torch = source.module if source.part is None else f"{source.module}.{names[-2]}"
            path = "/".join(names[1:-1])
            found[torch] = f"{path}[{i}]" if _scanned(names) else path
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


# ---- the file -----------------------------------------------------------------------------------------------------


def _read(path: str | Path) -> dict[str, np.ndarray]:
    """Tensor name -> array; Refusal unless the file is a whole safetensors file of floats."""
    advice = "give a .safetensors file (a torch .pth file can be converted with safetensors.torch.save_file)"
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist; {advice}") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}); {advice}") from None
    try:
        views = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise Refusal(f"{path} is not a whole safetensors file ({_one_line(error)}); {advice}") from None
    tensors = {}
    for name, view in views:
        if name.endswith("num_batches_tracked"):
            continue
        if view["dtype"] not in _NUMPY_TYPES:
            kinds = ", ".join(_NUMPY_TYPES)
            raise Refusal(f"{path} stores {name} as {view['dtype']}; weights can be {kinds}: save the float weights")
        tensors[name] = np.frombuffer(view["data"], _NUMPY_TYPES[view["dtype"]]).reshape(view["shape"])
    return tensors


def _normalised(tensors: Mapping[str, np.ndarray], model_name: str) -> dict[str, np.ndarray]:
    """The tensors without the "module." of a parallel wrapper, aliases of small ResNets replaced."""
    result = {name.removeprefix("module."): value for name, value in tensors.items()}
    if model_name in ("resnet8", "resnet20"):
        result = {
            re.sub(r"^linear\.", "fc.", name.replace(".shortcut.", ".downsample.")): v for name, v in result.items()
        }
    return result


def _check_names(path: str | Path, model_name: str, found: Mapping[str, Any], wanted: set[str]) -> None:
    missing = sorted(wanted - set(found), key=_natural)
    extra = sorted(set(found) - wanted, key=_natural)
    problems = []
    if missing:
        problems.append(f"lacks {_count(missing)} of {model_name} (the first is {missing[0]})")
    if extra:
        problems.append(f"has {_count(extra)} that {model_name} has not (the first is {extra[0]})")
    if problems:
        raise Refusal(f"{path} {' and '.join(problems)}; give the weights of a {model_name} in timm/torchvision naming")


# ---- leaves and their sources --------------------------------------------------------------------------------------


def _sources(model_name: str, names: tuple[str, ...], leaf: Any) -> list[_Source]:
    """The tensors that fill one leaf: one, one for each block of a scanned leaf, or none for a leaf of another kind."""
    if model_name not in _MODULE_NAMES:
        known = ", ".join(_MODULE_NAMES)
        raise Refusal(f"no naming of weights is known for {model_name!r}; possible: {known}; train it from scratch")
    if names[0] not in ("params", "batch_stats"):
        return []
    *modules, last = names[1:]
    if not modules and last in ("cls_token", "pos_embed"):
        return [_Source("", last)]
    if last not in _TENSORS:
        return []
    if _scanned(names):
        return [_source(model_name, [f"block{i + 1}", *modules[1:]], last) for i in range(leaf.shape[0])]
    return [_source(model_name, modules, last)]


def _source(model_name: str, modules: list[str], last: str) -> _Source:
    try:
        module = _MODULE_NAMES[model_name](modules)
    except (IndexError, KeyError, ValueError):
        where = "/".join((*modules, last))
        raise Refusal(f"{where} is no parameter of a {model_name}; give the variables of a {model_name}") from None
    part = ("query", "key", "value").index(modules[-1]) if modules[-1] in ("query", "key", "value") else None
    return _Source(module, f"{module}.{_TENSORS[last]}", part)


def _scanned(names: tuple[str, ...]) -> bool:
    """Whether the leaf stacks the blocks of a ViT made with scan=True."""
    return names[1] == "blocks"


def _resnet_module(modules: list[str]) -> str:
    if modules[0] == "stem":
        return {"conv": "conv1", "bn": "bn1"}[modules[1]]
    if modules[0] == "head":
        return "fc"
    last = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}.get(modules[2], modules[2])
    return f"layer{_number(modules[0])}.{_number(modules[1]) - 1}.{last}"


def _mobilenet_module(modules: list[str]) -> str:
    if modules[0] == "stem":
        return {"conv": "conv_stem", "bn": "bn1"}[modules[1]]
    if modules[0] == "head":
        return "classifier"
    group, index = 0, _number(modules[0]) - 1
    while index >= _MOBILENET_GROUPS[group]:
        index -= _MOBILENET_GROUPS[group]
        group += 1
    last = {"depthwise": "conv_dw", "pointwise": "conv_pw"}.get(modules[1], modules[1])
    return f"blocks.{group}.{index}.{last}"


def _vit_module(modules: list[str]) -> str:
    if modules[0] == "patch_embed":
        return "patch_embed.proj"
    if not modules[0].startswith("block"):
        return modules[0]
    inner = modules[1:]
    if inner[0] == "attn":
        inner = ["attn", "proj" if inner[1] == "out" else "qkv"]
    return ".".join(["blocks", str(_number(modules[0]) - 1), *inner])


_MODULE_NAMES: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(("resnet8", "resnet20", "resnet18", "resnet34", "resnet50"), _resnet_module),
    "mobilenetv1": _mobilenet_module,
    "vit": _vit_module,
}


# ---- values -------------------------------------------------------------------------------------------------------


def _fill(
    path: str | Path, tensors: Mapping[str, np.ndarray], names: tuple[str, ...], leaf: Any, sources: list[_Source]
) -> Any:
    """The leaf's new value; the leaf itself where it has no source."""
    if not sources:
        return leaf
    scanned = _scanned(names)
    shape = tuple(leaf.shape[1:] if scanned else leaf.shape)
    values = [_converted(path, tensors[s.tensor], shape, names, s) for s in sources]
    return jnp.asarray(np.stack(values) if scanned else values[0], leaf.dtype)


def _converted(
    path: str | Path, tensor: np.ndarray, shape: tuple[int, ...], names: tuple[str, ...], source: _Source
) -> np.ndarray:
    """A tensor in torch's layout -> ours of `shape`: OIHW to HWIO, [out, in] to [in, out], heads apart."""
    wanted = _torch_shape(shape, names)
    if tensor.shape != wanted:
        raise Refusal(
            f"{path} has {source.tensor} of shape {list(tensor.shape)}, the model needs {list(wanted)}; "
            "create the model with the options (classes, width, image size) that these weights were trained with"
        )
    if source.part is not None:
        tensor = np.split(tensor, 3)[source.part]
    if names[-1] == "kernel":
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor.reshape(shape)


def _torch_shape(shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[int, ...]:
    """The shape that torch gives the tensor of a leaf of `shape`; for query, key and value that of all three."""
    module, last = names[-2], names[-1]
    if module in ("query", "key", "value"):
        features = 3 * shape[-2] * shape[-1]
        return (features, shape[0]) if last == "kernel" else (features,)
    if last != "kernel":
        return shape
    if len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return (shape[-1], int(np.prod(shape[:-1])))


# ---- small things --------------------------------------------------------------------------------------------------


def _names(key: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in key)


def _number(name: str) -> int:
    """12 of "block12"."""
    return int(re.sub(r"\D", "", name))


def _natural(name: str) -> list[Any]:
    """Sorts blocks.2 before blocks.10."""
    return [(0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", name) if t]


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
