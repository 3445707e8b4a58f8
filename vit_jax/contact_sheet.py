"""Draws what augmentation does to a photo.

  python -m vit_jax.contact_sheet --output=sheet.png [IMAGE ...]

On the left every operation of Google's RandAugment and of timm's, a row each, at five
magnitudes. On the right every preset, as input of a model: a batch of eight, augmented, then
mixed; and below them DINO's multi-crop. The operations are drawn on the first image, as are
the crops, the presets on all in turn; without an image they are two photographs of
scikit-learn. Everything is random in --seed alone.
"""

from pathlib import Path

from absl import flags

from vit_jax.command_line import cli
from vit_jax.data.contact_sheet import write_sheet

# ---- the command -------------------------------------------------------------------------


def main(positional: list[str]) -> None:
    output = Path(cli.required("output"))
    sheet = write_sheet(output, positional, flags.FLAGS.tile, flags.FLAGS.seed)
    print(f"{sheet.width} x {sheet.height} pixels in {output}")


def define_flags() -> None:
    flags.DEFINE_string("output", None, "The PNG file to write.")
    flags.DEFINE_integer("tile", 64, "Edge of each image in pixels.", lower_bound=32)
    flags.DEFINE_integer("seed", 0, "Decides what is drawn.", lower_bound=0)


if __name__ == "__main__":
    cli.run(main, define_flags)
