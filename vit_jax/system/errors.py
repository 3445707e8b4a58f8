"""The exception for wrong input, and errors of the operating system turned into it."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vit_jax.system.bounded import Unfit


class UserError(Exception):
    """Bad input from the user.

    The message is one sentence that names the file or field, the value found and the
    remedy. The commands print it and exit with code 1, without a traceback.

    It may quote an untrusted file: so it is shown on one line, without terminal control codes,
    and long text is shortened.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > 2 * _SHOWN:
            text = f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"
        if text.isprintable():
            return text
        escaped = lambda c: c.encode("unicode_escape").decode("ascii")
        return "".join(c if c.isprintable() else escaped(c) for c in text)


_SHOWN = 2_000  # characters at each end of a message, which holds its reason and its remedy


_ROOM = "make room there, or choose another place, and run the same command again"
_PERMISSION = "get permission for it, or choose another place, and run the same command again"
_KIND = "there is a file instead of a folder, or a folder instead of a file: move it away"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose another place",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EISDIR: _KIND,
    errno.ENOTDIR: _KIND,
    errno.EEXIST: _KIND,
    errno.ENOENT: "it, or a folder above it, is gone: restore it, or choose another place",
    errno.ELOOP: "it is a link that leads back to itself: remove the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold too many files open",
    errno.EIO: "check the disk, or the connection to it, and run the same command again",
    errno.ESTALE: "check the connection to its file system, and run the same command again",
}
_OTHERWISE = "run the same command again once that is fixed"

# How TensorStore, which writes checkpoints in C++, reports an error of the system.
_TOLD = re.compile(r"(?:\"(?P<path>/[^\"]+)\".*)?\[os_error_code='(?P<number>\d+)'", re.DOTALL)


def of_system(error: BaseException) -> UserError | None:
    """A sentence about the error of the operating system that caused `error`, if there is one.

    A full disk, a missing permission, a file instead of a folder: none of them is an error of
    the program, and each has a remedy. Explicit causes (`raise ... from`) are followed;
    an error raised while another was handled is not, since that may be a bug of ours.
    """
    following: BaseException | None = error
    while following is not None:
        if isinstance(following, Unfit):
            return UserError(
                f"{_named(following.filename)} cannot be used: {following.strerror}"
            )
        if isinstance(following, OSError) and following.errno is not None:
            return _sentence(following.errno, following.filename)
        if match := _TOLD.search(str(following)):
            return _sentence(int(match["number"]), match["path"])
        following = following.__cause__
    return None


def _sentence(number: int, path: str | bytes | int | None) -> UserError:
    what, remedy = os.strerror(number), _REMEDIES.get(number, _OTHERWISE)
    return UserError(f"{_named(path)} cannot be used ({what}): {remedy}")


def _named(path: str | bytes | int | None) -> str:
    if isinstance(path, str | bytes) and path:
        return os.fsdecode(path)
    return "a file, or where output goes,"


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Names `path` in errors of the system that name no file: those of open files do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
