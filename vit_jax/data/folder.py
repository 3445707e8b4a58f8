"""Your own images: `folder:PATH`, where every class is a folder.

PATH/train/<class>/*.jpg  and  PATH/test/<class>/*.jpg     splits made by you
PATH/<class>/*.jpg                                         split here, 80 % and 20 %
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_jax.data.sources import HELD_OUT, pick_split
from vit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class FolderSource:
    """Image files below `root`: relative paths with a label each."""

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.files[i])
        return {"image": path, "label": self.labels[i], "name": path}


def open_folder(path: str, split: str) -> FolderSource:
    """Opens `split` of the images below `path`, in an order fixed by a hash of their names.

    With folders `train` and one of `val`, `validation`, `test`, these are the splits, and
    the class names are the sorted folder names of `train`. Otherwise the folders are the
    classes, the splits are `train`, `test` and `all`, and a file's name alone decides its
    side, so that files added later move no other (but of a class with two images or more,
    one at least lies on each side).

    Raises UserError for a missing folder or split, and for folders without images.
    """
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"folder {path!r} does not exist or is not a folder; give folder:PATH.")
    names = _folders(root)
    # A root with no training split is still good to evaluate on.
    if "train" in names or (names and set(names) <= set(HELD_OUT)):
        return _open_split_folder(root, split, [n for n in names if n in ("train", *HELD_OUT)])
    split = pick_split(split, ("train", "test", "all"), f"folder {path!r}")
    files = {name: _divide(paths)[split] for name, paths in _class_files(root).items()}
    return _source(root, files, tuple(files))


def _open_split_folder(root: Path, split: str, available: list[str]) -> FolderSource:
    split = pick_split(split, available, f"folder {str(root)!r}")
    files = _class_files(root / split)
    classes = tuple(_folders(root / "train")) if "train" in available else tuple(files)
    if unknown := sorted(set(files) - set(classes)):
        raise UserError(
            f"class folder {str(root / split / unknown[0])!r} has no counterpart in "
            f"{str(root / 'train')!r}; rename or remove it."
        )
    return _source(root / split, files, classes)


def _source(
    root: Path, files: dict[str, list[str]], class_names: tuple[str, ...]
) -> FolderSource:
    label = {name: i for i, name in enumerate(class_names)}
    rows = sorted(
        ((path, label[name]) for name, paths in files.items() for path in paths),
        key=lambda row: _order(row[0]),
    )
    return FolderSource(
        str(root),
        tuple(path for path, _ in rows),
        tuple(label for _, label in rows),
        class_names,
    )


def _class_files(root: Path) -> dict[str, list[str]]:
    """Image paths relative to `root`, for every class folder."""
    files = {name: _images(root, name) for name in _folders(root)}
    if not files:
        raise UserError(
            f"folder {str(root)!r} has no class folders; put the images of each class in a "
            "folder of its own, named after the class."
        )
    for name, paths in files.items():
        if not paths:
            raise UserError(
                f"class folder {str(root / name)!r} holds no images "
                f"({', '.join(e[1:] for e in EXTENSIONS)}); fill or remove it."
            )
    return files


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(root: Path, name: str) -> list[str]:
    found = []
    for here, folders, files in os.walk(root / name, followlinks=True):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        relative = Path(here).relative_to(root)
        found += [
            (relative / file).as_posix()
            for file in files
            if not file.startswith(".") and file.lower().endswith(EXTENSIONS)
        ]
    return found


def _order(path: str) -> bytes:
    """A hash: spreads classes evenly, and knows nothing of listing order."""
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest()


def _divide(paths: list[str]) -> dict[str, list[str]]:
    """Splits one class by hash; the extremes move so that neither side is left empty."""
    paths = sorted(paths, key=_order)
    limit = int((1 - HELD_OUT_SHARE) * 2**64)
    kept = sum(int.from_bytes(_order(path), "big") < limit for path in paths)
    kept = min(max(kept, 1), max(len(paths) - 1, 1))
    return {"train": paths[:kept], "test": paths[kept:], "all": paths}
