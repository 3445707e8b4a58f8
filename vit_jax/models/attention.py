"""Softmax attention as in arXiv 2010.11929, Appendix A.

    [q, k, v] = z U_qkv                       (5)
    A = softmax(q k^T / sqrt(d))              (6)
    SA(z) = A v                               (7)
    MSA(z) = [SA_1(z); ...; SA_k(z)] U_msa    (8)

Equations 6 and 7 are `softmax_attention`, for all heads at once; 5 and 8 are the dense layers
around it, in `vit.MultiHeadDotProductAttention`.

Symbols: B batch, T tokens with queries, S tokens with keys and values (T = S but for the MAP
head), k heads, d width of a head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.models import attention_kernels
from vit_jax.models.kernels import average, ordered, score, stored

Weights = Callable[[], jax.Array]


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, bias: jax.Array | None = None
) -> tuple[jax.Array, Weights]:
    """Equations 6 and 7: products with `dtype` operands, float32 between them.

    Arguments and results are those of `attend`, but the (B, T, k, d) result is float32. The
    softmax is normalised after the product with the values: d divisions a token, not S.
    """
    q, k, v = ordered(q * q.shape[-1] ** -0.5, k, v)
    scores = score(q, k, dtype)
    scores = scores if bias is None else scores + bias
    # Softmax does not change with what is subtracted, and so has no gradient of it.
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    y = average(weights, v, dtype) / total
    return y.swapaxes(1, 2), lambda: weights / total


# On GPUs and TPUs the scores, not the products, cost the time: they are the largest arrays of a
# ViT's step, and written as above they go to memory and back several times. There the same
# function is computed in one of these forms; `attention_kernels.choose` holds the conditions.
#
#   form    where "auto" takes it         what it is, and why
#   plain   CPUs, float32, the MAP head   `softmax_attention`. XLA has nothing faster for CPUs,
#                                         fused kernels round to bfloat16, and the scores of
#                                         the MAP head's single query are small
#   cudnn   GPUs by NVIDIA since Ampere   NVIDIA's fused kernel: scores never reach memory
#   whole   other GPUs; with a bias       two plain products, with a gradient that computes
#                                         the weights again: none are kept for it
#   parts   TPUs                          `whole` for so many examples at a time that their
#                                         scores stay on the chip
#   splash  TPUs from 2,600 tokens on     JAX's fused kernel: the scores of one head alone are
#                                         too large for the chip
#   pallas  nowhere: it was never timed   our fused kernel for TPUs and short sequences

ATTENTION_KERNELS = (  # values of `model.attention`
    "auto",  # the fastest that the device, the precision and the network allow
    "xla",  # plain, whole or parts
    "cudnn",  # this one, or an error; so are the next two
    "pallas",
    "splash",
)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str,
    bias: jax.Array | None = None,
    kernel: str = "xla",
) -> tuple[jax.Array, Weights]:
    """Attention of (B, T, k, d) queries to (B, S, k, d) keys and values.

    A `bias` that broadcasts to (B, k, T, S) is added to the scaled scores. `kernel` is one of
    `ATTENTION_KERNELS`.

    Returns:
      The (B, T, k, d) result in the type that activations have here (`kernels.stored`), and a
      function that returns the (B, k, T, S) float32 weights, so that nobody who does not ask
      for them pays for them.

    Raises:
      UserError: a kernel that is asked for by name cannot be had, with the reason.
    """
    form = attention_kernels.choose(q, k, dtype, bias is not None, kernel)
    plain = functools.partial(softmax_attention, q, k, v, dtype, bias)
    if form == "plain":
        y, weights = plain()
        return y.astype(stored(dtype)), weights
    # The other forms do not return their weights: whoever asks has them computed plainly.
    y = attention_kernels.compute(form, q, k, v, dtype, bias)
    return y, lambda: plain()[1]()
