"""Images whose labels stand in a file: CSV, TSV or JSON lines, for `folder:PATH`.

PATH/labels.csv                     all images; split here, 80 % and 20 %, or by a column
PATH/metadata.csv                   the same
PATH/train.csv  and  PATH/val.csv   splits made by you (or validation.csv, test.csv, ...)
PATH/train/metadata.csv  and so on  the same, the layout of Hugging Face's imagefolder
folder:PATH/any.csv                 this file, whatever it is called
folder:PATH/any.csv,image=id,label=breed                  and these columns of it

Every name may end in .csv, .tsv or .jsonl instead. Columns (in JSON: keys), in any case and
order, others are left alone:

  file    file_name, filename, file, image, path, img, id and the like (`FILE_COLUMNS`, the
          first of them that is there): relative to the folder that holds the file of labels, to
          a folder beside it that has them, or absolute; an ending that is missing is found
  label   label, class, class_name, labels and the like (`LABEL_COLUMNS`), or the only other
          column: a name, or a number from 0
  split   optional, only in a file of all images: train, val, validation, test and the like

Names of classes are sorted, as those of class folders are. If all labels are whole numbers,
they are the classes' positions. PATH/classes.txt, one name a line, says what the classes are
and which number is whose. All is checked before the first image is read.
"""

import csv
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from vit_jax.data import files, listed_files
from vit_jax.data.files import FileSource
from vit_jax.data.sources import SPLITS, pick_split, split_kind
from vit_jax.errors import UserError

ENDINGS = (".csv", ".tsv", ".jsonl")
# The first that a file has counts.
FILE_COLUMNS = (
    "file_name", "filename", "file", "image", "path", "img", "image_path", "img_path",
    "file_path", "filepath", "filepaths", "image_name", "img_name", "image_id", "id_code", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "class_name", "labels", "fine_label", "category", "target")
_NUMBERING = ("", "unnamed: 0", "index")  # of rows: what tables are saved with
_NUMBER = re.compile(r"(-?\d+)(?:\.0*)?")  # 2, 002, and 2.0 as tables may have it
_MOST_CLASSES = 10_000_000  # a larger number is an identifier in the wrong column


@dataclass(frozen=True)
class Listed:
    """Files of labels: of each split, or, under the name "", one of all images."""

    files: Mapping[str, Path]
    root: Path
    image: str | None = None  # the columns to use; None: by their names
    label: str | None = None
    multi: str | None = None  # how several labels of an image are written: see multi_label.py

    def of(self, kind: str) -> Path | None:
        """The file of the split that `kind` means, of those there are."""
        return next((p for name, p in self.files.items() if split_kind(name) == kind), None)


class Row(NamedTuple):
    """One line of a file of labels."""

    file: str
    label: str
    split: str
    line: int


def find(root: Path) -> Listed | None:
    """The files of labels in `root`, by their names. Raises UserError if two contradict."""
    found: dict[str, list[Path]] = defaultdict(list)
    with os.scandir(root) as entries:
        for entry in entries:
            stem, ending = os.path.splitext(entry.name)
            if ending in ENDINGS and stem in ("labels", "metadata"):
                found[""].append(Path(entry.path))
            elif ending in ENDINGS and split_kind(stem):
                found[stem].append(Path(entry.path))
            elif split_kind(entry.name) and entry.is_dir():
                inside = [Path(entry.path, f"metadata{x}") for x in ENDINGS]
                found[entry.name] += [path for path in inside if path.is_file()]
    existing = {split: sorted(paths) for split, paths in sorted(found.items()) if paths}
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
        return tuple(sorted(listed.files, key=_place))
    named = {row.split for row in _read(listed, listed.files[""])}
    return ("train", "test") if named == {""} else tuple(sorted(named, key=_place))


def _place(split: str) -> tuple[int, str]:
    return ("train", "validation", "test").index(split_kind(split) or ""), split


def open_listed(listed: Listed, split: str) -> FileSource:
    """Opens `split` of the images listed, in an order fixed by a hash of their names.

    Raises:
      UserError: no such split; a column, label or image file is missing; an image is listed
        twice; a label is not one of the classes.
    """
    if "" not in listed.files:
        split = pick_split(split, split_names(listed), f"folder {str(listed.root)!r}")
        path = listed.files[split]
        rows = list(_read(listed, path))
        training = listed.of("train")
        known = list(_read(listed, training)) if training else rows
    else:
        path = listed.files[""]
        rows = known = list(_read(listed, path))
        if any(row.split for row in rows):
            split = pick_split(split, split_names(listed), repr(str(path)))
            known = [row for row in rows if split_kind(row.split) == "train"] or rows
            rows = [row for row in rows if row.split == split]
    if not rows:
        raise UserError(f"{str(path)!r} lists no images; add a line for each.")
    classes = _classes(listed.root, path, known)
    labels = _labels(path, rows, classes)
    lister = listed_files.Lister()
    root = listed_files.find_root(path, listed.root, split, rows, lister)
    rows = listed_files.check(path, root, rows, lister)
    _tell_of_gaps(path, classes.names, labels)
    if "" not in listed.files or path.stem in ("labels", "metadata"):
        listed_files.tell_of_left_out(listed.root, path, root, rows)
    listing = _arrange(rows, labels, classes)
    if "" in listed.files and not rows[0].split:
        split = pick_split(split, files.SPLITS, repr(str(path)))
        return listing.select(split, str(root), classes.names)
    return listing.select("all", str(root), classes.names)


def _arrange(rows: list[Row], labels: list[int], classes: "Classes") -> files.Listing:
    of_class: dict[int, list[str]] = {label: [] for label in sorted(set(labels))}
    for row, label in zip(rows, labels, strict=True):
        of_class[label].append(row.file)
    return files.arrange(of_class.items())


# ---- reading -----------------------------------------------------------------------------


def _read(listed: Listed, path: Path) -> Iterator[Row]:
    """Yields the rows of a file of labels. Raises UserError, naming the line."""
    columns: tuple[str, str] | None = None
    try:
        for line, record in _records(listed, path):
            record = {str(key).strip().lower(): value for key, value in record.items()}
            if columns is None:
                columns, divided = _columns(listed, path, record), "split" in record
            file, label = (record.get(column) for column in columns)
            if not isinstance(file, str) or not file.strip():
                _reject(path, line, f"has no {columns[0]!r}", "name an image")
            if (text := _text(label)) is None:
                _reject(path, line, f"has {columns[1]} {label!r}", "give a name or a number")
            split = str(record["split"]).strip() if divided else ""
            if divided and not split_kind(split):
                _reject(path, line, f"has split {split!r}", f"use one of {', '.join(SPLITS)}")
            yield Row(file.strip(), text, split, line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error}); save it as text in UTF-8."
        ) from error


def _text(label: Any) -> str | None:
    """A label as text: `True` of a boolean, `3` of 3.0; None if it cannot be one."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip() or None if isinstance(label, str | int) else None


def _records(listed: Listed, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of `path` as dicts, with their numbers."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _json(path, number, text)
            return
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        _columns(listed, path, dict.fromkeys(reader.fieldnames))
        for record in reader:
            yield reader.line_num, record


def _json(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        _reject(path, line, "is no JSON object", 'write {"file_name": ..., "label": ...}')
    return record


def _columns(listed: Listed, path: Path, record: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the file's and the label's column."""
    file = _column(path, record, "image", listed.image, FILE_COLUMNS)
    others = {name: x for name, x in record.items() if name not in (file, "split", *_NUMBERING)}
    if len(others) == 1 and not listed.label:
        return file, next(iter(others))
    return file, _column(path, others, "label", listed.label, LABEL_COLUMNS)


def _column(
    path: Path, record: Mapping[str, Any], what: str, chosen: str | None, known: Sequence[str]
) -> str:
    there = ", ".join(map(str, record))
    if chosen is not None:
        if chosen.lower() not in record:
            raise UserError(
                f"{str(path)!r} has columns {there}, and no {chosen!r}; give "
                f"{what}=NAME with one of them."
            )
        return chosen.lower()
    if not (present := [name for name in known if name in record]):
        holds = "image files" if what == "image" else "labels"
        raise UserError(
            f"{str(path)!r} has columns {there}, none of which holds {holds}; call one of "
            f"them {' or '.join(known[:3])}, or give folder:{path},{what}=NAME."
        )
    return present[0]


def _reject(path: Path, line: int, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{str(path)!r} line {line} {what}; {remedy}.")


# ---- checks ------------------------------------------------------------------------------


class Classes(NamedTuple):
    """The names of the classes, and whether labels are their numbers."""

    names: tuple[str, ...]
    numbered: bool


def _classes(root: Path, path: Path, known: list[Row]) -> Classes:
    """The classes of classes.txt, or else of the rows to train on."""
    numbered = all(_NUMBER.fullmatch(row.label) for row in known)
    if (given := root / "classes.txt").is_file():
        return Classes(_read_classes(given), numbered)
    if not numbered:
        return Classes(tuple(sorted({row.label for row in known})), False)
    for row in known:
        if not 0 <= float(row.label) < _MOST_CLASSES:
            _reject(path, row.line, f"has label {row.label}", "number the classes from 0")
    return Classes(
        tuple(map(str, range(max(int(float(row.label)) for row in known) + 1))), True
    )


def _read_classes(path: Path) -> tuple[str, ...]:
    names = [name.strip() for name in path.read_text("utf-8-sig").splitlines()]
    names = [name for name in names if name]
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
        label = row.label
        if numbered and (number := _NUMBER.fullmatch(label)):
            label = number[1].lstrip("0") or "0"
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


def _tell_of_gaps(path: Path, classes: tuple[str, ...], labels: list[int]) -> None:
    """Numbers from 1, say, leave class 0 without an image."""
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty and (path.stem in ("labels", "metadata") or split_kind(path.stem) == "train"):
        print(
            f"note: {str(path)!r} has no image of {len(empty)} of the {len(classes)} classes, "
            f"the first of them {classes[empty[0]]!r}",
            file=sys.stderr,
        )
