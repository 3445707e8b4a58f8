"""From an encoded example to an upright 8-bit PIL image.

What is no picture (empty, cut off, another kind of file, a pipe, a decompression bomb, pixels
that 8 bits cannot show) is a `BadImage`, which a run may skip and count; a file that is gone or
may not be read is an error of the data set, which it may not. Not found out is damage in the
middle of a JPEG's data: libjpeg decodes on, and Pillow does not pass its warnings on.
"""

import contextlib
import io
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax import bounded
from vit_jax.errors import UserError

# Pillow reads 40 more, among them EPS, for which it runs another program on the file. It asks
# one after the other: so the commonest come first.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
    if name in Image.OPEN
)
# Of an image file. As many pixels as Pillow decodes, with transparency, stored as they are.
MOST_BYTES = 4 * 2 * (Image.MAX_IMAGE_PIXELS or 0)
# Where Pillow keeps the camera's notes, except those of a TIFF.
NOTES = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


class BadImage(UserError):
    """What should be a picture is none; the message names it."""


def decode(example: dict[str, Any], channels: int | None) -> Image.Image:
    """The image of an example, upright, in mode L (1 channel) or RGB (3).

    Takes files and bytes in one of `FORMATS`, and uint8 arrays of shape (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4); an image that is decoded already comes back as it is. With
    `channels=None`, grey images stay grey. Of an animation the first frame counts.
    Transparency is dropped and the colours below it stay, as TensorFlow and torchvision have
    it. 16-bit grey is scaled to 8 bits. An image of more than twice
    `PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels in all) is refused before it is decoded.

    Raises:
      BadImage: the image is broken or none.
      UserError: its file cannot be read.
    """
    if channels not in (1, 3, None):
        raise UserError(f"images can be decoded to 1 or 3 channels, but not to {channels}.")
    encoded, name = example["image"], example["name"]
    if isinstance(encoded, Image.Image):
        return encoded
    try:
        if isinstance(encoded, np.ndarray):
            return _to_mode(_from_array(encoded), channels)
        if not isinstance(encoded, bytes):
            encoded = bounded.read(encoded, MOST_BYTES)
        _check_png(encoded)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            image.load()  # an error of the pixels must not pass for one of the notes
            return _to_mode(_upright(image), channels)
    except UnidentifiedImageError as error:
        what = "in no format that can be read" if encoded else "empty"
        raise BadImage(f"image {name} is {what}; repair or remove it.") from error
    # Given broken data, Pillow's plugins raise nearly every built-in exception.
    except Exception as error:
        # Only errors of the system have a number: the file is gone, or may not be read.
        system = isinstance(error, OSError) and error.errno is not None
        system = system and not isinstance(error, bounded.Unfit)
        raise (UserError if system else BadImage)(
            f"image {name} cannot be decoded ({error}); repair or remove it."
        ) from error


def _check_png(encoded: bytes) -> None:
    """Raises ValueError if the pixels of a PNG are damaged, which Pillow would not tell."""
    if not encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    start = 8
    while start + 12 <= len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        if encoded[start + 4 : start + 8] == b"IDAT" and end <= len(encoded):
            stored = int.from_bytes(encoded[end - 4 : end], "big")
            if zlib.crc32(memoryview(encoded)[start + 4 : end - 4]) != stored:
                raise ValueError("a checksum of its pixels is wrong")
        start = end


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"an array of {pixels.dtype} {pixels.shape} is no 8-bit image")
    return Image.fromarray(pixels)


def _upright(image: Image.Image) -> Image.Image:
    # Most have none, and to look for the orientation takes 5 us: a tenth of a small PNG's time.
    if image.format != "TIFF" and NOTES.isdisjoint(image.info):
        return image
    # The pixels may be sound where the camera's notes are not: then read them as stored.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_mode(image: Image.Image, channels: int | None) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, for which Pillow has several names
        wide = np.asarray(image).astype(np.float64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; store them as 8-bit")
        image = Image.fromarray(np.rint(wide / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point; store them as 8-bit")
    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA", "La") else 3
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns, and may blend
    mode = "L" if channels == 1 else "RGB"
    # To convert makes a copy even if the mode stays: 50 us and more for a photograph.
    return image if image.mode == mode else image.convert(mode)
