"""What a Vision Transformer has learned before its first layer: filters and positions.

Figure 7 (left and centre) of "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 4.5.

Symbols: P patch edge, C channels, D width, a grid of rows x columns of patches.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models import vit
from vit_jax.models.model import Params
from vit_jax.models.positions import PositionEmbedding
from vit_jax.models.vit_config import ViTConfig


class Components(NamedTuple):
    """Principal components of the filters, the one that explains most first.

    Attributes:
      filters: (n, P, P, C) float64, each of length 1, its largest entry positive.
      explained: (n,) float64, the share of the filters' variance along each.
    """

    filters: np.ndarray
    explained: np.ndarray


def filter_components(kernel: np.ndarray, count: int) -> Components:
    """Principal components of the D filters in a (P, P, C, D) kernel of the patch embedding.

    There are no more than D - 1 or P P C of them, whichever is less.
    """
    *shape, width = kernel.shape
    filters = np.asarray(kernel, np.float64).reshape(-1, width).T  # one filter a row
    _, lengths, axes = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    count = min(count, max(width - 1, 1), len(axes))
    axes, variances = axes[:count], lengths**2
    largest = np.abs(axes).argmax(axis=1)[:, None]
    axes = axes * np.sign(np.take_along_axis(axes, largest, axis=1))
    explained = variances[:count] / max(variances.sum(), np.finfo(np.float64).tiny)
    return Components(axes.reshape(count, *shape), explained)


def position_embeddings(cfg: ViTConfig, params: Params) -> np.ndarray | None:
    """(rows, columns, D) float32: what is added to the patch at each place, or None.

    Where every layer has its own (`posemb_at="layers"`), those of the first.
    """
    if cfg.posemb == "none":
        return None
    encoder = params["Transformer"]
    if cfg.posemb_at == "layers":
        if "encoderblock" in encoder:
            encoder = vit.unstack_layers(params)["Transformer"]
        encoder = encoder["encoderblock_0"]
    learned = {"params": encoder.get("posembed_input", {})}
    table = cast(jax.Array, PositionEmbedding(cfg).apply(learned))
    return np.asarray(table[0, cfg.positioned_prefix :], jnp.float32).reshape(*cfg.grid, -1)


def cosine_similarity(table: np.ndarray) -> np.ndarray:
    """Of every two of (rows, columns, D) vectors: (rows, columns, rows, columns) float64."""
    grid, vectors = table.shape[:2], np.asarray(table, np.float64).reshape(-1, table.shape[2])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return (unit @ unit.T).reshape(*grid, *grid)
