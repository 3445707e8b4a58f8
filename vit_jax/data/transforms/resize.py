"""Resizing, by the rules the published checkpoints were trained with.

TensorFlow and PIL mean different things by "bilinear", and the difference is worth tenths
of a percent of accuracy. So the methods have different names:

    bilinear             TensorFlow's, from half-pixel centres and without antialiasing
    area                 TensorFlow's, the mean over the exact area a pixel covers
    bilinear_antialias, bicubic (a = -0.5), lanczos, box, hamming     PIL's, antialiased
    nearest              PIL's, the pixel at the new centre

TensorFlow's two may also cut off what is beyond a whole level (`rounding="floor"`) where
others round: big_vision converts its resized images so, which darkens them by half a level.

All but `area` go along rows first and then along columns, and round to 8 bits in between, as
PIL did before version 13, which goes along columns first where that is less work.

cykooz.resizer works in the memory of PIL's images with the processor's vector instructions,
about five times as fast. Of what PIL makes of a photograph, up to 0.8% of the values differ,
by one level of 255, rarely by two. Where it is not installed, PIL and NumPy do the same.
"""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # there is none for Linux on ARM
    cykooz_resizer = None

_PIL_FILTERS = {
    "bilinear_antialias": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
METHODS = ("bilinear", "area", *_PIL_FILTERS)
ROUNDING = {"nearest": 0.5, "floor": 0.0}  # what is added before the fraction is cut off

# Names of (algorithm, filter). "interpolation" reads as many pixels however much an image is
# reduced: without antialiasing.
_CYKOOZ = {
    "bilinear": ("interpolation", "bilinear"),
    "bilinear_antialias": ("convolution", "bilinear"),
    "bicubic": ("convolution", "catmull_rom"),
    "lanczos": ("convolution", "lanczos3"),
}


def resize(
    image: Image.Image, size: tuple[int, int], method: str, rounding: str = "nearest"
) -> Image.Image:
    """Resizes an image to `size` = (height, width), whatever its aspect.

    Args:
      image: of mode L, RGB, or F (one channel of levels with fractions, which stay).
      size: in pixels.
      method: of `METHODS`.
      rounding: of `ROUNDING`: how the result becomes 8-bit; PIL's methods know one way.
    """
    height, width = size
    if (width, height) == image.size:
        return image
    if taps := taps_of(method, rounding):
        return by_taps(image, size, taps, (0, 0, width, height), rounding)
    if cykooz_resizer and method in _CYKOOZ:
        return _by_cykooz(image, size, method)
    rows = image.resize((width, image.height), _PIL_FILTERS[method])
    return rows.resize((width, height), _PIL_FILTERS[method])


def taps_of(method: str, rounding: str = "nearest") -> Any:
    """The pixels that are summed, for the methods that are computed here, or None."""
    if method == "area":
        return _area_taps
    by_cykooz = cykooz_resizer and rounding == "nearest"
    return _bilinear_taps if method == "bilinear" and not by_cykooz else None


def _by_cykooz(image: Image.Image, size: tuple[int, int], method: str) -> Image.Image:
    height, width = size
    options = _options(*_CYKOOZ[method])
    resizer = cykooz_resizer.Resizer()  # it has buffers, which threads may not share
    for shape in ((width, image.height), (width, height)):
        if shape != image.size:
            source, image = image, Image.new(image.mode, shape)
            resizer.resize_pil(source, image, options)
    return image


@functools.cache
def _options(algorithm: str, kernel: str) -> Any:
    # Of `ResizeAlg`, which has no constructor for interpolation, nothing else is read.
    chosen = SimpleNamespace(
        algorithm=cykooz_resizer.Algorithm[algorithm],
        filter_type=cykooz_resizer.FilterType[kernel],
        multiplicity=None,
    )
    return cykooz_resizer.ResizeOptions(chosen)


def by_taps(
    image: Image.Image,
    size: tuple[int, int],
    taps: Any,
    box: tuple[int, int, int, int],
    rounding: str = "nearest",
) -> Image.Image:
    """The pixels in `box` (left, top, right, bottom) of the image resized to `size`."""
    left, top, right, bottom = box
    pixels = np.asarray(image)
    for axis, (length, *part) in enumerate(((size[0], top, bottom), (size[1], left, right))):
        pixels = _gather(pixels, axis, *taps(pixels.shape[axis], length, np.arange(*part)))
    if image.mode == "F":
        return Image.fromarray(pixels.astype(np.float32))
    # Sums of weights in float32 may be slightly below the exact level.
    return Image.fromarray((pixels + max(ROUNDING[rounding], 1e-4)).astype(np.uint8))


def _gather(
    pixels: np.ndarray, axis: int, first: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Sums `weights[k]` x pixel `first + k` over k, repeating border pixels; float32."""
    column = (-1, *[1] * (pixels.ndim - axis - 1))
    total = pixels.take(first, axis, mode="clip") * weights[0].reshape(column)
    for k, weight in enumerate(weights[1:], 1):
        total += pixels.take(first + k, axis, mode="clip") * weight.reshape(column)
    return total


def _bilinear_taps(
    before: int, after: int, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The two pixels whose centres lie around the new centre of each of the `wanted`.

    PIL samples likewise in `Image.transform` with EXTENT, but drops the fraction: that
    darkens an image by 0.45 levels, and is no faster.
    """
    centre = (wanted + 0.5) * (before / after) - 0.5
    first = np.floor(centre)
    share = centre - first
    return first.astype(np.intp), np.stack([1 - share, share]).astype(np.float32)


def _area_taps(before: int, after: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pixels that each of the `wanted` covers, each by the part of it that is covered."""
    scale = before / after
    low, high = wanted * scale, (wanted + 1) * scale
    first = np.floor(low)
    left = first + np.arange(int(np.ceil(high - first).max()))[:, None]
    covered = np.minimum(high, left + 1) - np.maximum(low, left)
    return first.astype(np.intp), (covered.clip(0) / scale).astype(np.float32)
