"""The task of every contestant, in a form that fits on a line of JSON.

Nothing here imports a framework, so that a process loads only the one that it measures.
"""

from typing import Any, NamedTuple

import numpy as np

CLASSES = 1000


class Task(NamedTuple):
    """One network, one batch.

    It computes: erf GELU (timm and Hugging Face have no other for these sizes), class token,
    learned positions, no dropout, `CLASSES` outputs.
    """

    image_size: tuple[int, int]  # (H, W), pixels
    patch_size: int  # P, pixels
    depth: int  # L
    width: int  # D
    mlp_dim: int  # M
    num_heads: int  # k
    batch_size: int
    dtype: str  # float32 | bfloat16
    training: bool  # forward, backward and AdamW; otherwise forward only
    backend: str  # cpu | gpu | tpu
    devices: int = 1  # the batch is divided over them; ours only

    @property
    def shape(self) -> dict[str, Any]:
        """The network as fields of a `ViTConfig`."""
        names = ("patch_size", "depth", "width", "mlp_dim", "num_heads")
        network = {name: getattr(self, name) for name in names}
        size = tuple(self.image_size)
        return network | {"image_size": size, "channels": 3, "num_classes": CLASSES}

    def example(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, H, W, C) float32 images and (B,) int32 labels, the same for all."""
        rng = np.random.default_rng(0)
        images = rng.standard_normal((self.batch_size, *self.image_size, 3), np.float32)
        return images, rng.integers(0, CLASSES, self.batch_size, np.int32)


def product_size(backend: str) -> int:
    """Edge of the square matrices whose product is the reference speed of a device."""
    return 2048 if backend == "cpu" else 8192
