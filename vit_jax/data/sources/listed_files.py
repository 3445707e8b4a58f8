"""Finds the image files that a label file names, and checks that none is missing."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vit_jax.data.sources import image_files
from vit_jax.data.sources.splits import split_kind
from vit_jax.system.errors import UserError

Rows = Sequence[Any]  # `label_files.Row`


class Lister:
    """Lists every folder once, which is faster than checking every file."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def named(self, path: str) -> list[str]:
        """The files that are meant by `path`, which may lack its ending (Kaggle's ids do), or
        have backslashes between folders."""
        return (
            self._named(path) or ("\\" in path and self._named(path.replace("\\", "/"))) or []
        )

    def _named(self, path: str) -> list[str]:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name in self._names[folder]:
            return [path]
        if folder not in self._stems:
            stems: dict[str, list[str]] = defaultdict(list)
            for each in sorted(self._names[folder]):
                stem, ending = os.path.splitext(each)
                if ending.lower() in (*image_files.EXTENSIONS, *image_files.ARRAYS):
                    stems[stem].append(each)
            self._stems[folder] = stems
        return [os.path.join(folder, each) for each in self._stems[folder].get(name, [])]


def find_root(path: Path, root: Path, split: str, rows: Rows, lister: Lister) -> Path:
    """The folder that the names in `rows` are relative to, judged by the first of them.

    It is the folder of the file of labels, or one in it that has the image: for train.csv
    `train` before others.

    Raises:
      UserError: several have it.
    """
    has = lambda folder: bool(lister.named(os.path.join(folder, rows[0].file)))
    if has(path.parent):
        return path.parent
    with os.scandir(path.parent) as entries:
        beside = sorted(
            e.name
            for e in entries
            if image_files.is_folder(e) and not image_files.is_hidden(e.name)
        )
    found = [name for name in beside if has(path.parent / name)]
    named = [name for name in found if name in (split, path.stem)]
    of_split = [name for name in found if name.lower().startswith(path.stem.lower())]
    for several in (named, of_split, found):
        if len(several) == 1:
            return path.parent / several[0]
    if found:
        raise UserError(
            f"{str(path)!r} names {rows[0].file!r}, which lies in each of "
            f"{', '.join(map(repr, found))} beside it: write the folder before the name."
        )
    return path.parent


def check(path: Path, root: Path, rows: Rows, lister: Lister) -> list[Any]:
    """The same rows, with the endings of files that lack one.

    Raises:
      UserError: a file is not there, is listed twice, or may be one of two.
    """
    lines: dict[str, int] = {}
    checked, missing = [], []
    for row in rows:
        found = lister.named(os.path.normpath(os.path.join(root, row.file)))
        if len(found) > 1:
            both = " and ".join(repr(os.path.basename(each)) for each in found[:2])
            _reject(path, row, f"names {row.file!r}, and there are {both}", "add the ending")
        if not found:
            missing.append(row)
            continue
        if found[0] in lines:
            _reject(
                path,
                row,
                f"lists {row.file!r} again, after line {lines[found[0]]}",
                "keep one of the two",
            )
        lines[found[0]] = row.line
        checked.append(row._replace(file=_completed(row.file, found[0])))
    if missing:
        others = f", and {len(missing) - 1:,} more are missing" if len(missing) > 1 else ""
        _reject(
            path,
            missing[0],
            f"names {missing[0].file!r}, which does not exist below {str(root)!r}{others}",
            "correct the names (endings belong to them), or remove the lines",
        )
    return checked


def _completed(name: str, found: str) -> str:
    """A name in a table as that of the file that was found for it."""
    name = name if found.endswith(os.path.normpath(name)) else name.replace("\\", "/")
    return name + os.path.basename(found)[len(os.path.basename(name)) :]


def _reject(path: Path, row: Any, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{str(path)!r} line {row.line} {what}; {remedy}.")


def tell_of_left_out(top: Path, path: Path, root: Path, rows: Rows) -> None:
    """Notes which images in the folder of the listed ones are not listed, and that there are
    folders beside it that are no classes here.

    Images of other splits are not counted: for a file of one split the folder of that split is
    looked at, or the one that its images lie in.
    """
    listed = {os.path.normpath(os.path.join(root, row.file)) for row in rows}
    place = root if split_kind(path.stem) or root != top else top
    folders = sorted({os.path.dirname(file) for file in listed} - {str(place)})
    classes = [name for name in map(os.path.basename, folders) if not split_kind(name)]
    if split_kind(path.stem) and place == top:
        return  # other splits lie there, too
    images = image_files.search(place, "", {}).images
    left_out = sum(
        os.path.normpath(os.path.join(place, image)) not in listed for image in images
    )
    if not left_out and len(classes) < 2:
        return
    folders_too = (
        f"; folders do not count as classes: for that give folder:{top},classes=outer"
        if classes
        else ""
    )
    image_files.tell_once(
        f"note: {str(path)!r} lists {len(rows):,} images, and {left_out:,} others below "
        f"{str(place)!r} are left out{folders_too}"
    )
