"""Images that PIL has no mode for: any number of channels, of 8 or 16 bits.

Each channel is a separate PIL image, so that operations that move or resize pixels treat it
like a grey image: 8 bits in mode L, 16 bits in mode F, which is rounded once, at the end.
Operations on colours are for images of 1 and 3 channels only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

_MOST = 65535  # level of 16 bits


class Planes:
    """Channels of one size, with as much of PIL's images as cropping and resizing need."""

    def __init__(self, planes: tuple[Any, ...]) -> None:
        self.planes = planes
        self.width, self.height = self.size = planes[0].size

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Planes":
        """Of an array (H, W, C) uint8 or uint16."""
        kind = np.uint8 if pixels.dtype == np.uint8 else np.float32
        channels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0), kind)
        return cls(tuple(Image.fromarray(channel) for channel in channels))

    def map(self, function: Callable[[Any], Any]) -> "Planes":
        return Planes(tuple(function(plane) for plane in self.planes))

    def crop(self, box: tuple[int, int, int, int]) -> "Planes":
        return self.map(lambda plane: plane.crop(box))

    def transpose(self, method: Any) -> "Planes":
        return self.map(lambda plane: plane.transpose(method))

    def pixels(self) -> np.ndarray:
        """(H, W, C) uint8 or uint16."""
        pixels = np.stack([np.asarray(plane) for plane in self.planes], axis=-1)
        if pixels.dtype == np.uint8:
            return pixels
        return np.rint(pixels).clip(0, _MOST).astype(np.uint16)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.pixels(), dtype)

    def tobytes(self) -> bytes:
        return self.pixels().tobytes()


def with_depth(pixels: np.ndarray, bits: int | None) -> np.ndarray:
    """Levels of 8 or 16 bits: the brightest stays the brightest. None: as they are.

    Raises ValueError for pixels that are neither uint8 nor uint16.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"an array of {pixels.dtype} {pixels.shape} is no 8- or 16-bit image")
    if bits is None:
        return pixels
    if pixels.dtype == np.uint8:
        return pixels if bits == 8 else pixels * np.uint16(257)
    return pixels if bits == 16 else np.rint(pixels / 257).astype(np.uint8)


class OtherChannels(ValueError):
    """The channels of the image cannot be converted to those wanted."""


def with_channels(pixels: np.ndarray, channels: int | None) -> np.ndarray:
    """(H, W, C) of as many channels as are wanted; None: as it is.

    Between grey and colours it converts as PIL does; transparency is dropped if it is the only
    additional channel.

    Raises OtherChannels for everything else.
    """
    found = pixels.shape[-1]
    if channels in (None, found):
        return pixels
    if channels in (1, 3) and found in (2, 4):
        return with_channels(pixels[..., :-1], channels)
    if (found, channels) == (1, 3):
        return pixels.repeat(3, axis=-1)
    if (found, channels) == (3, 1):
        grey = pixels @ np.array([0.299, 0.587, 0.114])
        return np.rint(grey).astype(pixels.dtype)[..., None]
    raise OtherChannels(f"{found} channel{'s' * (found > 1)}")
