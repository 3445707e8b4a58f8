"""Which form of attention runs (the table in `attention.py`), and the kernels of others."""

import re

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vit_jax.models import attention_parts, devices
from vit_jax.models.attention_gradient import SAVED, recomputing_attention
from vit_jax.models.kernels import stored
from vit_jax.system.errors import UserError


def choose(q: jax.Array, k: jax.Array, dtype: str, biased: bool, kernel: str) -> str:
    """The form for these queries and keys where `model.attention` is `kernel`.

    `auto` takes no kernel for TPUs where sequences are short, for none was ever timed here. It
    takes one where products alone would send several times as many bytes to HBM and back.

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
    # The gradient of a bias is a sum over all examples, which parts do not have.
    if devices.platform() != "tpu" or biased:
        return "whole"
    fits = attention_parts.fits(q.shape[1])
    return "parts" if fits or kernel == "xla" or refusals["splash"]() else "splash"


def compute(
    form: str, q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, bias: jax.Array | None
) -> jax.Array:
    """The result of `attention.attend` in any form but `plain`."""
    if form in ("whole", "parts"):
        return recomputing_attention(q, k, v, bias, form)
    if form == "pallas":
        from vit_jax.models import tpu_attention  # here, since Pallas takes long to import

        y = tpu_attention.attention(q, k, v, bias)
    else:
        fused = {"cudnn": cudnn_attention, "splash": splash_attention}[form]
        y = fused(q, k, v, dtype)
    return checkpoint_name(y.astype(stored(dtype)), SAVED)


# --- TPUs ---------------------------------------------------------------------------------


def _why_not_on_tpu(q: jax.Array, k: jax.Array, dtype: str) -> str | None:
    """A reason why no kernel for TPUs can be used here, or None if there is none."""
    if devices.platform() != "tpu":
        return f"this is no TPU but {devices.platform()}"
    if q.shape != k.shape:
        return "queries and keys are not the same tokens"
    return None if dtype == "bfloat16" else f"model.dtype is {dtype!r}, not 'bfloat16'"


def _why_not_pallas(q: jax.Array, k: jax.Array, dtype: str) -> str | None:
    """A reason why our kernel for TPUs cannot be used here, or None if it can."""
    if (reason := _why_not_on_tpu(q, k, dtype)) is not None:
        return reason
    from vit_jax.models import tpu_attention

    return tpu_attention.why_not(q.shape[1], q.shape[3])


def _why_not_splash(q: jax.Array, k: jax.Array, dtype: str, biased: bool) -> str | None:
    """A reason why JAX's kernel for TPUs cannot be used here, or None if it can."""
    if (reason := _why_not_on_tpu(q, k, dtype)) is not None:
        return reason
    return "model.relative adds a bias to the scores" if biased else None


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, dtype: str, interpret: bool = False
) -> jax.Array:
    """`attend` in the kernel `jax.experimental.pallas.ops.tpu.splash_attention`.

    It takes blocks of 128 tokens only: the last one is padded, and the padding is a sequence of
    its own that others do not attend to. With `interpret` it runs on any device.
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

    qkv = [x.astype(dtype) for x in (q * q.shape[-1] ** -0.5, k, v)]
    arrays = [(x, devices.TOKENS) for x in qkv]
    return devices.on_each_device(on_one, arrays, [devices.TOKENS])[0]


# --- GPUs ---------------------------------------------------------------------------------


def why_not_cudnn(head_width: int, dtype: str, biased: bool) -> str | None:
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
    return "model.relative adds a bias to the scores" if biased else None


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
