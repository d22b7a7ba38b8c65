"""What is particular to a data set: normalisation, augmentation, its test split, and how to get it."""

import os
from typing import NamedTuple


class Recipe(NamedTuple):
    """How the images of one data set are fed to a model.

    mean, std: of each channel, for pixels in [0, 1]; one value stands for all channels.
    shift: in training, moved by up to so many pixels each way, zeros moved in (pad and crop).
    flip: in training, mirrored left to right half of the time.
    random_crop: in training, random-resized-crop and flip. Only for images that differ in size.
    test_split: the TFDS split in the role of the test set; None: "test", else "validation".
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    shift: int = 0
    flip: bool = False
    random_crop: bool = False
    test_split: str | None = None


# The means and standard deviations of digits and fashion_mnist are those of all pixels of the whole TFDS train split
# (our validation split included), divided by 255, summed in float64. Those of cifar10 and imagenet2012 are the
# constants in general use, per channel.
RECIPES = {
    "digits": Recipe(mean=(0.28719,), std=(0.35403,)),
    "fashion_mnist": Recipe(mean=(0.28604,), std=(0.35302,), shift=2, flip=True),
    "cifar10": Recipe(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), shift=4, flip=True),
    # The labels of ImageNet's own test split are not public.
    "imagenet2012": Recipe(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), random_crop=True, test_split="validation"
    ),
}

IDX_VARIABLE = "MPQ_FASHION_MNIST_IDX"


def idx_folder() -> str:
    """Where the four IDX files of Fashion-MNIST are looked for: $MPQ_FASHION_MNIST_IDX, else where Debian puts them."""
    return os.environ.get(IDX_VARIABLE) or "/usr/share/datasets/fashion-mnist"


def base_name(name: str) -> str:
    """The name without configuration and version: emnist/letters:3.0.1 -> emnist."""
    return name.split("/")[0].split(":")[0]


def recipe_of(name: str) -> Recipe:
    """The recipe of a data set; for one that has none: pixels to [-1, 1], no augmentation."""
    return RECIPES.get(base_name(name), Recipe())


def build_command(name: str, data_dir: str) -> str:
    """The command that prepares `name` with TFDS's own builder, which needs TensorFlow."""
    manual = " --manual_dir DIR" if base_name(name) == "imagenet2012" else ""
    return (
        "pip install tensorflow tensorflow-datasets array-record && "
        f"tfds build {name} --file_format array_record --data_dir {data_dir}{manual}"
    )


def how_to_get(name: str, data_dir: str) -> str:
    """What to type to get a data set that is not there."""
    build = build_command(name, data_dir)
    if base_name(name) == "digits":
        return "the name digits alone, without a version"
    if base_name(name) == "fashion_mnist":
        return (
            f"apt-get install dataset-fashion-mnist (or set {IDX_VARIABLE} to a folder with its four IDX files), "
            f"or, in an environment of its own: {build}"
        )
    if base_name(name) == "imagenet2012":
        return (
            "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org into a folder DIR, "
            f"then, in an environment of its own: {build}"
        )
    return f"in an environment of its own: {build}"
