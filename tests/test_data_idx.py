"""Fashion-MNIST from its IDX files: bytes by hand, and what TFDS has."""

import gzip
import struct
from collections import Counter

import numpy as np
import pytest
from made_data import make_fashion_mnist

from mpq_jax.data import eval_batches, open_dataset
from mpq_jax.data.recipes import IDX_VARIABLE
from mpq_jax.types import Refusal


def write_idx(path, array):
    """Bytes by hand, as the format is published."""
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(struct.pack(">I", size) for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx(tmp_path, monkeypatch):
    folder = tmp_path / "idx"
    folder.mkdir()
    random, made_arrays = np.random.default_rng(0), {}
    for prefix, count in (("train", 60), ("t10k", 30)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
        made_arrays["train" if prefix == "train" else "test"] = images, labels
    monkeypatch.setenv(IDX_VARIABLE, str(folder))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "home"))  # no set is found by accident
    return folder, made_arrays


def test_fashion_mnist_from_idx_files_is_tfdss_own(idx, tmp_path):
    import tensorflow_datasets as tfds

    dataset = open_dataset("fashion_mnist", data_dir=tmp_path / "data", validation_fraction=0)
    assert dataset.sizes == {"train": 60, "validation": 0, "test": 30} and dataset.num_classes == 10
    for split, (images, labels) in idx[1].items():
        expected = Counter(
            (((image[..., None] / 255 - 0.28604) / 0.35302).round(4).tobytes(), int(label))
            for image, label in zip(images, labels, strict=True)
        )
        found = Counter()
        for batch in eval_batches(dataset, split, 30):
            # To the nearest pixel value and back, to compare exactly.
            pixels = ((batch["image"].astype(np.float64) * 0.35302 + 0.28604) * 255).round()
            found.update(
                (((image / 255 - 0.28604) / 0.35302).round(4).tobytes(), int(label))
                for image, label in zip(pixels, batch["label"], strict=True)
            )
        assert found == expected
    stock = tfds.builder("fashion_mnist", data_dir=tmp_path / "other")
    written = tfds.builder("fashion_mnist", data_dir=tmp_path / "data")
    assert written.info.splits["train"].num_examples == 60
    assert (written.info.full_name, repr(written.info.features)) == (stock.info.full_name, repr(stock.info.features))
    assert written.info.features["label"].names == stock.info.features["label"].names


def test_a_prepared_fashion_mnist_goes_before_idx_files(idx, tmp_path):
    make_fashion_mnist(tmp_path / "home", train=40, test=20)
    assert open_dataset("fashion_mnist", data_dir=tmp_path / "data").sizes["test"] == 20
    assert not (tmp_path / "data" / "fashion_mnist").exists()


@pytest.mark.parametrize("damage", ("cut off", "not gzip", "broken", "wrong type", "no images"))
def test_damaged_idx_files_are_refused_and_nothing_is_written(idx, tmp_path, damage):
    path = idx[0] / "t10k-images-idx3-ubyte.gz"
    packed = path.read_bytes()
    content = gzip.decompress(packed)
    path.write_bytes(
        {
            "cut off": gzip.compress(content[:-5]),
            "not gzip": b"<html>404</html>",
            "broken": packed[:20] + b"\xff\xff\xff\xff" + packed[24:],
            "wrong type": gzip.compress(b"\x00\x00\x0d" + content[3:]),
            "no images": gzip.compress(content[:2]),
        }[damage]
    )
    with pytest.raises(Refusal, match=r"t10k-images-idx3-ubyte\.gz"):
        open_dataset("fashion_mnist", data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / "fashion_mnist").exists()
