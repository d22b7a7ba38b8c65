"""Random order and random changes to images, by numbers that depend on nothing but the seed and the position.

The position counts the training examples from the first of the first epoch on, without end.
"""

import functools
from collections.abc import Sequence

import numpy as np

# Philox keys are two words: the seed, and what the numbers are for.
_FOR_BATCHES, _FOR_CROPS, _FOR_ORDER = 1, 2, 3


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    philox = np.random.Philox(key=[seed, _FOR_ORDER], counter=[0, epoch, 0, 0])
    return np.random.Generator(philox).permutation(count)


def shuffled(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """int64 [B]: which of `count` examples stands at each position: every one once an epoch, in an order of its own.

    grain's shuffle computes one index at a time (17 to 50 microseconds each, by the size of the set); whole epochs, the
    last few kept, cost nearly nothing.
    """
    epochs, places = np.divmod(positions, count)
    result = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = _permutation(seed, int(epoch), count)[places[here]]
    return result


def draws(seed: int, positions: np.ndarray) -> np.ndarray:
    """uint64 [B, 4]: four random words for each position.

    Philox is a counter put through a block cipher, four words a count: the position is the counter, so the words of
    one position do not depend on which others are asked for.
    """
    first = int(positions.min())
    count = int(positions.max()) - first + 1
    words = np.random.Philox(key=[seed, _FOR_BATCHES], counter=[first, 0, 0, 0]).random_raw(4 * count)
    return words.reshape(count, 4)[positions - first]


def generator(seed: int, position: int) -> np.random.Generator:
    """As many random numbers as wanted for one position; the position is the second word of Philox's counter."""
    return np.random.Generator(np.random.Philox(key=[seed, _FOR_CROPS], counter=[0, position, 0, 0]))


def shift_and_flip(images: np.ndarray, words: np.ndarray, shift: int, flip: bool) -> np.ndarray:
    """Moves each image by -shift to shift pixels on both axes, zeros moved in; mirrors half of them if `flip`.

    images: [B, H, W, C]. words: uint64 [B, 4], random. The same as padding by `shift` and cropping at random.
    """
    batch, height, width, _ = images.shape
    # The modulus of a 64-bit word is uniform to within 1e-18.
    down = (words[:, 0] % np.uint64(2 * shift + 1)).astype(np.intp)
    right = (words[:, 1] % np.uint64(2 * shift + 1)).astype(np.intp)
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    rows = down[:, None] + np.arange(height)
    columns = right[:, None] + np.arange(width)
    if flip:
        mirrored = (words[:, 2] & np.uint64(1)).astype(bool)
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    return padded[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [B, H, W, C] -> float32: (pixel / 255 - mean) / std, per channel."""
    centre, spread = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    *most, width, channels = images.shape
    rows = images.reshape(*most, width * channels).astype(np.float32)  # NumPy is slow over an axis of three
    times = width * channels // spread.size
    rows *= np.tile((1 / (255 * spread)).astype(np.float32), times)
    rows -= np.tile((centre / spread).astype(np.float32), times)
    return rows.reshape(images.shape)
