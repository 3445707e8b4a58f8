"""Small TIFF files whose tags promise work without end."""

import functools
import struct

PIXELS = 13_300  # of each side of a picture just below the most that Pillow decodes


@functools.cache
def large_tiffs() -> dict[str, bytes]:
    """Those of them that our own reader of TIFF gets."""
    side, found = PIXELS, {}
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 277: 1, 273: 8, 279: 8}
    found["tiles.tif"] = _tags(tags | {322: 1, 323: 1, 324: 8, 325: 8})
    found["rows.tif"] = _tags(tags | {256: 1, 257: side**2, 278: 1})
    found["channels.tif"] = _tags(tags | {262: 0, 277: 4096, 278: side})
    found["lzw.tif"] = _overlapping(5, b"\x80\x00" * 100_000)
    found["packbits.tif"] = _overlapping(32773, b"\x80" * 200_000)
    found["entries.tif"] = _many_entries(20_000)
    return found


def _tags(tags: dict[int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, x) for tag, x in sorted(tags.items()))
    return (
        b"II*\0"
        + struct.pack("<I", 16)
        + bytes(8)
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def _overlapping(method: int, data: bytes) -> bytes:
    """A thousand strips that all are the same bytes, in which there is nothing."""
    count, at = 1000, 8 + len(data)
    tags = {
        256: (1, 1000),
        257: (1, count),
        258: (1, 8),
        259: (1, method),
        262: (1, 1),
        277: (1, 1),
        278: (1, 1),
    }
    tags |= {273: (count, at), 279: (count, at + 4 * count)}
    end = at + 8 * count
    entries = b"".join(
        struct.pack("<HHII", tag, 4, n, x) for tag, (n, x) in sorted(tags.items())
    )
    lists = struct.pack(f"<{count}I", *[8] * count) + struct.pack(
        f"<{count}I", *[len(data)] * count
    )
    return (
        b"II*\0"
        + struct.pack("<I", end)
        + data
        + lists
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def _many_entries(count: int) -> bytes:
    """Entries of which each has all of the file as its numbers."""
    size = 8 + 2 + 12 * count
    entries = b"".join(struct.pack("<HHII", 1000 + i, 1, size - 8, 8) for i in range(count))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + entries
