"""Turns images into vectors.

  python -m vit_jax.embed --workdir=DIR --output=FILE.npz IMAGE_OR_FOLDER ...

Writes the model's representation (the input of its head) of each image as one float32 row of
length 1, ready for a vector index, together with the file names:

  FILE.npz      arrays `embeddings` (N, D) and `names` (N,)
  FILE.npy      the (N, D) array, with FILE.names.txt beside it, one name a line, in which
                a line break is written \n and a backslash \\, as in Python
  FILE.parquet  columns `name` and `embedding`

Rows are written as they are made, so a folder may be larger than memory. An image that cannot
be read is reported and left out, and makes the exit code 1. The output appears only when
complete.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from vit_jax.command_line import cli, model_flags
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.evaluation.embeddings import FORMATS, Row, normalised, write_embeddings
from vit_jax.evaluation.inference import Unreadable
from vit_jax.system import cache
from vit_jax.system.errors import UserError


def define_flags() -> None:
    model_flags.define_flags()
    flags.adopt_module_key_flags(model_flags)  # so that --help shows them
    flags.DEFINE_string("output", None, f"File to write, ending in {', '.join(FORMATS)}.")
    flags.DEFINE_integer(
        "batch_size", None, "Images at a time, over all devices; the fastest unless given."
    )


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    output = Path(cli.required("output"))
    if not positional:
        raise UserError("no image was given: pass image files or folders after the flags")
    cache.keep_compiled_programs()
    mesh = sharding.make_mesh()
    paths = inference.find_images(positional)
    batch_size = inference.check_batch_size(given.batch_size, mesh)
    model = model_flags.from_flags(mesh)
    failures: list[Unreadable] = []
    config = model.model.config

    def rows() -> Iterator[Row]:
        results = inference.apply_to_images(model, normalised, paths, batch_size, mesh)
        bar: Any = tqdm(results, total=len(paths), unit="image", disable=None)
        with contextlib.closing(results):
            for path, result in zip(paths, bar, strict=True):
                if isinstance(result, Unreadable):
                    failures.append(result)
                    print(f"error: {result.reason}", file=sys.stderr)
                else:
                    yield path, result

    width = config.representation_size or config.width
    write_embeddings(output, rows(), width)
    print(f"{len(paths) - len(failures)} vectors of width {width} in {output}")
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} images could not be read: see above")


if __name__ == "__main__":
    cli.run(main, define_flags)
