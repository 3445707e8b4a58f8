"""Attention in bfloat16 whose gradient is written out, so that it keeps no weights.

These are the forms `whole` and `parts` of the table in `attention.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import devices
from vit_jax.models.attention_parts import by_parts
from vit_jax.models.devices import TOKENS
from vit_jax.models.kernels import contract

SAVED = "attention"  # the name of the result, for policies of recomputation

ROWS = ("examples", "heads", "tokens")  # of a number for each query

_contract = functools.partial(contract, dtype=jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recomputing_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, form: str
) -> jax.Array:
    """Attention that keeps its operands, its result and one number a query for its gradient.

    As `whole`, XLA sends the scores of all examples to a TPU's HBM and back three times
    forward and five times backward, which is most of what a ViT's step moves. As `parts`, which
    takes no bias, the scores of some examples at a time stay on the chip.

    Args:
      q: (B, T, k, d) bfloat16, as are `k` and `v`.
      k: keys.
      v: values.
      bias: None, or what broadcasts to (B, k, T, T), added to the scaled scores.
      form: `whole` or `parts`.

    Returns:
      (B, T, k, d) bfloat16.
    """
    return _forwards(q, k, v, bias, form)[0]


def _forwards(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, form: str
) -> Any:
    if form == "parts":
        forward, arrays = (
            functools.partial(by_parts, _forward),
            [(x, TOKENS) for x in (q, k, v)],
        )
        y, log_total = devices.on_each_device(forward, arrays, [TOKENS, ROWS])
    else:
        y, log_total = _forward(q, k, v, bias)
    y, log_total = checkpoint_name((y, log_total), SAVED)
    return y, (q, k, v, y, log_total, bias)


def _backwards(form: str, saved: Any, g: jax.Array) -> Any:
    q, k, v, y, log_total, bias = saved
    if form == "parts":
        arrays = [(x, ROWS if x.ndim == 3 else TOKENS) for x in (q, k, v, y, log_total, g)]
        backward = functools.partial(by_parts, lambda *arrays: _backward(*arrays)[:3])
        return *devices.on_each_device(backward, arrays, [TOKENS] * 3), None
    *to_qkv, to_scores = _backward(q, k, v, y, log_total, g, bias)
    if bias is None:
        return *to_qkv, None
    shared = tuple(i for i, size in enumerate(bias.shape) if size != to_scores.shape[i])
    return *to_qkv, to_scores.sum(shared, keepdims=True).astype(bias.dtype)


recomputing_attention.defvjp(_forwards, _backwards)


def _scores(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    scores = _contract("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    return scores if bias is None else scores + bias


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The bfloat16 result, and the logarithm of each query's (B, k, T) sum of weights."""
    scores = _scores(q, k, bias)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    y = _contract("bhqk,bkhd->bqhd", weights, v) / total.swapaxes(1, 2)
    return y.astype(jnp.bfloat16), (highest + jnp.log(total))[..., 0]


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    y: jax.Array,
    log_total: jax.Array,
    g: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of `q`, `k`, `v` in bfloat16, and of the (B, k, T, T) scores in float32.

    As FlashAttention has it (arXiv 2205.14135, section 3.1 and appendix B): the weights come
    from the scores without another sum, and the softmax needs no more of its own gradient than
    the product of result and cotangent.
    """
    weights = jnp.exp(_scores(q, k, bias) - log_total[..., None])
    inner = jnp.einsum("bqhd,bqhd->bhq", g.astype(jnp.float32), y.astype(jnp.float32))
    to_scores = weights * (_contract("bqhd,bkhd->bhqk", g, v) - inner[..., None])
    scale = q.shape[-1] ** -0.5
    dq = _contract("bhqk,bkhd->bqhd", to_scores, k) * scale
    dk = _contract("bhqk,bqhd->bkhd", to_scores, q * scale)
    dv = _contract("bhqk,bqhd->bkhd", weights, g)
    dq, dk, dv = (x.astype(jnp.bfloat16) for x in (dq, dk, dv))
    return dq, dk, dv, to_scores
