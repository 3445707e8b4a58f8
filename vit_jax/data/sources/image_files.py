"""Millions of labelled image files, compact, in an order that depends on names alone."""

import dataclasses
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from vit_jax.data.decode import FORMATS
from vit_jax.data.sources.source import digest, plain_label, renumber
from vit_jax.system.errors import UserError

# Formats that `decode` reads, as far as this Pillow has them; `.pfm` is floating-point.
_COMMON = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EXTENSIONS = _COMMON + tuple(
    ending
    for ending, form in sorted(Image.registered_extensions().items())
    if form in FORMATS and ending not in (*_COMMON, ".pfm")
)
ARRAYS = (".npy",)  # are images where there are no others

# Folders that systems make for themselves; like all names with a dot in front, they hold
# no data.
_OF_SYSTEMS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information")

HELD_OUT_SHARE = 0.2
SPLITS = ("train", "test", "all")


class Paths(Sequence[str]):
    """Strings in one buffer, which takes a third of the memory of a tuple of them.

    Worker processes get a copy, and Python's cycle collector has nothing to traverse.
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        """Takes the bytes of all strings, uint8, and where each ends, int64 (N,)."""
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "Paths":
        encoded = [os.fsencode(path) for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start = int(self.ends[i - 1]) if i else 0
        return os.fsdecode(self.buffer[start : int(self.ends[i])].tobytes())

    def take(self, rows: np.ndarray) -> "Paths":
        """The strings at `rows`, integers of shape (n,), in their order."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends])
        lengths = np.diff(starts)[rows]
        # What follows each other here is copied at once: rows are rarely far apart.
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        last = np.append(first, len(rows))[1:] - 1
        begins, ends = starts[rows[first]].tolist(), self.ends[rows[last]].tolist()
        buffer = self.buffer.data
        joined = b"".join(buffer[a:b] for a, b in zip(begins, ends, strict=True))
        return Paths(np.frombuffer(joined, np.uint8), np.cumsum(lengths))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over by every command."""
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is nothing."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class Found(NamedTuple):
    """What lies in a folder: paths relative to where the search began.

    Attributes:
      images: files that `EXTENSIONS` names.
      arrays: files that `ARRAYS` names.
      passed: how many other files there are, by ending, and `hidden` ones.
    """

    images: list[str]
    arrays: list[str]
    passed: Counter[str]

    def files(self) -> list[str]:
        """The images, or else the arrays."""
        return self.images or self.arrays


def search(root: str | Path, start: str, dates: dict[str, int]) -> Found:
    """Looks through `root/start` and the folders in it, and notes the dates of folders.

    A folder that is a link to one that it lies in is not entered.
    """
    found = Found([], [], Counter())
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(start, frozenset())]
    while pending:
        folder, above = pending.pop()
        try:
            inside = _look_into(os.path.join(root, folder), folder, above, dates)
        except OSError as error:
            raise UserError(
                f"folder {os.path.join(root, folder)!r} cannot be read ({error.strerror}); let "
                "it be read, or move it away."
            ) from error
        for name, path, identities in inside:
            if is_hidden(name):
                found.passed["hidden"] += 1
            elif identities is not None:
                pending.append((path, identities))
            else:
                _sort(name, path, found)
    return found


_Identities = frozenset[tuple[int, int]]


def _look_into(
    place: str, folder: str, above: _Identities, dates: dict[str, int]
) -> list[tuple[str, str, _Identities | None]]:
    """(name, path, None) of files, and of folders the identities of those that they lie in."""
    status = os.stat(place)
    if (identity := (status.st_dev, status.st_ino)) in above:
        return []
    dates[folder] = status.st_mtime_ns
    found: list[tuple[str, str, _Identities | None]] = []
    with os.scandir(place) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if is_folder(entry):
                found.append((entry.name, path, above | {identity}))
            # To open a pipe would wait for ever; a dead link is an error when read.
            elif entry.is_symlink() or entry.is_file():
                found.append((entry.name, path, None))
    return found


def _sort(name: str, path: str, found: Found) -> None:
    lower = name.lower()
    if lower.endswith(EXTENSIONS):
        found.images.append(path)
    elif lower.endswith(ARRAYS):
        found.arrays.append(path)
    else:
        found.passed[os.path.splitext(lower)[1] or "without an ending"] += 1


def passed_over(found: Found) -> Counter[str]:
    """What is not among `found.files()`."""
    return found.passed + Counter({".npy": len(found.arrays) if found.images else 0})


_told: set[str] = set()  # a folder is looked at again for every split


def tell_once(note: str) -> None:
    """Prints a note on stderr, unless this process has printed it before."""
    if note not in _told:
        _told.add(note)
        print(note, file=sys.stderr)


def tell_of_passed(root: str | Path, passed: Mapping[str, int]) -> None:
    """Says on stderr how many files below `root` are no images, and of which kinds."""
    if not passed:
        return
    count = sum(passed.values())
    kinds = sorted(passed.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{n:,} {kind}" for kind, n in kinds[:5]) + ", ..." * (len(kinds) > 5)
    tell_once(
        f"note: {count:,} file{'s' * (count > 1)} in {str(root)!r} passed over, as no images: "
        f"{listed}"
    )


@dataclass(frozen=True)
class FileSource:
    """The files `rows` of `files`, relative to `root`.

    Labels are int32 (len(rows),), or where images have several, bool (len(rows), K).
    """

    root: str
    files: Paths
    rows: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.files[int(self.rows[i])])
        return {"image": path, "label": plain_label(self.labels[i]), "name": path}

    def fingerprint(self, start: int, stop: int) -> str:
        """Of names relative to `root`, and labels; a million files take 0.1 s."""
        names = self.files.take(self.rows[start:stop])
        return digest(names.ends, names.buffer, self.labels[start:stop])

    def with_classes(self, positions: np.ndarray, names: tuple[str, ...]) -> "FileSource":
        """As `classes.as_classes` has it."""
        labels = renumber(self.labels, positions, len(names))
        return dataclasses.replace(self, labels=labels, class_names=names)


@dataclass(frozen=True)
class Listing:
    """Files in order, labels as of `FileSource`, and which of them are held out, bool (N,)."""

    files: Paths
    labels: np.ndarray
    held_out: np.ndarray

    def select(self, split: str, root: str, class_names: Sequence[str]) -> FileSource:
        """The files of `train`, `test` or `all`."""
        chosen = {"train": ~self.held_out, "test": self.held_out}.get(split)
        rows = np.arange(len(self.files)) if chosen is None else np.flatnonzero(chosen)
        return FileSource(root, self.files, rows, self.labels[rows], tuple(class_names))


def arrange(classes: Iterable[tuple[int, Sequence[str]]]) -> Listing:
    """Orders the (label, paths) of all classes by a hash of the paths, and holds out 20 %.

    A file's name alone decides its split, so that files added later move no other (but a class
    with two files or more has at least one in each).
    """
    hashes, labels, held_out, paths = [], [], [], []
    limit = int((1 - HELD_OUT_SHARE) * 2**64)
    for label, of_class in classes:
        hashed = sorted((_hash(path), path) for path in of_class)
        kept = sum(value < limit for value, _ in hashed)
        kept = min(max(kept, 1), max(len(hashed) - 1, 1))  # the extremes move
        hashes += [value for value, _ in hashed]
        paths += [path for _, path in hashed]
        labels += [label] * len(hashed)
        held_out += [i >= kept for i in range(len(hashed))]
    order = np.argsort(np.array(hashes, np.uint64), kind="stable")
    return Listing(
        Paths.of(paths[i] for i in order),
        np.array(labels, np.int32)[order],
        np.array(held_out, bool)[order],
    )


def _hash(path: str) -> int:
    """Spreads classes evenly, and does not depend on listing order."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")
