"""Tells damage to a checkpoint from trouble of the system that reads it.

Only damage sets a checkpoint aside. A file that may not be read today, a disk that answers with
an error, too little memory or too many open files say nothing about what was saved: they end
the command, and everything stays where it is.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.checkpoints.digests import MOST, Damaged
from vit_jax.system.errors import UserError

# What the system says when a file is missing, or is no file: of a checkpoint, that is damage.
_MISSING = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR}
# How versions of TensorStore, which raises no OSError, report what the system said.
_TENSORSTORE = re.compile(r"\[OS error (\d+):|os_error_code='(\d+)'")


def judge(checkpoint: Path, error: BaseException) -> Damaged | UserError:
    """What `error`, raised while `checkpoint` was read, says about it."""
    if isinstance(error, Damaged | UserError):
        return error
    if trouble := system_trouble(error) or unreadable_file(checkpoint):
        return cannot_be_read(checkpoint, trouble)
    if not checkpoint.is_dir():
        return UserError(
            f"checkpoint {checkpoint} was removed while it was read, perhaps by the run that "
            f"trains there: run the same command again"
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        missing = Path(error.filename)
        return Damaged(f"{missing.parent.name}/{missing.name} is missing")
    while error.__cause__ is not None:  # Orbax wraps what TensorStore says
        error = error.__cause__
    return Damaged(f"it cannot be decoded: {_first_line(error)}")


def cannot_be_read(checkpoint: Path, trouble: str) -> UserError:
    return UserError(
        f"checkpoint {checkpoint} cannot be read now ({trouble}): it may be intact and was "
        f"left where it is; mend that and run the same command again"
    )


def system_trouble(error: BaseException) -> str:
    """What the system said, if it is the reason for `error`, else nothing."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return "not enough memory"
        if isinstance(cause, jax.errors.JaxRuntimeError | ImportError):
            return _first_line(cause)
        number = cause.errno if isinstance(cause, OSError) else None
        if told := _TENSORSTORE.search(str(cause)):
            number = int(told[1] or told[2])
        if number is not None and number not in _MISSING:
            return os.strerror(number)
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that led to it."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        waiting += [cause.__cause__, cause.__context__]
        if isinstance(cause, BaseExceptionGroup):
            waiting += cause.exceptions


def unreadable_file(checkpoint: Path, through: bool = True) -> str:
    """What the system says against reading some file of `checkpoint`, if anything.

    Args:
      checkpoint: its folder.
      through: read every file to its end, which finds errors of the disk; else only open it.
    """
    try:
        for folder, _, names in os.walk(checkpoint, onerror=_raise):
            for name in names:
                _try(os.path.join(folder, name), through)
    except OSError as error:
        if error.errno not in _MISSING:
            return f"{error.filename}: {error.strerror}"
    return ""


_MOST_DATA = (
    64 << 30
)  # bytes of a file with parts of arrays: TensorStore begins a new one at 2 GiB


def strange_file(checkpoint: Path) -> str:
    """What in `checkpoint` was never saved and would make its reader wait or fall over.

    That is a pipe or the like; and a file of endless size, for which TensorStore asks for so
    much memory that the process ends. Those with the data of arrays, in folders `d`, may be
    larger: they are read in parts.
    """
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            path = Path(folder, name)
            if not path.exists():
                continue
            if not path.is_file():
                return f"{path.relative_to(checkpoint)} is no regular file"
            size = path.stat().st_size
            if size > (_MOST_DATA if path.parent.name == "d" else MOST):
                return f"{path.relative_to(checkpoint)} has {size:,} bytes"
    return ""


def _raise(error: OSError) -> None:
    raise error


def _try(path: str, through: bool) -> None:
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                while through and file.read(1 << 24):
                    pass
    except OSError as error:
        error.filename = path  # which an error of reading, not of opening, does not know
        raise


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200] or type(error).__name__


_LONGEST = 512  # bytes of a message that other processes hear


def agree(error: Damaged | UserError | None) -> None:
    """Raises what was found if any process has found something; each must ask.

    Raises:
      Damaged: to some process, the checkpoint is damaged.
      UserError: some process cannot tell.
    """
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    kinds = (Damaged, UserError)  # the worse of them last
    said = "" if error is None else f"{int(isinstance(error, UserError))}{error}"
    row = np.frombuffer(
        said.encode(errors="replace")[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8
    )
    rows = np.asarray(multihost_utils.process_allgather(row))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    if found := max(texts, key=lambda text: text[:1]):
        raise kinds[int(found[0])](found[1:])
