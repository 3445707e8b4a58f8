"""Reading untrusted files: regular ones only, and never more than a limit.

A path may be anything: a pipe, which waits for a writer for ever, a device, which has no end, a
link to either, a sparse file of terabytes. Files are therefore checked before they are read.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import IO, Any

LABELS = 1 << 20  # bytes of a line in a file of labels or records
SETTINGS = 16 << 20  # bytes of a whole file of settings, names or labels of classes


class Unfit(OSError):
    """Not a regular file, or a file over the limit."""


def open_regular(path: str | Path, most: int | None = None) -> IO[bytes]:
    """Opens a file for reading, if it is a regular one of at most so many bytes.

    Links are followed. Nothing is read, and nothing is waited for.

    Raises:
      Unfit: it is something else, or larger.
      OSError: it cannot be opened.
    """
    number, _ = _open(path, most)
    return open(number, "rb")


def _open(path: str | Path, most: int | None) -> tuple[int, int]:
    """The number of an open file, and its size in bytes."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            check_regular(status, path)
        if most is not None and status.st_size > most:
            raise Unfit(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}")
    except BaseException:
        os.close(number)
        raise
    return number, status.st_size


def check_regular(status: os.stat_result, path: str | Path) -> None:
    """Raises Unfit for what is neither a file nor a folder; folders raise IsADirectoryError."""
    for test, what in (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(status.st_mode):
            raise Unfit(errno.EINVAL, f"it is {what}, not a regular file")
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def read(path: str | Path, most: int = SETTINGS) -> bytes:
    """The content of a regular file of at most so many bytes. Raises as `open_regular` does."""
    number, size = _open(path, most)
    try:
        content = os.read(number, size + 1)  # one more, to see that it has not grown since
        while len(content) <= most and (more := os.read(number, 1 << 20)):
            content += more
    finally:
        os.close(number)
    if len(content) > most:
        raise Unfit(errno.EFBIG, f"it has more than {most:,} bytes")
    return content


def read_text(path: str | Path, encoding: str = "utf-8", most: int = SETTINGS) -> str:
    """The same as text. Raises ValueError too, for bytes that are none."""
    return read(path, most).decode(encoding)


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, where too many brackets are a ValueError like every other mistake."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
