"""Files and folders that are either complete or absent."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vit_jax.system.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path at which to write a file or folder, which then replaces `path`.

    It is beside `path`, so that the move is atomic, and has the same ending. If the block
    fails, it is removed, and what was at `path` stays.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        part = room / path.name
        yield part
        if path.is_dir():  # which the system replaces only by one, when it is empty
            if not part.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder is there: move it away")
            os.replace(path, room / f"{path.name}.before")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)
