"""One table of architectures: a name such as `B/16` becomes depth, width and the rest.

Base, Large and Huge are Table 1 of "An Image is Worth 16x16 Words" (arXiv 2010.11929);
Ti and S come from DeiT (2012.12877), g, G and e from "Scaling Vision Transformers"
(2106.04560) and its successors, So400m from the shape-optimised ViT (2305.13035).
`mu` exists for tests only. A hybrid such as `R50+B/16` cuts its patches from the feature map of
a ResNet; its number is how many pixels a patch spans in all.
"""

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from vit_jax.system.errors import UserError


class Variant(NamedTuple):
    """The shape of an encoder: L layers of width D, MLP width M and k heads."""

    depth: int
    width: int
    mlp_dim: int
    num_heads: int


VARIANTS = {
    #                   L     D      M   k
    "mu":      Variant( 1,   32,   128,  2),
    "Ti":      Variant(12,  192,   768,  3),
    "S":       Variant(12,  384,  1536,  6),
    "M":       Variant(12,  512,  2048,  8),
    "B":       Variant(12,  768,  3072, 12),
    "L":       Variant(24, 1024,  4096, 16),
    "So400m":  Variant(27, 1152,  4304, 16),
    "H":       Variant(32, 1280,  5120, 16),
    "g":       Variant(40, 1408,  6144, 16),
    "g-opt":   Variant(40, 1536,  6144, 16),
    "G":       Variant(48, 1664,  8192, 16),
    "G-opt":   Variant(48, 1536,  8192, 16),
    "e":       Variant(56, 1792, 15360, 16),
}  # fmt: skip


class MixerVariant(NamedTuple):
    """The shape of a Mixer: L layers of width D, and the hidden widths of its MLPs."""

    depth: int
    width: int
    tokens_mlp_dim: int
    mlp_dim: int  # of channel mixing


# Table 1 of "MLP-Mixer" (2105.01601), which has S/32, S/16, B/32, B/16, L/32, L/16 and H/14.
MIXERS = {
    #                  L     D    S     M
    "S": MixerVariant( 8,  512, 256, 2048),
    "B": MixerVariant(12,  768, 384, 3072),
    "L": MixerVariant(24, 1024, 512, 4096),
    "H": MixerVariant(32, 1280, 640, 5120),
}  # fmt: skip

# Units in each stage. A unit holds three convolutions; with root and head they name the depth.
RESNETS = {
    "R26": (2, 2, 2, 2),
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}


_Shape = TypeVar("_Shape")


def _look_up(
    name: str, pattern: str, example: str, table: Mapping[str, _Shape]
) -> tuple[_Shape, int]:
    """Reads SIZE and NUMBER off a name, and SIZE off a table.

    Raises:
      UserError: the name does not read like `example`, or its first part is not in the table.
    """
    if not (match := re.fullmatch(pattern, name)):
        raise UserError(
            f"model.variant is {name!r}, which does not read as a size and a number: write "
            f"e.g. {example!r}"
        )
    size, number = match["size"], match["number"]
    if size not in table:
        close = difflib.get_close_matches(size, table, n=1, cutoff=0.3)
        hint = f"did you mean {name.replace(size, close[0])!r}? " if close else ""
        raise UserError(
            f"model.variant is {name!r}, but there is no size {size!r}: {hint}the sizes are "
            f"{', '.join(table)}"
        )
    return table[size], int(number)


_PATCHED = r"(?P<size>[^/]+)/(?P<number>[1-9][0-9]*)"


def decode_variant(name: str) -> tuple[Variant, int]:
    """Returns the shape and the patch edge in pixels that `name`, such as `L/32`, stands for.

    Raises:
      UserError: the name has no patch size, or its first part is not in the table.
    """
    return _look_up(name, _PATCHED, "B/16", VARIANTS)


def decode_mixer(name: str) -> tuple[MixerVariant, int]:
    """The same for a Mixer such as `Mixer-B/16`."""
    table = {f"Mixer-{size}": variant for size, variant in MIXERS.items()}
    return _look_up(name, _PATCHED, "Mixer-B/16", table)


def decode_resnet(name: str) -> tuple[tuple[int, ...], int]:
    """Returns the units in each stage and the width factor of a name such as `R152x2`.

    Raises:
      UserError: the name has no width factor, or its first part is not in the table.
    """
    pattern = r"(?P<size>[^x]+)x(?P<number>[1-9][0-9]*)"
    return _look_up(name, pattern, "R50x1", RESNETS)


def decode_hybrid(name: str) -> tuple[tuple[int, ...], Variant, int]:
    """Returns the ResNet's units, the shape and the patch edge in pixels of e.g. `R50+B/16`.

    With 32 pixels a patch all four stages stand in front, and a patch is one cell of the map;
    with 16 the units of the fourth stage go into the third (section 3.1: "(3, 4, 9)").
    `R+Ti/16` is the root alone. Its name is that of the release, whose patches span 32 pixels
    all the same: 8 x 8 cells of a map that is 4 times smaller than the image.

    Raises:
      UserError: the name does not read as RESNET+SIZE/PATCH, or there is no such hybrid.
    """
    front, _, rest = name.partition("+")
    variant, patch = decode_variant(rest)
    if front == "R" and patch == 16:
        return (), variant, 32
    if front not in RESNETS or patch not in (16, 32):
        raise UserError(
            f"model.variant is {name!r}, but there is no such hybrid: use one of R, "
            f"{', '.join(RESNETS)} before the +, and patches of 16 or 32 pixels (R: 16)"
        )
    units = RESNETS[front]
    return (units if patch == 32 else (*units[:2], sum(units[2:]))), variant, patch
