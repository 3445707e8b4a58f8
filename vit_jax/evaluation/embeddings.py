"""Representations of images, written to a file as they come."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.system.errors import UserError

Row = tuple[str, np.ndarray]  # file name, vector (D,)

FORMATS = (".npz", ".npy", ".parquet")


def normalised(logits: jax.Array, out: dict[str, jax.Array]) -> jax.Array:
    """The representation before the head, (B, D), each row divided by its length."""
    vector = out["pre_logits"]
    return vector / jnp.maximum(jnp.linalg.norm(vector, axis=-1, keepdims=True), 1e-12)


def _write_header(file: BinaryIO, rows: int, width: int) -> None:
    # NumPy pads its header so that the number of rows can grow in place.
    description = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, description)


def _write_npy(path: Path, rows: Iterable[Row], width: int) -> list[str]:
    """Streams vectors into an .npy file, whose header is corrected at the end."""
    names: list[str] = []
    with path.open("wb") as file:
        _write_header(file, 0, width)
        for name, vector in rows:
            names.append(name)
            file.write(vector.astype("<f4").tobytes())
        file.seek(0)
        _write_header(file, len(names), width)
    return names


def _write_parquet(path: Path, rows: Iterator[Row], width: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.float32(), width)
    schema = pa.schema([("name", pa.string()), ("embedding", kind)])
    with pq.ParquetWriter(path, schema) as writer:
        while group := [row for row, _ in zip(rows, range(1024), strict=False)]:
            names, vectors = zip(*group, strict=True)
            flat = pa.array(np.concatenate(vectors).astype(np.float32))
            texts = [name.encode("utf-8", "backslashreplace").decode() for name in names]
            table = [pa.array(texts), pa.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_batch(pa.record_batch(table, schema=schema))


def write_embeddings(path: Path, rows: Iterator[Row], width: int) -> None:
    """Writes (name, vector) rows in the format that the ending of `path` names.

    Raises:
      UserError: the ending is none of `FORMATS`, or the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--output={path} has no known ending: use one of {', '.join(FORMATS)}")
    part = path.with_name(path.name + ".part")
    names_file = path.with_suffix(".names.txt")
    try:
        if path.suffix == ".parquet":
            _write_parquet(part, rows, width)
        else:
            names = _write_npy(part, rows, width)
            if path.suffix == ".npy":
                text = "".join(f"{one_line(name)}\n" for name in names)
                names_file.write_text(text, encoding="utf-8")
            else:
                _pack(part, names)
        os.replace(part, path)
    except OSError as error:
        if error.filename not in (None, str(part), str(path), str(names_file)):
            raise  # of an image or a model, not of the output
        raise UserError(f"--output={path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _pack(npy: Path, names: list[str]) -> None:
    """Replaces an .npy file by an .npz of it and the names, without reading it whole."""
    packed = npy.with_name(npy.name + ".zip")
    with zipfile.ZipFile(packed, "w") as archive:
        with (
            npy.open("rb") as source,
            archive.open("embeddings.npy", "w", force_zip64=True) as to,
        ):
            shutil.copyfileobj(source, to, 1 << 20)
        with archive.open("names.npy", "w") as to:
            np.lib.format.write_array(to, np.array(names, np.str_))
    os.replace(packed, npy)


# A backslash, and what some reader takes for the end of a line or cannot encode.
_UNFIT = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(name: str) -> str:
    """A name of a file, which may hold any character, on one line of text.

    Undone by `text.encode("latin-1", "backslashreplace").decode("unicode_escape")`.
    """
    return _UNFIT.sub(lambda match: match[0].encode("unicode_escape").decode(), name)
