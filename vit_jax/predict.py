"""Classifies images: `python -m vit_jax.predict --workdir=DIR IMAGE_OR_FOLDER ...`.

Prints the most probable classes of each image, or those from --threshold on, which is 0.5 for
a model that was trained on images with several labels; and with --output=FILE.jsonl writes them
as one JSON object a line. Folders are searched for images, nested ones too. An image that
cannot be read is reported and skipped, and makes the exit code 1.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from vit_jax.command_line import cli, model_flags
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.evaluation.inference import Unreadable
from vit_jax.evaluation.predictions import predict
from vit_jax.system import cache
from vit_jax.system.errors import UserError


def define_flags() -> None:
    model_flags.define_flags()
    flags.adopt_module_key_flags(model_flags)  # so that --help shows them
    flags.DEFINE_integer("topk", 5, "How many classes to show.", lower_bound=1)
    flags.DEFINE_float(
        "threshold", None, "Show classes of at least this probability; 0.5 for several labels.",
        lower_bound=0.0, upper_bound=1.0,
    )  # fmt: skip
    flags.DEFINE_string("output", None, "Also write the predictions to this JSONL file.")
    flags.DEFINE_integer(
        "batch_size", None, "Images at a time, over all devices; the fastest unless given."
    )


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    if not positional:
        raise UserError("no image was given: pass image files or folders after the flags")
    cache.keep_compiled_programs()
    mesh = sharding.make_mesh()
    paths = inference.find_images(positional)
    batch_size = inference.check_batch_size(given.batch_size, mesh)
    model = model_flags.from_flags(mesh)
    if note := inference.head_note(model):
        print(f"note: {note}", file=sys.stderr)
    failures = 0
    with contextlib.ExitStack() as stack:
        output = None
        if given.output:
            output = stack.enter_context(open_output(Path(given.output)))
        threshold = given.threshold
        threshold = given.threshold
        if threshold is None and (model.multi_label or model.config.data.multi_label):
            threshold = 0.5
        topk = given.topk
        if threshold is not None and not flags.FLAGS["topk"].present:
            topk = len(model.class_names)
        results = predict(model, paths, topk, batch_size, mesh, threshold)
        # Where results are printed to the terminal they show the progress.
        hidden = True if sys.stdout.isatty() else None
        for result in tqdm(results, total=len(paths), unit="image", disable=hidden):
            if isinstance(result, Unreadable):
                failures += 1
                print(f"error: {result.reason}", file=sys.stderr)
                continue
            shown = "  ".join(f"{name} {100 * p:.2f}%" for name, p in result.classes)
            print(f"{result.path}: {shown or f'no class of at least {100 * threshold:g}%'}")
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
