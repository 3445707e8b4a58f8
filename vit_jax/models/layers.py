"""Layers that every model here is made of. Precision is decided in `kernels.py`."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import attention_gradient
from vit_jax.models.kernels import affine, float32_inside, matmul, stored

Initializer = Callable[..., jax.Array]

REMAT_POLICIES = ("full", "dots")  # what the backward pass recomputes: see `remat_policy`

SAVED = "dense"  # the name of the results of dense layers, for policies of recomputation


def remat_policy(name: str, dtype: str) -> Callable[..., Any] | None:
    """What `jax.checkpoint` keeps: `full` only its input, `dots` what dense layers return.

    Where activations are bfloat16 their results are kept by name, after they were rounded, and
    with them the result of attention, which costs much to compute and little to keep.
    """
    if name == "full":
        return None
    if stored(dtype) == jnp.float32:
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint_policies.save_only_these_names(SAVED, attention_gradient.SAVED)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts (B, H, W, C) images into (B, N, P, P, C) patches, row by row."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.swapaxes(2, 3).reshape(b, -1, patch, patch, c)


def flattened(init: Initializer, num_in_axes: int) -> Initializer:
    """Applies a matrix initialiser to a kernel of more axes, as if it were (fan-in, fan-out).

    Attention kernels are stored per head, (D, k, d) and (k, d, D), but they are one matrix.
    """

    def wrapped(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        fan_in, fan_out = math.prod(shape[:num_in_axes]), math.prod(shape[num_in_axes:])
        return init(key, (fan_in, fan_out), dtype).reshape(shape)

    return wrapped


class Dense(nn.Module):
    """Affine map of the trailing axes: (..., *in_shape) -> (..., *out_shape).

    The kernel has shape (*in_shape, *out_shape), which is how published checkpoints store
    patch embeddings (P, P, C, D) and attention projections (D, k, d); it is applied as one
    matrix. The result has the type of activations (`kernels.stored`), or float32 where `exact`.
    With `keep` it is kept for the backward pass where results of dense layers are.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: str
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    use_bias: bool = True
    exact: bool = False
    keep: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_init = flattened(self.kernel_init, len(self.in_shape))
        kernel = self.param("kernel", kernel_init, (*self.in_shape, *self.out_shape))
        leading = x.shape[: x.ndim - len(self.in_shape)]
        fan_in, fan_out = math.prod(self.in_shape), math.prod(self.out_shape)
        if stored(self.dtype) == jnp.bfloat16:
            bias = self.param("bias", self.bias_init, self.out_shape) if self.use_bias else None
            x, kernel = x.reshape(*leading, fan_in), kernel.reshape(fan_in, *self.out_shape)
            y = affine(x, kernel, bias, jnp.float32 if self.exact else jnp.bfloat16)
            return checkpoint_name(y, SAVED) if self.keep else y
        # All leading axes are flattened, which is what matrix-product libraries like best.
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


class CompactLayerNorm(nn.Module):
    """LayerNorm of bfloat16 activations: float32 inside, bfloat16 out, one pass for both sums.

    E[x^2] - E[x]^2 in float32 is off by less than the rounding of its bfloat16 input already
    was, as long as the mean is less than 2^15 deviations. Nothing but the input is kept for the
    gradient.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalize(x, scale, bias, self.epsilon)


def _standardize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """`x` with mean 0 and deviation 1 along the last axis, and 1 / deviation; float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0.0)
    inverse = lax.rsqrt(variance + epsilon)
    return (x - mean) * inverse, inverse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm of (..., D) with (D,) float32 `scale` and `bias`, in the type of `x`."""
    return (_standardize(x, epsilon)[0] * scale + bias).astype(x.dtype)


def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> Any:
    return normalize(x, scale, bias, epsilon), (x, scale)


def _normalize_backwards(epsilon: float, saved: Any, g: jax.Array) -> Any:
    x, scale = saved
    standard, inverse = _standardize(x, epsilon)
    g, tokens = g.astype(jnp.float32), tuple(range(x.ndim - 1))
    to_standard = g * scale
    mean = lambda y: y.mean(axis=-1, keepdims=True)
    dx = to_standard - mean(to_standard) - standard * mean(to_standard * standard)
    return (inverse * dx).astype(x.dtype), (g * standard).sum(tokens), g.sum(tokens)


normalize.defvjp(_normalize, _normalize_backwards)


def layer_norm(eps: float, dtype: str, name: str) -> nn.Module:
    """LayerNorm over the width; in float32, whatever it is given and returns.

    In float32 the two-pass variance is chosen on purpose: Flax's default E[x^2] - E[x]^2 loses
    digits when the mean is large against the spread, which deep residual streams reach.
    """
    if stored(dtype) == jnp.bfloat16:
        return CompactLayerNorm(eps, name=name)
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=jnp.float32, name=name)


def add(z: jax.Array, y: jax.Array) -> jax.Array:
    """The residual sum: in float32, returned in the type of the stream `z`."""
    return (z.astype(jnp.float32) + y).astype(z.dtype)


def erf_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) with Phi of a standard normal variable (arXiv 1606.08415).

    Through erf, as PyTorch has it. `jax.nn.gelu` goes through erfc, which is exact to the last
    digits of tiny results of negative x too, and takes twice as long.
    """
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


GELU: dict[str, Callable[..., jax.Array]] = {
    "tanh": float32_inside(functools.partial(jax.nn.gelu, approximate=True)),  # Google's
    "erf": float32_inside(erf_gelu),  # everybody else's
}

swish_gate = float32_inside(lambda h, gate: h * jax.nn.silu(gate))  # arXiv 2002.05202


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
