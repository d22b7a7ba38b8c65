"""Opening a data set: its shapes, sizes and splits, the validation split cut from train."""

import difflib
import os
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpq_jax.data.digits import write_digits
from mpq_jax.data.idx import has_idx, write_fashion_mnist
from mpq_jax.data.recipes import RECIPES, Recipe, base_name, how_to_get, idx_folder, recipe_of
from mpq_jax.data.records import Records, find_prepared, tfds_home
from mpq_jax.types import Refusal

# A set whose train and test images all fit in here, decoded, is kept in memory.
MEMORY_LIMIT = 512 << 20
SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """Some records of a TFDS split.

    records: where they are read; of a user's own data, what was given. numbers: int64 [N], which of them, in the order
    of evaluation.
    """

    records: Any
    numbers: np.ndarray


class Dataset(NamedTuple):
    """An opened data set.

    name: TFDS's name. num_classes: of its labels. image_shape: (H, W, C) as fed to the model.
    sizes: examples in "train", "validation" and "test".
    recipe, in_memory, augment, splits: what `train_batches` and `eval_batches` need.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    sizes: dict[str, int]
    recipe: Recipe
    in_memory: bool
    augment: bool
    splits: Mapping[str, Split]

    @property
    def features(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Array name -> (shape, dtype) of one example in a batch."""
        return image_features(self.image_shape)


def image_features(shape: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Array name -> (shape, dtype) of one example of a set of images of `shape`."""
    return {"image": (tuple(shape), np.dtype(np.float32)), "label": ((), np.dtype(np.int32))}


def open_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    augment: bool = True,
) -> Dataset:
    """Opens a TFDS image classification set: any with an "image" and a "label".

    name: `digits`, `fashion_mnist`, `cifar10`, `imagenet2012`, or another that has been prepared ("name",
        "name/config", "name:1.2.3").
    data_dir: where prepared sets are, and are written; default: `data` in the current directory. Sets in
        $TFDS_DATA_DIR or ~/tensorflow_datasets are found too. `digits` is written from scikit-learn where it is
        missing, `fashion_mnist` from the IDX files of Debian's dataset-fashion-mnist (or in $MPQ_FASHION_MNIST_IDX).
        Nothing is ever downloaded.
    validation_fraction: share of the train split that becomes "validation", at random, depending on nothing but
        (name, validation_fraction, seed). Of sets that fit in memory every class gives the same share.
    image_size: side of the square images, where the set's own differ in size (default 224); refused for others.
    augment: whether training images are changed at random, as far as the set's recipe has it.

    Raises Refusal for a set that is not there (saying how to get it) or that cannot be used.
    """
    root = str(data_dir) if data_dir is not None else "data"
    if not 0 <= validation_fraction < 1:
        raise Refusal(f"validation_fraction is {validation_fraction}; give a number from 0 up to, not including, 1")
    builder = _find_or_prepare(name, root)
    recipe = recipe_of(name)
    shape, num_classes = _features(name, builder)
    test_split = _test_split(name, builder, recipe)
    _check_files(name, builder, ("train", test_split), root)
    image_shape = _image_shape(name, shape, image_size)
    infos = builder.info.splits
    counts = {each: infos[each].num_examples for each in ("train", test_split)}
    fixed = None not in shape
    in_memory = fixed and sum(counts.values()) * int(np.prod(image_shape)) <= MEMORY_LIMIT
    directory = os.path.abspath(builder.data_dir)
    cache_dir = os.path.join(root, "decoded")
    train = Records(directory, "train", shape, cache_dir)
    kept, held_out = cut_validation(
        base_name(name), counts["train"], validation_fraction, seed, train.decoded[1] if in_memory else None
    )
    splits = {
        "train": Split(train, kept),
        "validation": Split(train, held_out),
        "test": Split(Records(directory, test_split, shape, cache_dir), np.arange(counts[test_split])),
    }
    sizes = {split: len(splits[split].numbers) for split in SPLITS}
    return Dataset(name, num_classes, image_shape, sizes, recipe, in_memory, augment, splits)


def cut_validation(
    name: str, count: int, fraction: float, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): int64 record numbers of a train split of `count` examples, disjoint, all of them together.

    With labels (int [count]) each class gives its share, to within one example. What is held out is in random order,
    so that its beginning stands for the whole.
    """
    held = 0 if fraction == 0 else max(1, round(count * fraction))
    if held >= count:
        raise Refusal(
            f"{name} has {count} training examples, too few for validation_fraction {fraction}; give a smaller one"
        )
    order = np.random.default_rng([seed % 2**32, zlib.crc32(name.encode())]).permutation(count)
    if labels is not None:
        _, classes, members = np.unique(labels[order], return_inverse=True, return_counts=True)
        by_class = np.argsort(classes, kind="stable")
        ranks = np.empty(count)
        ranks[by_class] = np.arange(count) - (np.cumsum(members) - members)[classes[by_class]]
        # By how much of its own class stands before it: any beginning of this order is stratified.
        order = order[np.argsort((ranks + 0.5) / members[classes], kind="stable")]
    return np.sort(order[held:]), order[:held]


def _find_or_prepare(name: str, root: str) -> Any:
    if not re.fullmatch(r"[a-z]\w*(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        raise Refusal(f"{name!r} is no name of a data set; give one as TFDS writes it, such as {', '.join(RECIPES)}")
    can_write = base_name(name) == "digits" or (base_name(name) == "fashion_mnist" and has_idx(idx_folder()))
    builder = find_prepared(name, root, refuse_formats=not can_write)
    if builder is None and can_write:
        if base_name(name) == "digits":
            print(f"writing digits to {root} (once)", file=sys.stderr)
            write_digits(root)
        else:
            print(f"writing fashion_mnist from {idx_folder()} to {root} (once, some ten seconds)", file=sys.stderr)
            write_fashion_mnist(root, idx_folder())
        builder = find_prepared(name, root, refuse_formats=True)
    if builder is None:
        near = difflib.get_close_matches(base_name(name), RECIPES, n=1)
        meant = f"did you mean {near[0]}? else " if near and near[0] != base_name(name) else ""
        raise Refusal(
            f"{name} is not prepared under {root} or {tfds_home()}; {meant}get it with: {how_to_get(name, root)}"
        )
    return builder


def _features(name: str, builder: Any) -> tuple[tuple[int | None, int | None, int], int]:
    """((H, W, C), classes) of a set with a uint8 "image" and a "label"."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or np.dtype(image.np_dtype) != np.uint8
        or image.shape[-1] not in (1, 3, 4)
    ):
        raise Refusal(
            f'{name} has the features {", ".join(sorted(features))}; only sets with an "image" (uint8) and a "label" '
            f"(a class) can be used, such as {', '.join(RECIPES)}"
        )
    return tuple(image.shape), label.num_classes


def _test_split(name: str, builder: Any, recipe: Recipe) -> str:
    """The TFDS split that plays the role of the test set."""
    there = [split for split, info in builder.info.splits.items() if info.num_examples]
    wanted = (recipe.test_split,) if recipe.test_split else ("test", "validation")
    found = [split for split in wanted if split in there]
    if "train" not in there or not found:
        raise Refusal(
            f"{builder.data_dir} has the splits {', '.join(there) or 'none'}; {name} needs train and "
            f"{' or '.join(wanted)}: prepare it again, whole"
        )
    return found[0]


def _check_files(name: str, builder: Any, splits: tuple[str, ...], root: str) -> None:
    for split in splits:
        for path in builder.info.splits[split].filepaths:
            if not os.path.exists(path):
                again = "run this again" if base_name(name) == "digits" else how_to_get(name, root)
                raise Refusal(f"{path} is missing; delete {builder.data_dir}, then: {again}")


def _image_shape(name: str, shape: tuple[int | None, int | None, int], image_size: int | None) -> tuple[int, int, int]:
    height, width, channels = shape
    if height is None or width is None:
        side = 224 if image_size is None else image_size
        if side < 1:
            raise Refusal(f"image_size is {image_size}; give the side of the images in pixels, such as 224")
        return side, side, channels
    if image_size is not None and (height, width) != (image_size, image_size):
        raise Refusal(
            f"{name} has images of {height}x{width}, and image_size is {image_size}; leave image_size out: it is for "
            "sets whose images differ in size, such as imagenet2012"
        )
    return height, width, channels
