"""Images with several labels, or none: `data.multi_label`.

    auto       a list of labels; a table with a column of 0 and 1 for each class; or texts such
               as "cat;dog", separated by the first of ; | , that occurs
    another    the separator of the labels in a text; `space` for blanks

Labels of an image are then a bool array (K,), where one label would be its number.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vit_jax.data.sources.image_files import tell_once
from vit_jax.data.sources.source import Source, known_labels
from vit_jax.system.errors import UserError

AUTO = "auto"
_MOST_BYTES = 64 << 30  # of all labels: nine million images with 7,000 classes, as Open Images
_SEPARATORS = (";", "|", ",")


def is_multi_label(source: Source) -> bool:
    """Whether the images of a source have several labels each."""
    labels = known_labels(source)
    if labels is None:
        labels = np.asarray(source[0]["label"]) if len(source) else np.zeros(1, int)
    return labels.dtype == bool


def separator(setting: str, texts: Iterable[str], where: str) -> str | None:
    """The separator of the labels in `texts`; None stands for blanks.

    Raises UserError where `auto` finds nothing but blanks, which names have, too.
    """
    if setting != AUTO:
        return None if setting.strip() in ("", "space") else setting.strip()
    texts = list(texts)
    found = set().union(*(set(text) for text in texts)) & set(_SEPARATORS)
    if not found and (open_ := [text for text in texts if len(text.split()) > 1]):
        raise UserError(
            f"{where} has {open_[0]!r}, which may be one label or several; set "
            "data.multi_label=space for several, or =';' for one."
        )
    chosen = next((each for each in _SEPARATORS if each in found), _SEPARATORS[0])
    if found:
        tell_once(f"note: the labels of an image in {where} are separated by {chosen!r}")
    return chosen


def tell_of_joined(names: Sequence[str], where: str) -> None:
    """Says that a class looks like several labels of an image, where one is read."""
    known = set(names)
    for name in names:
        for between in (*_SEPARATORS, None):
            parts = divide(name, between)
            if len(parts) > 1 and (between in (";", "|") or known.issuperset(parts)):
                tell_once(
                    f"note: {where} has the class {name!r}: if these are several labels of an "
                    f"image, set data.multi_label={'space' if between is None else AUTO}"
                )
                return


def divide(text: str, between: str | None) -> tuple[str, ...]:
    """The labels in a text, each once."""
    parts = (part.strip() for part in text.split(between))
    return tuple(dict.fromkeys(part for part in parts if part))


def hot(labels: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    """bool (N, K): which of K classes each image has, of lists of their numbers.

    Raises UserError where that would take more memory than can be meant.
    """
    if len(labels) * classes > _MOST_BYTES:
        raise UserError(
            f"{len(labels):,} images with {classes:,} classes are too many for several labels "
            f"an image: number the classes from 0, without gaps"
        )
    found = np.zeros((len(labels), classes), bool)
    for row, numbers in zip(found, labels, strict=True):
        row[list(numbers)] = True
    return found


def truth(value: Any) -> bool | None:
    """A cell of a table of 0 and 1, as tables have it, or None if it is something else."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    text = str(value).strip().lower()
    return {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}.get(
        text
    )
