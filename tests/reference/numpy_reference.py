"""The float models once more, in NumPy and float64, read from tensors in torch's names and layout.

An independent check of mpq_jax.models and mpq_jax.pretrained: it knows neither JAX nor our names. Names and layouts
are torchvision's (ResNet-18, -34, -50) and timm's (mobilenetv1_100, VisionTransformer); the small ResNets are named
alike. By hand:

    python tests/reference/numpy_reference.py make resnet18 weights.safetensors
    python tests/reference/numpy_reference.py logits resnet18 weights.safetensors images.npy

where images.npy holds [B, H, W, C] floats, normalized as the model wants them.
"""

import argparse
import math
from collections.abc import Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file, save_file

Tensors = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

RESNETS = {
    "resnet8": ("small", (1, 1, 1)),
    "resnet20": ("small", (3, 3, 3)),
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
}
# timm's arch_def of mobilenetv1_100: (repeats, stride of the first, channels).
MOBILENET = ((1, 1, 64), (2, 2, 128), (2, 2, 256), (6, 2, 512), (2, 2, 1024))


# ---- operations, torch's layout: [B, C, H, W] and [out, in, h, w] --------------------------------------------------


def conv2d(x: np.ndarray, weight: np.ndarray, stride: int, padding: int, groups: int = 1) -> np.ndarray:
    """Cross-correlation by windows; groups is 1 or the number of channels."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    if groups > 1:
        return np.einsum("bchwij,cij->bchw", windows, weight[:, 0])
    return np.moveaxis(np.tensordot(windows, weight, axes=([1, 4, 5], [1, 2, 3])), -1, 1)


def batch_norm(x: np.ndarray, t: Tensors, name: str) -> np.ndarray:
    shape = (1, -1, 1, 1)
    mean, var = t[f"{name}.running_mean"].reshape(shape), t[f"{name}.running_var"].reshape(shape)
    weight, bias = t[f"{name}.weight"].reshape(shape), t[f"{name}.bias"].reshape(shape)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def max_pool(x: np.ndarray) -> np.ndarray:
    """3x3, stride 2, padding 1."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    return sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max(axis=(-1, -2))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def linear(x: np.ndarray, t: Tensors, name: str) -> np.ndarray:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def layer_norm(x: np.ndarray, t: Tensors, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return normal * t[f"{name}.weight"] + t[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- models -------------------------------------------------------------------------------------------------------


def resnet(t: Tensors, x: np.ndarray, kind: str, depths: tuple[int, ...]) -> np.ndarray:
    if kind == "small":
        x = relu(batch_norm(conv2d(x, t["conv1.weight"], 1, 1), t, "bn1"))
    else:
        x = max_pool(relu(batch_norm(conv2d(x, t["conv1.weight"], 2, 3), t, "bn1")))
    for layer, depth in enumerate(depths, start=1):
        for block in range(depth):
            x = residual(t, x, f"layer{layer}.{block}", kind, 2 if layer > 1 and block == 0 else 1)
    return linear(x.mean((2, 3)), t, "fc")


def residual(t: Tensors, x: np.ndarray, name: str, kind: str, stride: int) -> np.ndarray:
    # (stride, padding) of each convolution: torchvision strides the 3x3.
    convs = ((1, 0), (stride, 1), (1, 0)) if kind == "bottleneck" else ((stride, 1), (1, 1))
    y = x
    for i, (s, p) in enumerate(convs, start=1):
        y = batch_norm(conv2d(y, t[f"{name}.conv{i}.weight"], s, p), t, f"{name}.bn{i}")
        y = relu(y) if i < len(convs) else y
    if f"{name}.downsample.0.weight" in t:
        x = batch_norm(conv2d(x, t[f"{name}.downsample.0.weight"], stride, 0), t, f"{name}.downsample.1")
    return relu(x + y)


def mobilenet(t: Tensors, x: np.ndarray, relu6: bool) -> np.ndarray:
    def act(y: np.ndarray) -> np.ndarray:
        return np.clip(y, 0, 6) if relu6 else relu(y)

    x = act(batch_norm(conv2d(x, t["conv_stem.weight"], 2, 1), t, "bn1"))
    for group, (repeats, stride, _) in enumerate(MOBILENET):
        for i in range(repeats):
            name = f"blocks.{group}.{i}"
            x = conv2d(x, t[f"{name}.conv_dw.weight"], stride if i == 0 else 1, 1, groups=x.shape[1])
            x = act(batch_norm(x, t, f"{name}.bn1"))
            x = act(batch_norm(conv2d(x, t[f"{name}.conv_pw.weight"], 1, 0), t, f"{name}.bn2"))
    return linear(x.mean((2, 3)), t, "classifier")


def vit(t: Tensors, x: np.ndarray, heads: int) -> np.ndarray:
    weight = t["patch_embed.proj.weight"]
    x = conv2d(x, weight, weight.shape[-1], 0) + t["patch_embed.proj.bias"].reshape(1, -1, 1, 1)
    x = np.moveaxis(x.reshape(*x.shape[:2], -1), 1, 2)
    x = np.concatenate([np.repeat(t["cls_token"], len(x), axis=0), x], axis=1) + t["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    for i in range(depth):
        b = f"blocks.{i}"
        x = x + attention(t, layer_norm(x, t, f"{b}.norm1"), f"{b}.attn", heads)
        x = x + linear(gelu(linear(layer_norm(x, t, f"{b}.norm2"), t, f"{b}.mlp.fc1")), t, f"{b}.mlp.fc2")
    return linear(layer_norm(x, t, "norm")[:, 0], t, "head")


def attention(t: Tensors, x: np.ndarray, name: str, heads: int) -> np.ndarray:
    batch, tokens, dim = x.shape
    qkv = linear(x, t, f"{name}.qkv").reshape(batch, tokens, 3, heads, dim // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    weights = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(dim // heads))
    return linear((weights @ v).swapaxes(1, 2).reshape(batch, tokens, dim), t, f"{name}.proj")


def logits(model: str, tensors: Tensors, images: np.ndarray, heads: int = 4, relu6: bool = False) -> np.ndarray:
    """[B, H, W, C] images -> float64 logits [B, classes]."""
    t = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    x = np.moveaxis(np.asarray(images, np.float64), -1, 1)
    if model in RESNETS:
        return resnet(t, x, *RESNETS[model])
    return mobilenet(t, x, relu6) if model == "mobilenetv1" else vit(t, x, heads)


# ---- made weights -------------------------------------------------------------------------------------------------


def _norm(shapes: Shapes, name: str, channels: int) -> None:
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{name}.{tensor}"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def _linear(shapes: Shapes, name: str, outputs: int, inputs: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)


def resnet_shapes(kind: str, depths: tuple[int, ...], classes: int, channels: int) -> Shapes:
    width, size, expansion = (16, 3, 1) if kind == "small" else (64, 7, 4 if kind == "bottleneck" else 1)
    shapes: Shapes = {"conv1.weight": (width, channels, size, size)}
    _norm(shapes, "bn1", width)
    inputs = width
    for layer, depth in enumerate(depths, start=1):
        middle = width * 2 ** (layer - 1)
        for block in range(depth):
            b, out = f"layer{layer}.{block}", middle * expansion
            sizes = ((middle, 1), (middle, 3), (out, 1)) if kind == "bottleneck" else ((middle, 3), (out, 3))
            previous = inputs
            for i, (c, k) in enumerate(sizes, start=1):
                shapes[f"{b}.conv{i}.weight"] = (c, previous, k, k)
                _norm(shapes, f"{b}.bn{i}", c)
                previous = c
            if block == 0 and (layer > 1 or inputs != out):
                shapes[f"{b}.downsample.0.weight"] = (out, inputs, 1, 1)
                _norm(shapes, f"{b}.downsample.1", out)
            inputs = out
    _linear(shapes, "fc", classes, inputs)
    return shapes


def mobilenet_shapes(classes: int, channels: int) -> Shapes:
    shapes: Shapes = {"conv_stem.weight": (32, channels, 3, 3)}
    _norm(shapes, "bn1", 32)
    inputs = 32
    for group, (repeats, _, outputs) in enumerate(MOBILENET):
        for i in range(repeats):
            b = f"blocks.{group}.{i}"
            shapes[f"{b}.conv_dw.weight"] = (inputs, 1, 3, 3)
            _norm(shapes, f"{b}.bn1", inputs)
            shapes[f"{b}.conv_pw.weight"] = (outputs, inputs, 1, 1)
            _norm(shapes, f"{b}.bn2", outputs)
            inputs = outputs
    _linear(shapes, "classifier", classes, inputs)
    return shapes


def vit_shapes(classes: int, channels: int, patch: int, dim: int, depth: int, patches: int) -> Shapes:
    shapes: Shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + patches, dim)}
    shapes["patch_embed.proj.weight"], shapes["patch_embed.proj.bias"] = (dim, channels, patch, patch), (dim,)
    for i in range(depth):
        b = f"blocks.{i}"
        _linear(shapes, f"{b}.attn.qkv", 3 * dim, dim)
        _linear(shapes, f"{b}.attn.proj", dim, dim)
        _linear(shapes, f"{b}.mlp.fc1", 4 * dim, dim)
        _linear(shapes, f"{b}.mlp.fc2", dim, 4 * dim)
        for norm in (f"{b}.norm1", f"{b}.norm2"):
            shapes[f"{norm}.weight"], shapes[f"{norm}.bias"] = (dim,), (dim,)
    shapes["norm.weight"], shapes["norm.bias"] = (dim,), (dim,)
    _linear(shapes, "head", classes, dim)
    return shapes


def tensor_shapes(model: str, classes: int = 1000, channels: int = 3, **vit_options: int) -> Shapes:
    """Tensor name -> shape, as in the state dict of the torch model. vit_options: patch, dim, depth, patches."""
    if model in RESNETS:
        return resnet_shapes(*RESNETS[model], classes, channels)
    if model == "mobilenetv1":
        return mobilenet_shapes(classes, channels)
    return vit_shapes(classes, channels, **{"patch": 4, "dim": 64, "depth": 4, "patches": 64, **vit_options})


def made_tensors(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors, no two alike, so that a swapped name shows."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(1, np.int64)
        elif len(shape) > 1:
            value = rng.standard_normal(shape, np.float32)
            fan_in = max(1, math.prod(shape[1:]))
            tensors[name] = value if shape[0] == 1 else value * np.float32(math.sqrt(2 / fan_in))
        elif name.endswith(("running_var", "weight")):
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            tensors[name] = rng.normal(0, 0.2, shape).astype(np.float32)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="Float models in NumPy: made weights, and logits of a weight file.")
    parser.add_argument("action", choices=("make", "logits"))
    parser.add_argument("model", choices=(*RESNETS, "mobilenetv1", "vit"))
    parser.add_argument("weights", help="the .safetensors file to write (make) or to read (logits)")
    parser.add_argument("images", nargs="?", help=".npy file of [B, H, W, C] floats (logits)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=4, help="attention heads (vit)")
    parser.add_argument("--relu6", action="store_true", help="clip activations at 6 (mobilenetv1)")
    arguments = parser.parse_args()
    if arguments.action == "make":
        save_file(made_tensors(tensor_shapes(arguments.model, arguments.classes)), arguments.weights)
    elif arguments.images is None:
        parser.error("logits needs a file of images")
    else:
        images = np.load(arguments.images)
        print(logits(arguments.model, load_file(arguments.weights), images, arguments.heads, arguments.relu6))


if __name__ == "__main__":
    main()
