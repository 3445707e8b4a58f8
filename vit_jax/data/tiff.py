"""TIFF files with any number of channels of 8 or 16 bits, which Pillow does not read.

Strips and tiles, channels interleaved or apart, uncompressed or by deflate, LZW or PackBits,
with or without differences of neighbours (predictor 2); classic TIFF and BigTIFF. Only the
first page is read. Other files are `Unsupported`.
"""

import itertools
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_CODES = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _STRIP_SIZES, _ROWS = 273, 279, 278
_TILES, _TILE_SIZES, _TILE_WIDTH, _TILE_HEIGHT = 324, 325, 322, 323
_ORIENTATION, _CHANNELS, _APART, _PREDICTOR, _FORMAT = 274, 277, 284, 317, 339
_READ = {
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_SIZES, _ROWS, _TILES,
    _TILE_SIZES, _TILE_WIDTH, _TILE_HEIGHT, _ORIENTATION, _CHANNELS, _APART, _PREDICTOR,
    _FORMAT,
}  # fmt: skip


class Unsupported(ValueError):
    """A TIFF of a kind that is not supported."""


class _Page(NamedTuple):
    """The tags of a page, and the byte order of its samples."""

    tags: dict[int, tuple[int, ...]]
    order: str

    def one(self, tag: int, default: int) -> int:
        return self.tags.get(tag, (default,))[0]


def read(encoded: bytes) -> np.ndarray:
    """The pixels of the first page, upright: (H, W, C) uint8 or uint16.

    Raises:
      Unsupported: it is of another kind.
      ValueError: it is damaged, or declares more pixels than Pillow would decode.
    """
    try:
        page = _page(encoded)
        pixels = _pixels(encoded, page)
    except (struct.error, IndexError, zlib.error) as error:
        raise ValueError(f"the TIFF is damaged: {error}") from error
    return np.ascontiguousarray(_upright(pixels, page.one(_ORIENTATION, 1)))


def _page(encoded: bytes) -> _Page:
    order = "<" if encoded[:2] == b"II" else ">"
    big = encoded[:4] in MAGIC[2:]
    offset, count, entry, inline = ("Q", "Q", 20, 8) if big else ("I", "H", 12, 4)
    [at] = struct.unpack_from(order + offset, encoded, 8 if big else 4)
    [entries] = struct.unpack_from(order + count, encoded, at)
    at += struct.calcsize(count)
    tags: dict[int, tuple[int, ...]] = {}
    for start in range(at, at + entry * entries, entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{offset}", encoded, start)
        # The numbers of each may be as many as the file has bytes: a few tags are read, once.
        if kind not in _CODES or tag not in _READ or tag in tags:
            continue
        values = start + entry - inline
        if struct.calcsize(_CODES[kind]) * number > inline:
            [values] = struct.unpack_from(order + offset, encoded, values)
        tags[tag] = struct.unpack_from(f"{order}{number}{_CODES[kind]}", encoded, values)
    return _Page(tags, order)


def _pixels(encoded: bytes, page: _Page) -> np.ndarray:
    height, width, channels = page.one(_HEIGHT, 0), page.one(_WIDTH, 0), page.one(_CHANNELS, 1)
    bits = set(page.tags.get(_BITS, (1,)))
    formats = set(page.tags.get(_FORMAT, (1,)))
    if len(bits) != 1 or not bits <= {8, 16} or formats != {1}:
        raise Unsupported("its samples are no whole numbers of 8 or 16 bits")
    if page.one(_PHOTOMETRIC, 1) not in (0, 1, 2, 5) or page.one(_PREDICTOR, 1) not in (1, 2):
        raise Unsupported("its colours are stored in another way")
    most = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 40)
    if not 0 < height * width <= most or not 0 < height * width * channels <= 4 * most:
        raise ValueError(f"it declares {width} x {height} pixels of {channels} channels")
    apart = page.one(_APART, 1) == 2
    tiled = _TILES in page.tags
    rows = page.one(_TILE_HEIGHT, 0) if tiled else min(page.one(_ROWS, height), height)
    columns = page.one(_TILE_WIDTH, 0) if tiled else width
    if not rows or not columns or rows * columns > most:
        raise ValueError("its tiles have no size")
    dtype = np.dtype(page.order + ("u1" if bits == {8} else "u2"))
    shape = (rows, columns, 1 if apart else channels)
    offsets = page.tags.get(_TILES if tiled else _STRIPS, ())
    sizes = page.tags.get(_TILE_SIZES if tiled else _STRIP_SIZES, ())
    blocks = (channels if apart else 1) * -(-height // rows) * -(-width // columns)
    if not len(offsets) == len(sizes) == blocks or sum(sizes) > len(encoded):
        raise ValueError("the TIFF is damaged: its strips or tiles do not make up an image")
    pixels = np.zeros((height, width, channels), dtype.newbyteorder("="))
    places = itertools.product(
        range(channels if apart else 1), range(0, height, rows), range(0, width, columns)
    )
    for (channel, top, left), offset, size in zip(places, offsets, sizes, strict=True):
        tall = rows if tiled else min(rows, height - top)
        block = _block(encoded[offset : offset + size], (tall, *shape[1:]), dtype, page)
        block = block[: height - top, : width - left]
        where = slice(channel, channel + 1) if apart else slice(None)
        pixels[top : top + len(block), left : left + block.shape[1], where] = block
    if page.one(_PHOTOMETRIC, 1) == 0:  # white is zero
        pixels = np.iinfo(pixels.dtype).max - pixels
    return pixels


def _block(
    stored: bytes, shape: tuple[int, int, int], dtype: np.dtype, page: _Page
) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    method = page.one(_COMPRESSION, 1)
    if method in (8, 32946):
        stored = zlib.decompressobj().decompress(stored, size)
    elif method == 5:
        stored = _lzw(stored, size)
    elif method == 32773:
        stored = _packbits(stored, size)
    elif method != 1:
        raise Unsupported(f"it is compressed by method {method}")
    if len(stored) < size:
        raise ValueError("the TIFF is cut off")
    block = np.frombuffer(stored, dtype, int(np.prod(shape))).reshape(shape)
    block = block.astype(dtype.newbyteorder("="))
    if page.one(_PREDICTOR, 1) == 2:
        block = np.cumsum(block, axis=1, dtype=block.dtype)
    return block


def _packbits(stored: bytes, size: int) -> bytes:
    found, i = bytearray(), 0
    while len(found) < size and i < len(stored):
        code = stored[i]
        if code < 128:
            found += stored[i + 1 : i + 2 + code]
            i += 2 + code
        elif code > 128:
            found += stored[i + 1 : i + 2] * (257 - code)
            i += 2
        else:
            i += 1
    return bytes(found[:size])


def _lzw(stored: bytes, size: int) -> bytes:
    """Codes of 9 to 12 bits, the first bit first, each changing its length one code early."""
    found, words = bytearray(), list[bytes]()
    before, width, held, count = b"", 9, 0, 0
    for byte in stored:
        held, count = (held << 8 | byte) & 0xFFFFFF, count + 8
        if count < width:
            continue
        count -= width
        code = held >> count & (1 << width) - 1
        if code == 256:
            words = [bytes((i,)) for i in range(256)] + [b"", b""]
            before, width = b"", 9
            continue
        if code == 257 or len(found) >= size:
            break
        if not words or code > len(words) or (code == len(words) and not before):
            raise ValueError("the TIFF is damaged: a code of LZW has no meaning")
        word = words[code] if code < len(words) else before + before[:1]
        found += word
        if before:
            words.append(before + word[:1])
        before = word
        width = 9 + sum(len(words) >= most for most in (511, 1023, 2047))
    return bytes(found[:size])


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
