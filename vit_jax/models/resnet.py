"""ResNets with weight standardisation and group normalisation: baselines and hybrid stems.

"An Image is Worth 16x16 Words" (arXiv 2010.11929, section 4.1) compares with the ResNets of
Big Transfer (BiT, 1912.11370), in which batch normalisation gave way to group normalisation
(1803.08494) and weight standardisation (1903.10520), and builds hybrids whose patches are
cut from the feature map of such a network.

BiT proper is a ResNet-v2: it normalises *before* each convolution. The hybrids whose weights
were released normalise *after* it, like a ResNet-v1. This file does what the released
hybrids do, for the baselines too, so names such as `R50x1` stand for the sizes of BiT, not
for its order of operations, and BiT's own weights do not fit.

    root    StdConv 7x7 / 2 -> GN -> ReLU -> max pool 3x3 / 2
    unit    y = GN(StdConv 1x1) -> ReLU -> GN(StdConv 3x3 / stride) -> ReLU -> GN(StdConv 1x1)
            ReLU(shortcut(x) + y), the shortcut projected where the shape changes

Stage s has inner width 64 w 2^(s-1), w the width factor, and four times that outside; every
stage but the first halves the map in its first unit. Padding is SAME as XLA means it: with
stride 2 and an even size, one pixel at the right and bottom and none at the left and top.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vit_jax.models.checks import check_choices, check_positive
from vit_jax.models.devices import split_by_example
from vit_jax.models.layers import Dense, remat_policy
from vit_jax.models.model import EditPatches, Model, Out, Params
from vit_jax.system.errors import UserError


def reduction(block_sizes: Sequence[int]) -> int:
    """How many pixels of an image edge one cell of the feature map stands for.

    4 for the root alone, then 4, 8, 16, 32 for one to four stages. Where that does not divide
    the image, SAME padding rounds the size of the map up.
    """
    return 4 * 2 ** max(len(block_sizes) - 1, 0)


def standardize(kernel: jax.Array) -> jax.Array:
    """Gives each output channel of an (h, w, in, out) kernel zero mean and unit deviation."""
    centred = kernel - kernel.mean(axis=(0, 1, 2))
    return centred / (centred.std(axis=(0, 1, 2)) + 1e-5)


class StdConv(nn.Module):
    """A SAME convolution without bias, its kernel standardised each time it is used.

    (B, H, W, in) -> (B, ceil(H / stride), ceil(W / stride), features), float32. Checkpoints
    hold the kernel as it is before standardisation.
    """

    features: int
    size: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = standardize(self.param("kernel", nn.initializers.lecun_normal(), shape))
        # Unlike a matrix product this is not asked for float32: XLA on GPUs would then convert
        # the operands and convolve in float32 throughout. Sums are float32 inside all the same,
        # and they are rounded once, just before a normalisation.
        y = lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.astype(jnp.float32)


def group_norm(name: str, scale: float = 1.0) -> nn.GroupNorm:
    """GroupNorm over 32 groups of channels, in float32 and with the two-pass variance."""
    return nn.GroupNorm(
        num_groups=32,
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=nn.initializers.constant(scale),
        name=name,
    )


class ResidualUnit(nn.Module):
    """A bottleneck of inner width `width`: (B, H, W, C) -> (B, H/stride, W/stride, 4 width).

    The last normalisation starts with scale 0, so that the unit starts as its shortcut.
    """

    width: int
    stride: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = lambda features, size, stride, name: StdConv(
            features, size, stride, self.dtype, name=name
        )
        features = 4 * self.width
        shortcut = x
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = conv(features, 1, self.stride, "conv_proj")(x)
            shortcut = group_norm("gn_proj")(shortcut)
        y = nn.relu(group_norm("gn1")(conv(self.width, 1, 1, "conv1")(x)))
        y = nn.relu(group_norm("gn2")(conv(self.width, 3, self.stride, "conv2")(y)))
        y = group_norm("gn3", scale=0.0)(conv(features, 1, 1, "conv3")(y))
        return nn.relu(shortcut + y)


class ResNetStage(nn.Module):
    """`size` units of one width, `unit1` with the stride."""

    size: int
    width: int
    stride: int
    dtype: str
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = ResidualUnit
        if self.remat != "none":
            unit = nn.remat(unit, policy=remat_policy(self.remat, self.dtype))
        for u in range(self.size):
            stride = self.stride if u == 0 else 1
            x = split_by_example(unit(self.width, stride, self.dtype, name=f"unit{u + 1}")(x))
        return x


def resnet_stages(
    images: jax.Array,
    block_sizes: Sequence[int],
    width_factor: int,
    dtype: str,
    remat: str = "none",
) -> list[jax.Array]:
    """The feature maps after the root and after each stage; see `resnet_features`."""
    width = 64 * width_factor
    x = StdConv(width, 7, 2, dtype, name="conv_root")(images)
    x = nn.relu(group_norm("gn_root")(x))
    maps = [nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")]
    for s, size in enumerate(block_sizes):
        stride = 1 if s == 0 else 2
        stage = ResNetStage(size, width * 2**s, stride, dtype, remat, name=f"block{s + 1}")
        maps.append(stage(maps[-1]))
    return maps


def resnet_features(
    images: jax.Array,
    block_sizes: Sequence[int],
    width_factor: int,
    dtype: str,
    remat: str = "none",
) -> jax.Array:
    """The last feature map of a ResNet, for a hybrid to cut its patches from.

    Call it inside a method marked `nn.compact`. Its modules `conv_root`, `gn_root`,
    `block1`, ... then belong to the calling module, beside that module's own, which is where
    published hybrids keep them.

    Args:
      images: (B, H, W, C) float32, already normalised.
      block_sizes: how many units each stage has; `()` for the root alone.
      width_factor: 1 for the widths of ResNet-50.
      dtype: the operands of convolutions, `float32` or `bfloat16`.
      remat: `none`, or a policy of `layers.REMAT_POLICIES` for each unit. None of them keeps
        a convolution, so that all recompute the whole unit.

    Returns:
      (B, H / r, W / r, F) float32, with r = `reduction(block_sizes)` and sizes rounded up;
      F is 64 `width_factor` after the root and 256 `width_factor` 2^(s-1) after stage s.
    """
    return resnet_stages(images, block_sizes, width_factor, dtype, remat)[-1]


CHOICES = {"dtype": ("float32", "bfloat16"), "remat": ("none", "full")}


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The shape and numerics of a ResNet classifier.

    Raises (on construction):
      UserError: a value that cannot be built, naming the field of `config.model`.
    """

    image_size: tuple[int, int]  # (H, W), pixels
    channels: int  # C
    resnet: tuple[int, ...]  # units in each stage
    resnet_width: int  # 1 for the widths of ResNet-50
    num_classes: int  # K; 0 returns the representation instead of logits
    head_bias_init: float = 0.0
    dtype: str = "float32"  # operands of convolutions and the head: float32 | bfloat16
    remat: str = "none"  # none | full: what the backward pass recomputes

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        check_positive(self, ("channels", "resnet_width"))
        if any(size < 1 for size in self.image_size):
            raise UserError(f"image_size is {self.image_size}: both must be at least 1 pixel")
        if any(size < 1 for size in self.resnet):
            raise UserError(f"model.resnet is {self.resnet}: every stage needs at least 1 unit")


class ResNet(nn.Module):
    """(B, H, W, C) float32 images, already normalised, to (B, K) float32 logits."""

    cfg: ResNetConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        if images.shape[1:] != (*cfg.image_size, cfg.channels):
            raise ValueError(
                f"images of shape {images.shape[1:]} given to a model built for "
                f"{(*cfg.image_size, cfg.channels)}"
            )
        maps = resnet_stages(images, cfg.resnet, cfg.resnet_width, cfg.dtype, cfg.remat)
        out["root"] = maps[0]
        out |= {f"block{s}": features for s, features in enumerate(maps[1:], start=1)}
        out["pooled"] = out["pre_logits"] = y = maps[-1].mean(axis=(1, 2))
        if cfg.num_classes:
            zeros, bias = nn.initializers.zeros, nn.initializers.constant(cfg.head_bias_init)
            head = Dense(
                y.shape[-1:],
                (cfg.num_classes,),
                cfg.dtype,
                zeros,
                bias,
                exact=True,
                name="head",
            )
            y = head(y)
        out["logits"] = y
        return y, out


def build(cfg: ResNetConfig) -> Model:
    """Returns the model that `cfg` describes.

    Its named intermediates are `root` and `block{s}` (B, H', W', F), `pooled`, `pre_logits`
    and `logits`. It has no dropout: `train` and `rngs` change nothing.
    """
    module = ResNet(cfg)

    def init(key: jax.Array) -> Params:
        images = jnp.zeros((1, *cfg.image_size, cfg.channels))
        return cast(Params, module.init(key, images)["params"])

    def apply(
        params: Params,
        images: jax.Array,
        *,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        return_attention: bool = False,
        edit_patches: EditPatches | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, Out]:
        if edit_patches is not None or keep is not None:
            raise UserError("a ResNet has no patches to mask: use a Vision Transformer")
        if return_attention:
            raise UserError("a ResNet has no attention to look at: use a Vision Transformer")
        return cast(tuple[jax.Array, Out], module.apply({"params": params}, images, rngs=rngs))

    def at(image_size: tuple[int, int], method: str = "corner") -> Model:
        return build(dataclasses.replace(cfg, image_size=image_size))  # it has no positions

    return Model(cfg, init, apply, at)
