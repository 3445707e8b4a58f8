"""Softmax attention (arXiv 2010.11929, Appendix A, equations 6 and 7), by platform.

    A = softmax(q k^T / sqrt(d) + bias)          (6)
    SA = A v                                     (7)

Symbols: B batch, T tokens, k heads, d width of a head. Whatever computes it, the result is the
same function; `model.attention` says which form of it runs.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import devices
from vit_jax.models.kernels import contract, product, stored
from vit_jax.system.errors import UserError

ATTENTION_KERNELS = (
    "auto",  # the fastest that the device, the precision and the network allow
    "xla",  # plain matrix products
    "cudnn",  # NVIDIA's fused kernel, or an error
    "pallas",  # our own fused kernel for TPUs and short sequences, or an error; never timed
    "splash",  # JAX's fused kernel for TPUs and long sequences, or an error; never timed
)

SAVED = "attention"  # the name of the result, for policies of recomputation

Weights = Callable[[], jax.Array]


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
    form = _form(q, k, dtype, bias is not None, kernel)
    plain = functools.partial(_plain, q, k, v, dtype, bias)
    if form == "plain":
        y, weights = plain()
        return y.astype(stored(dtype)), weights
    # The other forms keep their weights to themselves: whoever asks has them computed plainly.
    if form in ("cudnn", "splash"):
        kernel_of = {"cudnn": cudnn_attention, "splash": splash_attention}
        y = checkpoint_name(kernel_of[form](q, k, v, dtype).astype(stored(dtype)), SAVED)
    else:
        y = _compact(q, k, v, bias, form)
    return y, lambda: plain()[1]()


def _form(q: jax.Array, k: jax.Array, dtype: str, biased: bool, kernel: str) -> str:
    """Which form computes it.

    No kernel for TPUs was ever timed here. `auto` takes one only where sequences are so long
    that products send several times as many bytes to HBM and back.

    Raises:
      UserError: the kernel that is asked for by name cannot be had.
    """
    refusals = {
        "cudnn": lambda: why_not_cudnn(q.shape[-1], dtype, biased),
        "pallas": lambda: _why_not_pallas(q, k, dtype),
        "splash": lambda: _why_not_splash(q, k, dtype, biased),
    }
    if kernel in refusals:
        if (reason := refusals[kernel]()) is not None:
            raise UserError(f"model.attention is {kernel!r}, but {reason}: use 'auto' or 'xla'")
        return kernel
    if kernel == "auto" and refusals["cudnn"]() is None:
        return "cudnn"
    if stored(dtype) == jnp.float32 or q.shape != k.shape:
        return "plain"
    # A bias has a gradient that is a sum over all examples.
    if devices.platform() != "tpu" or biased:
        return "whole"
    fits = _bytes_of_scores(q.shape[1]) <= ON_CHIP
    return "parts" if fits or kernel == "xla" or refusals["splash"]() else "splash"


# --- Plain products, differentiated automatically -----------------------------------------

# For CPUs, with the order of axes in which XLA multiplies in bfloat16 there.
_score = product("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "zbqhd,zbhqk->bkhd")
_average = product("bhqk,bkhd->bhqd", "bhqd,bkhd->bhqk", "zbhqk,zbhqd->bkhd")


def _plain(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, bias: jax.Array | None
) -> tuple[jax.Array, Weights]:
    """Attention as three plain operations, float32 between them.

    Every product is a plain batched matrix product, and the softmax is normalised after the
    product with the values: d divisions a token, not T. On CPUs the products themselves move
    heads before tokens: of transposed operands XLA takes bfloat16 back to float32 there.
    """
    q = q * q.shape[-1] ** -0.5
    score, average = _score, _average
    if devices.platform() != "cpu":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        score = functools.partial(contract, "bhqd,bhkd->bhqk")
        average = functools.partial(contract, "bhqk,bhkd->bhqd")
    scores = score(q, k, dtype)
    scores = scores if bias is None else scores + bias
    scores = scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores)
    total = weights.sum(axis=-1, keepdims=True)
    y = average(weights, v, dtype) / total
    return y.swapaxes(1, 2), lambda: weights / total


# --- Plain products with a gradient of their own, for accelerators ------------------------

# Bytes of float32 scores that a TPU keeps on the chip beside what else a step needs there: the
# largest for which the compiled step of L/16 on a v5e moved no scores to HBM.
ON_CHIP = 28 << 20


def _scores(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    scores = contract("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, jnp.bfloat16)
    return scores if bias is None else scores + bias


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The bfloat16 result, and the logarithm of each query's (B, k, T) sum of weights."""
    scores = _scores(q, k, bias)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    y = contract("bhqk,bkhd->bqhd", weights, v, jnp.bfloat16) / total.swapaxes(1, 2)
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
    half = functools.partial(contract, dtype=jnp.bfloat16)
    weights = jnp.exp(_scores(q, k, bias) - log_total[..., None])
    inner = jnp.einsum("bqhd,bqhd->bhq", g.astype(jnp.float32), y.astype(jnp.float32))
    to_scores = weights * (half("bqhd,bkhd->bhqk", g, v) - inner[..., None])
    scale = q.shape[-1] ** -0.5
    dq = half("bhqk,bkhd->bqhd", to_scores, k) * scale
    dk = half("bhqk,bqhd->bkhd", to_scores, q * scale)
    dv = half("bhqk,bqhd->bkhd", weights, g)
    dq, dk, dv = (x.astype(jnp.bfloat16) for x in (dq, dk, dv))
    return dq, dk, dv, to_scores


def _gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return _backward(*arrays)[:3]


def part_size(examples: int, heads: int, bytes_each: int) -> tuple[int, int]:
    """How many examples and heads a part has, whose scores take `bytes_each` a head.

    The most examples that divide the batch and stay on the chip, or else the most heads of one.
    Where not even one head would stay, all of them.
    """
    most = lambda count, size: max(
        (n for n in range(1, count + 1) if count % n == 0 and n * size <= ON_CHIP), default=0
    )
    if several := most(examples, heads * bytes_each):
        return several, heads
    if some := most(heads, bytes_each):
        return 1, some
    return examples, heads


def _bytes_of_scores(tokens: int) -> int:
    """Of one head, float32, as a TPU stores them: rows of a multiple of 128 numbers."""
    return 4 * tokens * -(-tokens // 128) * 128


def _by_parts(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)` for some examples and heads at a time, each part into its place.

    Args:
      function: to a tuple of arrays, (B, T, k, d) or (B, k, T) as the arguments are.
      arrays: the first is (B, T, k, d) and tells how large scores are.
    """
    count, tokens, heads, _ = arrays[0].shape
    n, h = part_size(count, heads, _bytes_of_scores(tokens))
    if (n, h) == (count, heads):
        return function(*arrays)

    def of_part(shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _head_axis(shape)
        return (n, *shape[1:axis], h, *shape[axis + 1 :])

    def start(i: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Of part `i`: heads innermost."""
        at: list[Any] = [0] * len(shape)
        at[0], at[_head_axis(shape)] = i // (heads // h) * n, i % (heads // h) * h
        return tuple(at)

    def body(i: jax.Array, out: Any) -> Any:
        part = (lax.dynamic_slice(x, start(i, x.shape), of_part(x.shape)) for x in arrays)
        put = lambda whole, x: lax.dynamic_update_slice(whole, x, start(i, whole.shape))
        return jax.tree.map(put, out, function(*part))

    shapes = jax.eval_shape(function, *arrays)
    empty = lambda x: lax.empty(x.shape, x.dtype)  # zeros would be written first
    return lax.fori_loop(0, count // n * (heads // h), body, jax.tree.map(empty, shapes))


def _head_axis(shape: tuple[int, ...]) -> int:
    """Of (B, T, k, d) or (B, k, T)."""
    return 2 if len(shape) == 4 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _compact(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, form: str
) -> jax.Array:
    """Attention that keeps its operands, its result and one number a query, in bfloat16.

    Written as one product (`whole`), XLA sends the scores of all examples to a TPU's HBM and
    back three times forward and five times backward, which is most of what a ViT's step moves.
    `parts` walks through the batch so that the scores of a part stay on the chip; `pallas`
    does so within one kernel.
    """
    return _compact_forwards(q, k, v, bias, form)[0]


TOKENS, ROWS = ("examples", "tokens", "heads", "width"), ("examples", "heads", "tokens")


def _compact_forwards(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, form: str
) -> Any:
    arrays, log_total = [(x, TOKENS) for x in (q, k, v)], None
    if form == "pallas":
        from vit_jax.models import tpu_attention

        given = [*arrays, (bias, _axes_of(bias, q))]
        (y,) = devices.on_each_device(tpu_attention.forward, given, [TOKENS])
    elif form == "parts":
        forward = functools.partial(_by_parts, _forward)
        y, log_total = devices.on_each_device(forward, arrays, [TOKENS, ROWS])
    else:
        y, log_total = _forward(q, k, v, bias)
    y, log_total = checkpoint_name((y, log_total), SAVED)
    return y, (q, k, v, y, log_total, bias)


def _compact_backwards(form: str, saved: Any, g: jax.Array) -> Any:
    q, k, v, y, log_total, bias = saved
    of_bias = _axes_of(bias, q)
    if form == "pallas":
        from vit_jax.models import tpu_attention

        given = [*((x, TOKENS) for x in (q, k, v, g)), (bias, of_bias)]
        results = [TOKENS] * 3 + [of_bias] * (bias is not None)
        backward = functools.partial(tpu_attention.backward, shared="shared" in of_bias)
        dq, dk, dv, *db = devices.on_each_device(backward, given, results)
        return dq, dk, dv, db[0].astype(bias.dtype) if db else None
    if form == "parts":
        arrays = [(x, ROWS if x.ndim == 3 else TOKENS) for x in (q, k, v, y, log_total, g)]
        backward = functools.partial(_by_parts, _gradients)
        return *devices.on_each_device(backward, arrays, [TOKENS] * 3), None
    dq, dk, dv, to_scores = _backward(q, k, v, y, log_total, g, bias)
    if bias is None:
        return dq, dk, dv, None
    shared = tuple(i for i, size in enumerate(bias.shape) if size != to_scores.shape[i])
    return dq, dk, dv, to_scores.sum(shared, keepdims=True).astype(bias.dtype)


def _axes_of(bias: jax.Array | None, q: jax.Array) -> devices.Axes:
    """Those of a (1 or B, k, T, T) bias; of None, nothing."""
    if bias is None:
        return ()
    return "examples" if len(bias) == len(q) else "shared", "heads", "queries", "keys"


_compact.defvjp(_compact_forwards, _compact_backwards)


# --- Fused kernels ------------------------------------------------------------------------


def _why_not_on_tpu(q: jax.Array, k: jax.Array) -> str | None:
    """A reason why no kernel for TPUs can be used here, or None if there is none."""
    if devices.platform() != "tpu":
        return f"this is no TPU but {devices.platform()}"
    return "queries and keys are not the same tokens" if q.shape != k.shape else None


def _why_not_pallas(q: jax.Array, k: jax.Array, dtype: str) -> str | None:
    """A reason why our kernel for TPUs cannot be used here, or None if it can."""
    if (reason := _why_not_on_tpu(q, k)) is not None:
        return reason
    from vit_jax.models import tpu_attention  # Pallas takes long to import

    return tpu_attention.why_not(q.shape[1], q.shape[3], dtype)


def _why_not_splash(q: jax.Array, k: jax.Array, dtype: str, biased: bool) -> str | None:
    """A reason why JAX's kernel for TPUs cannot be used here, or None if it can."""
    if (reason := _why_not_on_tpu(q, k)) is not None:
        return reason
    if dtype != "bfloat16":
        return f"model.dtype is {dtype!r}, not 'bfloat16'"
    return "model.relative adds a bias to the scores" if biased else None


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, interpret: bool = False
) -> jax.Array:
    """`attend` in the kernel `jax.experimental.pallas.ops.tpu.splash_attention`.

    It takes blocks of 128 tokens only: the last one is filled up, and what fills it is a
    sequence of its own that others do not see. With `interpret` it runs on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    tokens, blocks = q.shape[1], -(-q.shape[1] // 128)
    length = 128 * blocks
    block = 128 * max(n for n in (1, 2, 3, 4) if blocks % n == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )

    def on_one(*qkv: jax.Array) -> tuple[jax.Array]:
        more = ((0, 0), (0, 0), (0, length - tokens), (0, 0))
        ids = jnp.asarray(jnp.arange(length) >= tokens, jnp.int32)
        all_see_all = masks.MultiHeadMask([masks.FullMask((length, length))] * qkv[0].shape[2])
        kernel = splash.make_splash_mha(
            all_see_all, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
        padded = (jnp.pad(x.swapaxes(1, 2), more) for x in qkv)
        y = jax.vmap(kernel, (0, 0, 0, None))(*padded, splash.SegmentIds(ids, ids))
        return (y[:, :, :tokens].swapaxes(1, 2),)

    q, k, v = (x.astype(dtype) for x in (q * q.shape[-1] ** -0.5, k, v))
    return devices.on_each_device(on_one, [(x, TOKENS) for x in (q, k, v)], [TOKENS])[0]


def why_not_cudnn(head_width: int, dtype: str, has_bias: bool) -> str | None:
    """A reason why cuDNN's fused attention cannot be used here, or None if it can.

    Its limits are those stated by cuDNN and JAX 0.10; a bias would be possible in part, but
    not the gradient of one that differs from image to image.
    """
    if devices.platform() != "gpu":
        return f"this is no NVIDIA GPU but {devices.platform()}"
    capability = getattr(jax.devices()[0], "compute_capability", "")
    if not re.fullmatch(r"[0-9]+\.[0-9]+", capability) or float(capability) < 8.0:
        return f"{jax.devices()[0].device_kind} is older than Ampere"
    if dtype != "bfloat16":
        return f"model.dtype is {dtype!r}, not 'bfloat16'"
    if head_width % 8 or head_width > 128:
        return f"heads are {head_width} wide, neither a multiple of 8 nor at most 128"
    if has_bias:
        return "model.relative adds a bias to the scores"
    return None


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, dtype: str) -> jax.Array:
    """`attend` in one kernel of NVIDIA's: scores and weights never reach memory."""
    tokens = q.shape[1]

    def prepare(x: jax.Array) -> jax.Array:
        # The backward pass takes even numbers of tokens only.
        return jnp.pad(x, ((0, 0), (0, tokens % 2), (0, 0), (0, 0))).astype(dtype)

    q, k, v = prepare(q * q.shape[-1] ** -0.5), prepare(k), prepare(v)
    lengths = jnp.full(q.shape[0], tokens, jnp.int32) if tokens % 2 else None
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return y[:, :tokens]
