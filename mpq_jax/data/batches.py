"""Batches for training and evaluation, by grain: random access, batch, prefetch by threads or processes."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mpq_jax.data import own
from mpq_jax.data.augment import draws, generator, normalise, shift_and_flip, shuffled
from mpq_jax.data.images import centre_crop, decode, random_resized_crop
from mpq_jax.data.opening import SPLITS, Dataset, Split
from mpq_jax.data.own import OwnData
from mpq_jax.data.records import Records
from mpq_jax.types import Refusal

Batch = dict[str, np.ndarray]
_SEEDS = 2**32
_ENDLESS = 2**62


def train_batches(
    dataset: Dataset | OwnData,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless training batches: {"image": float32 [B / process_count, H, W, C], "label": int32 [B / process_count]}.

    Every example once an epoch, in a new order each epoch; a batch may span two epochs. Batch t is a function of
    (dataset, batch_size, seed, t) alone: `first_step` starts at any t without reading what is before. Process i of n
    gets the i-th of n equal parts of the batch that a single process would get, augmented the same.
    batch_size: B, of all processes together.
    workers: processes that decode and augment, for sets that are not kept in memory; 0: threads of this process. The
        batches do not depend on it. A script that asks for them needs `if __name__ == "__main__"`.

    Raises Refusal for a batch size, step or process layout that does not fit.
    """
    import grain

    _check_layout(batch_size, process_index, process_count)
    if first_step < 0 or workers < 0:
        raise Refusal(f"first_step is {first_step} and workers is {workers}; give numbers from 0")
    split, seed, size = dataset.splits["train"], seed % _SEEDS, batch_size // process_count
    if isinstance(dataset, OwnData) or dataset.in_memory:
        batch_of: Callable[..., Batch] = own.training_batch if isinstance(dataset, OwnData) else _training_batch
        make = functools.partial(batch_of, dataset, split, seed, batch_size, process_index, process_count)
        return _made_ahead(split, grain.MapDataset.range(first_step, _ENDLESS).map(make))
    positions = grain.MapDataset.range(first_step * size, _ENDLESS)
    if process_count > 1:
        positions = positions.map(functools.partial(_position, batch_size, size, process_index))
    examples = positions.map(functools.partial(_training_example, dataset, split, seed))
    return _decoded_ahead(dataset, split, examples, size, workers)


def eval_batches(
    dataset: Dataset | OwnData,
    split: str,
    batch_size: int,
    *,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over a split in its fixed order, never augmented: the same dicts as `train_batches`.

    The last batch is filled up with zero images of label -1, so that all batches, of all processes, have one shape.
    Batches of a user's own data have "valid" besides, bool [B / process_count]: False for what was filled up.
    split: "train", "validation" or "test". limit: only the first so many examples; the order of "validation" and that
    of TFDS in the files are random, so these stand for the whole.

    Raises Refusal for a split that is unknown or empty, and for a process layout that does not fit.
    """
    import grain

    _check_layout(batch_size, process_index, process_count)
    if split not in SPLITS:
        raise Refusal(f"{split!r} is no split; give one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise Refusal(f"limit is {limit}; give a number of examples from 1, or leave it out")
    chosen, size = dataset.splits[split], batch_size // process_count
    numbers = chosen.numbers[:limit]
    if not len(numbers):
        raise Refusal(f"the {split} split of {dataset.name} is empty; give a validation_fraction above 0")
    padded = np.full(-(-len(numbers) // batch_size) * batch_size, -1)
    padded[: len(numbers)] = numbers
    mine = padded.reshape(-1, process_count, size)[:, process_index].ravel()
    if isinstance(dataset, OwnData) or dataset.in_memory:
        rows = grain.MapDataset.source(mine.reshape(-1, size))
        batch_of: Callable[..., Batch] = own.eval_batch if isinstance(dataset, OwnData) else _eval_batch
        return _made_ahead(chosen, rows.map(functools.partial(batch_of, dataset, chosen)))
    examples = grain.MapDataset.source(mine).map(functools.partial(_eval_example, dataset, chosen))
    return _decoded_ahead(dataset, chosen, examples, size, workers=0)


def _check_layout(batch_size: int, process_index: int, process_count: int) -> None:
    if process_count < 1 or not 0 <= process_index < process_count:
        raise Refusal(f"process {process_index} of {process_count} cannot be; give an index from 0 below the count")
    if batch_size < 1 or batch_size % process_count:
        raise Refusal(
            f"a batch of {batch_size} cannot be split over {process_count} processes; "
            f"give a multiple of {process_count}"
        )


def _made_ahead(split: Split, batches: Any) -> Iterator[Batch]:
    """Batches from memory: one thread beside the program's own, as the work is Python's and NumPy's."""
    import grain

    if isinstance(split.records, Records):
        _ = split.records.decoded  # loaded before the thread starts
    # Examples that a user reads by number may wait for a disk.
    threads = 1 if isinstance(split.records, (Records, Mapping)) else min(_cores(), 8)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))))


def _decoded_ahead(dataset: Dataset, split: Split, examples: Any, size: int, workers: int) -> Iterator[Batch]:
    """Batches from single examples, decoded by threads or by processes."""
    import grain
    from absl import flags

    _ = split.records.source  # opened once, before the threads start
    finish: Callable[[Any], Batch] = functools.partial(_finished, dataset)
    if workers == 0:
        # Decoding one image is much work outside of Python: a thread an image.
        threads = min(_cores(), 16)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * size))
        return iter(examples.to_iter_dataset(options).batch(size).map(finish))
    # Whole batches to each worker: how many workers there are does not change what is in a batch.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    batches = examples.batch(size).map(finish).to_iter_dataset(options)
    if not flags.FLAGS.is_parsed():
        # grain reads its options from absl's flags, which a program without absl's `app.run` never parses.
        flags.FLAGS.mark_as_parsed()
    return iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finished(dataset: Dataset, batch: Batch) -> Batch:
    """uint8 images normalised; a padding example (label -1) is all zeros."""
    labels = batch["label"].astype(np.int32)
    image = normalise(batch["image"], dataset.recipe.mean, dataset.recipe.std)
    image[labels < 0] = 0
    return {"image": image, "label": labels}


def _training_batch(
    dataset: Dataset, split: Split, seed: int, batch_size: int, process_index: int, process_count: int, step: int
) -> Batch:
    """Batch number `step` of this process, from memory."""
    size = batch_size // process_count
    positions = step * batch_size + process_index * size + np.arange(size)
    images, labels = split.records.decoded
    rows = split.numbers[shuffled(seed, positions, len(split.numbers))]
    batch, recipe = images[rows], dataset.recipe
    if dataset.augment and (recipe.shift or recipe.flip):
        batch = shift_and_flip(batch, draws(seed, positions), recipe.shift, recipe.flip)
    return _finished(dataset, {"image": batch, "label": labels[rows]})


def _eval_batch(dataset: Dataset, split: Split, rows: np.ndarray) -> Batch:
    """Record numbers [B], -1 for padding, from memory."""
    images, labels = split.records.decoded
    return _finished(dataset, {"image": images[rows], "label": np.where(rows < 0, -1, labels[rows])})


def _position(batch_size: int, size: int, process_index: int, number: int) -> int:
    """Where in the order of all processes' examples the `number`-th of this one stands; size: of its part of a batch."""
    return number // size * batch_size + process_index * size + number % size


def _training_example(dataset: Dataset, split: Split, seed: int, position: int) -> dict[str, Any]:
    """The example at one position, from its record: uint8 image and label."""
    index = shuffled(seed, np.asarray([position]), len(split.numbers))[0]
    encoded, label = split.records.example(int(split.numbers[index]))
    if dataset.augment and dataset.recipe.random_crop:
        size, _, channels = dataset.image_shape
        return {"image": random_resized_crop(encoded, channels, size, generator(seed, position)), "label": label}
    return {"image": _plain(dataset, split, encoded), "label": label}


def _eval_example(dataset: Dataset, split: Split, number: int) -> dict[str, Any]:
    """One record, or padding for -1: uint8 image and label."""
    if number < 0:
        return {"image": np.zeros(dataset.image_shape, np.uint8), "label": -1}
    encoded, label = split.records.example(int(number))
    return {"image": _plain(dataset, split, encoded), "label": label}


def _plain(dataset: Dataset, split: Split, encoded: bytes) -> np.ndarray:
    """Without augmentation: the image as it is, or its centre where images differ in size."""
    size, _, channels = dataset.image_shape
    if None in split.records.shape:
        return centre_crop(encoded, channels, size)
    return decode(encoded, channels)
