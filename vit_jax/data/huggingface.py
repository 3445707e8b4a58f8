"""Data sets of the Hugging Face hub and in its formats, through its library `datasets`.

hf:NAME or hf:NAME@CONFIG      of the hub: cifar100@cifar100, owner/name
hf:PATH                        a folder saved by `save_to_disk`, one of Parquet or Arrow files,
                               an imagefolder, or one such file

The image is the column of type Image; the label is the column of type ClassLabel, or else the
one called label or labels, of integers or strings. Nothing but columns is read before it is
asked for, and images arrive encoded.
"""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.sources import digest, pick_split
from vit_jax.errors import UserError

_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
_LABELS = ("label", "labels")
_ROWS_AT_ONCE = 100_000


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

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 (N,); a label that is missing is -1."""
        return np.array([self._number(x) for x in self.table[self.label_key][:]], np.int64)

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
            "label": self._number(row[self.label_key]),
            "name": f"{self.name}[{i}]{file}",
        }

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


def open_huggingface(name: str, split: str) -> HuggingFaceSource:
    """Opens a whole split of `name`, which is fetched if it is not on this machine.

    Raises:
      UserError: the library is missing; the data set cannot be found, fetched or read; it
        lacks the split, or has no image or no label.
    """
    tables = _load(name)
    split = pick_split(split, _ordered(tables), f"hf:{name}")
    image, label = _keys(tables[split].features, name)
    class_names, named = _classes(tables, label, name)
    table = tables[split].select_columns([image, label])
    table = table.cast_column(image, _datasets(name).Image(decode=False))
    return HuggingFaceSource(table, image, label, class_names, named, f"hf:{name} {split}")


def split_names(name: str) -> tuple[str, ...]:
    """The splits of `name`, the one to train on first. Raises UserError."""
    return _ordered(_load(name))


def _ordered(tables: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(tables, key=lambda split: (split != "train", split)))


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
            loaded = datasets.load_dataset(str(path))
        else:
            loaded = datasets.load_dataset(hub, config or None)
    except UserError:
        raise
    # The library and those below it raise some thirty exceptions, of no common base.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"hf:{name} cannot be loaded ({reason.rstrip('.')}).") from error
    return loaded if isinstance(loaded, Mapping) else {str(loaded.split or "train"): loaded}


def _load_file(path: Path, name: str) -> Any:
    if (form := _FILES.get(path.suffix.lower())) is None:
        raise UserError(
            f"hf:{name} is a file in no format that is read here; give one that ends in "
            f"{' or '.join(_FILES)}, or a folder."
        )
    return _datasets(name).load_dataset(form, data_files=str(path))


def _keys(features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The columns of the image and the label, each the first of its kind."""
    datasets = _datasets(name)
    kinds = {key: getattr(value, "dtype", "") for key, value in features.items()}
    images = [key for key, value in features.items() if isinstance(value, datasets.Image)]
    labels = [key for key, value in features.items() if isinstance(value, datasets.ClassLabel)]
    labels += [key for key in _LABELS if re.match(r"u?int|(large_)?string", kinds.get(key, ""))]
    if not images or not labels:
        raise UserError(
            f"hf:{name} cannot be used to classify images, because it has columns "
            f"{', '.join(features)} and needs an Image and a ClassLabel (or a column "
            "`label` of integers or strings) among them."
        )
    return images[0], labels[0]


def _classes(tables: Mapping[str, Any], label: str, name: str) -> tuple[tuple[str, ...], bool]:
    """The names of the classes, and whether labels are stored as these names."""
    first = tables[_ordered(tables)[0]]
    feature = first.features[label]
    if isinstance(feature, _datasets(name).ClassLabel):
        return tuple(feature.names), False
    found: set[Any] = set()
    for table in tables.values():
        found.update(table.unique(label) if label in table.column_names else ())
    found.discard(None)
    if not found:
        raise UserError(f"hf:{name} has no label in its column {label!r}; choose another set.")
    if "string" in feature.dtype:
        return tuple(sorted(found)), True
    return tuple(str(i) for i in range(max(max(found), 0) + 1)), False
