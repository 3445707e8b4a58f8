"""Data sets without files: scikit-learn's digits, synthetic images, and your own arrays."""

import dataclasses
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_jax.data.sources.source import Source, digest, renumber
from vit_jax.data.sources.splits import pick_split
from vit_jax.system.errors import UserError


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


def open_digits(argument: str, split: str, data_dir: str | None) -> Source:
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


def open_synthetic(argument: str, split: str, data_dir: str | None) -> Source:
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
