"""The embedded default: scikit-learn's scans of handwritten digits, 8x8 pixels, as a TFDS set."""

from pathlib import Path

import numpy as np

from mpq_jax.data.prepare import labelled, write_set

VERSION = "1.0.0"
# The scans have 17 levels, 0 to 16. Times 15 they fill a byte and can still be told apart exactly.
GAIN = 15


def digits_splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "test"}: (uint8 [N, 8, 8, 1], int64 [N]); 1,442 and 355 of the 1,797 scans.

    The fifth, tenth, ... scan of each digit is for testing: stratified, and drawn evenly over the writers, who follow
    each other in the file.
    """
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = (scans.images * GAIN).astype(np.uint8)[..., None]
    labels = scans.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for digit in np.unique(labels):
        test[np.flatnonzero(labels == digit)[4::5]] = True
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def write_digits(data_dir: str | Path) -> Path:
    """Writes the TFDS set `digits` under `data_dir`, whole or not at all; returns its folder."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    splits = {split: labelled(images, labels) for split, (images, labels) in digits_splits().items()}
    description = "Handwritten digits, 8x8 pixels, 17 levels: the test part of UCI's optdigits, as scikit-learn has it."
    return write_set(data_dir, "digits", VERSION, features, splits, description)
