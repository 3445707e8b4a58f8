"""Digests of saved arrays: so that damage to a checkpoint is noticed, not trained on.

Disks, file systems and copies flip bits, and a flipped bit in array data decodes as a number
like any other. So while a state is written, the CRC-32 of each part of each array is taken
from the host's memory and stored beside it, in `digests/process_N`: process N tells about the
parts that its devices hold. Whoever restores compares. A part is given by its range of global
indices, so that any number of processes, with any mesh, can check what any other has saved.

CRC-32 finds every single flipped bit, every burst of up to 32, and misses other damage once in
four billion times. It is no protection against somebody who forges a checkpoint.
"""

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from zlib_ng import zlib_ng

from vit_jax.checkpoints.metadata import Card
from vit_jax.distributed import sharding
from vit_jax.system import bounded

FOLDER = "digests"
MOST = 256 << 20  # bytes of a file of them, or of a card: a hundred times that of large models
Box = tuple[tuple[int, int], ...]  # of each axis: first index, and one past the last


class Damaged(Exception):
    """A checkpoint is not what was saved; the message says what about it, in a few words."""


class Entry(NamedTuple):
    """What was saved under one name: global shape, dtype, and the digest of each part."""

    shape: tuple[int, ...]
    dtype: str
    parts: dict[Box, str]


class Digests(NamedTuple):
    """Those of a whole checkpoint.

    Attributes:
      card: of the card, see `of_json`.
      arrays: by the path of the array, such as `params/head/kernel`.
    """

    card: str
    arrays: dict[str, Entry]


def of_array(x: np.ndarray) -> str:
    """CRC-32 of the elements in C order, as 8 hexadecimal digits."""
    return f"{zlib_ng.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data):08x}"


def of_json(value: Any) -> str:
    """CRC-32 of a JSON value, whatever the order of its keys and the spaces of its file."""
    return f"{zlib_ng.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def of_tree(tree: Any) -> str:
    """CRC-32 of the names, shapes, dtypes and elements of a tree of arrays."""
    arrays = {name: np.asarray(x) for name, x in named(tree).items()}
    return of_json({n: [x.shape, str(x.dtype), of_array(x)] for n, x in arrays.items()})


def box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The range of global indices that `index`, of a shard of `shape`, stands for."""
    return tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {sharding.path_name(path): leaf for path, leaf in leaves}


# --- Saving -------------------------------------------------------------------------------


def parts_to_save(x: Any) -> list[tuple[Box, Any]]:
    """The parts that this process is to tell about: each part is told about by one process."""
    if isinstance(x, jax.Array):
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        return [(box(shard.index, x.shape), shard.data) for shard in shards]
    return [(tuple((0, n) for n in np.shape(x)), x)] if jax.process_index() == 0 else []


Copied = dict[str, tuple[tuple[int, ...], Any, list[tuple[Box, np.ndarray]]]]


def copy_to_host(tree: Any) -> Copied:
    """Shape, dtype and parts of every array; afterwards the devices may overwrite theirs."""
    parts = {name: parts_to_save(x) for name, x in named(tree).items()}
    for _, data in (part for of_one in parts.values() for part in of_one):
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    return {
        name: (np.shape(x), x.dtype, [(where, np.asarray(data)) for where, data in parts[name]])
        for name, x in named(tree).items()
    }


def write(folder: Path, arrays: Copied, card: Card) -> None:
    """Computes the digests of this process and writes its file."""
    contents = {
        "processes": jax.process_count(),
        "card": of_json(card),
        "arrays": {
            name: [shape, str(dtype), [[where, of_array(x)] for where, x in parts]]
            for name, (shape, dtype, parts) in arrays.items()
        },
    }
    text = json.dumps({"contents": contents, "crc32": of_json(contents)})
    (folder / f"process_{jax.process_index()}").write_text(text)


# --- Checking -----------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a file of a checkpoint holds.

    Raises:
      Damaged: it is no JSON, or no regular file.
      OSError: it cannot be read.
    """
    try:
        return bounded.parse_json(bounded.read(path, MOST))
    except bounded.Unfit as error:
        name = f"{path.parent.name}/{path.name}"
        raise Damaged(f"{name} is not what was saved: {error.strerror}") from error
    except ValueError as error:
        raise Damaged(f"{path.parent.name}/{path.name} is not JSON") from error


def read(checkpoint: Path) -> Digests | None:
    """The digests of a checkpoint, None if it was saved before there were any.

    Raises:
      Damaged: they are not what was saved.
      OSError: they cannot be read.
    """
    folder = checkpoint / FOLDER
    if not folder.exists():
        return None
    first = _read_contents(folder / "process_0")
    arrays: dict[str, Entry] = {}
    for process in range(first["processes"]):
        contents = _read_contents(folder / f"process_{process}")
        for name, (shape, dtype, parts) in contents["arrays"].items():
            entry = arrays.setdefault(name, Entry(tuple(shape), dtype, {}))
            entry.parts.update((tuple(map(tuple, where)), digest) for where, digest in parts)
    for name, entry in arrays.items():
        if sum(map(_size, entry.parts)) != math.prod(entry.shape):
            raise Damaged(f"there are no digests of parts of {name}")
    return Digests(first["card"], arrays)


def _read_contents(path: Path) -> dict[str, Any]:
    whole = read_json(path)
    contents = whole.get("contents") if isinstance(whole, dict) else None
    if not isinstance(contents, dict) or whole.get("crc32") != of_json(contents):
        raise Damaged(f"{FOLDER}/{path.name} differs from what was saved")
    return contents


def _size(where: Box) -> int:
    return math.prod(stop - start for start, stop in where)


def check_arrays(tree: Any, digests: Digests) -> None:
    """Compares restored arrays with what was saved; of several processes, all must take part.

    Each looks at what it holds, so what is found is to be put together.

    Raises:
      Damaged: an array differs.
    """
    arrays = named(tree)
    # A few, for each holds a copy of an array; and processes must gather in one order.
    threads = min(4, os.cpu_count() or 1) if jax.process_count() == 1 else 1
    with ThreadPoolExecutor(threads) as pool:
        right = pool.map(lambda name: _holds(arrays[name], digests.arrays[name]), arrays)
        wrong = [name for name, good in zip(arrays, right, strict=True) if not good]
    if wrong:
        more = f" and {len(wrong) - 1} more arrays differ" * (len(wrong) > 1)
        raise Damaged(f"{wrong[0]}{more or ' differs'} from what was saved")


def _holds(x: Any, entry: Entry) -> bool:
    return all(entry.parts[where] == of_array(part) for where, part in _parts(x, entry.parts))


def _parts(x: Any, boxes: dict[Box, str]) -> Iterator[tuple[Box, np.ndarray]]:
    """The parts `boxes` of an array, as far as this process holds them.

    An array that is divided as it was saved stays where it is. Another is gathered, a single
    one at a time, for `boxes` may cut across what the processes hold.
    """
    if isinstance(x, jax.Array) and set(boxes) == _layout(x):
        for shard in {box(s.index, x.shape): s for s in x.addressable_shards}.values():
            yield box(shard.index, x.shape), _on_host(shard.data)
        return
    whole = _on_host(x)
    for where in boxes:
        yield where, whole[tuple(slice(*ends) for ends in where)]


def _layout(x: jax.Array) -> set[Box]:
    """How an array is divided over the devices of all processes."""
    places = x.sharding.devices_indices_map(x.shape).values()
    return {box(index, x.shape) for index in places}


def _on_host(x: Any) -> np.ndarray:
    """The whole array; of a copy, since JAX keeps what an array was converted to with it."""
    if not isinstance(x, jax.Array):
        return np.asarray(x)
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(jax.device_put(x, x.sharding, may_alias=False))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
