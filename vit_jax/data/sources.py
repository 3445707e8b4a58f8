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

import dataclasses
import difflib
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from vit_jax.errors import UserError

# What splits are called, in any case; names of one kind mean the same.
_SPLIT_KINDS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
SPLITS = tuple(name for names in _SPLIT_KINDS.values() for name in names)
# Asked for by one of these, the only held-out split there is will do, whatever it is called.
_ANY_HELD_OUT = ("val", "validation", "test")
_LOOKED_AT = 64  # examples whose labels are checked where reading all would take too long


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


def load(
    source: str, split: str, data_dir: str | None = None, multi_label: str | None = None
) -> Source:
    """Opens `split` of `source`; `data_dir` is where `tfds:` sets lie.

    `multi_label` says how several labels of an image are written: see multi_label.py.

    Raises UserError for an unknown source or split, for data that cannot be read, and for a
    label out of range (of a source that must read an image for every label, only some are
    looked at here, and the rest when they come).
    """
    kind, argument = _parse_source(source)
    parts = [_parse_split(part) for part in split.split("+")]
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
    """16 hex digits that tell which examples `source` holds, in which order, with which labels.

    They differ where an example was added, removed, renamed or moved, or got another label.
    They stay where a data set was only moved to another place: no folder above it counts. They
    take a moment, because no pixels are read: a picture drawn over under its old name in a
    folder goes unseen. Each kind of source counts what it knows: names and labels (`folder:`),
    labels and a digest made when the images were packed (`records:`), labels, names and sizes
    (`hf:`), name, version and sizes (`tfds:`), arrays in memory as they are.
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


def _check_multi_label(source: Source, name: str, wanted: str | None) -> None:
    from vit_jax.data.multi_label import is_multi_label

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
            f"classes are numbered 0 to {classes - 1}; choose a split with labels, or mend the "
            "data set."
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


# ---- splits and parts of splits ----------------------------------------------------------


@dataclass(frozen=True)
class SubSplit:
    """`base[start:stop]`, each bound a count or a percentage of the base split."""

    text: str
    base: str
    start: str | None = None
    stop: str | None = None

    def of(self, source: Source) -> Source:
        """The part of `source`, which is the whole base split."""
        if self.start is None and self.stop is None:
            return source
        n = len(source)
        start, stop = self._index(self.start, 0, n), self._index(self.stop, n, n)
        if start >= stop:
            raise UserError(
                f"split {self.text!r} holds no examples, because {self.base!r} has {n}; "
                "widen its bounds."
            )
        return Subset(source, start, stop)

    def _index(self, bound: str | None, default: int, n: int) -> int:
        if bound is None:
            return default
        # The closest index, halves to even, as TensorFlow Datasets rounds.
        index = round(int(bound[:-1]) * n / 100) if bound.endswith("%") else int(bound)
        index = index + n if bound.startswith("-") else index
        if not 0 <= index <= n:
            raise UserError(
                f"split {self.text!r} reaches outside {self.base!r}, which has {n} examples; "
                f"bounds lie between -{n} and {n}, or -100% and 100%."
            )
        return index


def _parse_split(text: str) -> SubSplit:
    bound = r"(-?\d+%?)?"
    match = re.fullmatch(rf"\s*([\w.-]+)(?:\[\s*{bound}\s*:\s*{bound}\s*\])?\s*", text)
    if match is None:
        raise UserError(
            f"split {text!r} is not understood; write it like train, train[:98%], "
            "train[10%:] or train[100:200]."
        )
    return SubSplit(text.strip(), *match.groups())


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


def split_kind(name: str) -> str | None:
    """`train`, `validation` or `test` if that is what `name` means, in any case."""
    for kind, names in _SPLIT_KINDS.items():
        if name.casefold() in names:
            return kind
    return None


def in_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Splits with the one to train on first, by name."""
    return tuple(sorted(splits, key=lambda name: (split_kind(name) != "train", name)))


def pick_split(requested: str, available: Sequence[str], where: str) -> str:
    """The available split that `requested` means.

    `val`, `validation`, `valid` and `dev` are one name, in any case; `test` is another, unless
    only one set is held out. Raises UserError, listing what exists.
    """
    if requested in available:
        return requested
    kind = split_kind(requested)
    same = [name for name in available if kind and split_kind(name) == kind]
    same = same or [name for name in available if name.casefold() == requested.casefold()]
    if not same and requested.casefold() in _ANY_HELD_OUT:
        same = [name for name in available if split_kind(name) in ("validation", "test")]
    if len(same) == 1:
        return same[0]
    raise UserError(f"{where} has no split {requested!r}; it has {', '.join(available)}.")


def split_options(argument: str, names: Sequence[str], kind: str) -> tuple[str, dict[str, str]]:
    """`PATH,label=breed` -> the path and `{"label": "breed"}`, of the options `names`.

    Raises UserError for an option twice or without a value.
    """
    option = rf",\s*({'|'.join(names)})=([^,]*)"
    match = re.fullmatch(rf"(.*?)((?:{option})*)", argument, re.DOTALL)
    assert match is not None  # the path takes all that is no option
    found = re.findall(option, match[2])
    options = {name: value.strip() for name, value in found}
    if len(options) < len(found) or not all(options.values()):
        raise UserError(
            f"{kind}:{argument} has an option without a value, or one twice; write it like "
            f"{kind}:PATH,{names[0]}=NAME."
        )
    return match[1], options


# ---- data sets that need no files --------------------------------------------------------


@dataclass(frozen=True)
class ArraySource:
    """Images and labels held in memory: (N, H, W) or (N, H, W, C) uint8, and (N,) integers."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        label = int(self.labels[i])
        return {"image": self.images[i], "label": label, "name": f"{self.name}[{i}]"}

    def fingerprint(self, start: int, stop: int) -> str:
        return digest(self.images[start:stop], self.labels[start:stop].astype(np.int64))

    def with_classes(self, positions: np.ndarray, names: tuple[str, ...]) -> "ArraySource":
        """As `classes.as_classes` has it."""
        labels = renumber(self.labels, positions, len(names))
        return dataclasses.replace(self, labels=labels, class_names=names)


def _open_digits(argument: str, split: str, data_dir: str | None) -> Source:
    """1,797 scans of handwritten digits, 8 x 8 grey: 1,437 to train on and 360 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if argument:
        raise UserError(f"the digits source takes no argument, but got {argument!r}.")
    split = pick_split(split, ("train", "test"), "digits")
    images, labels = load_digits().images, load_digits().target
    images = np.rint(images * (255 / 16)).astype(np.uint8)  # stored as 0 .. 16
    rows = train_test_split(
        np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )[split == "test"]
    return ArraySource(images[rows], labels[rows], tuple("0123456789"), "digits")


@dataclass(frozen=True)
class SyntheticSource:
    """Noise with random labels, a pure function of (split, index); to time and test with."""

    split: str
    shape: tuple[int, int, int] = (224, 224, 3)
    classes: int = 1000
    examples: int = 1280

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(label) for label in range(self.classes))

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(self.examples)[i]
        rng = np.random.default_rng([zlib.crc32(self.split.encode()), i])
        label = int(rng.integers(self.classes))
        image = np.frombuffer(rng.bytes(int(np.prod(self.shape))), np.uint8)
        return {
            "image": image.reshape(self.shape),
            "label": label,
            "name": f"synthetic {self.split}[{i}]",
        }

    def fingerprint(self, start: int, stop: int) -> str:
        return digest(f"synthetic {self.split} {self.shape} {self.classes} {start}:{stop}")


def _open_synthetic(argument: str, split: str, data_dir: str | None) -> Source:
    options: dict[str, Any] = {}
    for field in filter(None, argument.split(",")):
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", field):
            options["shape"] = tuple(int(size) for size in match.groups())
        elif match := re.fullmatch(r"(classes|examples)=([1-9]\d*)", field):
            options[match[1]] = int(match[2])
        else:
            raise UserError(
                f"synthetic source: {field!r} is not understood; write it like "
                "synthetic:224x224x3,classes=1000,examples=1280."
            )
    return SyntheticSource(split, **options)


# ---- all kinds of sources ----------------------------------------------------------------


def _open_folder(
    argument: str, split: str, data_dir: str | None, multi_label: str | None = None
) -> Source:
    from vit_jax.data import folder

    return folder.open_folder(argument, split, multi_label)


def _splits_of_folder(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data import folder

    return folder.split_names(argument)


def _open_tfds(argument: str, split: str, data_dir: str | None) -> Source:
    from vit_jax.data import tfds

    return tfds.open_tfds(argument, split, data_dir)


def _splits_of_tfds(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data import tfds

    return tfds.split_names(argument, data_dir)


def _open_huggingface(
    argument: str, split: str, data_dir: str | None, multi_label: str | None = None
) -> Source:
    from vit_jax.data import huggingface

    return huggingface.open_huggingface(argument, split, multi_label)


def _splits_of_huggingface(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data import huggingface

    return huggingface.split_names(argument)


def _open_records(argument: str, split: str, data_dir: str | None) -> Source:
    from vit_jax.data import records

    return records.open_records(argument, split)


def _splits_of_records(argument: str, data_dir: str | None) -> tuple[str, ...]:
    from vit_jax.data import records

    return records.split_names(argument)


class _Kind(NamedTuple):
    """How to open (argument, whole split, data_dir), and to list the splits that exist."""

    open: Callable[..., Source]
    splits: Callable[[str, str | None], tuple[str, ...]]


_MULTI_LABEL = ("folder", "hf")  # must be told how labels are written

# Each kind is imported when it is used: TensorFlow Datasets alone takes a second.
_KINDS = {
    "digits": _Kind(_open_digits, lambda argument, data_dir: ("train", "test")),
    "folder": _Kind(_open_folder, _splits_of_folder),
    "tfds": _Kind(_open_tfds, _splits_of_tfds),
    "hf": _Kind(_open_huggingface, _splits_of_huggingface),
    "records": _Kind(_open_records, _splits_of_records),
    "synthetic": _Kind(_open_synthetic, lambda argument, data_dir: ("train", "test")),
}
