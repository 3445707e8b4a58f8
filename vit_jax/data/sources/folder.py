"""Your own images: `folder:PATH`, where every class is a folder.

PATH/train/<class>/*.jpg  and  PATH/test/<class>/*.jpg     splits made by you
PATH/<class>/*.jpg                                         split by us, 80 % and 20 %
PATH/labels.csv, or another file that lists the images     see label_files.py
folder:PATH,classes=outer                                  class folders, whatever is listed
folder:PATH,classes=inner                                  of nested folders the inner ones

Splits are called train or training; val, validation, valid, dev or eval; test or testing, in
any case. The files of folders with 10,000 or more are listed in an index, so that a second
start only checks the modification time of each folder (100,000 files in 100 folders:
0.05 s). The index is one file in `folders/` of the user's cache (vit_jax/system/cache.py),
because the folder of a data set is often read-only, shared, or copied.
Deleting the index costs one more scan.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_jax.data.sources import image_files, label_files
from vit_jax.data.sources.image_files import FileSource, Listing, Paths
from vit_jax.data.sources.splits import in_order, pick_split, split_kind, split_options
from vit_jax.system import cache
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

REMEMBERED_FROM = 10_000  # files; fewer are found as fast as the index is read

# Within its date's resolution, a folder can change without a new date: 2 s on FAT.
_SETTLED = 2.0


def open_folder(argument: str, split: str, multi_label: str | None = None) -> FileSource:
    """Opens `split` of the images below a path, in an order fixed by a hash of their names.

    With folders that are named like splits (see `splits.split_kind`), these are the splits,
    and the class names are the sorted folder names of the one to train on. Otherwise the
    folders are the classes, the splits are `train`, `test` and `all`, and a file's name alone
    decides its split, so that files added later move no other (but a class with two images
    or more has at least one in each). A file of labels has precedence over folders.

    Classes whose names differ in case only are kept apart, and reported on stderr.

    Args:
      argument: the path, then options: `,classes=outer` or `inner`; of a file of labels
        `,image=COLUMN` and `,label=COLUMN`.
      split: its name.
      multi_label: of a file of labels, as `config.data.multi_label` has it.

    Raises:
      UserError: a missing folder or split, folders without images, or a file of labels that
        cannot be used.
    """
    root, nested, listed = _find(argument, multi_label)
    if listed:
        return label_files.open_listed(listed, split)
    if multi_label:
        raise UserError(
            f"data.multi_label is {multi_label!r}, but an image in a class folder has one "
            f"class: list the labels of {str(root)!r} in a file of labels, or set it to None."
        )
    splits = _splits(root)
    split = pick_split(split, splits or image_files.SPLITS, f"folder {str(root)!r}")
    if not splits:
        index = _index(root, nested)
        names = _short(index.class_names)
        _tell_of_twins(root, names)
        return index.listing.select(split, str(root), names)
    index = _index(root / split, nested)
    training = next((name for name in splits if split_kind(name) == "train"), None)
    classes = _class_folders(root / training, nested) if training else index.class_names
    if unknown := sorted(set(index.class_names) - set(classes)):
        raise UserError(
            f"class folder {str(root / split / unknown[0])!r} has no counterpart in "
            f"{str(root / (training or ''))!r}; rename or remove it."
        )
    _tell_of_twins(root / (training or split), _short(classes))
    source = index.listing.select("all", str(root / split), _short(classes))
    new = np.array([classes.index(name) for name in index.class_names], np.int32)
    return dataclasses.replace(source, labels=new[source.labels])


def split_names(argument: str) -> tuple[str, ...]:
    """The splits that share no image, the one to train on first. Raises UserError."""
    root, _, listed = _find(argument, None)
    if listed:
        return label_files.split_names(listed)
    return tuple(_splits(root)) or ("train", "test")


def _find(
    argument: str, multi: str | None
) -> tuple[Path, str | None, label_files.Listed | None]:
    """The folder, the option `classes`, and the label files in it, or that it is."""
    path, options = argument, dict[str, str]()
    if not Path(argument).expanduser().exists():
        path, options = split_options(argument, ("classes", "image", "label"), "folder")
    root, nested = Path(path).expanduser(), options.pop("classes", None)
    if nested not in (None, "outer", "inner"):
        raise UserError(f"folder:{argument} has classes={nested}: use outer or inner.")
    if path and root.is_file():
        listed = label_files.listed_in_file(root)
        return root.parent, None, _with_options(listed, multi, options)
    if not path or not root.is_dir():
        raise UserError(f"folder {path!r} does not exist or is not a folder; give folder:PATH.")
    found = None if nested else label_files.find(root)
    if found is None:
        if options:
            name, value = next(iter(options.items()))
            raise UserError(
                f"folder {str(root)!r} is read without a file of labels, so that "
                f"{name}={value} has no meaning; give folder:{root}/FILE,{name}={value}."
            )
        return root, nested, None
    return root, None, _with_options(found, multi, options)


def _with_options(
    listed: label_files.Listed, multi: str | None, options: dict[str, str]
) -> label_files.Listed:
    image, label = options.get("image"), options.get("label")
    return dataclasses.replace(listed, multi=multi, image=image, label=label)


def _splits(root: Path) -> list[str]:
    """The folders of `root` that are splits, or none if they are classes.

    Raises UserError where that cannot be decided.
    """
    names = _folders(root)
    splits = [name for name in names if split_kind(name)]
    others = [name for name in names if not split_kind(name)]
    if splits and others:
        inside = {name: set(_folders(root / name)) for name in splits}
        if not any(split_kind(name) == "train" and inside[name] for name in splits):
            _check_no_split(root, inside, others)
            return []  # a class may be called "train", too, but then it holds images
        _tell_of_others(root, splits, others)
    # A root with no training split is still good to evaluate on.
    return list(in_order(splits))


def _check_no_split(root: Path, inside: Mapping[str, set[str]], classes: list[str]) -> None:
    """Raises UserError if a folder beside class folders holds the same class folders."""
    for name, folders in inside.items():
        if folders & set(classes):
            raise UserError(
                f"{str(root / name)!r} is named like a split and holds class folders, as "
                f"{str(root)!r} does itself ({', '.join(classes[:3])}): put these into "
                f"{str(root / 'train')!r}, or rename {name!r}."
            )


def _tell_of_others(root: Path, splits: list[str], others: list[str]) -> None:
    image_files.tell_once(
        f"note: {', '.join(map(repr, splits))} in {str(root)!r} are splits, so the folders "
        f"beside them are left out: {', '.join(map(repr, others[:5]))}"
        f"{', ...' if len(others) > 5 else ''}"
    )


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        names = [e.name for e in entries if image_files.is_folder(e)]
    return sorted(name for name in names if not image_files.is_hidden(name))


def _class_folders(root: Path, nested: str | None) -> tuple[str, ...]:
    return _index(root, nested).class_names if nested == "inner" else tuple(_folders(root))


def _short(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Of inner folders the last part of their path, if that makes them unique."""
    names = tuple(name.rpartition("/")[2] for name in classes)
    return names if len(set(names)) == len(names) else classes


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
    """The files of class folders; labels are positions in `class_names`.

    `passed` is how many files are no images, by ending.
    """

    class_names: tuple[str, ...]
    listing: Listing
    passed: dict[str, int]


def _index(root: Path, nested: str | None = None) -> Index:
    """Raises UserError if there are no class folders, or one holds no images."""
    key = _digest(os.path.abspath(root) + ("\0inner" if nested == "inner" else ""))
    remembered = cache.folder() / "folders" / f"{key}.npz"
    index = _recall(remembered, root)
    if index is None:
        index = _scan(root, nested, remembered)
    image_files.tell_of_passed(root, index.passed)
    return index


def _scan(root: Path, nested: str | None, remembered: Path) -> Index:
    begin = time.time()
    dates: dict[str, int] = {}
    found = {name: _images(root, name, dates) for name in _folders_dated(root, dates)}
    if not found:
        raise UserError(
            f"folder {str(root)!r} has no class folders; put the images of each class in a "
            "folder of its own, named after the class."
        )
    of_class = _classes(root, found, nested)
    passed = sum((image_files.passed_over(each) for each in found.values()), _loose(root))
    index = Index(
        tuple(of_class), image_files.arrange(enumerate(of_class.values())), dict(passed)
    )
    settled = max(dates.values()) < (begin - _SETTLED) * 1e9
    if len(index.listing.files) >= REMEMBERED_FROM and settled:
        with contextlib.suppress(UserError):  # a cache that cannot be written costs time only
            _remember(remembered, index, dates)
    return index


def _classes(
    root: Path, found: Mapping[str, image_files.Found], nested: str | None
) -> dict[str, list[str]]:
    """The files of each class, by the path of its folder."""
    arrays = not any(each.images for each in found.values())
    of_class = {name: each.arrays if arrays else each.images for name, each in found.items()}
    for name, paths in of_class.items():
        if not paths and nested != "inner":
            raise UserError(
                f"class folder {str(root / name)!r} holds no images "
                f"({', '.join(e[1:] for e in image_files.EXTENSIONS)}); fill or remove it."
            )
    inner: dict[str, list[str]] = defaultdict(list)
    for path in itertools.chain.from_iterable(of_class.values()):
        inner[path.rpartition("/")[0]].append(path)
    if nested == "inner":
        return dict(sorted(inner.items()))
    if nested is None and len(inner) > len(of_class) and not inner.keys() & of_class.keys():
        _ask_which(root, tuple(of_class), sorted(inner))
    return of_class


def _ask_which(root: Path, outer: tuple[str, ...], inner: list[str]) -> None:
    """Class folders that hold folders only: of one alone it must be said which are meant."""
    shown = ", ".join(repr(name) for name in inner[:3]) + ", ..." * (len(inner) > 3)
    if len(outer) == 1:
        raise UserError(
            f"folder {str(root)!r} holds only {outer[0]!r}, and its images lie in {len(inner)} "
            f"folders in it ({shown}); if these are the classes, give folder:"
            f"{root / outer[0]}, else folder:{root},classes=outer."
        )
    image_files.tell_once(
        f"note: the classes of {str(root)!r} are its {len(outer)} outer folders; for the "
        f"{len(inner)} inner ones ({shown}) give folder:{root},classes=inner"
    )


def _loose(root: Path) -> Counter[str]:
    """How many images lie beside the class folders."""
    with os.scandir(root) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(image_files.EXTENSIONS)]
    count = sum(not image_files.is_hidden(name) for name in names)
    return Counter({"in no class folder": count} if count else {})


def _folders_dated(root: Path, dates: dict[str, int]) -> list[str]:
    # The date is read first: a change while the folder is read makes the index invalid.
    dates["."] = os.stat(root).st_mtime_ns
    return _folders(root)


def _images(root: Path, name: str, dates: dict[str, int]) -> image_files.Found:
    """What lies below `root/name`; notes the dates of the folders."""
    return image_files.search(root, name, dates)


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
            passed=json.dumps(index.passed),
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
            passed = json.loads(str(stored["passed"]))
            return Index(tuple(json.loads(str(stored["classes"]))), listing, passed)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # none yet, of another version, or damaged
