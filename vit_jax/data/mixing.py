"""Blending the images of a batch, on the device and inside the jitted step."""

import jax
import jax.numpy as jnp


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Blends every example with the one before it, images and targets by the same weight.

    `images` is floating (B, ...), `targets` floating (B, K), such as one-hot labels. The
    weight is drawn from Beta(alpha, alpha) once a batch and folded to at least a half, so
    that an example keeps the larger part of itself; 0 turns mixup off. (mixup, arXiv
    1710.09412, in the form AugReg used: the partner is the batch rolled by one.)
    """
    if alpha == 0:
        return images, targets
    weight = jax.random.beta(key, alpha, alpha)
    weight = jnp.maximum(weight, 1 - weight)

    def blend(x: jax.Array) -> jax.Array:
        w = weight.astype(x.dtype)
        return w * x + (1 - w) * jnp.roll(x, 1, axis=0)

    return blend(images), blend(targets)
