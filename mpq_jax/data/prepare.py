"""Writing a data set as TFDS writes it (ArrayRecord), without TensorFlow."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpq_jax.types import Refusal

# Makes the examples of one split anew at each call: (key, {feature: value}).
Examples = Callable[[], Iterable[tuple[int | str, dict[str, Any]]]]


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 1 or 3] -> PNG. TFDS encodes arrays with TensorFlow, but takes encoded bytes as they are."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()


def labelled(images: np.ndarray, labels: np.ndarray) -> Examples:
    """The examples of a split from uint8 [N, H, W, C] and integers [N], keyed by number as in TFDS's MNIST."""
    return lambda: (
        (number, {"image": png(image), "label": int(label)})
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    )


def _builder(
    data_dir: str, name: str, version: str, features: Any, splits: Mapping[str, Examples], description: str
) -> Any:
    """A TFDS builder of the given splits, not registered, so that a stock builder of the same name does not clash."""
    import tensorflow_datasets as tfds

    set_name = name

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg,misc]
        name = set_name
        VERSION = tfds.core.Version(version)
        # Where TFDS would look for checksums of downloads, of which there are none; its own search for it needs a
        # package (importlib_resources) that TFDS 4.9.10 does not ask for.
        code_path = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, description=description, features=features, supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples: Examples) -> Any:
            yield from examples()

    return Prepared(data_dir=data_dir, file_format="array_record")


def write_set(
    data_dir: str | Path,
    name: str,
    version: str,
    features: Any,
    splits: Mapping[str, Examples],
    description: str = "",
) -> Path:
    """Writes the TFDS set `data_dir/name/version`, whole or not at all; returns its folder.

    features: a `tfds.features.FeaturesDict` with "image" and "label"; images are given encoded.
    It is written beside its place and moved there in one step. If another process was first, that one's set stays.
    Raises Refusal where `data_dir` cannot be written.
    """
    import tensorflow_datasets as tfds

    # TFDS's own bars are for downloads of minutes, not for a set that is written in seconds.
    tfds.disable_progress_bar()
    place = Path(data_dir) / name / version
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{name}-") as temporary:
            builder = _builder(temporary, name, version, features, splits, description)
            # TFDS announces itself on stdout, which belongs to the commands' own output.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(
                        compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
                    )
                )
            try:
                os.rename(builder.data_dir, place)
            except OSError:
                if not place.exists():
                    raise
    except OSError as error:
        raise Refusal(
            f"{name} cannot be written under {data_dir} ({error}); give a folder that can be written as data_dir"
        ) from None
    return place
