"""Where examples come from: one string names a data set, another names a split of it.

    load("digits", "train")                    bundled with scikit-learn, nothing to fetch
    load("folder:~/pets", "test")              your own images, one folder a class
    load("folder:~/pets/labels.csv", "test")   your own images, labels in a file
    load("tfds:cifar10", "train[:98%]")        prepared by TensorFlow Datasets
    load("hf:cifar100@cifar100", "train")      from the Hugging Face hub, or a folder of theirs
    load("records:~/packed", "train")          packed by `python -m vit_jax.prepare`
    load("synthetic:32x32x3,classes=10", "train")

Every source takes the same split grammar, that of TensorFlow Datasets: `train`,
`train[:98%]`, `train[10%:]`, `train[100:200]`, `train[-10:]` and sums such as
`train+validation[:50%]`.
"""

import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vit_jax.data.sources.in_memory import open_digits, open_synthetic
from vit_jax.data.sources.multi_label import is_multi_label
from vit_jax.data.sources.source import Concatenation, Source, known_labels
from vit_jax.data.sources.splits import parse_split
from vit_jax.system.errors import UserError

_LOOKED_AT = 64  # examples whose labels are checked where reading all would take too long


def load(
    source: str, split: str, data_dir: str | None = None, multi_label: str | None = None
) -> Source:
    """Opens `split` of `source`; `data_dir` is the folder of `tfds:` sets.

    `multi_label` says how several labels of an image are written: see multi_label.py.

    Raises UserError for an unknown source or split, for data that cannot be read, and for a
    label out of range (of a source that must read an image for every label, only some are
    checked here, and the rest when they are read).
    """
    kind, argument = _parse_source(source)
    parts = [parse_split(part) for part in split.split("+")]
    options = {"multi_label": multi_label} if kind in _MULTI_LABEL else {}
    opened = [
        part.of(_KINDS[kind].open(argument, part.base, data_dir, **options)) for part in parts
    ]
    whole = opened[0] if len(opened) == 1 else Concatenation(opened)
    _check_multi_label(whole, source, multi_label)
    _check_labels(whole)
    return whole


def split_names(source: str, data_dir: str | None = None) -> tuple[str, ...]:
    """The splits of `source` that share no example. Raises UserError as `load` does."""
    kind, argument = _parse_source(source)
    return _KINDS[kind].splits(argument, data_dir)


def _check_multi_label(source: Source, name: str, wanted: str | None) -> None:
    if len(source) and is_multi_label(source) != bool(wanted):
        has, remedy = ("one label", "None") if wanted else ("several labels", "auto")
        raise UserError(
            f"an image of {name} has {has}, and data.multi_label is {wanted!r}; set it to "
            f"{remedy}."
        )


def _check_labels(source: Source) -> None:
    labels, classes = known_labels(source), len(source.class_names)
    rows = np.arange(len(source))
    if labels is None:
        rows = np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT, dtype=int))
        labels = np.array([source[int(i)]["label"] for i in rows])
    if labels.dtype == bool:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(
            f"{source[int(rows[wrong[0]])]['name']} has label {labels[wrong[0]]}, but the "
            f"classes are numbered 0 to {classes - 1}; choose a split with labels, or "
            "correct the data set."
        )


def _parse_source(source: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w*)(?:[:,](.*))?", source, re.DOTALL)
    kind, argument = match.groups() if match else (source, None)
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"unknown data source {source!r}{hint}: use digits, folder:PATH, tfds:NAME, "
            "hf:NAME, records:PATH or synthetic:HxWxC."
        )
    return kind, argument or ""


def _open_folder(
    argument: str, split: str, data_dir: str | None, multi_label: str | None = None
) -> Source:
    from vit_jax.data.sources import folder

    return folder.open_folder(argument, split, multi_label)


def _splits_of_folder(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data.sources import folder

    return folder.split_names(argument)


def _open_tfds(argument: str, split: str, data_dir: str | None) -> Source:
    from vit_jax.data.sources import tfds

    return tfds.open_tfds(argument, split, data_dir)


def _splits_of_tfds(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data.sources import tfds

    return tfds.split_names(argument, data_dir)


def _open_huggingface(
    argument: str, split: str, data_dir: str | None, multi_label: str | None = None
) -> Source:
    from vit_jax.data.sources import huggingface

    return huggingface.open_huggingface(argument, split, multi_label)


def _splits_of_huggingface(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data.sources import huggingface

    return huggingface.split_names(argument)


def _open_records(argument: str, split: str, data_dir: str | None) -> Source:
    from vit_jax.data.sources import records

    return records.open_records(argument, split)


def _splits_of_records(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data.sources import records

    return records.split_names(argument)


class _Kind(NamedTuple):
    """How to open (argument, whole split, data_dir), and to list the splits that exist."""

    open: Callable[..., Source]
    splits: Callable[[str, str | None], tuple[str, ...]]


_MULTI_LABEL = ("folder", "hf")  # need to know how labels are written


# Each kind is imported when it is used: TensorFlow Datasets alone takes a second.
_KINDS = {
    "digits": _Kind(open_digits, lambda argument, data_dir: ("train", "test")),
    "folder": _Kind(_open_folder, _splits_of_folder),
    "tfds": _Kind(_open_tfds, _splits_of_tfds),
    "hf": _Kind(_open_huggingface, _splits_of_huggingface),
    "records": _Kind(_open_records, _splits_of_records),
    "synthetic": _Kind(open_synthetic, lambda argument, data_dir: ("train", "test")),
}
