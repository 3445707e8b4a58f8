"""Where a patch is: tables added to tokens, and offsets between two tokens in attention.

Symbols as in `vit`: B batch, N patches in a grid of rows x columns, T tokens, D width,
k heads, d = D/k.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.kernels import contract
from vit_jax.models.vit_config import ViTConfig


def posemb_sincos_2d(
    grid: tuple[int, int], width: int, temperature: float = 10_000.0
) -> jax.Array:
    """Fixed sine-cosine position embeddings, (N, D) float32 (MoCo v3; arXiv 2205.01580).

    Each row is [sin(x w), cos(x w), sin(y w), cos(y w)] with D/4 frequencies w that fall
    geometrically from 1 to 1/temperature, both ends included.
    """
    y, x = (jnp.asarray(a.ravel(), jnp.float32) for a in jnp.indices(grid))
    omega = temperature ** -jnp.linspace(0.0, 1.0, width // 4)
    x, y = x[:, None] * omega, y[:, None] * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


class PositionEmbedding(nn.Module):
    """E_pos of equation (1): a (1, T, D) float32 table, the class token's row first.

    Only `learned` has a row for the class token, as in published checkpoints; for the other
    kinds that row, one more constant on top of the learned token itself, is zero.
    """

    cfg: ViTConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        cfg, (rows, columns), before = self.cfg, self.cfg.grid, self.cfg.positioned_prefix
        init = nn.initializers.normal(0.02)
        if cfg.posemb == "learned":
            return self.param("pos_embedding", init, (1, before + rows * columns, cfg.width))
        if cfg.posemb == "none":
            table = jnp.zeros((rows * columns, cfg.width))
        elif cfg.posemb == "sincos2d":
            table = posemb_sincos_2d(cfg.grid, cfg.width)
        else:
            x = self.param("pos_embedding_x", init, (columns, cfg.width // 2))
            y = self.param("pos_embedding_y", init, (rows, cfg.width // 2))
            shape = (rows, columns, cfg.width // 2)
            halves = (jnp.broadcast_to(x, shape), jnp.broadcast_to(y[:, None], shape))
            table = jnp.concatenate(halves, axis=-1).reshape(-1, cfg.width)
        return jnp.pad(table, ((before, 0), (0, 0)))[None]


def relative_index(grid: tuple[int, int]) -> np.ndarray:
    """(T, T) int: which row of BEiT's table is the bias of a query (row) and a key (column).

    The table has (2 rows - 1)(2 columns - 1) rows for the offsets between two patches, and
    then one each for class token to patch, patch to class token, and class token to itself
    (arXiv 2106.08254). Token 0 is the class token.
    """
    rows, columns = grid
    y, x = np.indices(grid).reshape(2, -1)
    dy, dx = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1
    offsets = (2 * rows - 1) * (2 * columns - 1)
    index = np.full((1 + y.size, 1 + y.size), offsets)
    index[:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    index[1:, 1:] = dy * (2 * columns - 1) + dx
    return index


class RelativeBias(nn.Module):
    """What position adds to the scores of attention.

      bias  one learned number for each two-dimensional offset and head (BEiT)
      keys  one learned key for each one-dimensional offset p_q - p_k, multiplied with the
            query (arXiv 2010.11929, D.4). Whether the paper's keys differ by head and where
            its class token stands is not said there; here they do, and it is token 0.

    Takes (B, T, k, d) queries; returns (B or 1, k, T, T) float32 to add to scaled scores.
    """

    cfg: ViTConfig

    @nn.compact
    def __call__(self, q: jax.Array) -> jax.Array:
        cfg, (rows, columns), tokens = self.cfg, self.cfg.grid, q.shape[1]
        if cfg.relative == "bias":
            shape = ((2 * rows - 1) * (2 * columns - 1) + 3, cfg.num_heads)
            table = self.param("table", nn.initializers.normal(0.02), shape)
            return jnp.moveaxis(table[relative_index(cfg.grid)], -1, 0)[None]
        init = nn.initializers.normal(0.02)
        keys = self.param("keys", init, (2 * tokens - 1, cfg.num_heads, q.shape[-1]))
        scores = contract("bqhd,rhd->bhqr", q * q.shape[-1] ** -0.5, keys, cfg.dtype)
        position = np.arange(tokens)
        index = position[:, None] - position + tokens - 1
        return jnp.take_along_axis(scores, jnp.asarray(index)[None, None], axis=-1)
