"""Decoding, cutting and resizing: against PIL on the cut image, and interpolation from its definition."""

import io
import math

import numpy as np
import pytest
from made_data import jpeg, made_image
from PIL import Image

from mpq_jax.data.images import AREA, RATIO, centre_crop, crop_and_resize, crop_box, random_resized_crop


@pytest.mark.parametrize("width, height", ((500, 375), (333, 500), (64, 64), (1, 1), (7, 3)))
def test_crop_boxes_keep_to_area_and_ratio(width, height):
    random, areas, ratios = np.random.default_rng(0), [], []
    for _ in range(1000):
        left, top, right, bottom = crop_box(random, width, height)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        ratios.append((right - left) / (bottom - top))
    if min(width, height) > 50:
        slack = 2 / min(width, height) / math.sqrt(AREA[0])
        assert AREA[0] * (1 - slack) <= min(areas) < 0.12 and 0.85 < max(areas) <= 1
        assert RATIO[0] * (1 - slack) <= min(ratios) < 0.8 and 1.25 < max(ratios) <= RATIO[1] * (1 + slack)


@pytest.mark.parametrize("width, height, box", ((1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506))))
def test_an_image_too_long_for_any_box_is_cut_in_the_middle(width, height, box):
    """8 % of the area at 3:4 is over 24 pixels wide: none fits."""
    assert {crop_box(np.random.default_rng(seed), width, height) for seed in range(20)} == {box}


@pytest.mark.parametrize("box", ((0, 0, 90, 70), (13, 5, 53, 45), (80, 60, 90, 70), (10, 0, 42, 32)))
def test_crop_and_resize_is_pils_resize_of_that_box(box):
    """The box cut out first, then resized: no neighbours outside of it, no shortcut in decoding."""
    encoded = jpeg(made_image(np.random.default_rng(0), 3, (70, 90, 3)))
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    expected = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(crop_and_resize(encoded, 3, box, 64), expected)


def test_large_jpegs_are_decoded_small_with_nearly_the_same_result():
    encoded = jpeg(made_image(np.random.default_rng(0), 3, (801, 1203, 3)))
    box = (101, 50, 1101, 750)
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    expected = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BILINEAR), np.float64)
    result = crop_and_resize(encoded, 3, box, 64)
    assert np.abs(result - expected).mean() < 2 and not np.array_equal(result, expected)


def test_random_resized_crop_is_a_box_and_half_the_time_a_flip():
    encoded = jpeg(made_image(np.random.default_rng(0), 3, (60, 80, 3)))
    flips = 0
    for seed in range(40):
        box = crop_box(np.random.default_rng(seed), 80, 60)
        plain = crop_and_resize(encoded, 3, box, 32)
        result = random_resized_crop(encoded, 3, 32, np.random.default_rng(seed))
        flipped = np.array_equal(result, plain[:, ::-1])
        assert flipped or np.array_equal(result, plain)
        flips += flipped
    assert 8 < flips < 32


def triangle_weights(source, target):
    """[target, source]: antialiased linear interpolation, from its definition, in float64."""
    scale = source / target
    support = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(source) + 0.5 - centres[:, None]) / support
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("height, width", ((375, 500), (500, 333), (256, 256), (200, 150)))
def test_centre_crop_is_resize_to_256_and_the_middle_224(height, width):
    encoded = jpeg(made_image(np.random.default_rng(0), 1, (height, width, 3)))
    pixels = np.asarray(Image.open(io.BytesIO(encoded)), np.float64)
    short = min(height, width)
    high, wide = (256 * side // short for side in (height, width))
    resized = np.tensordot(triangle_weights(height, high), pixels, 1)
    resized = np.einsum("sw,twc->tsc", triangle_weights(width, wide), resized, optimize=True)
    top, left = round((high - 224) / 2), round((wide - 224) / 2)
    expected = resized[top : top + 224, left : left + 224]
    result = centre_crop(encoded, 3, 224)
    assert result.shape == (224, 224, 3)
    # PIL rounds to whole levels after each of the two passes.
    assert np.abs(result - expected).max() < 1.6
