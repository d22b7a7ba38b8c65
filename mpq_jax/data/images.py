"""One encoded image to pixels: decoding, random-resized-crop, resize and centre crop. PIL only."""

import io
import math

import numpy as np
from PIL import Image

_MODE = {1: "L", 3: "RGB", 4: "RGBA"}
# "Going deeper with convolutions" (Szegedy et al., 2015), section 6, as torchvision has it.
AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10

Box = tuple[int, int, int, int]


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W, C], converted where the file has other channels (grey or CMYK JPEGs among RGB ones)."""
    mode = _MODE[channels]
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array[..., None] if array.ndim == 2 else array


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """PNG, JPEG, ... -> uint8 [H, W, C] in the image's own size."""
    with _opened(encoded) as image:
        return _pixels(image, channels)


def crop_box(random: np.random.Generator, width: int, height: int) -> Box:
    """A random box (left, top, right, bottom) in an image: 8 to 100 % of its area, 3:4 to 4:3, log-uniform ratio.

    After ten boxes that do not fit: the largest box in the middle whose ratio is within the limits.
    """
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(random.integers(width - box_width + 1))
            top = int(random.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * RATIO[1])))
    box_height = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def crop_and_resize(encoded: bytes, channels: int, box: Box, size: int) -> np.ndarray:
    """The box of the image, resized to uint8 [size, size, C] (bilinear, antialiased).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the box then still has at least `size` pixels each way:
    cheaper by far for large photographs.
    """
    left, top, right, bottom = box
    with _opened(encoded) as image:
        width, height = image.size
        image.draft(None, (math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))))
        across, down = image.width / width, image.height / height
        # Cut out before it is resized, so that nothing outside of the box is mixed in. Whole pixels, unless the image
        # was decoded at a part of its size.
        x, y = math.floor(left * across), math.floor(top * down)
        end = min(math.ceil(right * across), image.width), min(math.ceil(bottom * down), image.height)
        cut = image.crop((x, y, *end)).convert(_MODE[channels])
        inner = (
            left * across - x,
            top * down - y,
            min(right * across - x, cut.width),
            min(bottom * down - y, cut.height),
        )
        return _pixels(cut.resize((size, size), Image.Resampling.BILINEAR, box=inner), channels)


def random_resized_crop(encoded: bytes, channels: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Random-resized-crop and a flip half of the time -> uint8 [size, size, C]."""
    with _opened(encoded) as image:
        width, height = image.size
    box = crop_box(random, width, height)
    pixels = crop_and_resize(encoded, channels, box, size)
    return pixels[:, ::-1] if random.integers(2) else pixels


def centre_crop(encoded: bytes, channels: int, size: int) -> np.ndarray:
    """Shorter side to size * 256/224 (bilinear), then the middle -> uint8 [size, size, C].

    Sizes and offsets are rounded as torchvision's Resize and CenterCrop round them. Decoded in full: what is measured
    does not depend on a shortcut.
    """
    with _opened(encoded) as image:
        width, height = image.size
        short = round(size * 256 / 224)
        if width <= height:
            wide, high = short, int(short * height / width)
        else:
            wide, high = int(short * width / height), short
        left, top = round((wide - size) / 2), round((high - size) / 2)
        resized = image.convert(_MODE[channels]).resize((wide, high), Image.Resampling.BILINEAR)
        return _pixels(resized.crop((left, top, left + size, top + size)), channels)
