"""Converts weights between formats, sizes and numbers of classes.

  python -m vit_jax.convert SOURCE DESTINATION [--format=npz|hf|timm|vit_jax]
      [--image_size=384 or 224x448] [--num_classes=10] [--channels=1] [--dtype=bfloat16]

SOURCE is a work directory, a file or folder of weights (Google's .npz, big_vision's, Hugging
Face's, timm's, PyTorch's), recognised by what is in it, or a name such as `augreg:B_16`,
`google:ViT-B_16` or `hf:google/vit-base-patch16-224`. Nothing is overwritten without --force,
and DESTINATION appears when it is complete.
"""

from pathlib import Path

from absl import flags

from vit_jax.checkpoints import trained
from vit_jax.checkpoints.change import change_channels, replace_head, resize
from vit_jax.checkpoints.formats import FORMATS, choose_format, describe, write
from vit_jax.command_line import cli, weight_flags
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError


def parse_size(text: str) -> tuple[int, int]:
    """`384` or `224x448` (height x width) as (height, width) in pixels."""
    return weight_flags.parse_size("image_size", text)


def define_flags() -> None:
    weight_flags.define_flags()
    flags.adopt_module_key_flags(weight_flags)
    flags.DEFINE_string("step", "last", "Of a work directory: last, best or a step number.")
    flags.DEFINE_string("format", None, f"One of {', '.join(FORMATS)}; else by the ending.")
    flags.DEFINE_string(
        "image_size", None, "New size in pixels: 384, or 224x448 (height first)."
    )
    flags.DEFINE_string("resize", None, "How to resize positions; else as the family does.")
    flags.DEFINE_integer("num_classes", None, "New head for so many classes; 0: no head.")
    flags.DEFINE_integer("channels", None, "New number of input channels, as timm adapts them.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the arrays.")
    flags.DEFINE_bool("force", False, "Replace DESTINATION if it exists.")


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    if len(positional) != 2:
        raise UserError("pass SOURCE and DESTINATION: run with --help to see what they can be")
    destination = Path(positional[1])
    form = choose_format(given.format, destination)
    if destination.exists() and not given.force:  # before anything is fetched
        raise UserError(f"{destination} exists: pass --force to replace it")
    said = weight_flags.from_flags()
    model = trained.load_any(positional[0], given.step, None, said, as_stored=True)
    print(describe(model))
    changes: list[str] = []
    size = parse_size(given.image_size) if given.image_size else None
    if form == "vit_jax":  # which has one size for positions and images
        size = size or model.input_size
    if size:
        model, changes = resize(model, size, given.resize or model.resize)
    if given.channels is not None:
        model, change = change_channels(model, given.channels)
        changes.append(change)
    if given.num_classes is not None:
        model, change = replace_head(model, given.num_classes)
        changes.append(change)
    with replacing(destination) as part:
        notes = write(model, part, form, given.dtype)
    for line in [f"changed    {change}" for change in changes] + [
        f"note       {n}" for n in notes
    ]:
        print(line)
    print(f"wrote      {destination} ({form}, {given.dtype})")


if __name__ == "__main__":
    cli.run(main, define_flags)
