"""Draws what a model has learned and where it looks.

  python -m vit_jax.visualize --workdir=DIR --output=DIR [IMAGE_OR_FOLDER ...]

Writes the inspection figures of "An Image is Worth 16x16 Words" (arXiv 2010.11929), each as a
PNG with an .npz of its numbers beside it, and `report.html`, one file that holds them all:

  filters             principal components of the patch embedding (figure 7, left)
  positions           cosine similarity of position embeddings (figure 7, centre)
  attention_distance  mean attention distance of each head (figure 7, right)
  rollout             attention rollout over each photo (figure 6)
  rollout_layers_i    the same for photo i, through the first layers only

The last three need images: the distance is averaged over at most 128 of them, --max_images of
them are drawn, and the report has their predictions. A figure that does not apply to the model
is left out, and one line says why. An image that cannot be read is reported and skipped, and
makes the exit code 1. Files of an earlier run in --output are replaced one by one.
"""

from pathlib import Path

from absl import flags

from vit_jax.analysis.figures import BATCH_PER_DEVICE, DISTANCE_IMAGES, visualize
from vit_jax.command_line import cli, model_flags
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.system import cache
from vit_jax.system.errors import UserError


def define_flags() -> None:
    model_flags.define_flags()
    flags.adopt_module_key_flags(model_flags)  # so that --help shows them
    flags.DEFINE_string("output", None, "Folder to write to; it is made if need be.")
    flags.DEFINE_enum(
        "rollout",
        "residual",
        ["residual", "plain"],
        "Attention rollout with the skip connections, or the plain product of attention.",
    )
    flags.DEFINE_integer("topk", 5, "How many classes to show.", lower_bound=1)
    flags.DEFINE_integer("max_images", 8, "How many photos to draw.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Images at a time, over all devices.")


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    output = Path(cli.required("output"))
    cache.keep_compiled_programs()
    mesh = sharding.make_mesh()
    batch_size = BATCH_PER_DEVICE * mesh.size if given.batch_size is None else given.batch_size
    sharding.check_batch_size("--batch_size", batch_size, mesh)
    paths = inference.find_images(positional)
    model = model_flags.from_flags(mesh)
    failures = visualize(
        model, paths, output, given.rollout, given.topk, given.max_images, batch_size, mesh
    )
    if failures:
        tried = min(len(paths), DISTANCE_IMAGES)
        raise UserError(f"{failures} of {tried} images could not be read: see above")


if __name__ == "__main__":
    cli.run(main, define_flags)
