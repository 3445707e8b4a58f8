"""Files of arrays, opened without trusting them.

`.npz`, `.safetensors` and PyTorch files are recognised by their first bytes, never by their
names. Nothing in them is executed, and nothing is allocated before the sizes that a file
declares were compared with the size that it has. Every error is one sentence
(`UserError`).

Formats: numpy's NEP 1 (`.npy`) in a zip archive; https://github.com/huggingface/safetensors.
"""

import argparse
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from vit_jax.interop.families import Arrays
from vit_jax.system import bounded
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

# Weights hardly compress, but a zero-initialised head does; a bomb grows a thousandfold.
_MAX_RATIO, _MAX_SLACK = 64, 1 << 24
# Bytes of a table of contents, and arrays in it. What is declared costs memory and time before
# it can be checked, and no weights come near: the largest models have some thousand arrays.
_MAX_TABLE, _MAX_ARRAYS = 8 << 20, 50_000

_SIGNS = {b"{": 1, b"[": 2, b":": 4}  # how often they stand in the entry of an array

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": _BF16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[^']{1,8})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,18}L?, ?)*(?:\d{1,18}L?)?)\),? ?\}\s*"
)
_NPY_DTYPE = re.compile(r"[<>|=]?(?:[fiu][1248]|b1|V2)")


class _Reason(Exception):
    """Why a file cannot be read: the second half of a sentence that begins with its name."""


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns every error inside into one sentence that names the file."""
    try:
        yield
    except UserError:
        raise
    except _Reason as error:
        raise UserError(f"{path} {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except bounded.Unfit as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:
        # A damaged file may make any line of zipfile, zlib, json or torch fail.
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not what it claims to be: {what}") from error


def read(path: Path) -> tuple[Arrays, str]:
    """Reads all arrays of a file, whichever of the three formats it has.

    Returns:
      The arrays by name, in the dtypes of the file, all finite in float32; and what they came
      from: `npz`, `safetensors`, `torch`, or `wrapped` for PyTorch's with another dictionary
      around (`{"model": ...}`), as in the checkpoints of papers.

    Raises:
      UserError: the file cannot be read, is damaged or holds a number that is not finite.
    """
    arrays, kind = _read(path, nested=False)
    check_finite(arrays, path)
    return arrays, kind


def read_nested(path: Path) -> tuple[Arrays, str]:
    """As `read`, with the arrays of all dictionaries of a PyTorch file, joined by dots.

    `{"model": {"head.bias": ...}}` is `model.head.bias`. Numbers may be not finite.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    return _read(path, nested=True)


def _read(path: Path, nested: bool) -> tuple[Arrays, str]:
    with _named(path):
        if path.is_dir():
            raise _Reason("is a folder, not a file of weights")
        bounded.check_regular(path.stat(), path)
        kind = _kind(path)
        if kind == "torch":
            arrays, kind = _read_torch(path, nested)
        else:
            arrays = _read_npz(path) if kind == "npz" else _read_safetensors(path)
        if not arrays:
            raise _Reason("holds no arrays")
        return arrays, kind


def check_finite(arrays: Arrays, path: Path) -> None:
    """Raises UserError if an array is of an unknown type, or not finite in float32."""
    with _named(path):
        for name, value in arrays.items():
            if value.dtype.kind == "V" and value.dtype != _BF16:
                raise _Reason(f"has an array {name!r} of unknown type {value.dtype}")
            with np.errstate(over="ignore"):
                finite = np.isfinite(value.astype(np.float32, copy=False)).all()
            if not finite:
                raise _Reason(f"has NaN or infinite numbers (in float32) in array {name!r}")


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        _check_table(_table_size(path))
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return "torch" if any(n.rsplit("/")[-1] == "data.pkl" for n in names) else "npz"
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] <= bytes([pickle.HIGHEST_PROTOCOL]):
        return "torch"
    if start.startswith(b"version https://git-lfs"):
        raise _Reason("is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if not start:
        raise _Reason("is empty")
    raise _Reason("is not an .npz, .safetensors or PyTorch file: its first bytes are others")


def _declared(total: int, size: int) -> None:
    """Refuses an archive that would unpack to far more than its size."""
    if total > _MAX_RATIO * size + _MAX_SLACK:
        raise _Reason(f"would unpack from {size} to {total} bytes, which no weights do")


def _check_table(length: int) -> None:
    if length > _MAX_TABLE:
        raise _Reason(f"has a table of contents of {length} bytes, which no weights need")


# ---- .npz ----------------------------------------------------------------------------------


def _read_npz(path: Path) -> Arrays:
    arrays: Arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) != _member_count(path, len(archive.comment)):
            raise _Reason("is damaged: its table of contents is not complete")
        _declared(sum(member.file_size for member in members), path.stat().st_size)
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise _Reason(f"has a member {name!r}, which is not an array")
            if ".." in name.split("/") or name.startswith("/") or "\\" in name:
                raise _Reason(f"has a member {name!r}, whose name is a path out of the archive")
            if name in arrays:
                raise _Reason(f"has two arrays named {name!r}")
            with archive.open(member) as file:
                arrays[name] = _read_npy(file, name, member.file_size)
    return arrays


def _table_size(path: Path) -> int:
    """How many bytes of contents the end of a zip archive declares, 0 where it is damaged."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 22 - 0xFFFF, 0))  # the longest comment
        end = file.read()
    found = end.rfind(b"PK\x05\x06")
    return int.from_bytes(end[found + 12 : found + 16], "little") if found >= 0 else 0


def _member_count(path: Path, comment: int) -> int:
    """How many members the end of a zip archive counts, which `zipfile` does not look at."""
    with path.open("rb") as file:
        file.seek(-22 - comment, os.SEEK_END)
        end = file.read(22)
    return int.from_bytes(end[10:12], "little")


def npz_comment(path: Path) -> dict[str, Any]:
    """What `write_npz` said beside the arrays, {} for other files."""
    if not zipfile.is_zipfile(path):
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            said = json.loads(archive.comment or b"{}")["vit_jax"]
        return said if isinstance(said, dict) else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}  # a comment that is not ours


def _read_npy(file: IO[bytes], name: str, size: int) -> np.ndarray:
    """One `.npy` of `size` bytes; its header is matched, not evaluated."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\x01", b"\x02", b"\x03"):
        raise _Reason(f"has a member {name!r}, which is not an array")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > min(10_000, size):
        raise _Reason(f"has an array {name!r} with a header of {length} bytes")
    match = _NPY_HEADER.fullmatch(file.read(length))
    if not match:
        raise _Reason(f"has an array {name!r} with a header that is not understood")
    code = match["dtype"].decode("latin-1")
    if "O" in code:
        raise _Reason(f"has an array {name!r} of Python objects, which could run code")
    if not _NPY_DTYPE.fullmatch(code):
        raise _Reason(f"has an array {name!r} of type {code!r}, which no weights have")
    # numpy has no bfloat16 of its own and saves it as two untyped bytes.
    dtype = _BF16 if code.endswith("V2") else np.dtype(code)
    shape = tuple(int(n) for n in re.findall(rb"\d+", match["shape"]))
    data = size - 8 - width - length
    if math.prod(shape) * dtype.itemsize != data:
        raise _Reason(f"has an array {name!r} of shape {shape}, but {data} bytes of data")
    flat = np.frombuffer(file.read(), dtype)
    return flat.reshape(shape, order="F" if match["fortran"] == b"True" else "C")


# ---- .safetensors --------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Arrays:
    size, arrays = path.stat().st_size, {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise _Reason(f"declares a header of {length} bytes, but has {size}")
        _check_table(length)
        header = file.read(length)
        # An array has one brace, two brackets and four colons: more is none, and costs as much.
        count = max(header.count(sign) // each for sign, each in _SIGNS.items())
        if count > _MAX_ARRAYS:
            raise _Reason(f"declares {count} arrays or more, which no weights have")
        entries = json.loads(header, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        begin = 0
        # The format leaves no gaps and no overlaps, so that every byte has one meaning.
        for name, entry in sorted(entries.items(), key=lambda e: e[1]["data_offsets"]):
            dtype, shape = _SAFETENSORS.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise _Reason(f"has an array {name!r} of type {entry['dtype']!r}")
            if not all(type(n) is int and n >= 0 for n in shape):
                raise _Reason(f"has an array {name!r} of shape {shape}")
            end = begin + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [begin, end] or end > size - 8 - length:
                raise _Reason(f"has an array {name!r} with offsets that do not fit its shape")
            arrays[name] = np.frombuffer(file.read(end - begin), dtype).reshape(shape)
            begin = end
    if begin != size - 8 - length:
        raise _Reason(f"has {size - 8 - length} bytes of data, where its header needs {begin}")
    return arrays


def safetensors_metadata(path: Path) -> dict[str, str]:
    """What the header of a `.safetensors` file that `read` has accepted says in words."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {str(k): str(v) for k, v in dict(header.get("__metadata__") or {}).items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise _Reason("has two entries of the same name in its header")
    return found


# ---- PyTorch -------------------------------------------------------------------------------

# What papers' checkpoints keep their weights under, beside epoch, optimiser and arguments;
# of a teacher and its student, the teacher is what is published.
WRAPPERS = ("model", "state_dict", "teacher", "student")


_DEPTH = 8  # dictionaries within dictionaries that are looked into


def _read_torch(path: Path, nested: bool) -> tuple[Arrays, str]:
    """Reads a pickle with PyTorch's restricted unpickler, which builds tensors and no more."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        _declared(total, path.stat().st_size)
    try:
        import torch
    except ImportError:
        raise _Reason(
            "is a PyTorch file, and PyTorch is not installed: install vit_jax[parity], or "
            "convert the file to .safetensors"
        ) from None
    try:
        # Training scripts keep their command line beside the weights: a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Reason(
            "is a PyTorch file with more in it than arrays, and reading that could run code: "
            "where you trust it, save its state_dict alone, as .safetensors"
        ) from error
    if not isinstance(state, dict):
        raise _Reason(f"is a PyTorch file with a {type(state).__name__}, not a state_dict")
    if nested:
        tensors = _tensors(state, torch.Tensor)
        flat = [x for x in state.values() if isinstance(x, torch.Tensor)]
        kind = "torch" if len(flat) == len(tensors) else "wrapped"
    else:
        kind = "torch"
        while isinstance(state, dict) and (
            key := next(filter(state.__contains__, WRAPPERS), 0)
        ):
            state, kind = state[key], "wrapped"
        if not isinstance(state, dict):
            raise _Reason(f"is a PyTorch file with a {type(state).__name__}, not a state_dict")
        tensors = {str(k): x for k, x in state.items() if isinstance(x, torch.Tensor)}
    # Strides of zero make a large tensor out of one number.
    _declared(sum(x.numel() * x.element_size() for x in tensors.values()), path.stat().st_size)
    return {name: _from_torch(x) for name, x in tensors.items()}, kind


def _tensors(state: Mapping[Any, Any], kind: type, depth: int = 0) -> dict[str, Any]:
    """All tensors in nested dictionaries and lists, by their keys joined with dots."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        inside = {"": value} if isinstance(value, kind) else {}
        value = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(value, Mapping) and depth < _DEPTH:
            inside = _tensors(value, kind, depth + 1)
        for name, tensor in inside.items():
            full = f"{key}.{name}" if name else str(key)
            if full in found:
                raise _Reason(f"has two arrays named {full!r}")
            found[full] = tensor
    return found


def _from_torch(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ---- writing -------------------------------------------------------------------------------


def write_npz(
    path: Path, arrays: Mapping[str, np.ndarray], comment: Mapping[str, Any] | None = None
) -> None:
    """Writes an uncompressed `.npz`, the same bytes for the same arrays.

    bfloat16 becomes two untyped bytes (`V2`), as in all such files. The comment, for
    `npz_comment`, is that of the archive, which only we read.
    """

    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        archive.comment = json.dumps({"vit_jax": comment}).encode() if comment else b""
        for name, value in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # without the time of day
            with archive.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a `.safetensors` file that PyTorch's loaders accept, with words in its header."""
    codes = {dtype: code for code, dtype in _SAFETENSORS.items()}
    # Wide types first: then every array is aligned.
    items = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, value in items:
        begin, end = end, end + value.nbytes
        code = codes[value.dtype]
        header[name] = {"dtype": code, "shape": value.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with replacing(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in items:
            file.write(np.ascontiguousarray(value).tobytes())
