"""Data sets of the Hugging Face hub and in its formats, through its library `datasets`.

hf:NAME or hf:NAME@CONFIG      from the hub: cifar100@cifar100, owner/name
hf:PATH                        a folder saved by `save_to_disk`, one of Parquet or Arrow files,
                               an imagefolder, or one such file
hf:NAME,image=scan,label=age   and these columns of it

The image is the column `image` or `img`, else the only one of images: of type Image, of bytes,
or of {bytes, path}. The label is the column `label`, `labels` or `fine_label` of type
ClassLabel, else the only ClassLabel, else a column of one of these names: integers, strings,
booleans or whole floats. Where several columns remain, one must be chosen. Examples are
read only when they are used, and images stay encoded.
"""

import dataclasses
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.sources.multi_label import AUTO, divide, hot, separator, tell_of_joined
from vit_jax.data.sources.source import digest, renumber
from vit_jax.data.sources.splits import in_order, pick_split, split_kind, split_options
from vit_jax.system.errors import UserError

_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label")
_ROWS_AT_ONCE = 100_000


class Several(NamedTuple):
    """Lists of labels, or texts with a separator (None: blanks) between them."""

    listed: bool
    between: str | None

    def labels(self, stored: Any) -> Sequence[Any]:
        if stored is None:
            return ()
        return stored if self.listed else divide(stored, self.between)


@dataclass(frozen=True)
class HuggingFaceSource:
    """One split; `table` is a `datasets.Dataset` of the two columns, not decoded."""

    table: Any
    image_key: str
    label_key: str
    class_names: tuple[str, ...]
    named: bool  # labels are stored as names, not as numbers
    name: str
    positions: np.ndarray | None = None  # what the numbers stored are in `class_names`
    several: "Several | None" = None  # how several labels of an image are stored

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,), where a label that is missing is -1; or bool (N, K)."""
        stored = self.table[self.label_key][:]
        if self.several:
            return hot([self._numbers_of(x) for x in stored], len(self.class_names))
        return np.array([self._number(x) for x in stored], np.int64)

    def _numbers_of(self, stored: Any) -> list[int]:
        assert self.several is not None
        numbers = [self._number(label) for label in self.several.labels(stored)]
        if not all(0 <= n < len(self.class_names) for n in numbers):
            raise UserError(
                f"{self.name} has labels {stored!r} in {self.label_key!r}, and its classes are "
                f"numbered 0 to {len(self.class_names) - 1}; correct the data set."
            )
        return numbers

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.class_names)}

    def _number(self, label: Any) -> int:
        if label is None:
            return -1
        number = self._numbers[label] if self.named else int(label)
        if self.positions is None:
            return number
        known = 0 <= number < len(self.positions)
        return int(self.positions[number]) if known else -1

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        row = self.table[i]
        stored = row[self.image_key] or {"bytes": b"", "path": None}
        file = f" ({stored['path']})" if stored["path"] else ""
        return {
            "image": stored["path"] if stored["bytes"] is None else stored["bytes"],
            "label": self._label(row[self.label_key]),
            "name": f"{self.name}[{i}]{file}",
        }

    def _label(self, stored: Any) -> Any:
        if self.several:
            return hot([self._numbers_of(stored)], len(self.class_names))[0]
        return self._number(stored)

    def fingerprint(self, start: int, stop: int) -> str:
        """Of labels, and of the sizes and the names (without folders) of encoded images.

        Arrow keeps these apart from the images, so a million rows take half a second. The
        library's own fingerprint of a local data set changes with its folder and its dates.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        table, parts = self.table.with_format("arrow"), []
        for first in range(start, stop, _ROWS_AT_ONCE):
            images = table[first : min(first + _ROWS_AT_ONCE, stop)][self.image_key]
            stored = {key: pc.struct_field(images, key) for key in ("bytes", "path")}
            sizes = pc.binary_length(stored["bytes"]).cast(pa.int64()).fill_null(-1)
            names = pc.replace_substring_regex(stored["path"], r"^.*[/\\]", "")
            parts.append(digest(sizes.to_numpy(), "\n".join(names.fill_null("").to_pylist())))
        return digest(self.labels[start:stop], *parts)

    def with_classes(
        self, positions: np.ndarray, names: tuple[str, ...]
    ) -> "HuggingFaceSource":
        """As `classes.as_classes` has it."""
        if self.named:
            return dataclasses.replace(self, class_names=names)
        if self.positions is not None:
            positions = renumber(self.positions, positions, len(names))
        return dataclasses.replace(self, class_names=names, positions=positions)


def open_huggingface(
    argument: str, split: str, multi_label: str | None = None
) -> HuggingFaceSource:
    """Opens a whole split of a data set, which is fetched if it is not on this machine.

    With `multi_label`, labels are a list column, or texts: see multi_label.py.

    Raises:
      UserError: the library is missing; the data set cannot be found, fetched or read; it
        lacks the split, or has no image or no label, or several of which none is chosen.
    """
    name, options = split_options(argument, ("image", "label"), "hf")
    tables = _load(name)
    split = pick_split(split, in_order(tables), f"hf:{name}")
    features = tables[split].features
    image = _image_key(features, name, options.get("image"))
    label = _label_key(features, name, options.get("label"), bool(multi_label))
    several = _several(tables, label, name, multi_label) if multi_label else None
    class_names, named = _classes(tables, label, name, several)
    table = tables[split].select_columns([image, label])
    try:
        table = table.cast_column(image, _datasets(name).Image(decode=False))
    except Exception as error:  # of many kinds, as in `_load`
        raise UserError(
            f"hf:{name} has no images in its column {image!r}; choose another: "
            f"hf:{name},image=NAME."
        ) from error
    source = HuggingFaceSource(
        table, image, label, class_names, named, f"hf:{name} {split}", several=several
    )
    own = tuple(getattr(_inner(features[label]), "names", None) or class_names)
    return source if own == class_names else _renamed(source, own, class_names)


def _renamed(
    source: HuggingFaceSource, own: tuple[str, ...], names: tuple[str, ...]
) -> HuggingFaceSource:
    """Splits may number one set of names each in its own way. Raises UserError for two sets."""
    if unknown := sorted(set(own) - set(names)):
        raise UserError(
            f"{source.name} has a class {unknown[0]!r}, which the split to train on does not "
            f"have; use splits of the same classes."
        )
    positions = np.array([names.index(name) for name in own])
    return dataclasses.replace(source, class_names=own).with_classes(positions, names)


def split_names(argument: str) -> tuple[str, ...]:
    """The splits of a data set, the one to train on first. Raises UserError."""
    return in_order(_load(split_options(argument, ("image", "label"), "hf")[0]))


def _datasets(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"hf:{name} needs the library `datasets`; install it with "
            "`pip install 'vit_jax[hf]'`."
        ) from error


def _load(name: str) -> Mapping[str, Any]:
    """All splits, by name."""
    datasets = _datasets(name)
    path = Path(name).expanduser()
    is_path = (name and path.exists()) or name.startswith(("/", "~", "."))
    if is_path and not path.exists():
        raise UserError(f"hf:{name} is a path that does not exist; check it.")
    hub, _, config = name.partition("@")
    if not is_path and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub):
        raise UserError(
            f"hf:{name} is not a data set name; write it like hf:cifar100@cifar100, "
            "hf:owner/name or hf:/path/to/folder."
        )
    try:
        if path.is_dir() and any((path / f).is_file() for f in _SAVED):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = _load_file(path, name)
        elif is_path:
            loaded = datasets.load_dataset(str(path), **_capital_splits(path))
        else:
            loaded = datasets.load_dataset(hub, config or None)
    except UserError:
        raise
    # The library and those below it raise some thirty exceptions, of no common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"hf:{name} cannot be loaded ({reason.rstrip('.')}).") from error
    return loaded if isinstance(loaded, Mapping) else {str(loaded.split or "train"): loaded}


def _capital_splits(path: Path) -> dict[str, Any]:
    """Folders of splits such as `Train`, which the library would take together as one."""
    splits = [each.name for each in path.iterdir() if each.is_dir() and split_kind(each.name)]
    if all(name == name.lower() for name in splits):
        return {}
    return {"data_files": {name.lower(): f"{name}/**" for name in sorted(splits)}}


def _load_file(path: Path, name: str) -> Any:
    if (form := _FILES.get(path.suffix.lower())) is None:
        raise UserError(
            f"hf:{name} is a file in no format that is read here; give one that ends in "
            f"{' or '.join(_FILES)}, or a folder."
        )
    return _datasets(name).load_dataset(form, data_files=str(path))


# ---- which columns -----------------------------------------------------------------------


def _image_key(features: Mapping[str, Any], name: str, chosen: str | None) -> str:
    """The column of images: the one chosen, the one called so, or the only one."""
    if chosen is not None:
        return _chosen(features, name, "image", chosen)
    image = _datasets(name).Image
    declared = [key for key, value in features.items() if isinstance(value, image)]
    stored = [key for key, value in features.items() if _holds_bytes(value)]
    for candidates in (declared, stored):
        named = [key for key in _IMAGES if key in candidates]
        if named or len(candidates) == 1:
            return (named or candidates)[0]
        if candidates:
            raise _open_choice(name, "image", candidates)
    raise _unusable(features, name)


def _holds_bytes(feature: Any) -> bool:
    """A column of encoded images that is not declared as one."""
    if isinstance(feature, Mapping):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _inner(feature: Any) -> Any:
    """Of a list, the feature of what is in it."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return feature if inner is None else inner


def _several(tables: Mapping[str, Any], label: str, name: str, setting: str) -> Several:
    """How several labels are written in the column `label`."""
    feature = tables[in_order(tables)[0]].features[label]
    if _inner(feature) is not feature:
        return Several(True, None)
    if "string" not in str(getattr(feature, "dtype", "")):
        raise UserError(
            f"hf:{name} has one number for each image in its column {label!r}; for "
            f"data.multi_label={setting!r} choose a column of lists or texts: "
            f"hf:{name},label=NAME."
        )
    texts = [x for t in tables.values() if label in t.column_names for x in t.unique(label)]
    return Several(False, separator(setting, filter(None, texts), f"hf:{name}"))


def _label_key(
    features: Mapping[str, Any], name: str, chosen: str | None, several: bool
) -> str:
    """The column of labels: the one chosen, the one called so, or the only ClassLabel.

    With `several`, lists come before all other columns.
    """
    if chosen is not None:
        return _check_label(features, _chosen(features, name, "label", chosen), name, several)
    lists = [key for key, value in features.items() if _is_labels(_inner(value), name)]
    lists = [key for key in lists if _inner(features[key]) is not features[key]]
    if several and lists:
        named = [key for key in _LABELS if key in lists]
        if not named and len(lists) > 1:
            raise _open_choice(name, "label", lists)
        return (named or lists)[0]
    declared = [k for k, v in features.items() if isinstance(v, _datasets(name).ClassLabel)]
    plain = [key for key in _LABELS if key in features and key not in declared]
    named = [key for key in _LABELS if key in declared]
    if named:
        return named[0]
    if len(declared) == 1:
        return declared[0]
    if plain:
        return _check_label(features, plain[0], name, several)
    if declared:
        raise _open_choice(name, "label", declared)
    raise _unusable(features, name)


def _check_label(features: Mapping[str, Any], key: str, name: str, several: bool) -> str:
    inner = _inner(features[key])
    if not _is_labels(inner, name):
        raise _unusable(features, name)
    if inner is not features[key] and not several:
        raise UserError(
            f"hf:{name} has a list of labels for each image in its column {key!r}; set "
            f"data.multi_label={AUTO}, or choose another: hf:{name},label=NAME."
        )
    return key


def _is_labels(feature: Any, name: str) -> bool:
    kind = str(getattr(feature, "dtype", ""))
    return isinstance(feature, _datasets(name).ClassLabel) or bool(re.match(_PLAIN, kind))


_PLAIN = r"u?int|float|bool|(large_)?string"


def _chosen(features: Mapping[str, Any], name: str, what: str, chosen: str) -> str:
    if chosen not in features:
        raise UserError(
            f"hf:{name} has no column {chosen!r}; give {what}=NAME with one of "
            f"{', '.join(features)}."
        )
    return chosen


def _open_choice(name: str, what: str, candidates: list[str]) -> UserError:
    return UserError(
        f"hf:{name} has several columns that can be the {what}: {', '.join(candidates)}; "
        f"choose one, as in hf:{name},{what}={candidates[0]}."
    )


def _unusable(features: Mapping[str, Any], name: str) -> UserError:
    return UserError(
        f"hf:{name} cannot be used to classify images, because it has columns "
        f"{', '.join(features)} and needs an Image and a ClassLabel (or a column "
        "`label` of integers or strings) among them; others can be chosen: "
        f"hf:{name},image=NAME,label=NAME."
    )


def _classes(
    tables: Mapping[str, Any], label: str, name: str, several: Several | None
) -> tuple[tuple[str, ...], bool]:
    """The names of the classes, and whether labels are stored as these names."""
    first = tables[in_order(tables)[0]]
    feature = _inner(first.features[label])
    if isinstance(feature, _datasets(name).ClassLabel):
        return tuple(feature.names), False
    found: set[Any] = set()
    for table in tables.values():
        if label not in table.column_names:
            continue
        if several:
            stored = table[label][:]
            found.update(x for each in stored for x in several.labels(each))
        else:
            found.update(table.unique(label))
    found.discard(None)
    if not found:
        raise UserError(f"hf:{name} has no label in its column {label!r}; choose another set.")
    if "string" in feature.dtype:
        if not several:
            tell_of_joined(sorted(found), f"hf:{name}")
        return tuple(sorted(found)), True
    if "bool" in feature.dtype:
        return ("False", "True"), False
    if broken := sorted(x for x in found if x != int(x)):
        raise UserError(
            f"hf:{name} has label {broken[0]} in its column {label!r}, which is no class; use "
            "whole numbers or names."
        )
    return tuple(str(i) for i in range(max(int(max(found)), 0) + 1)), False
