"""Prepared TFDS sets: finding them, and reading the records of one split."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_jax.data.images import decode
from mpq_jax.data.recipes import how_to_get
from mpq_jax.files import whole
from mpq_jax.types import Refusal

# Decoding less than this takes no time worth a file.
_CACHE_FROM = 4 << 20
_CHUNK = 4096


def tfds_home() -> str:
    """Where TFDS itself keeps its sets: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join(os.path.expanduser("~"), "tensorflow_datasets")


def find_prepared(name: str, data_dir: str, refuse_formats: bool) -> Any:
    """The TFDS builder (from files, read only) of a set prepared under `data_dir` or TFDS's home; None if none is.

    refuse_formats: whether a set that is there, but not as ArrayRecord, is refused or passed over.
    Raises Refusal for a set that cannot be read.
    """
    import tensorflow_datasets as tfds

    unreadable = None
    for root in (data_dir, tfds_home()):
        try:
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
        except tfds.core.DatasetNotFoundError:
            continue
        except Exception as error:  # whatever a damaged file makes TFDS raise
            reason = str(error).strip().split("\n")[0]
            raise Refusal(
                f"{name} under {root} cannot be read as a TFDS set ({type(error).__name__}: {reason}); "
                "delete its folder and prepare it again"
            ) from None
        if not any(each.value == "array_record" for each in builder.info.available_file_formats()):
            unreadable = f"{builder.data_dir} holds {builder.info.file_format.value} files"
            continue
        return builder
    if unreadable and refuse_formats:
        raise Refusal(
            f"{unreadable}, which cannot be read without TensorFlow; move them away, then get array_record files "
            f"with: {how_to_get(name, data_dir)}"
        )
    return None


@dataclass(frozen=True)
class Records:
    """The examples of one TFDS split, by number; nothing is read before it is asked for.

    directory: of the prepared set. split: TFDS's name. shape: (H, W, C) of its images, H and W None where they differ.
    cache_dir: where decoded images may be kept.
    """

    directory: str
    split: str
    shape: tuple[int | None, int | None, int]
    cache_dir: str

    @functools.cached_property
    def source(self) -> Any:
        """`tfds.data_source` of the split, images left encoded."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.directory)
        return builder.as_data_source(
            split=self.split, decoders={"image": tfds.decode.SkipDecoding()}, file_format="array_record"
        )

    def example(self, number: int) -> tuple[bytes, int]:
        """(encoded image, label)."""
        record = self.source[number]
        return record["image"], int(record["label"])

    @functools.cached_property
    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [N, H, W, C], int32 [N]): the whole split in memory. Only for images of one size.

        Kept in a file under `cache_dir` that is named by what the set's files were when it was made.
        """
        path = Path(self.cache_dir) / f"{_fingerprint(Path(self.directory), self.split)}.npz"
        cached = _load_cache(path)
        if cached is not None:
            return cached
        images, labels = _decode_all(self.source, self.shape)
        if images.nbytes >= _CACHE_FROM:
            # A folder that cannot be written costs time at the next start, nothing else.
            with contextlib.suppress(OSError), whole(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=images, labels=labels)
        return images, labels


def _fingerprint(directory: Path, split: str) -> str:
    """Set, version and split, and a digest of the names, sizes and times of all files of the set."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(str(directory.resolve()).encode())
    return f"{directory.parent.name}-{directory.name}-{split}-{digest.hexdigest()[:16]}"


def _load_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(path) as arrays:
            return arrays["images"], arrays["labels"]
    except Exception:  # no cache, or one that NumPy cannot read: decode again
        return None


def _chunks(count: int) -> Iterator[range]:
    for start in range(0, count, _CHUNK):
        yield range(start, min(start + _CHUNK, count))


def _decode_all(source: Any, shape: tuple[int | None, int | None, int]) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels = shape
    assert height is not None and width is not None, "images of one size"
    images = np.empty((len(source), height, width, channels), np.uint8)
    labels = np.empty(len(source), np.int32)
    for chunk in _chunks(len(source)):
        # Many records a call: a sixth of the time of one by one.
        for number, record in zip(chunk, source.__getitems__(list(chunk)), strict=True):
            images[number] = decode(record["image"], channels)
            labels[number] = record["label"]
    return images, labels
