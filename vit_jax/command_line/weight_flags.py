"""Flags that describe weights where their file does not.

One definition of these flags for every command that opens weights.
"""

from absl import flags

from vit_jax.interop import timm, wrappers
from vit_jax.interop.families import FAMILIES
from vit_jax.interop.stated import Stated
from vit_jax.system.errors import UserError


def define_flags() -> None:
    """The flags of a command that opens weights."""
    flags.DEFINE_string(
        "source_image_size", None,
        "Pixels that the weights' positions are for, where their file does not say it and "
        "they are no square: 224x448 (height first).",
    )  # fmt: skip
    flags.DEFINE_integer("num_heads", None, "Heads of their attention.", lower_bound=1)
    flags.DEFINE_enum(
        "family", None, list(FAMILIES), "Whose code trained them: numerics and preprocessing."
    )
    flags.DEFINE_enum("pool", None, list(timm.POOLS), "How their tokens become one vector.")
    flags.DEFINE_enum(
        "weights", None, list(wrappers.WEIGHTS),
        "Of a file with both: as they were at the end, or averaged over training (ema).",
    )  # fmt: skip


def from_flags() -> Stated:
    """What the flags say.

    Raises:
      UserError: a size cannot be read.
    """
    given = flags.FLAGS
    size = given.source_image_size
    return Stated(
        image_size=parse_size("source_image_size", size) if size else None,
        num_heads=given.num_heads,
        family=given.family,
        pool=given.pool,
        weights=given.weights,
    )


def parse_size(flag: str, text: str) -> tuple[int, int]:
    """`384` or `224x448` (height x width) as (height, width) in pixels.

    Raises:
      UserError: it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--{flag}={text} does not read as a size: write 384 or 224x448")
    return int(parts[0]), int(parts[-1])
