"""Matches classes by name, and by position only where names cannot be compared.

A model has outputs with names, a data set has classes with names, and the two rarely have the
same order. `match` finds the model output of each class of a data set; `as_classes` renumbers
the labels of a source in another order of the same classes.
"""

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.sources.source import Concatenation, Source, Subset, renumber
from vit_jax.system import bounded
from vit_jax.system.errors import UserError

Names = tuple[str, ...]
REMEDY = (
    "give the output of each class of the data with --classes (names or numbers, with commas "
    "between, or a file of one a line), or the names of the outputs with --class_names=FILE"
)


class Match(NamedTuple):
    """The model's output for each class of the data, and a note about it."""

    outputs: tuple[int, ...]
    note: str = ""


class Mismatch(UserError):
    """The names contradict each other, or do not determine which class is which."""


# ---- spellings ---------------------------------------------------------------------------

_NUMBERED = re.compile(
    r"(?:label|class)?[ _-]?(\d{1,18})", re.IGNORECASE
)  # LABEL_0: Hugging Face


def _number(name: str) -> int | None:
    match = _NUMBERED.fullmatch(name.strip())
    return int(match[1]) if match else None


def numbers(names: Iterable[str]) -> list[int] | None:
    """The numbers that all names are, such as `007` or `LABEL_7`, or None."""
    found = [_number(name) for name in names]
    return None if None in found else [n for n in found if n is not None]


def _plain(name: str) -> str:
    """Without case and without the kind of gap between words; numbers without zeros."""
    number = _number(name)
    return str(number) if number is not None else re.sub(r"[\s_-]+", " ", name).strip().lower()


def _synonyms(name: str) -> set[str]:
    """`n01440764 tench, Tinca tinca` has three names."""
    wordnet = re.match(r"\s*(n\d{8})\b", name)
    words = name[wordnet.end() :] if wordnet else name
    found = {_plain(word) for word in words.split(",")} - {""}
    return found | ({wordnet[1]} if wordnet else set())


_SPELLINGS = (lambda name: {name}, lambda name: {_plain(name)}, _synonyms)


def _by_name(model: Names, data: Names) -> dict[int, int]:
    """{class of the data: output} of all classes that exactly one output fits.

    The exact name comes before another spelling of it, and that before a synonym.
    """
    found: dict[int, int] = {}
    for keys in _SPELLINGS:
        outputs: Mapping[str, set[int]] = defaultdict(set)
        for k, name in enumerate(model):
            for key in keys(name):
                outputs[key].add(k)
        for i, name in enumerate(data):
            meant = set().union(*(outputs.get(key, set()) for key in keys(name)))
            if i not in found and len(meant) == 1:
                found[i] = meant.pop()
    return found


# ---- a model's outputs and a data set's classes ------------------------------------------


def match(model: Names, data: Names, where: str, trust_order: bool) -> Match:
    """Finds the output of each class of the data; the data may have fewer classes.

    Args:
      model: the names of the outputs. data: the names of the classes. where: what the data are
      called in messages. trust_order: whether equally many classes have the same order where
      names cannot be compared.
        For published weights that is the custom ("tabby, tabby cat" is "n02123045" in a data
        set); of a model trained here, whose names are those of its own data, it is not.

    Raises:
      Mismatch: names contradict the order, or do not say which output a class is.
    """
    if data == model:
        return Match(tuple(range(len(data))))
    counts = f"{where} has the classes {some(data)}, but the model was trained on {some(model)}"
    found = _by_name(model, data)
    unnamed = trust_order and numbers(model) == list(range(len(model)))
    if len(found) == len(data) and (len(data) == len(model) or not unnamed):
        return _all_named(model, data, found, where)
    if not trust_order or len(data) != len(model):
        unknown = [name for i, name in enumerate(data) if i not in found]
        partly = f" ({unknown[0]!r} is none of them)" if found and unknown else ""
        raise Mismatch(f"{counts}{partly}: evaluate on data with the same classes, or {REMEDY}")
    if (numbered := numbers(data)) and (order := _numbered(numbered)) and not found:
        return order
    moved = [i for i, k in found.items() if i != k]
    if moved:
        unknown = [name for i, name in enumerate(data) if i not in found]
        raise Mismatch(
            f"{counts}: {data[moved[0]]!r} has another position there, so the order "
            f"does not say which output {unknown[0]!r} is; {REMEDY}"
        )
    first = next(i for i in range(len(data)) if i not in found)
    return Match(
        tuple(range(len(data))),
        f"class names differ ({data[first]!r} in the data, {model[first]!r} in the model): "
        f"their order is taken to be the same",
    )


def _all_named(model: Names, data: Names, found: dict[int, int], where: str) -> Match:
    outputs = tuple(found[i] for i in range(len(data)))
    owner: dict[int, str] = {}
    for name, k in zip(data, outputs, strict=True):
        if k in owner:
            raise Mismatch(
                f"{where} has classes {owner[k]!r} and {name!r}, which are both "
                f"{model[k]!r} in the model: merge them, or {REMEDY}"
            )
        owner[k] = name
    notes = []
    respelled = [i for i, k in found.items() if data[i] != model[k]]
    if respelled:
        i = respelled[0]
        notes.append(
            f"{len(respelled)} of {len(data)} classes are spelled otherwise in the model, the "
            f"first of them {data[i]!r} as {model[found[i]]!r}"
        )
    if len(data) < len(model):
        notes.append(
            f"{where} has {len(data)} of the model's {len(model)} classes, matched by name: "
            f"its other outputs are left out"
        )
    elif outputs != tuple(range(len(data))):
        notes.append(f"{where} has the model's classes in another order: matched by name")
    return Match(outputs, "; ".join(notes))


def _numbered(data: list[int]) -> Match | None:
    """Numbers say which output, though sorted as texts they stand as 0, 1, 10, 11, 2."""
    for first in (0, 1):
        if sorted(data) == list(range(first, first + len(data))):
            return Match(
                tuple(n - first for n in data),
                f"the classes of the data are numbers, from {first}: they are used as the "
                f"model's outputs in the order of these numbers",
            )
    return None


def chosen(given: str, model: Names, data: Names) -> Match:
    """The outputs that --classes names: a name or a number for each class of the data.

    Raises:
      UserError: they are too many or too few, or one is no output, or is meant twice.
    """
    entries = read_names("classes", given)
    if len(entries) != len(data):
        raise UserError(
            f"--classes has {len(entries)} entries, but the data have {len(data)} classes "
            f"{some(data)}: give one for each, in this order"
        )
    position = {name: k for k, name in reversed(list(enumerate(model)))}
    outputs = []
    for entry in entries:
        k = position.get(entry, int(entry) if re.fullmatch(r"\d{1,18}", entry) else -1)
        if not 0 <= k < len(model):
            raise UserError(
                f"--classes has {entry!r}, which is none of the model's outputs {some(model)}: "
                f"use their names, or numbers from 0 to {len(model) - 1}"
            )
        if k in outputs:
            raise UserError(f"--classes has {entry!r} for two classes: give each its own")
        outputs.append(k)
    return Match(tuple(outputs))


def read_names(flag: str, given: str) -> Names:
    """The entries of a flag: a file of one a line, or a list with commas between.

    Raises:
      UserError: the file cannot be read, or is empty.
    """
    path = Path(given).expanduser()
    is_file = os.path.isfile(path)  # which a long list is not, either
    try:
        text = bounded.read_text(path, "utf-8-sig") if is_file else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{flag}={given} cannot be read ({error}): check the file") from error
    lines = text.splitlines() if is_file else given.split(",")
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"--{flag}={given} holds no names: write one a line")
    return names


def some(names: Sequence[str]) -> str:
    """The first of them and their number, for a message."""
    shown = ", ".join(names[:5])
    return f"[{shown}{', ...' if len(names) > 5 else ''}] ({len(names)})"


# ---- the same classes in another order -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """A source whose label i is `positions[i]` among `class_names`."""

    source: Any
    positions: np.ndarray
    class_names: Names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self.source[i]
        label = renumber(np.asarray(example["label"]), self.positions, len(self.class_names))
        return {**example, "label": label if label.ndim else int(label)}

    def fingerprint(self, start: int, stop: int) -> str:
        return str(self.source.fingerprint(start, stop))


def as_classes(source: Source, names: Names) -> Source | None:
    """`source` with its labels as positions in `names`, matched by name.

    Returns None if it has a class that `names` lacks. A source that changes its own labels
    has `with_classes`, and then the fingerprint of one that always had them so.
    """
    if source.class_names == names:
        return source
    place = {name: i for i, name in enumerate(names)}
    if not set(source.class_names) <= place.keys():
        return None
    if isinstance(source, Subset):
        inner = as_classes(source.source, names)
        return None if inner is None else dataclasses.replace(source, source=inner)
    if isinstance(source, Concatenation):
        parts = [as_classes(part, names) for part in source.sources]
        return Concatenation([part for part in parts if part is not None])
    positions = np.array([place[name] for name in source.class_names], np.int32)
    if hasattr(source, "with_classes"):
        changed: Source = source.with_classes(positions, names)
        return changed
    return Relabelled(source, positions, names)
