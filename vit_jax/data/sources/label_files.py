"""Images whose labels are in a file: CSV, TSV or JSON lines, for `folder:PATH`.

PATH/labels.csv                     all images; split by us, 80 % and 20 %, or by a column
PATH/metadata.csv                   the same
PATH/train.csv  and  PATH/val.csv   splits made by you (or validation.csv, test.csv, ...)
PATH/train/metadata.csv  and so on  the same, the layout of Hugging Face's imagefolder
folder:PATH/any.csv                 this file, whatever it is called
folder:PATH/any.csv,image=id,label=breed                  and these columns of it

Every name may end in .csv, .tsv or .jsonl instead. Columns (in JSON: keys), in any case and
order, others are ignored:

  file    file_name, filename, file, image, path, img, id and the like (`FILE_COLUMNS`, the
          first of them that is there): relative to the folder that holds the file of labels, to
          a folder beside it that has them, or absolute; an ending that is missing is found
  label   label, class, class_name, labels and the like (`LABEL_COLUMNS`), or the only other
          column: a name, or a number from 0
  split   optional, only in a file of all images: train, val, validation, test and the like

Names of classes are sorted, as those of class folders are. If all labels are whole numbers,
they are the classes' positions. With `data.multi_label` an image may have several labels, or
none: a list, a text, or a 1 in the columns of its classes, which then make up the table (see
multi_label.py). PATH/classes.txt, one name a line, names the
classes in the order of their numbers. Everything is checked before the first image is read.
"""

import csv
import dataclasses
import io
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import numpy as np

from vit_jax.data.sources import image_files, listed_files, multi_label
from vit_jax.data.sources.image_files import FileSource
from vit_jax.data.sources.splits import SPLITS, pick_split, split_kind
from vit_jax.system import bounded
from vit_jax.system.errors import UserError

ENDINGS = (".csv", ".tsv", ".jsonl")
# The first that a file has counts.
FILE_COLUMNS = (
    "file_name", "filename", "file", "image", "path", "img", "image_path", "img_path",
    "file_path", "filepath", "filepaths", "image_name", "img_name", "image_id", "id_code", "id",
)  # fmt: skip
LABEL_COLUMNS = ("label", "class", "class_name", "labels", "fine_label", "category", "target")
_NUMBERING = ("", "unnamed: 0", "index")  # of rows: what tables are saved with
_NUMBER = re.compile(r"(-?\d+)(?:\.0*)?")  # 2, 002, and 2.0 as tables may have it
_MOST_CLASSES = 1_000_000  # a larger number is an identifier in the wrong column


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
    labels: tuple[str, ...]
    split: str
    line: int
    text: str | None = None  # several labels that are not divided yet


class Layout(NamedTuple):
    """The columns, in lower case: of the file, and of labels, or of each class.

    `classes` has {column: name of the class} of a table of 0 and 1.
    """

    file: str
    label: str
    classes: dict[str, str]


def find(root: Path) -> Listed | None:
    """The files of labels in `root`, by their names. Raises UserError if two contradict."""
    found: dict[str, list[Path]] = defaultdict(list)
    with os.scandir(root) as entries:
        for entry in entries:
            stem, ending = os.path.splitext(entry.name)
            ending = ending.lower()
            if ending in ENDINGS and stem.lower() in ("labels", "metadata"):
                found[""].append(Path(entry.path))
            elif ending in ENDINGS and split_kind(stem):
                found[stem].append(Path(entry.path))
            elif split_kind(entry.name) and image_files.is_folder(entry):
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
        training = listed.of("train") or path
        known = list(_read(listed, training)) if training != path else rows
    else:
        path = training = listed.files[""]
        rows = known = list(_read(listed, path))
        if any(row.split for row in rows):
            split = pick_split(split, split_names(listed), repr(str(path)))
            known = [row for row in rows if split_kind(row.split) == "train"] or rows
            rows = [row for row in rows if row.split == split]
    if not rows:
        raise UserError(f"{str(path)!r} lists no images; add a line for each.")
    if listed.multi:
        texts = [row.text for row in (*known, *rows) if row.text]
        between = multi_label.separator(listed.multi, texts, repr(str(path)))
        known, rows = (_divided(part, between) for part in (known, rows))
    classes = _classes(listed, training, known)
    labels = _labels(path, rows, classes)
    lister = listed_files.Lister()
    root = listed_files.find_root(path, listed.root, split, rows, lister)
    rows = listed_files.check(path, root, rows, lister)
    _tell_of_gaps(path, classes.names, labels)
    # Where several splits lie in one folder, what one leaves out is another's.
    alone = len(listed.files) == 1 or split_kind(root.name)
    if alone and ("" not in listed.files or path.stem.lower() in ("labels", "metadata")):
        listed_files.tell_of_left_out(listed.root, path, root, rows)
    listing = (_arrange_hot if listed.multi else _arrange)(rows, labels, classes)
    if "" in listed.files and not rows[0].split:
        split = pick_split(split, image_files.SPLITS, repr(str(path)))
        return listing.select(split, str(root), classes.names)
    return listing.select("all", str(root), classes.names)


def _divided(rows: list[Row], between: str | None) -> list[Row]:
    return [
        row if row.text is None else row._replace(labels=multi_label.divide(row.text, between))
        for row in rows
    ]


def _arrange(
    rows: list[Row], labels: list[tuple[int, ...]], classes: "Classes"
) -> image_files.Listing:
    of_class: dict[int, list[str]] = {label: [] for (label,) in sorted(set(labels))}
    for row, (label,) in zip(rows, labels, strict=True):
        of_class[label].append(row.file)
    return image_files.arrange(of_class.items())


def _arrange_hot(
    rows: list[Row], labels: list[tuple[int, ...]], classes: "Classes"
) -> image_files.Listing:
    """With labels bool (N, K); a fifth of all images is held out, whatever their classes."""
    listing = image_files.arrange([(0, [row.file for row in rows])])
    place = {row.file: i for i, row in enumerate(rows)}
    order = [place[file] for file in listing.files]
    found = multi_label.hot(labels, len(classes.names))[order]
    return dataclasses.replace(listing, labels=found)


# ---- reading -----------------------------------------------------------------------------


def _read(listed: Listed, path: Path) -> Iterator[Row]:
    """Yields the rows of a file of labels. Raises UserError, naming the line."""
    layout: Layout | None = None
    try:
        for line, given in _records(listed, path):
            layout = layout or _layout(listed, path, given)
            record = {str(key).strip().lower(): value for key, value in given.items()}
            file = record.get(layout.file)
            if not isinstance(file, str) or not file.strip():
                _reject(path, line, f"has no {layout.file!r}", "name an image")
            split = str(record.get("split", "")).strip()
            if "split" in record and not split_kind(split):
                _reject(path, line, f"has split {split!r}", f"use one of {', '.join(SPLITS)}")
            row = Row(file.strip(), (), split, line)
            yield _with_labels(path, row, layout, record, listed.multi)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({error}); save it as text in UTF-8."
        ) from error


def _with_labels(
    path: Path, row: Row, layout: Layout, record: Mapping[str, Any], multi: str | None
) -> Row:
    if layout.classes:
        return row._replace(labels=_hot_columns(path, row.line, layout, record))
    label = record.get(layout.label)
    if isinstance(label, list) and not multi:
        _reject(
            path,
            row.line,
            f"has a list of labels in {layout.label!r}",
            f"set data.multi_label={multi_label.AUTO} for several labels an image",
        )
    several = label if isinstance(label, list) else [label]
    texts = [_text(each) for each in several]
    if multi and not isinstance(label, list):
        return row._replace(text=texts[0] or "")
    for each, text in zip(several, texts, strict=True):
        if text is None:
            _reject(path, row.line, f"has {layout.label} {each!r}", "give a name or a number")
    return row._replace(labels=tuple(text for text in texts if text is not None))


def _hot_columns(
    path: Path, line: int, layout: Layout, record: Mapping[str, Any]
) -> tuple[str, ...]:
    """The classes whose column has a 1."""
    found = []
    for column, name in layout.classes.items():
        if (there := multi_label.truth(record.get(column))) is None:
            _reject(
                path,
                line,
                f"has {name} {record.get(column)!r}, where columns of 0 and 1 are read, one "
                f"for each class",
                "remove columns that are no classes, or name the one with labels: "
                "folder:PATH/FILE,label=NAME",
            )
        if there:
            found.append(name)
    return tuple(found)


def _text(label: Any) -> str | None:
    """A label as text: `True` of a boolean, `3` of 3.0; None if it cannot be one."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip() or None if isinstance(label, str | int) else None


def _records(listed: Listed, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        _layout(listed, path, dict.fromkeys(reader.fieldnames))
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


def _layout(listed: Listed, path: Path, record: Mapping[str, Any]) -> Layout:
    """What the columns of a table, or the keys of a first line, hold. Raises UserError."""
    names = {str(key).strip().lower(): str(key).strip() for key in record}
    file = _column(path, names, names, "image", listed.image, FILE_COLUMNS)
    others = {key: x for key, x in names.items() if key not in (file, "split", *_NUMBERING)}
    chosen = listed.label or next((key for key in LABEL_COLUMNS if key in others), None)
    if len(others) == 1 and not listed.label:
        return Layout(file, next(iter(others)), {})
    if listed.multi and len(others) > 1 and not chosen:
        return Layout(file, "", others)
    label = _column(path, names, others, "label", listed.label, LABEL_COLUMNS)
    return Layout(file, label, {})


def _class_columns(listed: Listed, path: Path) -> tuple[str, ...]:
    """The classes of a table of 0 and 1, or none."""
    _, record = next(_records(listed, path))
    return tuple(_layout(listed, path, record).classes.values())


def _column(
    path: Path,
    there: Mapping[str, str],
    candidates: Mapping[str, str],
    what: str,
    chosen: str | None,
    known: Sequence[str],
) -> str:
    listed = f"{str(path)!r} has columns {', '.join(there.values()) or '(none)'}"
    if chosen is not None:
        if chosen.lower() not in candidates:
            raise UserError(f"{listed}, and no {chosen!r}; give {what}=NAME with one of them.")
        return chosen.lower()
    if not (present := [name for name in known if name in candidates]):
        holds = "image files" if what == "image" else "labels"
        raise UserError(
            f"{listed}, none of which holds {holds}; call one of them "
            f"{' or '.join(known[:3])}, or give folder:{path},{what}=NAME."
        )
    return present[0]


def _reject(path: Path, line: int, what: str, remedy: str) -> NoReturn:
    raise UserError(f"{str(path)!r} line {line} {what}; {remedy}.")


# ---- checks ------------------------------------------------------------------------------


class Classes(NamedTuple):
    """The names of the classes, and whether labels are their numbers."""

    names: tuple[str, ...]
    numbered: bool


def _classes(listed: Listed, path: Path, known: list[Row]) -> Classes:
    """The classes of classes.txt, or else of the rows to train on."""
    numbered = all(_NUMBER.fullmatch(label) for row in known for label in row.labels)
    if (given := listed.root / "classes.txt").is_file():
        return Classes(_read_classes(given), numbered)
    if columns := _class_columns(listed, path):
        return Classes(columns, False)
    found = {label for row in known for label in row.labels}
    if not found:
        raise UserError(f"{str(path)!r} has no label at all; add some to learn from.")
    if not numbered:
        if not listed.multi:
            multi_label.tell_of_joined(sorted(found), repr(str(path)))
        if broken := sorted(label for label in found if re.fullmatch(r"-?\d*\.\d+", label)):
            image_files.tell_once(
                f"note: {str(path)!r} has labels such as {broken[0]}, which are read as "
                f"names of classes: numbers of classes are whole"
            )
        return Classes(tuple(sorted(found)), False)
    for row in known:
        for label in row.labels:
            if len(label) > 18 or not 0 <= float(label) < _MOST_CLASSES:
                _reject(path, row.line, f"has label {label}", "number the classes from 0")
    return Classes(tuple(map(str, range(max(int(float(x)) for x in found) + 1))), True)


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


def _labels(path: Path, rows: list[Row], classes: Classes) -> list[tuple[int, ...]]:
    """The positions in `classes` of the labels of `rows`."""
    names, numbered = classes
    position = {str(i) if numbered else name: i for i, name in enumerate(names)}

    def place(row: Row, given: str) -> int:
        label = given
        if numbered and (number := _NUMBER.fullmatch(label)):
            label = number[1].lstrip("0") or "0"
        if label not in position:
            known = f"{names[0]}, ..., {names[-1]}" if len(names) > 8 else ", ".join(names)
            _reject(
                path,
                row.line,
                f"has label {given!r}, which is none of the {len(names)} classes ({known})",
                "correct it, or list all classes in classes.txt",
            )
        return position[label]

    return [tuple(place(row, label) for label in row.labels) for row in rows]


def _tell_of_gaps(path: Path, classes: tuple[str, ...], labels: list[tuple[int, ...]]) -> None:
    """Numbers from 1, say, leave class 0 without an image."""
    used = np.zeros(len(classes), bool)
    used[[label for of_one in labels for label in of_one]] = True
    empty = np.flatnonzero(~used)
    if len(empty) and (path.stem in ("labels", "metadata") or split_kind(path.stem) == "train"):
        print(
            f"note: {str(path)!r} has no image of {len(empty)} of the {len(classes)} classes, "
            f"the first of them {classes[empty[0]]!r}",
            file=sys.stderr,
        )
