"""One table of architectures: a name such as `B/16` becomes depth, width and the rest.

Base, Large and Huge are Table 1 of "An Image is Worth 16x16 Words" (arXiv 2010.11929);
Ti and S come from DeiT (2012.12877), g, G and e from "Scaling Vision Transformers"
(2106.04560) and its successors, So400m from the shape-optimised ViT (2305.13035).
`mu` exists for tests only. A hybrid such as `R50+B/16` cuts its patches from the feature map of
a ResNet; its number is how many pixels a patch spans in all.
"""

import difflib
import re
from typing import NamedTuple

from vit_jax.errors import UserError


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


def decode_variant(name: str) -> tuple[Variant, int]:
    """Returns the shape and the patch edge in pixels that `name`, such as `L/32`, stands for.

    Raises:
      UserError: the name has no patch size, or its first part is not in the table.
    """
    match = re.fullmatch(r"(?P<size>[^/]+)/(?P<patch>[1-9][0-9]*)", name)
    if not match:
        raise UserError(
            f"model.variant is {name!r}, which does not read as SIZE/PATCH: write e.g. 'B/16'"
        )
    size = match["size"]
    if size not in VARIANTS:
        close = difflib.get_close_matches(size, VARIANTS, n=1, cutoff=0.3)
        hint = f"did you mean '{close[0]}/{match['patch']}'? " if close else ""
        raise UserError(
            f"model.variant is {name!r}, but there is no size {size!r}: {hint}"
            f"the sizes are {', '.join(VARIANTS)}"
        )
    return VARIANTS[size], int(match["patch"])


# Units in each stage. A unit holds three convolutions; with root and head they name the depth.
RESNETS = {
    "R26": (2, 2, 2, 2),
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
    "R200": (3, 24, 36, 3),
}


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
