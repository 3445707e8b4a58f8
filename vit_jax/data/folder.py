"""Your own images: `folder:PATH`, where every class is a folder.

PATH/train/<class>/*.jpg  and  PATH/test/<class>/*.jpg     splits made by you
PATH/<class>/*.jpg                                         split here, 80 % and 20 %
PATH/labels.csv, or another file that lists the images     see labels.py

What is found in folders of 10,000 files and more is remembered, so that a second start takes
as long as to look at the date of each folder (100,000 files in 100 folders: 0.05 s). The index
is one file in `folders/` of the user's cache (vit_jax/cache.py), because the folder of a data
set is often read-only, or shared by people, or copied on as it is. Deleting the index costs
one more scan.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_jax import cache
from vit_jax.atomic import replacing
from vit_jax.data import files, labels
from vit_jax.data.files import FileSource, Listing, Paths
from vit_jax.data.sources import HELD_OUT, pick_split
from vit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
REMEMBERED_FROM = 10_000  # files; fewer are found as fast as the index is read

# Within its date's resolution, a folder can change without a new date: 2 s on FAT.
_SETTLED = 2.0


def open_folder(path: str, split: str) -> FileSource:
    """Opens `split` of the images below `path`, in an order fixed by a hash of their names.

    With folders `train` and one of `val`, `validation`, `test`, these are the splits, and
    the class names are the sorted folder names of `train`. Otherwise the folders are the
    classes, the splits are `train`, `test` and `all`, and a file's name alone decides its
    side, so that files added later move no other (but of a class with two images or more,
    one at least lies on each side). A file of labels comes before folders.

    Classes whose names differ in case only are kept apart, and told of on stderr.

    Raises:
      UserError: a missing folder or split, folders without images, or a file of labels that
        cannot be used.
    """
    root, listed = _find(path)
    if listed:
        return labels.open_listed(listed, split)
    splits = _splits(root)
    split = pick_split(split, splits or files.SPLITS, f"folder {str(root)!r}")
    if not splits:
        index = _index(root)
        _tell_of_twins(root, index.class_names)
        return index.listing.select(split, str(root), index.class_names)
    index = _index(root / split)
    classes = tuple(_folders(root / "train")) if "train" in splits else index.class_names
    if unknown := sorted(set(index.class_names) - set(classes)):
        raise UserError(
            f"class folder {str(root / split / unknown[0])!r} has no counterpart in "
            f"{str(root / 'train')!r}; rename or remove it."
        )
    _tell_of_twins(root / "train", classes)
    source = index.listing.select("all", str(root / split), classes)
    new = np.array([classes.index(name) for name in index.class_names], np.int32)
    return FileSource(source.root, source.files, source.rows, new[source.labels], classes)


def split_names(path: str) -> tuple[str, ...]:
    """The splits that share no image, the one to train on first. Raises UserError."""
    root, listed = _find(path)
    if listed:
        return labels.split_names(listed)
    return tuple(_splits(root)) or ("train", "test")


def _find(path: str) -> tuple[Path, labels.Listed | None]:
    """The folder that `path` means, and the labels listed in it or in the file `path`."""
    root = Path(path).expanduser()
    if path and root.is_file():
        return root.parent, labels.listed_in_file(root)
    if not path or not root.is_dir():
        raise UserError(f"folder {path!r} does not exist or is not a folder; give folder:PATH.")
    return root, labels.find(root)


def _splits(root: Path) -> list[str]:
    """The folders of `root` that are splits, or none if they are classes."""
    names = _folders(root)
    # A root with no training split is still good to evaluate on.
    if "train" in names or (names and set(names) <= set(HELD_OUT)):
        return sorted(
            (name for name in names if name in ("train", *HELD_OUT)),
            key=lambda name: (name != "train", name),
        )
    return []


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if _is_dir(e) and not e.name.startswith("."))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a link to itself is nothing."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _tell_of_twins(root: Path, classes: tuple[str, ...]) -> None:
    spellings = defaultdict(list)
    for name in classes:
        spellings[name.casefold()].append(name)
    for names in spellings.values():
        if len(names) > 1:
            print(
                f"note: {str(root)!r} has classes {' and '.join(map(repr, names))}, which "
                "differ in case only and are kept apart: merge them if they are the same",
                file=sys.stderr,
            )


# ---- what lies in class folders ----------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """The files of class folders; labels are positions in `class_names`."""

    class_names: tuple[str, ...]
    listing: Listing


def _index(root: Path) -> Index:
    """Raises UserError if there are no class folders, or one holds no images."""
    remembered = cache.folder() / "folders" / f"{_digest(os.path.abspath(root))}.npz"
    if (index := _recall(remembered, root)) is not None:
        return index
    begin = time.time()
    dates: dict[str, int] = {}
    found = {name: _images(root, name, dates) for name in _folders_dated(root, dates)}
    if not found:
        raise UserError(
            f"folder {str(root)!r} has no class folders; put the images of each class in a "
            "folder of its own, named after the class."
        )
    for name, paths in found.items():
        if not paths:
            raise UserError(
                f"class folder {str(root / name)!r} holds no images "
                f"({', '.join(e[1:] for e in EXTENSIONS)}); fill or remove it."
            )
    index = Index(tuple(found), files.arrange(enumerate(found.values())))
    settled = max(dates.values()) < (begin - _SETTLED) * 1e9
    if len(index.listing.files) >= REMEMBERED_FROM and settled:
        with contextlib.suppress(UserError):  # a cache that cannot be written costs time only
            _remember(remembered, index, dates)
    return index


def _folders_dated(root: Path, dates: dict[str, int]) -> list[str]:
    # The date is read first: what changes while we look makes the index invalid.
    dates["."] = os.stat(root).st_mtime_ns
    return _folders(root)


def _images(root: Path, name: str, dates: dict[str, int]) -> list[str]:
    """Image paths below `root/name`, relative to `root`; notes the dates of the folders."""
    found = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(name, frozenset())]
    while pending:
        folder, above = pending.pop()
        status = os.stat(root / folder)
        if (identity := (status.st_dev, status.st_ino)) in above:
            continue  # a link to a folder that it lies in
        dates[folder] = status.st_mtime_ns
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{folder}/{entry.name}"
                if _is_dir(entry):
                    pending.append((path, above | {identity}))
                # What is no file is no image; a dead link is an error when read.
                elif entry.name.lower().endswith(EXTENSIONS) and (
                    entry.is_symlink() or entry.is_file()
                ):
                    found.append(path)
    return found


# ---- the index on disk -------------------------------------------------------------------


def _digest(path: str) -> str:
    return hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()


def _remember(path: Path, index: Index, dates: dict[str, int]) -> None:
    """Writes the index and the dates of all folders. Raises UserError."""
    folders = Paths.of(dates)
    with replacing(path) as part:
        np.savez(
            part,
            classes=json.dumps(index.class_names),
            buffer=index.listing.files.buffer,
            ends=index.listing.files.ends,
            labels=index.listing.labels,
            held_out=index.listing.held_out,
            folders=folders.buffer,
            folder_ends=folders.ends,
            dates=np.array(list(dates.values()), np.int64),
        )


def _recall(path: Path, root: Path) -> Index | None:
    """The index at `path`, if there is one and no folder has changed since."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            folders = Paths(stored["folders"], stored["folder_ends"])
            for folder, date in zip(folders, stored["dates"].tolist(), strict=True):
                if os.stat(os.path.join(root, folder)).st_mtime_ns != date:
                    return None
            names = Paths(stored["buffer"], stored["ends"])
            listing = Listing(names, stored["labels"], stored["held_out"])
            return Index(tuple(json.loads(str(stored["classes"]))), listing)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # none yet, of another version, or damaged
