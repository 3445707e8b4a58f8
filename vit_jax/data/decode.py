"""From an encoded example to an upright PIL image of 8 bits, or to channels of 8 or 16.

What is not an image (empty, truncated, another kind of file, a pipe, a decompression bomb,
pixels that 8 bits cannot hold) is a `BadImage`, which a run may skip and count; a file that is
missing or unreadable is an error of the data set, which ends the run. Damage in the middle of a
JPEG's data is not detected: libjpeg decodes on, and Pillow does not pass its warnings on.
"""

import contextlib
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_jax.data import tiff
from vit_jax.data.planes import OtherChannels, Planes, with_channels, with_depth
from vit_jax.system import bounded
from vit_jax.system.errors import UserError

# Pillow reads 40 more, among them EPS, for which it runs another program on the file. It tries
# them in order, so the most common come first.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
    if name in Image.OPEN
)
# Of an image file. As many pixels as Pillow decodes, with transparency, stored as they are.
MOST_BYTES = 4 * 2 * (Image.MAX_IMAGE_PIXELS or 0)
_LONGEST_SIDE = 1_000_000  # pixels
# Where Pillow keeps the camera's metadata, except that of a TIFF.
NOTES = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


class BadImage(UserError):
    """A file or array is not an image; the message names it."""


def decode(example: dict[str, Any], channels: int | None, bits: int | None = 8) -> Any:
    """The image of an example, upright: in mode L (1 channel) or RGB (3), else as `Planes`.

    Takes files and bytes in one of `FORMATS`, of NumPy (.npy), and uint8 or uint16 arrays of
    shape (H, W), (H, W, C), or of a file (C, H, W); an image that is decoded already comes back
    as it is. Of an animation the first frame counts.

    With `channels=None`, an image keeps those that it has. Transparency is kept as the last of
    2 or 4 channels; of 1 or 3 it is dropped and the colours below it stay, as TensorFlow and
    torchvision have it. With 8 `bits`, 16-bit images are scaled to 8; with 16, `Planes` have
    16, whatever the image has; with None, arrays and images of other channels keep theirs.

    An image of more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million pixels in all) is
    refused before it is decoded.

    Raises:
      BadImage: the image is broken or none, or has other channels.
      UserError: its file cannot be read, or there are no such channels.
    """
    if channels not in (1, 3, None) or bits != 8:
        check_channels(channels, bits)
    encoded, name = example["image"], example["name"]
    if isinstance(encoded, Image.Image | Planes):
        return encoded
    try:
        if isinstance(encoded, str | Path):
            encoded = bounded.read(encoded, MOST_BYTES)
        return _decode(encoded, channels, bits)
    except UnidentifiedImageError as error:
        what = "in no format that can be read" if encoded else "empty"
        raise BadImage(f"image {name} is {what}; repair or remove it.") from error
    except OtherChannels as error:
        raise BadImage(
            f"image {name} has {error}, and data.channels is {channels}; set that to what the "
            f"images have, or store this one so."
        ) from error
    # Given broken data, Pillow's plugins raise nearly every built-in exception.
    except Exception as error:
        # Only errors of the system have a number: the file is gone, or may not be read.
        system = isinstance(error, OSError) and error.errno is not None
        reason = str(error) or type(error).__name__
        system = system and not isinstance(error, bounded.Unfit)
        raise (UserError if system else BadImage)(
            f"image {name} cannot be decoded ({reason}); repair or remove it."
        ) from error


def check_channels(channels: int | None, bits: int | None) -> None:
    """Raises UserError for channels or bits that no image can have."""
    if channels is not None and (type(channels) is not int or channels < 1):
        raise UserError(f"data.channels is {channels!r}: use 1 for grey, 3 for RGB, or more.")
    if bits not in (8, 16, None):
        raise UserError(f"data.bits is {bits!r}: use 8 or 16.")


def _decode(encoded: Any, channels: int | None, bits: int | None) -> Any:
    if isinstance(encoded, bytes) and encoded.startswith(NUMPY):
        encoded = _from_numpy_file(encoded, channels)
    if isinstance(encoded, np.ndarray):
        return _from_array(encoded, channels, bits)
    if channels not in (1, 3, None) or bits == 16:
        return _to_planes(_pixels(encoded), channels, bits)
    _check_png(encoded)
    try:
        return _by_pillow(encoded, channels)
    except UnidentifiedImageError:
        if encoded.startswith(tiff.MAGIC):  # of 16 bits, or of more channels
            pixels = tiff.read(encoded)
            if channels is None:
                return _to_planes(pixels, None, bits)
            return _from_array(pixels, channels, bits)
        raise


def _by_pillow(encoded: bytes, channels: int | None) -> Image.Image:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        _check_sides(image)
        image.load()  # an error of the pixels must not be taken for one of the metadata
        return _to_mode(_upright(image), channels)


def _check_sides(image: Image.Image) -> None:
    """Raises ValueError for a single row or column, where Pillow needs ten times the memory."""
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(f"it has {image.width} x {image.height} pixels")


def _to_planes(pixels: np.ndarray, channels: int | None, bits: int | None) -> Planes:
    return Planes.of(with_channels(with_depth(pixels, bits), channels))


def _pixels(encoded: bytes) -> np.ndarray:
    """(H, W, C) uint8 or uint16, with all channels and levels that are stored."""
    if encoded.startswith(tiff.MAGIC):
        with contextlib.suppress(tiff.Unsupported):  # of 8 bits Pillow reads more
            return tiff.read(encoded)
    _check_png(encoded)
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        _check_sides(image)
        if image.format == "PNG" and (tile := image.tile[0]).args in _WIDE_PNG:
            return _wide_png(encoded, tile.args)
        if image.format == "PNG" and image.tile[0].args == "LA;16B":  # no other half of it
            raise ValueError(
                "it is grey with transparency in 16 bits, of which 8 would be lost; store it "
                "as TIFF, .npy or with 8 bits"
            )
        image.load()
        return _channels(_upright(image))


# Pillow's names for pixels of 16 bits that it reads at 8. It has the other half as well: what
# is the high byte of numbers stored the other way round.
_WIDE_PNG = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}


def _wide_png(encoded: bytes, high: str) -> np.ndarray:
    halves = []
    for args in (high, _WIDE_PNG[high]):
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            image.tile = [image.tile[0]._replace(args=args)]
            image.load()
            halves.append(np.asarray(_upright(image)).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _channels(image: Image.Image) -> np.ndarray:
    """The channels of an image that Pillow has decoded."""
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        _check_wide(wide)
        return wide.astype(np.uint16)[..., None]
    if image.mode == "F":
        raise ValueError("its pixels are floating-point; store them as 8- or 16-bit")
    if "transparency" in image.info:
        image = image.convert("RGBA" if image.mode in ("P", "RGB") else "LA")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


NUMPY = b"\x93NUMPY"


def _from_numpy_file(encoded: bytes, channels: int | None) -> np.ndarray:
    """The array in an .npy file, its channels last: (C, H, W) is turned where C is wanted."""
    pixels: np.ndarray = np.load(io.BytesIO(encoded), allow_pickle=False)
    if pixels.ndim == 3 and channels == pixels.shape[0] != pixels.shape[2]:
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels


def _check_png(encoded: bytes) -> None:
    """Raises ValueError if the pixels of a PNG are damaged, which Pillow does not report."""
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


def _from_array(pixels: np.ndarray, channels: int | None, bits: int | None) -> Any:
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise ValueError(f"an array of {pixels.dtype} {pixels.shape} is no 8-bit image")
    pixels = with_depth(pixels if pixels.ndim == 3 else pixels[..., None], bits)
    narrow = pixels.dtype == np.uint8 and bits != 16
    if narrow and channels in (1, 3, None) and pixels.shape[2] in (1, 3, 4):
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return _to_mode(image, channels)
    return Planes.of(with_channels(pixels, channels))


def _upright(image: Image.Image) -> Image.Image:
    # Most have none, and to look for the orientation takes 5 us: a tenth of a small PNG's time.
    if image.format != "TIFF" and NOTES.isdisjoint(image.info):
        return image
    # The pixels may be sound where the camera's metadata is not: then read them as stored.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _check_wide(wide: np.ndarray) -> None:
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("its pixels have more than 16 bits; store them as 8-bit")


def _to_mode(image: Image.Image, channels: int | None) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, for which Pillow has several names
        wide = np.asarray(image).astype(np.float64)
        _check_wide(wide)
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
