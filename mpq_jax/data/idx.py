"""Fashion-MNIST from the four IDX files in which it was published, as the TFDS set that TFDS itself would write."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from mpq_jax.data.prepare import labelled, write_set
from mpq_jax.types import Refusal

_PREFIX = {"train": "train", "test": "t10k"}


def idx_files(folder: str | Path) -> dict[str, tuple[Path, Path]]:
    """{"train", "test"}: (images, labels), the paths of the four files in `folder`, whether they are there or not."""
    return {
        split: (Path(folder) / f"{prefix}-images-idx3-ubyte.gz", Path(folder) / f"{prefix}-labels-idx1-ubyte.gz")
        for split, prefix in _PREFIX.items()
    }


def has_idx(folder: str | Path) -> bool:
    """Whether all four files are in `folder`."""
    return all(path.is_file() for pair in idx_files(folder).values() for path in pair)


def read_idx(path: str | Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes -> uint8 [...].

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions, the sizes as big-endian uint32, the
    data in C order. Raises Refusal for anything else.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(f"{path} cannot be read: {error}; get the file again") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise Refusal(f"{path} is no IDX file of unsigned bytes; get the file again")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start]) if len(content) >= start else ()
    data = np.frombuffer(content, np.uint8, offset=min(start, len(content)))
    if not shape or data.size != np.prod(shape, dtype=np.int64):
        raise Refusal(f"{path} is cut off or too long: {data.size} bytes for the shape {shape}; get the file again")
    return data.reshape(shape)


def _read_split(images_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise Refusal(
            f"{images_path} holds {images.shape} and {labels_path} {labels.shape}, not N images of 28x28 and N labels; "
            "get the files again"
        )
    return images[..., None], labels


def write_fashion_mnist(data_dir: str | Path, folder: str | Path) -> Path:
    """Writes the TFDS set `fashion_mnist` under `data_dir` from the IDX files in `folder`; returns its folder.

    Name, version, features, keys (so the order too) are those of TFDS's own builder. Raises Refusal for files that are
    not Fashion-MNIST's.
    """
    import tensorflow_datasets as tfds

    stock = tfds.builder("fashion_mnist", data_dir=str(data_dir))
    splits = {split: labelled(*_read_split(*paths)) for split, paths in idx_files(folder).items()}
    return write_set(data_dir, "fashion_mnist", str(stock.version), stock.info.features, splits, stock.info.description)
