"""Small sets of made images in TFDS format, under TFDS's names, for tests and benchmarks without real data.

The images of a class have its colour and its stripes, under noise: a network can learn them.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpq_jax.data.prepare import Examples, png, write_set

# For each split: the images (uint8 [H, W, C]) or their JPEGs, and int64 labels, in the order of their keys.
Made = dict[str, tuple[list[Any], np.ndarray]]


def made_image(random: np.random.Generator, label: int, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 [H, W, C]: the colour and the stripes of the class, a smooth random pattern, and a little noise."""
    height, width, channels = shape
    own = np.random.default_rng(label)
    colour, angle, waves = own.uniform(60, 200, channels), own.uniform(0, np.pi), own.uniform(2, 6)
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    stripes = 30 * np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 2 * np.pi))
    coarse = Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8))
    pattern = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64) - 128
    noise = random.normal(0, 12, shape)
    return np.clip(colour + (stripes + 0.4 * pattern)[..., None] + noise, 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 [H, W, C] -> JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "jpeg", quality=quality)
    return buffer.getvalue()


def _write(
    data_dir: str | Path, name: str, splits: Made, encode: Callable[[Any], bytes], extra: Callable[[str, int], dict]
) -> None:
    """As TFDS's own builder would: its version and features; `extra` gives what is not image and label."""
    import tensorflow_datasets as tfds

    def examples(split: str) -> Examples:
        images, labels = splits[split]

        def each() -> Iterator[tuple[int, dict[str, Any]]]:
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield number, {"image": encode(image), "label": int(label), **extra(split, number)}

        return each

    stock = tfds.builder(name, data_dir=str(data_dir))
    write_set(data_dir, name, str(stock.version), stock.info.features, {split: examples(split) for split in splits})


def _small(
    data_dir: str | Path, name: str, shape: tuple[int, int, int], counts: dict[str, int], seed: int, with_id: bool
) -> Made:
    random = np.random.default_rng(seed)
    made: Made = {}
    for split, count in counts.items():
        labels = np.arange(count) % 10
        made[split] = ([made_image(random, int(label), shape) for label in labels], labels)
    _write(data_dir, name, made, png, lambda split, number: {"id": f"{split}_{number:05d}"} if with_id else {})
    return made


def make_cifar10(data_dir: str | Path, train: int = 100, test: int = 50, seed: int = 0) -> Made:
    """Writes a `cifar10` (32x32x3, ten classes) under `data_dir`; returns what is in it."""
    return _small(data_dir, "cifar10", (32, 32, 3), {"train": train, "test": test}, seed, with_id=True)


def make_fashion_mnist(data_dir: str | Path, train: int = 100, test: int = 50, seed: int = 0) -> Made:
    """Writes a `fashion_mnist` (28x28x1, ten classes) under `data_dir`; returns what is in it."""
    return _small(data_dir, "fashion_mnist", (28, 28, 1), {"train": train, "test": test}, seed, with_id=False)


def make_imagenet2012(
    data_dir: str | Path,
    train: int = 40,
    validation: int = 20,
    classes: int = 10,
    sizes: Sequence[tuple[int, int]] = ((375, 500), (500, 333), (256, 256)),
    seed: int = 0,
) -> Made:
    """Writes an `imagenet2012` of JPEGs under `data_dir`; returns the JPEGs and labels that are in it.

    classes: only so many of the 1000 occur. sizes: (height, width), in turn.
    """
    random = np.random.default_rng(seed)
    made: Made = {}
    for split, count in (("train", train), ("validation", validation)):
        labels = np.arange(count) % classes
        shapes = [(*sizes[number % len(sizes)], 3) for number in range(count)]
        images = [jpeg(made_image(random, int(label), shape)) for label, shape in zip(labels, shapes, strict=True)]
        made[split] = (images, labels)
    _write(data_dir, "imagenet2012", made, lambda image: image, lambda split, n: {"file_name": f"{split}_{n}.JPEG"})
    return made
