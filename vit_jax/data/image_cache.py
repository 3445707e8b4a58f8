"""A cache of small decoded images: after one epoch they are read from memory.

A PNG of 32 x 32 takes as long to open and decode as to transform.
"""

from typing import Any

import numpy as np
from PIL import Image

from vit_jax.data.decode import decode
from vit_jax.data.sources.source import Source

MOST_PIXELS = 64 * 64  # of an image that is kept
ROOM = 256 << 20  # bytes for what a process keeps: all of CIFAR's 50,000 images
OVERHEAD = 500  # bytes about the pixels of each


class Kept:
    """The examples of a source, decoded; small images are kept while there is room.

    Arrays are in memory already and are not kept again. As `decode` does, reading an
    example raises BadImage if it is not an image, and UserError if its file is missing, unless
    it is cached.
    """

    def __init__(self, source: Source, channels: int, room: int = ROOM, bits: int = 8) -> None:
        self.source, self.channels, self.room, self.bits = source, channels, room, bits
        # By position: label, name, mode, size and pixels.
        self._kept: dict[int, tuple[Any, str, str, tuple[int, int], bytes]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if found := self._kept.get(i):
            label, name, mode, size, pixels = found
            return {"image": Image.frombytes(mode, size, pixels), "label": label, "name": name}
        example = self.source[i]
        image = decode(example, self.channels, self.bits)
        if not isinstance(image, Image.Image):
            return {**example, "image": image}
        small = image.width * image.height <= MOST_PIXELS
        if small and self.room > 0 and not isinstance(example["image"], np.ndarray):
            pixels = image.tobytes()
            self.room -= len(pixels) + OVERHEAD
            self._kept[i] = (example["label"], example["name"], image.mode, image.size, pixels)
        return {**example, "image": image}
