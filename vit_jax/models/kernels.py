"""Matrix products, and the one place where precision is decided, for each platform.

`model.dtype` names the operands of every matrix product; sums are float32 in all of them.
Parameters, the gradients that the optimiser gets, its moments and averaged weights are float32
always, and so are the statistics of LayerNorm and softmax, the logits and the loss. What stands
between two operations is a matter of where it runs (`stored`):

  model.dtype            float32          bfloat16, CPU    bfloat16, GPU and TPU
  operands of products   float32          bfloat16         bfloat16
  results of dense
  layers, q, k, v        float32          float32          bfloat16
  attention weights      float32          bfloat16         bfloat16
  LayerNorm, GELU,
  dropout: result        float32          float32          bfloat16, computed in float32
  residual stream        float32          float32          bfloat16, added up in float32
  gradients of all these float32          float32          bfloat16, computed in float32
  gradients of kernels   float32          float32          bfloat16, added up in float32;
                                                           float32 over micro-batches

On a CPU a product that returns bfloat16 is slower than one in float32 (docs/performance.md). On
accelerators what is moved costs more than what is computed: a float32 array between two
operations is twice the bytes (docs/planning.md). Inside of an operation float32 costs nothing
there, since XLA fuses the conversions into it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.models import devices


def stored(dtype: str) -> Any:
    """The type of activations between operations, for products with `dtype` operands."""
    compact = dtype == "bfloat16" and devices.platform() != "cpu"
    return jnp.bfloat16 if compact else jnp.float32


def contract(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    """`einsum` of two arrays with `dtype` operands and a float32 result."""
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )


# --- Float32 between operations ------------------------------------------------------------

Product = Callable[[jax.Array, jax.Array, str], jax.Array]


def product(forward: str, to_x: str, to_y: str) -> Product:
    """`contract(forward, x, y, dtype)` as a function of `x, y, dtype`, with its own gradient.

    The gradient is written out because automatic differentiation would multiply the float32
    cotangent with the bfloat16 operand in float32, at half the speed, and would keep the
    float32 operands alive for it. In float32 there is nothing to write out.

    Args:
      forward: subscripts of the product.
      to_x: those that make the gradient of `x` from the cotangent and `y`.
      to_y: those that make the gradient of `y` from `x` and the cotangent. An axis `z` in
        front is one of length 1 that is added to both. XLA's compiler for CPUs multiplies in
        bfloat16 only where the last axis of the first operand is summed over, and takes
        others back to float32; over two axes it sums after having transposed the operand.
    """

    def forwards(x: jax.Array, y: jax.Array, dtype: str) -> tuple[jax.Array, Any]:
        x, y = x.astype(dtype), y.astype(dtype)
        return contract(forward, x, y, dtype), (x, y)

    def backwards(dtype: str, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, y = saved
        dx = contract(to_x, g, y, dtype)
        x, g = (x[None], g[None]) if to_y.startswith("z") else (x, g)
        return dx, contract(to_y, x, g, dtype)

    half = jax.custom_vjp(lambda x, y, dtype: forwards(x, y, dtype)[0], nondiff_argnums=(2,))
    half.defvjp(forwards, backwards)

    def multiply(x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
        return contract(forward, x, y, dtype) if dtype == "float32" else half(x, y, dtype)

    return multiply


_dense = product("nk,km->nm", "nm,km->nk", "nk,nm->km")
# For CPUs. A kernel that narrows has a wide operand, which is often computed anew: it is not
# transposed, since XLA computes it in the order of the copy, several times as slowly.
_widen = product("nk,km->nm", "nm,km->nk", "znk,znm->km")


def matmul(x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
    """Matrix product (n, k) @ (k, m) -> (n, m): `dtype` operands, float32 result."""
    widens = w.shape[0] <= w.shape[1]
    return (_widen if widens and devices.platform() == "cpu" else _dense)(x, w, dtype)


# Of attention, for CPUs: tokens before heads, as they come from dense layers. XLA would take
# bfloat16 operands that it transposes back to float32 there.
_score = product("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "zbqhd,zbhqk->bkhd")
_average = product("bhqk,bkhd->bhqd", "bhqd,bkhd->bhqk", "zbhqk,zbhqd->bkhd")


def ordered(*arrays: jax.Array) -> list[jax.Array]:
    """(B, T, k, d) arrays with heads before tokens, (B, k, T, d), but for CPUs."""
    return [x if devices.platform() == "cpu" else x.swapaxes(1, 2) for x in arrays]


def score(q: jax.Array, k: jax.Array, dtype: str) -> jax.Array:
    """The float32 (B, k, T, S) products of `ordered` queries and keys."""
    cpu = devices.platform() == "cpu"
    return _score(q, k, dtype) if cpu else contract("bhqd,bhkd->bhqk", q, k, dtype)


def average(weights: jax.Array, v: jax.Array, dtype: str) -> jax.Array:
    """The float32 (B, k, T, d) sums of `ordered` values with (B, k, T, S) weights."""
    cpu = devices.platform() == "cpu"
    return (
        _average(weights, v, dtype) if cpu else contract("bhqk,bhkd->bhqd", weights, v, dtype)
    )


# --- Bfloat16 between operations -----------------------------------------------------------


def _axes(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last))


def _dot(
    x: jax.Array,
    y: jax.Array,
    of_x: tuple[int, ...],
    of_y: tuple[int, ...],
    result: Any = jnp.float32,
) -> jax.Array:
    """Sums over the axes `of_x` and `of_y` of bfloat16 arrays, in float32.

    A float32 result is written nowhere: XLA fuses the conversion that follows into it.
    """
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return lax.dot_general(x, y, ((of_x, of_y), ((), ())), preferred_element_type=result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, result: Any) -> jax.Array:
    """`x kernel + bias` with bfloat16 operands, float32 sums and a result of type `result`.

    Tokens are not flattened into the batch: 197 of them are no multiple of the rows of a TPU's
    tile, so that (B, T, D) and (B T, D) differ in memory, and every wide array would be copied
    in and out.

    Args:
      x: (..., k).
      kernel: (k, *m) float32.
      bias: (*m) float32, or None.
      result: the type of the (..., *m) result.
    """
    return _affine(x, kernel, bias, result)[0]


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, result: Any) -> Any:
    y = _dot(x, kernel, (x.ndim - 1,), (0,))
    y = y if bias is None else y + bias
    return y.astype(result), (x, kernel, bias)


def _affine_backwards(result: Any, saved: Any, g: jax.Array) -> Any:
    """The gradient of `x` in its own type, those of the weights in theirs.

    That of the kernel is first of type `result`: bfloat16 before devices add theirs up halves
    what they send. So do the peers, whose layers return bfloat16.
    """
    x, kernel, bias = saved
    batch = _axes(0, x.ndim - 1)
    dx = _dot(g, kernel, _axes(x.ndim - 1, g.ndim), _axes(1, kernel.ndim)).astype(x.dtype)
    dw = _dot(x, g, batch, batch, result).astype(kernel.dtype)
    db = None if bias is None else g.astype(jnp.float32).sum(batch).astype(bias.dtype)
    return dx, dw, db


affine.defvjp(_affine, _affine_backwards)


def float32_inside(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An elementwise `function` that is computed in float32 and returns the type it is given.

    Its gradient keeps the arguments and nothing else: what lies between is computed again,
    which is free where an operation waits for memory.
    """

    def compute(*args: jax.Array) -> jax.Array:
        return function(*(x.astype(jnp.float32) for x in args)).astype(args[0].dtype)

    def backwards(args: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(compute, *args)[1](g)

    half = jax.custom_vjp(compute)
    half.defvjp(lambda *args: (compute(*args), args), backwards)

    def apply(*args: jax.Array) -> jax.Array:
        plain = all(x.dtype == jnp.float32 for x in args)
        return function(*args) if plain else half(*args)

    return apply
