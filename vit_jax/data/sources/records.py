"""Data sets packed by `python -m vit_jax.prepare`: `records:PATH`.

PATH/dataset.json                            classes, splits with a digest of their images and
                                             labels, where they came from
PATH/train-00000-of-00004.array_record       examples 0 to n/4 of `train`, and so on
PATH/train-labels.npy                        all its labels, int32 (N,) or bool (N, K)

A record is a MessagePack map of `image` (encoded, bytes), `label` (integer, or a list of them)
and `name` (its name in the original source). Records are neither compressed nor grouped, so
that each one takes a single read.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import numpy as np

from vit_jax.data.sources.source import digest, plain_label
from vit_jax.data.sources.splits import pick_split
from vit_jax.system import bounded
from vit_jax.system.errors import UserError

INFO = "dataset.json"
VERSION = 1


@dataclass(frozen=True)
class RecordsSource:
    """One split of a packed data set; images arrive encoded, as they were stored."""

    records: Any  # grain.sources.ArrayRecordDataSource, which can be pickled
    labels: np.ndarray
    class_names: tuple[str, ...]
    name: str
    content: str  # identifies the content of this split: see `open_records`

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]
        try:
            record = msgpack.unpackb(self.records[i])
            if not isinstance(record, dict) or not {"image", "name"} <= record.keys():
                raise ValueError("it holds no image")
        # A wrong checksum is a ValueError or a RuntimeError of the reader.
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.name}[{i}] cannot be read ({reason}); copy or pack the data set again."
            ) from error
        label = plain_label(self.labels[i])
        return {**record, "label": label, "name": f"{self.name}[{i}] ({record['name']})"}

    def fingerprint(self, start: int, stop: int) -> str:
        """Of labels, and of the images of the whole split as they were when it was packed."""
        labels = self.labels[start:stop]
        labels = labels if labels.dtype == bool else labels.astype(np.int64)
        return digest(self.content, f"{start}:{stop}", labels)


def open_records(path: str, split: str) -> RecordsSource:
    """Opens a whole split of the data set packed at `path`.

    Raises:
      UserError: there is none, it lacks the split, or some of it is missing.
    """
    from grain.sources import ArrayRecordDataSource

    root, info = _read_info(path)
    split = pick_split(split, tuple(info["splits"]), f"records:{path}")
    described = info["splits"][split]
    try:
        labels = _read_labels(root / f"{split}-labels.npy", len(info["class_names"]))
        sizes = {name: (root / name).stat().st_size for name in described["shards"]}
    except (OSError, ValueError) as error:
        raise UserError(
            f"records:{path} has no whole split {split!r} ({error}); pack it again."
        ) from error
    for name, shard in described["shards"].items():
        if sizes[name] != shard["bytes"]:
            raise UserError(
                f"{str(root / name)!r} has {sizes[name]:,} bytes and should have "
                f"{shard['bytes']:,}; copy it again, or pack the data set again."
            )
    # With the number of examples in each file, the reader opens a file only when it reads from
    # it.
    shards = [_Shard.of(root / name, x["examples"]) for name, x in described["shards"].items()]
    records = ArrayRecordDataSource([shard for shard in shards if shard.take])
    if not len(records) == len(labels) == described["examples"]:
        raise UserError(
            f"records:{path} should hold {described['examples']} examples of {split!r}, but "
            f"has {len(records)} records and {len(labels)} labels; pack it again."
        )
    # Sets packed before there were digests have the sizes of their files, in steps of 64 KiB.
    content = described.get("digest") or json.dumps(described["shards"], sort_keys=True)
    name, class_names = f"records:{path} {split}", tuple(info["class_names"])
    return RecordsSource(records, labels, class_names, name, content)


def _read_labels(path: Path, classes: int) -> np.ndarray:
    """Raises ValueError for what are no labels, OSError for what cannot be read."""
    with bounded.open_regular(path) as file:
        try:
            labels: np.ndarray = np.load(file, allow_pickle=False)
        except OSError:
            raise
        except Exception as error:  # a damaged header may trip any line of NumPy's
            raise ValueError(f"{path.name} is damaged: {error}") from error
    numbers = labels.dtype.kind in "iu" and labels.ndim == 1
    if not numbers and not (labels.dtype == bool and labels.shape[1:] == (classes,)):
        raise ValueError(f"{path.name} holds an array of {labels.dtype} {labels.shape}")
    return labels


class _Shard(NamedTuple):
    """What a reader needs of a file, by name."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int

    @classmethod
    def of(cls, path: Path, examples: int) -> "_Shard":
        return cls(str(path), 0, examples, examples)


def split_names(path: str) -> tuple[str, ...]:
    """The splits of a packed data set, as they were packed. Raises UserError."""
    return tuple(_read_info(path)[1]["splits"])


def _read_info(path: str) -> tuple[Path, dict[str, Any]]:
    root = Path(path).expanduser()
    try:
        info = bounded.parse_json(bounded.read(root / INFO))
        version = info["format"]
        if version == VERSION:
            _check(info)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"records:{path} is no packed data set, for it has no readable {INFO}; make one "
            "with `python -m vit_jax.prepare SOURCE OUTPUT`."
        ) from error
    if version != VERSION:
        raise UserError(
            f"records:{path} has format {version}, and this version of vit_jax reads "
            f"{VERSION}; pack it again."
        )
    return root, info


def _check(info: Any) -> None:
    """Raises ValueError, KeyError or TypeError for a description that none has written."""
    names, splits = info["class_names"], info["splits"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names are no names")
    if len(set(names)) != len(names):
        raise ValueError("it has a class twice")
    if not isinstance(splits, dict):
        raise ValueError("there are no splits")
    for split, described in splits.items():
        shards = described["shards"].items() if isinstance(described["shards"], dict) else ()
        numbers = [
            described["examples"],
            *(x[n] for _, x in shards for n in ("examples", "bytes")),
        ]
        if not shards or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"split {split!r} has no numbers of examples and bytes")
        if not all(Path(name).name == name for name in (split, *(name for name, _ in shards))):
            raise ValueError(f"split {split!r} has files outside the folder")
        if not isinstance(described.get("digest", ""), str):
            raise ValueError(f"split {split!r} has no digest")


# ---- writing -----------------------------------------------------------------------------


class Packed(NamedTuple):
    """An example as it is stored."""

    image: bytes
    label: Any  # an int, or bool (K,) where there may be several
    name: str

    @property
    def stored_label(self) -> int | list[int]:
        """What MessagePack can hold: a number, or those of several classes."""
        several = isinstance(self.label, np.ndarray)
        return np.flatnonzero(self.label).tolist() if several else self.label


def write_split(
    folder: Path, split: str, examples: Iterable[Packed | None], length: int, shards: int
) -> dict[str, Any]:
    """Writes a split, in order, to files in `folder`; returns what `write_info` needs of it.

    Args:
      folder: exists.
      split: its name.
      examples: what to write, None for an example that is left out.
      length: the number of `examples`, those left out too.
      shards: the number of files, which get equal shares of `examples`.
    """
    from array_record.python import array_record_module  # type: ignore[import-untyped]

    names = [f"{split}-{k:05}-of-{shards:05}.array_record" for k in range(shards)]
    labels: list[Any] = []
    written = {}
    remaining, hasher = iter(examples), hashlib.blake2b(digest_size=8)
    for k, name in enumerate(names):
        share = (k + 1) * length // shards - k * length // shards
        before = len(labels)
        writer = array_record_module.ArrayRecordWriter(
            str(folder / name), "group_size:1,uncompressed"
        )
        for example in itertools.islice(remaining, share):
            if example is not None:
                stored = example._asdict() | {"label": example.stored_label}
                writer.write(msgpack.packb(stored))
                labels.append(example.label)
                hasher.update(f"{example.stored_label} {len(example.image)} ".encode())
                hasher.update(example.image)
        writer.close()
        size = (folder / name).stat().st_size
        written[name] = {"examples": len(labels) - before, "bytes": size}
    several = bool(labels) and isinstance(labels[0], np.ndarray)
    np.save(folder / f"{split}-labels.npy", np.array(labels, bool if several else np.int32))
    return {"examples": len(labels), "digest": hasher.hexdigest(), "shards": written}


def write_info(folder: Path, class_names: Iterable[str], splits: dict[str, Any]) -> None:
    """Writes `dataset.json`, which completes the data set."""
    info = {"format": VERSION, "class_names": list(class_names), "splits": splits}
    text = json.dumps(info, indent=2, ensure_ascii=False)
    (folder / INFO).write_text(text + "\n", "utf-8")
