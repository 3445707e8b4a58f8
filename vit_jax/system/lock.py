"""Exclusive locks between processes, which are released when their process ends.

They use `flock`, whose locks belong to an open file: the system releases them when the
process ends, however it ends, so nothing has to be cleaned up after a crash. The file names the
holder of the lock, for others to read; it is removed at the end, and one that a killed process
left behind is not locked. (`filelock` is not used: it empties the file before it takes the
lock, and falls back to a lock that outlives its process where the file system has no other.)

On network file systems: NFS (Linux, version 3 with its lock service, or 4) and Lustre
mounted with `flock` hold such locks across machines; Lustre mounted with `localflock`, and
buckets mounted by gcsfuse, only among the processes of one machine. Where there are none at
all, a note says so and every process may continue.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_jax.system.errors import UserError, about

_TO_SAY_WHO = 1.0  # seconds that a process gets to write its name after taking the lock
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Taken(Exception):
    """Another process holds the lock.

    Attributes:
      holder: who, in words.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Held:
    """A lock that this process holds."""

    def __init__(self, path: Path, file: int) -> None:
        self._path, self._file = path, file

    def still_there(self) -> bool:
        """Whether the file is where it was made: not if a folder above it was removed."""
        return _is_at(self._file, self._path)


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[Held]:
    """Holds the lock of the file `path` within this context.

    Args:
      path: in a folder that exists.
      waiting: what to print on stderr before waiting for the lock; empty: do not wait.

    Raises:
      Taken: another process holds it, and `waiting` is empty.
      OSError: the file cannot be made; one that is no regular file is refused like a folder.
    """
    while True:
        file = _open(path)
        try:
            _take(file, path, waiting)
            if not _is_at(file, path):
                continue  # its holder has removed it: others may lock a new file by now
            try:
                with about(path):
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(_myself()).encode() + b"\n", 0)
                yield Held(path, file)
            finally:
                if _is_at(file, path):
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


def _open(path: Path) -> int:
    # Does not wait for the other end of a pipe.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return file


def _take(file: int, path: Path, waiting: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waiting:
            raise Taken(_holder(file)) from None
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"note: the file system of {path.parent} has no locks ({error.strerror}): make "
            "sure that nothing else runs there",
            file=sys.stderr,
        )


def _myself() -> dict[str, Any]:
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "process": os.getpid(), "began": began}


def _holder(file: int) -> str:
    end = time.monotonic() + _TO_SAY_WHO
    while True:
        try:
            who = json.loads(os.pread(file, 4096, 0))
            return f"process {who['process']} on {who['host']}, begun {who['began']}"
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            if time.monotonic() > end:
                return "another process"
        time.sleep(0.02)  # the holder has not written its name yet


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


# --- Work directories ---------------------------------------------------------------------

NAME = "run.lock"


class WorkDirectory:
    """A work directory that no other process writes to."""

    def __init__(self, path: Path, held: Held | None) -> None:
        self.path, self._held = path, held

    def check(self, because: Exception | None = None) -> None:
        """Raises UserError if it was removed or replaced since: nothing can be saved in it.

        Args:
          because: what has failed, perhaps for that reason.
        """
        if self._held and not self._held.still_there():
            raise UserError(
                f"the work directory {self.path} was removed or replaced under the run, with "
                "what it had saved: restore it, or start again with another --workdir"
            ) from because


@contextlib.contextmanager
def alone_in(workdir: Path, first: bool = True) -> Iterator[WorkDirectory]:
    """Keeps other runs out of `workdir`, which is made if it is not there.

    Of several processes of a run only the `first` takes the lock. If the folder was removed
    during the run, that error replaces whatever failed because of it.

    Raises:
      UserError: another run is there, or the folder cannot be made, or was removed.
      OSError: the file of the lock cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the work directory {workdir} cannot be made ({error.strerror}): choose another"
        ) from error
    if not first:
        yield WorkDirectory(workdir, None)
        return
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(locked(workdir / NAME))
        except Taken as taken:
            raise UserError(
                f"another run is in {workdir} ({taken.holder}): wait for its end or stop it, "
                "or choose another --workdir"
            ) from None
        directory = WorkDirectory(workdir, held)
        try:
            yield directory
        except Exception as error:
            directory.check(error)
            raise
