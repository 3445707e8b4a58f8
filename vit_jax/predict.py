"""Classifies images: `python -m vit_jax.predict --workdir=DIR IMAGE_OR_FOLDER ...`.

Prints the most probable classes of each image, and with --output=FILE.jsonl writes them as
one JSON object a line. Folders are searched for images, nested ones too. An image that cannot
be read is reported and skipped, and makes the exit code 1.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from vit_jax import cli, experiment, trained
from vit_jax.data import preprocess
from vit_jax.data.decode import decode
from vit_jax.data.folder import EXTENSIONS
from vit_jax.errors import UserError
from vit_jax.training import sharding


class Prediction(NamedTuple):
    path: str
    classes: list[tuple[str, float]]  # names with probabilities, most probable first


class Unreadable(NamedTuple):
    path: str
    reason: str


def find_images(paths: list[str]) -> list[str]:
    """Files as given, folders as the sorted image files in them.

    Raises:
      UserError: a path does not exist, or a folder holds no image.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise UserError(f"the folder {path} holds no images: pass a folder that does")
            found += map(str, inside)
        elif path.exists():
            found.append(str(path))
        else:
            raise UserError(f"there is no file or folder {path}: check the path")
    return found


def read_images(paths: list[str], config: Any) -> Iterator[np.ndarray | Unreadable]:
    """Decodes and transforms ahead of the reader, in order; (H, W, C) uint8 each."""
    size, channels = tuple(config.image_size), config.data.channels
    transform, shape = (
        preprocess.parse_transform(config.data.eval_transform, size),
        (*size, channels),
    )

    def read(path: str) -> np.ndarray | Unreadable:
        try:
            image = transform(decode({"image": path, "name": path}, channels), None)
            return np.asarray(image).reshape(shape)
        except UserError as error:
            return Unreadable(path, str(error))

    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=500)
    iterator = iter(grain.MapDataset.source(paths).map(read).to_iter_dataset(options))
    with contextlib.closing(iterator):
        yield from iterator


def predict(
    model: trained.Trained, paths: list[str], topk: int, batch_size: int, mesh: Any
) -> Iterator[Prediction | Unreadable]:
    """Yields one result for each path, in order."""
    config, names = model.config, model.class_names
    to_probabilities = jax.nn.sigmoid if config.objective.loss == "sigmoid" else jax.nn.softmax
    prepare = experiment.prepare_for_eval(config)

    @jax.jit
    def probabilities(params: Any, images: jax.Array) -> jax.Array:
        batch = prepare({"image": images}, jax.random.key(0))
        return to_probabilities(model.model.apply(params, batch["image"])[0])

    def classify(images: list[np.ndarray]) -> np.ndarray:
        padded = images + [np.zeros_like(images[0])] * (batch_size - len(images))
        batch = sharding.put_batch({"image": np.stack(padded)}, mesh)
        return np.asarray(probabilities(model.params, batch["image"]))[: len(images)]

    reader = zip(paths, read_images(paths, config), strict=True)
    while group := list(itertools.islice(reader, batch_size)):
        images = [image for _, image in group if not isinstance(image, Unreadable)]
        rows = iter(classify(images) if images else [])
        for path, image in group:
            if isinstance(image, Unreadable):
                yield image
                continue
            row = next(rows)
            best = np.argsort(-row, kind="stable")[:topk]
            yield Prediction(path, [(names[k], float(row[k])) for k in best])


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of a training run.")
    flags.DEFINE_string("step", "last", "Checkpoint: last, best or a step number.")
    flags.DEFINE_integer("topk", 5, "How many classes to show.", lower_bound=1)
    flags.DEFINE_string("output", None, "Also write the predictions to this JSONL file.")
    flags.DEFINE_integer("batch_size", None, "Images at a time, over all devices.")


def main(positional: list[str]) -> None:
    given, workdir = flags.FLAGS, Path(cli.required("workdir"))
    if not positional:
        raise UserError("no image was given: pass image files or folders after the flags")
    mesh = sharding.make_mesh()
    batch_size = given.batch_size or 32 * mesh.size
    sharding.check_batch_size("--batch_size", batch_size, mesh)
    paths = find_images(positional)
    model = trained.load(workdir, given.step, mesh)
    failures = 0
    with contextlib.ExitStack() as stack:
        output = None
        if given.output:
            output = stack.enter_context(open_output(Path(given.output)))
        results = predict(model, paths, given.topk, batch_size, mesh)
        # Where results scroll by on the terminal they are the progress.
        hidden = True if sys.stdout.isatty() else None
        for result in tqdm(results, total=len(paths), unit="image", disable=hidden):
            if isinstance(result, Unreadable):
                failures += 1
                print(f"error: {result.reason}", file=sys.stderr)
                continue
            shown = "  ".join(f"{name} {100 * p:.2f}%" for name, p in result.classes)
            print(f"{result.path}: {shown}")
            if output:
                classes = [{"class": name, "probability": p} for name, p in result.classes]
                record = {"image": result.path, "predictions": classes}
                output.write(json.dumps(record) + "\n")
    if failures:
        raise UserError(f"{failures} of {len(paths)} images could not be read: see above")


def open_output(path: Path) -> Any:
    try:
        return path.open("w")
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    cli.run(main, define_flags)
