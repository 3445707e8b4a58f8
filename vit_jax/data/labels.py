"""Images whose labels stand in a file: CSV, TSV or JSON lines, for `folder:PATH`.

PATH/labels.csv                     all images; split here, 80 % and 20 %, or by a column
PATH/metadata.csv                   the same
PATH/train.csv  and  PATH/val.csv   splits made by you (or validation.csv, test.csv)
PATH/train/metadata.csv  and so on  the same, the layout of Hugging Face's imagefolder
folder:PATH/any.csv                 this file, whatever it is called

Every name may end in .csv, .tsv or .jsonl instead. Columns (in JSON: keys), in any case and
order, others are left alone:

  file    file_name, filename, file, image or path: relative to the folder that holds the file
          of labels, or absolute; for PATH/train.csv also relative to PATH/train
  label   label, class or class_name: a name, or a number from 0
  split   optional, only in a file of all images: train, val, validation or test

Names of classes are sorted, as those of class folders are. If all labels are whole numbers,
they are the classes' positions. PATH/classes.txt, one name a line, says what the classes are
and which number is whose. All is checked before the first image is read.
"""

import csv
import io
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

from vit_jax import bounded
from vit_jax.data import files
from vit_jax.data.files import FileSource
from vit_jax.data.sources import HELD_OUT, pick_split
from vit_jax.errors import UserError

ENDINGS = (".csv", ".tsv", ".jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
LABEL_COLUMNS = ("label", "class", "class_name")
SPLITS = ("train", *HELD_OUT)
_MOST_CLASSES = 10_000_000  # a larger number is an identifier in the wrong column


@dataclass(frozen=True)
class Listed:
    """Files of labels: of each split, or, under the name "", one of all images."""

    files: Mapping[str, Path]
    root: Path


class Row(NamedTuple):
    """One line of a file of labels."""

    file: str
    label: str
    split: str
    line: int


def find(root: Path) -> Listed | None:
    """The files of labels in `root`, by their names. Raises UserError if two contradict."""
    found: dict[str, list[Path]] = defaultdict(list)
    for ending in ENDINGS:
        found[""] += [root / f"{stem}{ending}" for stem in ("labels", "metadata")]
        for split in SPLITS:
            found[split] += [root / f"{split}{ending}", root / split / f"metadata{ending}"]
    existing = {
        split: [path for path in paths if path.is_file()] for split, paths in found.items()
    }
    existing = {split: paths for split, paths in existing.items() if paths}
    one_of_each = [paths[0] for paths in existing.values()]
    for several in (*existing.values(), *([one_of_each] if "" in existing else [])):
        if len(several) > 1:
            raise UserError(
                f"{str(several[0])!r} and {str(several[1])!r} both list labels; take one away, "
                "or name the one to use: folder:PATH/FILE."
            )
    if not existing:
        return None
    return Listed({split: paths[0] for split, paths in existing.items()}, root)


def listed_in_file(path: Path) -> Listed:
    """Raises UserError if `path` does not end as a file of labels."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"{str(path)!r} is a file that lists no labels; give a folder, or a file that "
            f"ends in {', '.join(ENDINGS)}."
        )
    return Listed({"": path}, path.parent)


def split_names(listed: Listed) -> tuple[str, ...]:
    """The splits that share no image. Raises UserError for a file that cannot be read."""
    if "" not in listed.files:
        return tuple(split for split in SPLITS if split in listed.files)
    named = {row.split for row in _read(listed.files[""])}
    if named == {""}:
        return ("train", "test")
    return tuple(split for split in SPLITS if split in named)


def open_listed(listed: Listed, split: str) -> FileSource:
    """Opens `split` of the images listed, in an order fixed by a hash of their names.

    Raises:
      UserError: no such split; a column, label or image file is missing; an image is listed
        twice; a label is not one of the classes.
    """
    if "" not in listed.files:
        split = pick_split(split, split_names(listed), f"folder {str(listed.root)!r}")
        path = listed.files[split]
        rows = list(_read(path))
        known = list(_read(listed.files["train"])) if "train" in listed.files else rows
    else:
        path = listed.files[""]
        rows = known = list(_read(path))
        if any(row.split for row in rows):
            split = pick_split(split, split_names(listed), repr(str(path)))
            known = [row for row in rows if row.split == "train"] or rows
            rows = [row for row in rows if row.split == split]
    if not rows:
        raise UserError(f"{str(path)!r} lists no images; add a line for each.")
    classes = _classes(listed.root, path, known)
    labels = _labels(path, rows, classes)
    root = _root(path, listed.root, split, rows)
    _check_files(path, root, rows)
    _tell_of_gaps(path, classes.names, labels)
    of_class: dict[int, list[str]] = {label: [] for label in sorted(set(labels))}
    for row, label in zip(rows, labels, strict=True):
        of_class[label].append(row.file)
    listing = files.arrange(of_class.items())
    if "" in listed.files and not rows[0].split:
        split = pick_split(split, files.SPLITS, repr(str(path)))
        return listing.select(split, str(root), classes.names)
    return listing.select("all", str(root), classes.names)


# ---- reading -----------------------------------------------------------------------------


def _read(path: Path) -> Iterator[Row]:
    """Yields the rows of a file of labels. Raises UserError, naming the line."""
    columns: tuple[str, str] | None = None
    try:
        for line, record in _records(path):
            record = {str(key).strip().lower(): value for key, value in record.items()}
            if columns is None:
                columns, divided = _columns(path, record), "split" in record
            file, label = (record.get(column) for column in columns)
            split = record.get("split", "")
            if not isinstance(file, str) or not file.strip():
                _reject(path, line, f"has no {columns[0]!r}", "name an image")
            if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                _reject(path, line, f"has {columns[1]} {label!r}", "give a name or a number")
            if divided and split not in SPLITS:
                _reject(path, line, f"has split {split!r}", f"use one of {', '.join(SPLITS)}")
            yield Row(file.strip(), str(label).strip(), split if divided else "", line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error}); save it as text in UTF-8."
        ) from error


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of `path` as dicts, with their numbers."""
    with (
        bounded.open_regular(path) as content,
        io.TextIOWrapper(content, "utf-8-sig", newline="") as text,
    ):
        file = _lines(path, text)
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json(path, number, line)
            return
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        _columns(path, dict.fromkeys(reader.fieldnames))
        for record in reader:
            yield reader.line_num, record


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """The lines of a file, none of which may be endless."""
    number = 0
    while text := file.readline(bounded.LABELS):
        number += 1
        if len(text) == bounded.LABELS:
            _reject(
                path, number, f"has {len(text):,} characters or more", "break it into lines"
            )
        yield text


def _json(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        record = bounded.parse_json(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        _reject(path, line, "is no JSON object", 'write {"file_name": ..., "label": ...}')
    return record


def _columns(path: Path, record: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the file's and the label's column."""
    names = []
    for what, known in (("image files", FILE_COLUMNS), ("labels", LABEL_COLUMNS)):
        if not (present := [name for name in known if name in record]):
            raise UserError(
                f"{str(path)!r} has columns {', '.join(map(str, record))}, none of which holds "
                f"{what}; call one of them {' or '.join(known)}."
            )
        names.append(present[0])
    return names[0], names[1]


def _reject(path: Path, line: int, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{str(path)!r} line {line} {what}; {remedy}.")


# ---- checks ------------------------------------------------------------------------------


class Classes(NamedTuple):
    """The names of the classes, and whether labels are their numbers."""

    names: tuple[str, ...]
    numbered: bool


def _classes(root: Path, path: Path, known: list[Row]) -> Classes:
    """The classes of classes.txt, or else of the rows to train on."""
    numbered = all(re.fullmatch(r"-?\d+", row.label) for row in known)
    if (given := root / "classes.txt").is_file():
        return Classes(_read_classes(given), numbered)
    if not numbered:
        return Classes(tuple(sorted({row.label for row in known})), False)
    for row in known:
        if len(row.label) > 18 or not 0 <= int(row.label) < _MOST_CLASSES:
            _reject(path, row.line, f"has label {row.label}", "number the classes from 0")
    return Classes(tuple(map(str, range(max(int(row.label) for row in known) + 1))), True)


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        lines = bounded.read_text(path, "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error}); save it as text in UTF-8."
        ) from error
    names = [name for line in lines if (name := line.strip())]
    if not names:
        raise UserError(f"{str(path)!r} names no classes; write one name a line.")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{str(path)!r} has the class {twice[0]!r} twice; remove one.")
    return tuple(names)


def _labels(path: Path, rows: list[Row], classes: Classes) -> list[int]:
    """The positions in `classes` of the labels of `rows`."""
    names, numbered = classes
    position = {str(i) if numbered else name: i for i, name in enumerate(names)}
    labels = []
    for row in rows:
        label = row.label.lstrip("0") or "0" if numbered else row.label
        if label not in position:
            known = f"{names[0]}, ..., {names[-1]}" if len(names) > 8 else ", ".join(names)
            _reject(
                path,
                row.line,
                f"has label {row.label!r}, which is none of the {len(names)} classes ({known})",
                "correct it, or list all classes in classes.txt",
            )
        labels.append(position[label])
    return labels


def _root(path: Path, root: Path, split: str, rows: list[Row]) -> Path:
    """The folder that names of files are relative to."""
    if path.stem == split and not (path.parent / rows[0].file).is_file():
        inside = root / split
        if (inside / rows[0].file).is_file():
            return inside
    return path.parent


def _check_files(path: Path, root: Path, rows: list[Row]) -> None:
    """Lists every folder once, which is quicker than to ask for every file."""
    lines: dict[str, int] = {}
    folders: dict[str, set[str]] = {}
    missing = []
    for row in rows:
        file = os.path.normpath(os.path.join(root, row.file))
        if file in lines:
            _reject(
                path,
                row.line,
                f"lists {row.file!r} again, after line {lines[file]}",
                "keep one of the two",
            )
        lines[file] = row.line
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in folders[folder]:
            missing.append(row)
    if missing:
        others = f", and {len(missing) - 1:,} more are missing" if len(missing) > 1 else ""
        _reject(
            path,
            missing[0].line,
            f"names {missing[0].file!r}, which does not exist below {str(root)!r}{others}",
            "correct the names (endings belong to them), or remove the lines",
        )


def _tell_of_gaps(path: Path, classes: tuple[str, ...], labels: list[int]) -> None:
    """Numbers from 1, say, leave class 0 without an image."""
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty and path.stem in ("labels", "metadata", "train"):
        print(
            f"note: {str(path)!r} has no image of {len(empty)} of the {len(classes)} classes, "
            f"the first of them {classes[empty[0]]!r}",
            file=sys.stderr,
        )
