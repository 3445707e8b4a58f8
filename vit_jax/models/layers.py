"""Layers that every model here is made of, and the one place where precision is decided.

Parameters are float32. With `dtype="bfloat16"` the operands of every matrix product are cast
to bfloat16 while products are accumulated and returned in float32, forward and backward;
normalisation, softmax and the residual stream stay float32. That keeps the speed of half
precision without its drift, and on XLA it is faster than products that return bfloat16.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from vit_jax.errors import UserError

Initializer = Callable[..., jax.Array]

BATCH_AXES = ("data", "fsdp")  # axes of the mesh over which examples are divided

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,  # keep only each block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep dense products
}


ATTENTION_KERNELS = (
    "auto",  # the fastest that the device, the precision and the network allow
    "xla",  # plain matrix products
    "cudnn",  # NVIDIA's fused kernel, or an error
)


def split_by_example(x: jax.Array) -> jax.Array:
    """Pins (B, ...) activations to be divided by examples and by nothing else.

    Only while a function is traced that sees a mesh (`training/sharding.py`); else `x` itself.
    """
    if not set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the mesh in sight, else where JAX computes by default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts (B, H, W, C) images into (B, N, P, P, C) patches, row by row."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.swapaxes(2, 3).reshape(b, -1, patch, patch, c)


def contract(subscripts: str, x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
    """`einsum` of two arrays with `dtype` operands and a float32 result."""
    return jnp.einsum(
        subscripts, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32
    )


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
_score = product("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "zbqhd,zbhqk->bkhd")
_average = product("bhqk,bkhd->bhqd", "bhqd,bkhd->bhqk", "zbhqk,zbhqd->bkhd")


def matmul(x: jax.Array, w: jax.Array, dtype: str) -> jax.Array:
    """Matrix product (n, k) @ (k, m) -> (n, m): `dtype` operands, float32 result."""
    widens = w.shape[0] <= w.shape[1]
    return (_widen if widens and platform() == "cpu" else _dense)(x, w, dtype)


def flattened(init: Initializer, num_in_axes: int) -> Initializer:
    """Applies a matrix initialiser to a kernel of more axes, as if it were (fan-in, fan-out).

    Attention kernels are stored per head, (D, k, d) and (k, d, D), but they are one matrix.
    """

    def wrapped(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:num_in_axes]), math.prod(shape[num_in_axes:])
        return init(key, (fan_in, fan_out), dtype).reshape(shape)

    return wrapped


class Dense(nn.Module):
    """Affine map of the trailing axes: (..., *in_shape) -> (..., *out_shape), float32.

    The kernel has shape (*in_shape, *out_shape), which is how published checkpoints store
    patch embeddings (P, P, C, D) and attention projections (D, k, d); it is applied as one
    matrix to all leading axes flattened, which is what matrix-product libraries like best.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = flattened(self.kernel_init, len(self.in_shape))
        kernel = self.param("kernel", kernel_init, (*self.in_shape, *self.out_shape))
        leading = x.shape[: x.ndim - len(self.in_shape)]
        fan_in, fan_out = math.prod(self.in_shape), math.prod(self.out_shape)
        y = matmul(x.reshape(-1, fan_in), kernel.reshape(fan_in, fan_out), self.dtype)
        y = y.reshape(*leading, *self.out_shape)
        return y + self.param("bias", self.bias_init, self.out_shape) if self.use_bias else y


def store_in(dtype: str, params: Any) -> Any:
    """Parameters with the kernels of `Dense` layers in `dtype`, the rest as it is.

    For inference: what a product would cast in every call is cast once, to the same result.
    Kernels of convolutions stay, for they are standardised in float32 first.
    """

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        *_, layer, name = "", *(key.key for key in path)
        dense = name == "kernel" and not layer.startswith("conv")
        return leaf.astype(dtype) if dense else leaf

    return jax.tree_util.tree_map_with_path(convert, params)


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """LayerNorm over the width, always in float32.

    The two-pass variance is chosen on purpose: Flax's default E[x^2] - E[x]^2 loses digits
    when the mean is large against the spread, which deep residual streams reach.
    """
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=jnp.float32, name=name)


def erf_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with Phi of a standard normal variable (arXiv 1606.08415).

    Through erf, as PyTorch has it. `jax.nn.gelu` goes through erfc, which is exact to the last
    digits of tiny results of negative x too, and takes twice as long.
    """
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


GELU: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": functools.partial(jax.nn.gelu, approximate=True),  # Google's checkpoints
    "erf": erf_gelu,  # everybody else's
}


class StochasticDepth(nn.Module):
    """Drops a residual branch of a whole example with probability `rate` (1603.09382)."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | float) -> jax.Array:
        keep = 1.0 - rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, x / keep, 0.0)


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch (CaiT, arXiv 2103.17239)."""

    init_value: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.init_value), x.shape[-1:])
        return x * gamma


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dtype: str,
    bias: jax.Array | None = None,
    kernel: str = "xla",
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Softmax attention of (B, N, k, d) queries, keys and values (Appendix A, equations 6-7).

    A `bias` that broadcasts to (B, k, N, N) is added to the scaled scores. `kernel` is one of
    `ATTENTION_KERNELS`.

    Returns:
      The (B, N, k, d) float32 result, and a function that returns the (B, k, N, N) weights,
      so that nobody who does not ask for them pays for them.

    Raises:
      UserError: `kernel="cudnn"` where that cannot be had.
    """
    if kernel != "xla":
        reason = why_not_cudnn(q.shape[-1], dtype, bias is not None)
        if reason is None:
            # The kernel keeps its weights to itself: whoever asks has them computed plainly.
            return cudnn_attention(q, k, v, dtype), lambda: attend(q, k, v, dtype)[1]()
        if kernel == "cudnn":
            raise UserError(f"model.attention is 'cudnn', but {reason}: use 'auto' or 'xla'")
    # Every product is a plain batched matrix product, and the softmax is normalised after the
    # product with the values: d divisions a token, not N. On CPUs the products themselves move
    # heads before tokens: of transposed operands XLA takes bfloat16 back to float32 there. For
    # TPUs a training step would need up to 2% more memory that way (B/16, compiled for a v5p).
    q = q * q.shape[-1] ** -0.5
    score, average = _score, _average
    if platform() != "cpu":
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


def why_not_cudnn(head_width: int, dtype: str, has_bias: bool) -> str | None:
    """A reason why cuDNN's fused attention cannot be used here, or None if it can.

    Its limits are those stated by cuDNN and JAX 0.10; a bias would be possible in part, but
    not the gradient of one that differs from image to image.
    """
    if jax.default_backend() != "gpu":
        return f"this is no NVIDIA GPU but {jax.default_backend()}"
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
    return y[:, :tokens].astype(jnp.float32)
