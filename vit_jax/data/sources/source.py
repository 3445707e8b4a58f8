"""The protocol of a data set: examples by number, labels, and a fingerprint.

A part of a source (`Subset`) and sources one after another (`Concatenation`) are sources too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vit_jax.system.errors import UserError


class Source(Protocol):
    """A random-access data set that can be pickled, so that worker processes can hold one.

    An example is a dict of `image` (encoded bytes, a path, or a uint8 or uint16 array of shape
    (H, W) or (H, W, C)), `label` (an int that indexes `class_names`, or where images have
    several labels a bool array (K,)) and `name` (what an error message should call it).

    A source that knows all labels without reading images may have them as `labels`, integers
    of shape (N,) or booleans (N, K).
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def fingerprint(self, start: int, stop: int) -> str:
        """Which examples lie from `start` up to `stop`, as `fingerprint` below has it."""
        ...


def known_labels(source: Source) -> np.ndarray | None:
    """All labels, as of `Source`, if they can be had without reading images."""
    if isinstance(source, Subset):
        labels = known_labels(source.source)
        return None if labels is None else labels[source.start : source.stop]
    if isinstance(source, Concatenation):
        parts = [known_labels(part) for part in source.sources]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None
    return getattr(source, "labels", None)


def fingerprint(source: Source) -> str:
    """16 hex digits that identify the examples of `source`, their order and their labels.

    They differ where an example was added, removed, renamed or moved, or got another label.
    They are the same where a data set was only moved: the folders above it do not count. They
    are fast to compute, because no pixels are read: an image that is replaced under its old
    name in a folder is not noticed. Each kind of source uses what it has: names and labels
    (`folder:`), labels and a digest made when the images were packed (`records:`), labels,
    names and sizes (`hf:`), name, version and sizes (`tfds:`), arrays in memory as they are.
    """
    return source.fingerprint(0, len(source))


def digest(*parts: str | np.ndarray) -> str:
    """16 hex digits of texts and arrays, of their dtypes and shapes too."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            part = np.frombuffer(part.encode(), np.uint8)
        # With the length before the content, no two lists of parts look the same.
        hasher.update(f"{part.dtype.str}{part.shape}".encode())
        hasher.update(np.ascontiguousarray(part).data)
    return hasher.hexdigest()


def renumber(labels: np.ndarray, positions: np.ndarray, classes: int) -> np.ndarray:
    """Labels where class i of before is class `positions[i]` of `classes`.

    `labels` are integers of any shape, of which those out of range become -1, or booleans
    (..., K) that say for each class whether it is there.
    """
    if labels.dtype == bool:
        moved = np.zeros((*labels.shape[:-1], classes), bool)
        moved[..., positions] = labels
        return moved
    known = (labels >= 0) & (labels < len(positions))
    return np.where(known, positions[np.where(known, labels, 0)], -1).astype(labels.dtype)


def plain_label(label: Any) -> Any:
    """A label of an array of them: an int, or where there may be several a bool array."""
    return label if label.ndim else int(label)


@dataclass(frozen=True)
class Subset:
    """Examples `start` up to `stop` of another source."""

    source: Source
    start: int
    stop: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.source[self.start + range(len(self))[i]]

    def fingerprint(self, start: int, stop: int) -> str:
        return self.source.fingerprint(self.start + start, self.start + stop)


class Concatenation:
    """Sources of the same classes, one after another."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.class_names = sources[0].class_names
        self.ends = np.cumsum([len(source) for source in sources])
        if any(source.class_names != self.class_names for source in sources):
            raise UserError("splits joined by + have different classes; load them apart.")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        part = int(np.searchsorted(self.ends, i, side="right"))
        return self.sources[part][i - (int(self.ends[part - 1]) if part else 0)]

    def fingerprint(self, start: int, stop: int) -> str:
        found = []
        for source, end in zip(self.sources, self.ends.tolist(), strict=True):
            n = len(source)
            first, last = (min(max(bound - (end - n), 0), n) for bound in (start, stop))
            if first < last:
                found.append(source.fingerprint(first, last))
        return digest(*found)
