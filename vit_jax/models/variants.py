"""One table of architectures: a name such as `B/16` becomes depth, width and the rest.

Base, Large and Huge are Table 1 of "An Image is Worth 16x16 Words" (arXiv 2010.11929);
Ti and S come from DeiT (2012.12877), g, G and e from "Scaling Vision Transformers"
(2106.04560) and its successors, So400m from the shape-optimised ViT (2305.13035).
`mu` exists for tests only.
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
