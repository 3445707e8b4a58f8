"""MLP-Mixer (arXiv 2105.01601): patches mixed by multi-layer perceptrons alone.

    U = X + (W_2 gelu(W_1 LN(X)^T))^T         token mixing, the same for every channel
    Y = U + W_4 gelu(W_3 LN(U))               channel mixing, the same for every token

Symbols: B batch, P patch edge, N patches, D width (C in that paper), L layers, S the hidden
width of token mixing (D_S), M that of channel mixing (D_C), K classes. There is no class
token and no position embedding: token mixing knows each token by its place, which also ties
the weights to one image size.

Modules and parameters carry the names of the published Flax model
(`MixerBlock_0/token_mixing/Dense_0/kernel`).
"""

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.checks import check_choices, check_positive, check_rates, check_tiles
from vit_jax.models.devices import split_by_example
from vit_jax.models.layers import (
    GELU,
    REMAT_POLICIES,
    Dense,
    StochasticDepth,
    add,
    layer_norm,
    patchify,
    remat_policy,
)
from vit_jax.models.model import EditPatches, Model, Out, Params, one_size_only
from vit_jax.system.errors import UserError

CHOICES = {
    "gelu": tuple(GELU),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", *REMAT_POLICIES),
}


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """The shape and numerics of a Mixer; every layer reads this one object.

    Raises (on construction):
      UserError: a value that cannot be built, naming the field of `config.model`.
    """

    image_size: tuple[int, int]  # (H, W), pixels
    channels: int  # C, of the images
    patch_size: int  # P, pixels
    depth: int  # L
    width: int  # D
    tokens_mlp_dim: int  # S
    mlp_dim: int  # M
    num_classes: int  # K; 0 returns the representation instead of logits
    head_bias_init: float = 0.0
    dropout: float = 0.0  # after each dense layer of an MLP
    stochastic_depth: float = 0.0  # rate of the last block; earlier blocks grow linearly to it
    gelu: str = "tanh"  # tanh (Google) | erf (everybody else)
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"  # operands of matrix products: float32 | bfloat16
    remat: str = "none"  # none | dots | full: what the backward pass recomputes

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        sizes = ("channels", "patch_size", "depth", "width", "tokens_mlp_dim", "mlp_dim")
        check_positive(self, sizes)
        check_rates(self, ("dropout", "stochastic_depth"))
        check_tiles(self.image_size, self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def block_rates(self) -> list[float]:
        """Stochastic-depth rate of each block, 0 at the first, linear in depth."""
        return [self.stochastic_depth * i / max(self.depth - 1, 1) for i in range(self.depth)]


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them, on the last axis; dropout after each."""

    cfg: MixerConfig
    hidden: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, width, hidden = self.cfg, x.shape[-1:], (self.hidden,)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        h = GELU[cfg.gelu](Dense(width, hidden, cfg.dtype, name="Dense_0")(x))
        return dropout(Dense(hidden, width, cfg.dtype, name="Dense_1")(dropout(h)))


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, on (B, N, D); also returns what happened inside."""

    cfg: MixerConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, drop_rate: float) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        mlp = lambda hidden, name: MlpBlock(cfg, hidden, self.train, name=name)

        def branch(y: jax.Array) -> jax.Array:
            return StochasticDepth()(y, drop_rate) if self.train and drop_rate else y

        y = layer_norm(cfg.layer_norm_eps, cfg.dtype, "LayerNorm_0")(x).swapaxes(
            1, 2
        )  # (B, D, N)
        y = mlp(cfg.tokens_mlp_dim, "token_mixing")(y).swapaxes(1, 2)
        out["token_mixing"] = y
        x = split_by_example(add(x, branch(y)))
        y = layer_norm(cfg.layer_norm_eps, cfg.dtype, "LayerNorm_1")(x)
        out["channel_mixing"] = y = mlp(cfg.mlp_dim, "channel_mixing")(y)
        out["output"] = x = split_by_example(add(x, branch(y)))
        return x, out


class MlpMixer(nn.Module):
    """(B, H, W, C) float32 images, already normalised, to (B, K) float32 logits."""

    cfg: MixerConfig
    train: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Out]:
        cfg, block, out = self.cfg, MixerBlock, {}
        if images.shape[1:] != (*cfg.image_size, cfg.channels):
            raise ValueError(
                f"images of shape {images.shape[1:]} given to a model built for "
                f"{(*cfg.image_size, cfg.channels)}"
            )
        patch_shape = (cfg.patch_size, cfg.patch_size, cfg.channels)
        stem = Dense(patch_shape, (cfg.width,), cfg.dtype, name="stem")
        out["patch_embedding"] = x = stem(patchify(images, cfg.patch_size))
        if cfg.remat != "none":
            # The rate decides in Python whether a branch draws at all: keep it a number.
            block = nn.remat(
                block, policy=remat_policy(cfg.remat, cfg.dtype), static_argnums=(2,)
            )
        for i, rate in enumerate(cfg.block_rates):
            name = f"MixerBlock_{i}"
            x, inside = block(cfg, self.train, name=name)(x, rate)
            out |= {f"{name}/{key}": value for key, value in inside.items()}
        out["encoded"] = x = layer_norm(cfg.layer_norm_eps, cfg.dtype, "pre_head_layer_norm")(x)
        out["pooled"] = out["pre_logits"] = y = x.mean(axis=1, dtype=jnp.float32)
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


def build(cfg: MixerConfig) -> Model:
    """Returns the model that `cfg` describes.

    Its named intermediates are `patch_embedding` and `encoded` (B, N, D),
    `MixerBlock_i/{token_mixing,channel_mixing,output}` (B, N, D), `pooled`, `pre_logits` and
    `logits`. `rngs={"dropout": key}` is needed when training with dropout or stochastic depth.
    """

    def init(key: jax.Array) -> Params:
        images = jnp.zeros((1, *cfg.image_size, cfg.channels))
        return cast(Params, MlpMixer(cfg).init(key, images)["params"])

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
            raise UserError("a Mixer has no patches to mask: use a Vision Transformer")
        if return_attention:
            raise UserError("a Mixer has no attention to look at: use a Vision Transformer")
        module = MlpMixer(cfg, train)
        return cast(tuple[jax.Array, Out], module.apply({"params": params}, images, rngs=rngs))

    return Model(cfg, init, apply, one_size_only(cfg))
