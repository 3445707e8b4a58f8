"""How many floating-point operations a network needs, counted from its shape.

Only matrix products and convolutions count, a multiplication and an addition as two. What
surrounds them (normalisation, softmax, GELU) is left out, as is usual where "model FLOPs
utilisation" is reported (PaLM, arXiv 2204.02311, appendix B). Counts of compilers differ:
XLA's adds elementwise operations, and sees the body of a loop over layers once.

Symbols as in `vit`, `mixer` and `resnet`: N patches, T tokens, D width, M MLP width, L layers.
"""

import math
from collections.abc import Sequence

from vit_jax.models.mixer import MixerConfig
from vit_jax.models.registry import ModelConfig
from vit_jax.models.resnet import ResNetConfig, reduction
from vit_jax.models.vit_config import ViTConfig


def forward_flops(cfg: ModelConfig) -> int:
    """FLOPs of one image from pixels to logits."""
    if isinstance(cfg, ResNetConfig):
        products, features = _resnet(cfg.image_size, cfg.channels, cfg.resnet, cfg.resnet_width)
        return 2 * (products + features * cfg.num_classes)
    return 2 * (_mixer(cfg) if isinstance(cfg, MixerConfig) else _vit(cfg))


def train_flops(cfg: ModelConfig) -> int:
    """FLOPs of one image in an update: the backward pass is two products for each forward one.

    Recomputation does not count, so that it shows as lower utilisation. Neither does it that
    no gradient flows to the pixels, which saves one product of the first layer.
    """
    return 3 * forward_flops(cfg)


def _vit(cfg: ViTConfig) -> int:
    """Multiplications of one image."""
    width, patches = cfg.width, math.prod(cfg.grid)
    tokens = patches + cfg.prefix
    edge, channels, total = cfg.patch_size, cfg.channels, 0
    if cfg.resnet is not None:
        total, channels = _resnet(cfg.image_size, channels, cfg.resnet, 1)
        edge //= reduction(cfg.resnet)
    total += patches * edge**2 * channels * width
    block = _attention(tokens, tokens, width) + _mlp(tokens, cfg)
    if cfg.relative == "keys":
        block += tokens * (2 * tokens - 1) * width
    total += cfg.depth * block
    if cfg.pool == "map":
        total += _attention(1, patches, width) + _mlp(1, cfg)
    pooled = 2 * width if cfg.pool == "cls_gap" else width
    if cfg.representation_size:
        total += pooled * cfg.representation_size
        pooled = cfg.representation_size
    heads = 2 if cfg.distillation == "heads" else 1
    return total + heads * pooled * cfg.num_classes


def _attention(queries: int, keys: int, width: int) -> int:
    """Projections of queries and results, of keys and values, and the two products between."""
    return 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width


def _mlp(tokens: int, cfg: ViTConfig) -> int:
    return (3 if cfg.mlp == "swiglu" else 2) * tokens * cfg.width * cfg.mlp_dim


def _mixer(cfg: MixerConfig) -> int:
    """Multiplications of one image."""
    patches, width = math.prod(cfg.grid), cfg.width
    stem = patches * cfg.patch_size**2 * cfg.channels * width
    block = 2 * width * patches * cfg.tokens_mlp_dim + 2 * patches * width * cfg.mlp_dim
    return stem + cfg.depth * block + width * cfg.num_classes


def _resnet(
    image_size: tuple[int, int], channels: int, stages: Sequence[int], factor: int
) -> tuple[int, int]:
    """Multiplications of one image up to the last map, and the channels of that map.

    Those with the zeros of SAME padding count, as they do in every implementation.
    """

    def halve(size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-edge // 2) for edge in size)

    features = 64 * factor
    size = halve(image_size)
    total = math.prod(size) * 49 * channels * features
    size = halve(size)  # the max pooling
    for stage, units in enumerate(stages):
        width = 64 * factor * 2**stage
        for unit in range(units):
            before = math.prod(size)
            strided = stage > 0 and unit == 0
            size = halve(size) if strided else size
            after, out = math.prod(size), 4 * width
            total += before * features * width + after * 9 * width**2 + after * width * out
            if strided or features != out:
                total += after * features * out
            features = out
    return total, features
