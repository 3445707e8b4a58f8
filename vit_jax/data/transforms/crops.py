"""Where to crop a training image: pure functions of a random generator and a size."""

import math

import numpy as np

Size = tuple[int, int]  # height, width
Box = tuple[int, int, int, int]  # top, left, height, width


def sample_inception_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (0.75, 1.33),
    attempts: int = 100,
) -> Box:
    """A random (top, left, height, width), drawn as TensorFlow's crop for Inception is.

    This follows `sample_distorted_bounding_box` to its rounding: aspect uniform, height
    uniform among those that fit the area, the last offset never drawn, and the whole image
    after `attempts` failures. Small crops are likelier than in torchvision's.
    """
    least, most = (share * height * width for share in area)
    for _ in range(attempts):
        ratio = rng.uniform(*aspect)
        size = _sample_inception_size(rng, (height, width), (least, most), ratio)
        if size is not None:
            h, w = size
            top = int(rng.integers(height - h)) if h < height else 0
            left = int(rng.integers(width - w)) if w < width else 0
            return top, left, h, w
    return 0, 0, height, width


def _sample_inception_size(
    rng: np.random.Generator, whole: Size, area: tuple[float, float], ratio: float
) -> Size | None:
    least, most = area
    tallest = round(math.sqrt(most / ratio))
    if round(tallest * ratio) > whole[1]:
        tallest = int((whole[1] + 0.5 - 1e-7) / ratio)
        tallest -= round(tallest * ratio) > whole[1]
    tallest = min(tallest, whole[0])
    h = min(round(math.sqrt(least / ratio)), tallest)
    h = int(rng.integers(h, tallest + 1))
    w = round(h * ratio)
    # Rounding may have moved the area just out of bounds, and one row may bring it back.
    if h * w < least:
        h, w = h + 1, round((h + 1) * ratio)
    if h * w > most:
        h, w = h - 1, round((h - 1) * ratio)
    fits = 0 < h <= whole[0] and 0 < w <= whole[1] and least <= h * w <= most
    return (h, w) if fits else None


def sample_resized_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random (top, left, height, width), drawn as torchvision's RandomResizedCrop does.

    Area uniform, aspect log-uniform, ten tries, then the largest central crop whose aspect
    lies in bounds.
    """
    for _ in range(10):
        target = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        h, w = round(math.sqrt(target / ratio)), round(math.sqrt(target * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    ratio = min(max(width / height, aspect[0]), aspect[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, h, w
