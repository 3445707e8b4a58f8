"""From an encoded example to an upright 8-bit PIL image."""

import contextlib
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.errors import UserError


def decode(example: dict[str, Any], channels: int) -> Image.Image:
    """The image of an example, upright, in mode L (1 channel) or RGB (3).

    Takes what Pillow reads, and uint8 arrays of shape (H, W), (H, W, 1), (H, W, 3) or
    (H, W, 4). Of an animation the first frame counts. Transparency is dropped and the
    colours below it stay, as TensorFlow and torchvision have it. 16-bit grey is scaled to
    8 bits. Raises UserError, naming the example, for anything broken.
    """
    if channels not in (1, 3):
        raise UserError(f"images can be decoded to 1 or 3 channels, but not to {channels}.")
    encoded, name = example["image"], example["name"]
    try:
        if isinstance(encoded, np.ndarray):
            return _to_mode(_from_array(encoded), channels)
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as file:
            return _to_mode(_upright(file), channels)
    except UnidentifiedImageError as error:
        raise UserError(
            f"image {name} is in no format that can be read; repair or remove it."
        ) from error
    # Given broken data, Pillow's plugins raise nearly every built-in exception.
    except Exception as error:
        raise UserError(
            f"image {name} cannot be decoded ({error}); repair or remove it."
        ) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"an array of {pixels.dtype} {pixels.shape} is no 8-bit image")
    return Image.fromarray(pixels)


def _upright(image: Image.Image) -> Image.Image:
    # The pixels may be sound where the camera's notes are not: then read them as stored.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, for which Pillow has several names
        wide = np.asarray(image).astype(np.float64).clip(0, 65535)
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point; store them as 8-bit")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns, and may blend
    return image.convert("L" if channels == 1 else "RGB")
