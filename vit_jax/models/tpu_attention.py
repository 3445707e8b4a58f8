"""Attention on TPUs in one kernel that holds whole heads on the chip, for short sequences.

Scores of 197 tokens are 155 KB a head: the queries, keys and values of some heads and all that
is made of them fit into the memory on the chip. Forward, the kernel reads q, k, v and writes y;
backward, it reads q, k, v and the cotangent of y and writes three gradients, computing the
scores anew. Nothing else crosses HBM: JAX's own kernels for TPUs (`flash_attention`,
`splash_attention`) are made for long sequences, and also move row sums, padded to 128 numbers.

It has been compiled for v4, v5e, v5p and v6e and runs in Pallas's interpreter, equal to float64
but for rounding. It has never run on a TPU, so that `model.attention="auto"` does not take it.

Arrays are (B, k, d, T) here, tokens along the lanes: XLA's own choice, as d is often 64 and
would fill half of 128 lanes. Scores are (keys, queries): sums over keys are sums of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vit_jax.models import devices
from vit_jax.models.devices import TOKENS

# Bytes on the chip that a kernel may use: what every TPU since v4 gives without asking.
LIMIT = 15 << 20
LANES, SUBLANES = 128, 16  # a tile of bfloat16 as it is stored
_SCORES_HELD = 4  # float32 arrays of the size of a head's scores that are alive at once


def why_not(tokens: int, head_width: int) -> str | None:
    """A reason why the kernel cannot compute this attention, or None if it can."""
    if _needed(1, tokens, head_width, biased=True) > LIMIT:
        return f"the scores of {tokens} tokens do not fit into the memory on the chip"
    return None


@jax.custom_vjp
def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`forward`, differentiable, on the examples and heads that each device has."""
    return _attention(q, k, v, bias)[0]


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> Any:
    arrays = [*((x, TOKENS) for x in (q, k, v)), (bias, _axes_of(bias, q))]
    (y,) = devices.on_each_device(forward, arrays, [TOKENS])
    return y, (q, k, v, bias)


def _gradients(saved: Any, g: jax.Array) -> Any:
    *qkv, bias = saved
    of_bias = _axes_of(bias, g)
    arrays = [*((x, TOKENS) for x in (*qkv, g)), (bias, of_bias)]
    results = [TOKENS] * 3 + [of_bias] * (bias is not None)
    each = functools.partial(backward, shared="shared" in of_bias)
    dq, dk, dv, *db = devices.on_each_device(each, arrays, results)
    return dq, dk, dv, db[0].astype(bias.dtype) if db else None


def _axes_of(bias: jax.Array | None, q: jax.Array) -> devices.Axes:
    """Those of a (1 or B, k, T, T) bias; of None, nothing."""
    if bias is None:
        return ()
    return "examples" if len(bias) == len(q) else "shared", "heads", "queries", "keys"


attention.defvjp(_attention, _gradients)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array]:
    """softmax(q k^T / sqrt(d) + bias) v of (B, T, k, d) arrays.

    Args:
      q: queries, bfloat16 (or float32 in the interpreter), as are keys and values.
      k: keys.
      v: values.
      bias: None, or (1 or B, k, T, T) of any float type, added to the scaled scores.
      interpret: computes with JAX's operations instead of compiling, on any device.

    Returns:
      (B, T, k, d) in the type of `q`.
    """
    q, k, v = map(_to_lanes, (q, k, v))
    (y,) = _call(_forward, (q, k, v), _transposed(bias), [q], interpret)
    return (_from_lanes(y),)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    bias: jax.Array | None = None,
    shared: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Gradients of `q`, `k`, `v` and, where there is one, of `bias` for the cotangent `g`.

    That of `bias` is float32, and the sum over all examples of the mesh in sight where it is
    `shared` by them.
    """
    q, k, v, g = map(_to_lanes, (q, k, v, g))
    to_bias = [] if bias is None else [jax.ShapeDtypeStruct(bias.shape, jnp.float32)]
    results = [q, k, v, *to_bias]
    dq, dk, dv, *db = _call(_backward, (q, k, v, g), _transposed(bias), results, interpret)
    grads = tuple(map(_from_lanes, (dq, dk, dv)))
    if bias is None:
        return grads
    to_bias = db[0].swapaxes(-1, -2)
    if shared and devices.sees_mesh():
        to_bias = lax.psum(to_bias, devices.BATCH_AXES)
    return *grads, to_bias


def _to_lanes(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 3, 1)


def _from_lanes(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


def _transposed(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.swapaxes(-1, -2)


# --- The grid -----------------------------------------------------------------------------


def _needed(heads: int, tokens: int, head_width: int, biased: bool) -> int:
    """Bytes on the chip for a step of the grid of the backward pass, the larger of the two."""
    row = -(-tokens // LANES) * LANES
    blocks = 7 * heads * -(-head_width // SUBLANES) * SUBLANES * row * 2
    scores = -(-tokens // SUBLANES) * SUBLANES * row * 4
    # Blocks twice, as the next are fetched while these are worked on.
    return 2 * (blocks + biased * 2 * heads * scores) + _SCORES_HELD * scores


def _heads_at_once(heads: int, tokens: int, head_width: int, biased: bool) -> int:
    fits = lambda n: _needed(n, tokens, head_width, biased) <= LIMIT
    return max((n for n in range(1, heads + 1) if heads % n == 0 and fits(n)), default=1)


def _call(kernel: Any, arrays: Any, bias: Any, results: Any, interpret: bool) -> Any:
    """Runs `kernel` for some heads of one image at a time, examples innermost.

    So the gradient of a bias that all images share is added up in one block on the chip.
    """
    b, k, d, t = arrays[0].shape
    heads = _heads_at_once(k, t, d, bias is not None)
    block = pl.BlockSpec((None, heads, d, t), lambda j, i: (i, j, 0, 0))
    shared = bias is not None and bias.shape[0] == 1
    of_bias = pl.BlockSpec((None, heads, t, t), lambda j, i: (0 if shared else i, j, 0, 0))
    biases = [] if bias is None else [bias]
    return pl.pallas_call(
        functools.partial(
            kernel, heads=heads, scale=d**-0.5, biased=bias is not None, shared=shared
        ),
        grid=(k // heads, b),
        in_specs=[block] * len(arrays) + [of_bias] * len(biases),
        out_specs=[block] * min(len(results), 3) + [of_bias] * (len(results) - 3),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*arrays, *biases)


# --- One head -----------------------------------------------------------------------------


def _dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    return lax.dot_general(
        x, y, (((of_x,), (of_y,)), ((), ())), preferred_element_type=jnp.float32
    )


def _weights(
    q: jax.Array, k: jax.Array, bias: Any, scale: float
) -> tuple[jax.Array, jax.Array]:
    """(keys, queries) weights before normalisation, and their (1, queries) sums, float32."""
    scores = _dot(k, q, 0, 0) * scale
    scores = scores if bias is None else scores + bias.astype(jnp.float32)
    weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
    return weights, weights.sum(axis=0, keepdims=True)


def _forward(*refs: Any, heads: int, scale: float, biased: bool, shared: bool) -> None:
    q_ref, k_ref, v_ref, *rest = refs
    bias_ref, y_ref = rest if biased else (None, *rest)

    def head(h: jax.Array, _: None) -> None:
        bias = bias_ref[h] if biased else None
        weights, total = _weights(q_ref[h], k_ref[h], bias, scale)
        v = v_ref[h]
        y_ref[h] = (_dot(v, weights.astype(v.dtype), 1, 0) / total).astype(y_ref.dtype)

    lax.fori_loop(0, heads, head, None)


def _backward(*refs: Any, heads: int, scale: float, biased: bool, shared: bool) -> None:
    q_ref, k_ref, v_ref, g_ref, *rest = refs
    bias_ref, dq_ref, dk_ref, dv_ref, db_ref = rest if biased else (None, *rest, None)
    if biased and shared:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            db_ref[...] = jnp.zeros_like(db_ref)

    def head(h: jax.Array, _: None) -> None:
        q, k, v, g = q_ref[h], k_ref[h], v_ref[h], g_ref[h]
        weights, total = _weights(q, k, bias_ref[h] if biased else None, scale)
        weights = weights / total
        to_weights = _dot(v, g, 0, 0)
        inner = (weights * to_weights).sum(axis=0, keepdims=True)
        to_scores = weights * (to_weights - inner)
        if biased:
            db_ref[h] = db_ref[h] + to_scores if shared else to_scores
        to_scores = to_scores.astype(q.dtype)
        dq_ref[h] = (_dot(k, to_scores, 1, 0) * scale).astype(dq_ref.dtype)
        dk_ref[h] = (_dot(q, to_scores, 1, 1) * scale).astype(dk_ref.dtype)
        dv_ref[h] = _dot(g, weights.astype(g.dtype), 1, 1).astype(dv_ref.dtype)

    lax.fori_loop(0, heads, head, None)
