"""LIMPQ's joint training in PyTorch, as its authors run it: eager, channels last, one pass a row.

Written from the method's formulas (LSQ with scaled gradients, BatchNorm for every row, K uniform passes and a random one,
gradients summed, clipped by value, one SGD step), for nets of `mpq_jax.models` by their parameter trees: same weights, same
step sizes, same losses. Needs torch: pip install ".[benchmarks]".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

RANDOM = "random"


def round_through(x: torch.Tensor) -> torch.Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


def scaled_gradient(s: torch.Tensor, factor: float) -> torch.Tensor:
    """s, with `factor` times its gradient."""
    return s * factor + (s - s * factor).detach()


def lsq(x: torch.Tensor, s: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """x_hat = round(clip(x / s, -Q_N, Q_P)) s, the gradient of s scaled by 1 / sqrt(Q_P numel(x)) (Esser et al., 2020)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    s = scaled_gradient(s, 1 / math.sqrt(high * x.numel()))
    return round_through(torch.clamp(x / s, low, high)) * s


class Layer(nn.Module):
    """A convolution or dense layer from a Flax entry; bits None: in float."""

    def __init__(self, entry: Mapping[str, Any], widths: Sequence[int], stride: int = 1, padding: int = 0, groups=1):
        super().__init__()
        kernel = torch.tensor(np.array(entry["kernel"]))
        self.dense = kernel.ndim == 2
        kernel = kernel.T if self.dense else kernel.permute(3, 2, 0, 1)
        self.weight = nn.Parameter(kernel.contiguous(memory_format=_format(kernel)))
        self.bias = nn.Parameter(torch.tensor(np.array(entry["bias"]))) if "bias" in entry else None
        self.options = {"stride": stride, "padding": padding, "groups": groups}
        self.widths = list(widths)
        self.step_sizes = nn.ParameterDict()
        for kind in ("weight", "activation"):
            if f"{kind}_step_size" in entry:
                for k, b in enumerate(widths):
                    value = torch.tensor(float(entry[f"{kind}_step_size"][k]))
                    self.step_sizes[f"{kind}{b}"] = nn.Parameter(value)
        self.bits: tuple[int, int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if self.bits is not None and self.step_sizes:
            w, a = self.bits
            weight = lsq(weight, self.step_sizes[f"weight{w}"], w, signed=True)
            x = lsq(x, self.step_sizes[f"activation{a}"], a, signed=False)
        return F.linear(x, weight, self.bias) if self.dense else F.conv2d(x, weight, self.bias, **self.options)


def _format(kernel: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if kernel.ndim == 4 else torch.contiguous_format


class Norms(nn.Module):
    """BatchNorm, one copy for each row."""

    def __init__(self, channels: int, rows: Sequence[str]):
        super().__init__()
        self.copies = nn.ModuleDict({row: nn.BatchNorm2d(channels) for row in rows})
        self.row = rows[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.copies[self.row](x)


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, tree: Mapping[str, Any], widths: Sequence[int], stride: int, rows: Sequence[str]):
        super().__init__()
        self.conv1 = Layer(tree["conv1"], widths, stride, 1)
        self.conv2 = Layer(tree["conv2"], widths, 1, 1)
        channels = self.conv1.weight.shape[0]
        self.bn1, self.bn2 = Norms(channels, rows), Norms(channels, rows)
        self.shortcut = None
        if "shortcut_conv" in tree:
            self.shortcut = nn.Sequential(Layer(tree["shortcut_conv"], widths, stride, 0), Norms(channels, rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Unit(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self, tree: Mapping[str, Any], widths: Sequence[int], stride: int, rows: Sequence[str]):
        super().__init__()
        channels = tree["depthwise"]["kernel"].shape[3]
        self.depthwise = Layer(tree["depthwise"], widths, stride, 1, groups=channels)
        self.pointwise = Layer(tree["pointwise"], widths)
        self.bn1, self.bn2 = Norms(channels, rows), Norms(self.pointwise.weight.shape[0], rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class Net(nn.Module):
    """A net of `mpq_jax.models`, by its parameter tree and the strides of its blocks."""

    def __init__(
        self, params: Mapping[str, Any], strides: Sequence[int], widths: Sequence[int], stem_stride: int, pool: bool
    ):
        super().__init__()
        self.rows = [*map(str, widths), RANDOM]
        size = params["stem"]["conv"]["kernel"].shape[0]
        self.stem = Layer(params["stem"]["conv"], widths, stem_stride, size // 2)
        self.bn = Norms(self.stem.weight.shape[0], self.rows)
        self.pool = pool
        trees = [tree for name in sorted(params, key=_natural) for tree in _blocks(name, params[name])]
        kinds = [Unit if "depthwise" in tree else Block for tree in trees]
        self.blocks = nn.ModuleList(
            kind(tree, widths, stride, self.rows) for kind, tree, stride in zip(kinds, trees, strides, strict=True)
        )
        self.head = Layer(params["head"], widths)
        self.widths = list(widths)
        self.searched = [m for m in self.modules() if isinstance(m, Layer) and m.step_sizes]
        self.norms = [m for m in self.modules() if isinstance(m, Norms)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        if self.pool:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))

    def use(self, row: str, bits: Sequence[tuple[int, int] | None]) -> None:
        """The row's BatchNorm copies, and bits for each searched layer."""
        for norm in self.norms:
            norm.row = row
        for layer, each in zip(self.searched, bits, strict=True):
            layer.bits = each


def _natural(name: str) -> tuple[str, int]:
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def _blocks(name: str, tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The blocks of a stage, or a unit itself; none of the stem and the head."""
    if name.startswith("unit"):
        return [tree]
    return [tree[key] for key in sorted(tree, key=_natural)] if name.startswith("stage") else []


def joint_step(net: Net, images: torch.Tensor, labels: torch.Tensor, optimizer, rng) -> dict[str, float]:
    """One step of joint training: K uniform passes and a random one, then one update. -> {row: loss}"""
    optimizer.zero_grad()
    losses = {}
    for row in net.rows:
        if row == RANDOM:
            drawn = rng.choice(net.widths, size=(len(net.searched), 2))
            net.use(row, [(int(w), int(a)) for w, a in drawn])
        else:
            net.use(row, [(int(row), int(row))] * len(net.searched))
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        losses[row] = loss.detach()
    nn.utils.clip_grad_value_(net.parameters(), 1.0)
    optimizer.step()
    return {row: float(loss) for row, loss in losses.items()}


def float_step(net: Net, images: torch.Tensor, labels: torch.Tensor, optimizer) -> float:
    """One step of float training."""
    optimizer.zero_grad()
    net.use(net.rows[0], [None] * len(net.searched))
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
