"""Orders, draws and changes of images, each against its definition."""

from collections import Counter

import numpy as np
import pytest

from mpq_jax.data.augment import draws, normalise, shift_and_flip, shuffled
from mpq_jax.data.recipes import RECIPES


def test_order_is_a_permutation_of_every_epoch():
    positions = np.arange(35)
    order = shuffled(5, positions, 7)
    for epoch in range(5):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert len({tuple(order[7 * epoch : 7 * epoch + 7]) for epoch in range(5)}) > 1
    assert all(shuffled(5, np.array([position]), 7)[0] == order[position] for position in positions)
    # Each example is as often first as any other: 7 of 700, standard deviation 9.3.
    firsts = np.bincount(shuffled(0, np.arange(0, 4900, 7), 7), minlength=7)
    assert np.abs(firsts - 100).max() < 5 * 9.3


def test_random_words_belong_to_positions():
    words = draws(1, np.arange(40))
    assert np.array_equal(draws(1, np.array([39, 3, 17])), words[[39, 3, 17]])
    assert len(np.unique(words)) == words.size
    assert not np.array_equal(draws(2, np.arange(40)), words)


@pytest.mark.parametrize("shift", (0, 2, 4))
@pytest.mark.parametrize("flip", (False, True))
def test_shift_and_flip_is_pad_crop_and_mirror(shift, flip):
    random = np.random.default_rng(0)
    images = random.integers(1, 256, (200, 6, 5, 3), dtype=np.uint8)
    result = shift_and_flip(images, draws(0, np.arange(200)), shift, flip)
    seen = Counter()
    for image, changed in zip(images, result, strict=True):
        padded = np.zeros((6 + 2 * shift, 5 + 2 * shift, 3), np.uint8)
        padded[shift : shift + 6, shift : shift + 5] = image
        ways = [
            (down, right, mirrored)
            for down in range(2 * shift + 1)
            for right in range(2 * shift + 1)
            for mirrored in ((False, True) if flip else (False,))
            if np.array_equal(padded[down : down + 6, right : right + 5][:, :: -1 if mirrored else 1], changed)
        ]
        assert len(ways) == 1
        seen[ways[0]] += 1
    assert len({way[0] for way in seen}) == len({way[1] for way in seen}) == 2 * shift + 1
    if flip:
        assert 60 < sum(number for way, number in seen.items() if way[2]) < 140


@pytest.mark.parametrize("name", ("digits", "fashion_mnist", "cifar10", "imagenet2012"))
def test_normalise_is_mean_and_standard_deviation(name):
    recipe = RECIPES[name]
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, len(recipe.mean)), dtype=np.uint8)
    expected = (images.astype(np.float64) / 255 - np.array(recipe.mean)) / np.array(recipe.std)
    np.testing.assert_allclose(normalise(images, recipe.mean, recipe.std), expected, atol=1e-6)
