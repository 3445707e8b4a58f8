"""Where a Vision Transformer looks: attention rollout and mean attention distance.

Figures 6 and 7 (right) of "An Image is Worth 16x16 Words" (arXiv 2010.11929), sections 4.5,
D.7 and D.8.

Symbols: B batch, L layers, k heads, T tokens, N patches in a grid of rows x columns. The
patches are always the last N tokens; class, distillation and register tokens come before.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models import vit
from vit_jax.models.model import Model, Out, Params, one_size_only
from vit_jax.models.vit_config import ViTConfig


def num_prefix_tokens(tokens: int, grid: tuple[int, int]) -> int:
    """How many of T tokens precede the patches."""
    rows, columns = grid
    return tokens - rows * columns


def patch_distances(grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """(N, N) float32 distances between the centres of two patches, in pixels."""
    y, x = np.indices(grid, np.float32).reshape(2, -1)
    return np.hypot(y[:, None] - y, x[:, None] - x) * np.float32(patch_size)


def mean_attention_distance(
    attention: jax.Array, grid: tuple[int, int], patch_size: int
) -> jax.Array:
    """The mean distance between a query and what it attends to (section D.7).

    The distance from a patch to the patches that it attends to, weighted by attention, then
    averaged over all patches. Tokens that are no patches have no place in the image: they are
    left out as queries and as keys, and what remains of a row is rescaled to sum to 1. The
    paper does not say this; it is our interpretation.

    Args:
      attention: (B, k, T, T) weights, rows are queries.
      grid: rows and columns of patches.
      patch_size: edge of a patch in pixels.

    Returns:
      (B, k) float32 pixels; NaN for a head in which no patch attends to any patch.
    """
    before = num_prefix_tokens(attention.shape[-1], grid)
    among = attention[..., before:, before:]
    total = among.sum(axis=-1)
    distance = jnp.einsum("bhqk,qk->bhq", among, patch_distances(grid, patch_size))
    return jnp.nanmean(jnp.where(total > 0, distance / total, jnp.nan), axis=-1)


def attention_rollout(
    attention: Iterable[jax.Array], readout: jax.Array, residual: bool = True
) -> jax.Array:
    """How much of each input token is in the read-out tokens, after each layer.

    Attention is averaged over the heads, and the matrices of all layers are multiplied
    (section D.8, after Abnar and Zuidema, arXiv 2005.00928).

    Args:
      attention: (B, k, T, T) weights of each of L layers, the first layer first.
      readout: (B, T) weight of each token in the read-out; rows sum to 1.
      residual: mixes each matrix half and half with the identity, for the skip connection,
        as Abnar and Zuidema do; their rows then sum to 1 again. The text of section D.8 does
        not mention it; False leaves it out.

    Returns:
      (B, L, T) float32; the last of the L is the rollout through the whole network.
    """
    rows, mixed = [], None
    for weights in attention:
        layer = weights.mean(axis=1)
        if residual:
            layer = (layer + jnp.eye(layer.shape[-1])) / 2
        layer = layer / layer.sum(axis=-1, keepdims=True)  # against rounding, over many layers
        mixed = layer if mixed is None else layer @ mixed
        rows.append(jnp.einsum("bt,bts->bs", readout, mixed))
    return jnp.stack(rows, axis=1)


def readout(cfg: ViTConfig, params: Params, out: Out) -> jax.Array:
    """(B, T) float32: the share of each token of the last layer in the input of the head.

    cls      the class token; with two heads (DeiT) half the distillation token
    gap      every patch alike
    cls_gap  half the class token, half every patch alike
    map      the attention of the pooling head's query, averaged over its heads
    """
    z = out["encoded"]
    tokens = jnp.arange(z.shape[1])
    before = num_prefix_tokens(z.shape[1], cfg.grid)
    patches = (tokens >= before) / (z.shape[1] - before)
    if cfg.pool == "map":
        head = params["MAPHead_0"]
        probe = jnp.broadcast_to(head["probe"], (len(z), 1, cfg.width))
        module = vit.MultiHeadDotProductAttention(cfg)
        inner = {"params": head["MultiHeadDotProductAttention_0"]}
        attended: Any = module.apply(inner, probe, z[:, before:])
        return jnp.pad(attended[1]().mean(axis=1)[:, 0], ((0, 0), (before, 0)))
    if cfg.pool == "gap":
        row = patches
    elif cfg.pool == "cls_gap":
        row = ((tokens == 0) + patches) / 2
    elif cfg.distillation == "heads":
        row = (tokens < 2) / 2
    else:
        row = 1.0 * (tokens == 0)
    return jnp.broadcast_to(row, z.shape[:2])


def with_attention_summary(
    model: Model, params: Params, residual: bool = True
) -> tuple[Model, Params]:
    """A model and its parameters, to which the summaries of its attention are added.

    Its intermediates have two more entries: `attention_rollout` (B, L, N) and
    `attention_distance` (B, L, k) in pixels. No attention matrix leaves the program, and the
    layers are unrolled so that under `jit` few of them exist at a time.
    """
    if model.config.scan:
        params = vit.unstack_layers(params)
    cfg = dataclasses.replace(model.config, scan=False)
    inner = vit.build(cfg)

    def apply(params: Params, images: jax.Array, **options: Any) -> tuple[jax.Array, Out]:
        logits, out = inner.apply(params, images, **{**options, "return_attention": True})
        layers = [out[f"encoderblock_{i}/attention"] for i in range(cfg.depth)]
        before = num_prefix_tokens(layers[0].shape[-1], cfg.grid)
        rollout = attention_rollout(layers, readout(cfg, params, out), residual)
        distances = [mean_attention_distance(a, cfg.grid, cfg.patch_size) for a in layers]
        summary = {
            "attention_rollout": rollout[:, :, before:],
            "attention_distance": jnp.stack(distances, axis=1),
        }
        return logits, out | summary

    return Model(cfg, inner.init, apply, one_size_only(cfg)), params
