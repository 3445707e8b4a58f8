"""Resizing that is deferred until the crop is known.

An image of 1 x 60,000 pixels, whose shorter edge is made 248, has 3.7 thousand million pixels,
of which a crop keeps 248 x 248. A result of more than `LARGE` pixels is therefore not computed
before the crop; the pixels are the same. What is still too much work is refused.
"""

from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data.planes import Planes
from vit_jax.data.transforms import resize as resizing
from vit_jax.data.transforms.crops import Size

LARGE = 1 << 22  # pixels of a result that is computed at once: 2048 x 2048
MOST = Image.MAX_IMAGE_PIXELS or 1 << 26  # pixels held at a time; decoding has twice this
EDGE = 1 << 24  # pixels of an edge: resizers keep 100 bytes for each
STRIPS = 4  # how often `MOST` pixels may be processed for one image


class TooLarge(ValueError):
    """Computing the pixels of this image would take too much memory or time."""


def resize(image: Any, size: Size, method: str, *rounding: str) -> Any:
    """As `resize.resize`, of each channel of `Planes`; if the result is large, `Deferred`."""
    if isinstance(image, Planes) and size[0] * size[1] <= LARGE:
        return image.map(lambda plane: resizing.resize(plane, size, method, *rounding))
    if size[0] * size[1] <= LARGE:
        return resizing.resize(image, size, method, *rounding)
    return Deferred(image, size, method, *rounding)


class Deferred:
    """A resized image of which parts can be computed, with PIL's interface for cropping."""

    def __init__(self, image: Any, size: Size, method: str, rounding: str = "nearest") -> None:
        self.image, self.method, self.rounding = image, method, rounding
        self.height, self.width = size
        self.size = (self.width, self.height)

    def whole(self) -> Any:
        """Raises TooLarge."""
        return self.crop((0, 0, self.width, self.height))

    def crop(self, box: tuple[int, int, int, int]) -> Any:
        """The pixels of (left, top, right, bottom), which must lie inside. Raises TooLarge."""
        if isinstance(self.image, Planes):
            size, how = (self.height, self.width), (self.method, self.rounding)
            return self.image.map(lambda plane: Deferred(plane, size, *how).crop(box))
        left, top, right, bottom = box
        if (right - left) * (bottom - top) > MOST:
            raise self._too_large()
        if taps := self._taps():
            return resizing.by_taps(
                self.image, (self.height, self.width), taps, box, *self._rounded()
            )
        return self._by_passes(left, top, right, bottom)

    def _taps(self) -> Any:
        return resizing.taps_of(self.method, *self._rounded())

    def _rounded(self) -> tuple[str, ...]:
        return () if self.rounding == "nearest" else (self.rounding,)

    def _by_passes(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        """Resizes all rows and crops; then resizes columns, some at a time, and crops."""
        rows, pixels = self.image.height, self.image.height * self.width
        same = self.image.width == 1  # then all columns are
        columns = 1 if same else right - left
        if max(self.size) > EDGE or pixels > MOST or columns * self.height > STRIPS * MOST:
            raise self._too_large()
        if same:
            cut = self.image
        else:
            wide = resizing.resize(self.image, (rows, self.width), self.method)
            cut = wide.crop((left, 0, right, rows))
        at_once = max(MOST // 4 // self.height, 1)
        made = Image.new(cut.mode, (columns, bottom - top))
        for first in range(0, columns, at_once):
            last = min(first + at_once, columns)
            strip = cut.crop((first, 0, last, rows))
            tall = resizing.resize(strip, (self.height, last - first), self.method)
            made.paste(tall.crop((0, top, last - first, bottom)), (first, 0))
        if not same:
            return made
        return Image.fromarray(np.repeat(np.asarray(made), right - left, axis=1))

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"its {self.image.width} x {self.image.height} pixels would become "
            f"{self.width:,} x {self.height:,}"
        )
