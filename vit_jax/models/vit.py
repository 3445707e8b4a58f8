"""The Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1.

    z_0  = [x_class; x_p^1 E; ...; x_p^N E] + E_pos          (1)
    z'_l = MSA(LN(z_{l-1})) + z_{l-1}                        (2)
    z_l  = MLP(LN(z'_l)) + z'_l                              (3)
    y    = LN(z_L^0)                                         (4)

Symbols: B batch, H x W image, C channels, P patch edge, N patches, T tokens (N plus class
token and registers), D width, M MLP width, L layers, k heads, d = D/k, K classes.

Modules and parameters carry the names of Google's published checkpoints
(`Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel`), so that loading
one is renaming, not rewriting. With `scan` the L blocks are one block named `encoderblock`
whose arrays have a leading layer axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models import devices
from vit_jax.models.attention import attend
from vit_jax.models.devices import split_by_example
from vit_jax.models.kernels import stored
from vit_jax.models.layers import (
    GELU,
    Dense,
    LayerScale,
    StochasticDepth,
    add,
    layer_norm,
    patchify,
    remat_policy,
    swish_gate,
)
from vit_jax.models.model import EditPatches, Model, Out, Params
from vit_jax.models.positions import PositionEmbedding, RelativeBias
from vit_jax.models.resize_positions import resize_params
from vit_jax.models.resnet import reduction, resnet_features
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError


class MultiHeadDotProductAttention(nn.Module):
    """MSA of Appendix A, equations 5-8: (B, T, D) queries over (B, S, D) keys and values."""

    cfg: ViTConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array | None = None
    ) -> tuple[jax.Array, Callable[[], jax.Array]]:
        cfg, memory = self.cfg, x if memory is None else memory
        width, heads = (cfg.width,), (cfg.num_heads, cfg.width // cfg.num_heads)
        xavier = nn.initializers.xavier_uniform()

        def project(name: str, tokens: jax.Array, bias: bool = True) -> jax.Array:
            dense = Dense(width, heads, cfg.dtype, xavier, use_bias=bias, name=name)
            return dense(tokens)  # (B, T, k, d)

        q, v = project("query", x), project("value", memory)
        k = project("key", memory, cfg.key_bias)
        bias = None
        if cfg.relative != "none" and memory is x:
            bias = RelativeBias(cfg, name="relative")(q)
        kernel = cfg.attention if memory is x else "xla"  # a single query needs no fusing
        y, weights = attend(q, k, v, cfg.dtype, bias, kernel)
        # Its result is as cheap to compute again as to read back, and takes memory.
        out = Dense(heads, width, cfg.dtype, xavier, keep=False, name="out")
        return out(y), weights


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them; dropout after each (Appendix B.1).

    With `swiglu` the hidden layer is multiplied by a gate, SiLU of a third dense layer
    (arXiv 2002.05202), in place of the GELU.
    """

    cfg: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, width, hidden = self.cfg, (self.cfg.width,), (self.cfg.mlp_dim,)
        inits = nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        h = Dense(width, hidden, cfg.dtype, *inits, name="Dense_0")(x)
        if cfg.mlp == "swiglu":
            h = swish_gate(h, Dense(width, hidden, cfg.dtype, *inits, name="gate")(x))
        else:
            h = GELU[cfg.gelu](h)
        return dropout(Dense(hidden, width, cfg.dtype, *inits, name="Dense_1")(dropout(h)))


class EncoderBlock(nn.Module):
    """Equations (2) and (3) on (B, T, D) tokens; also returns what happened inside.

    `shared` (1, T, D) is what `posemb_at="shared"` adds to the input of every block.
    """

    cfg: ViTConfig
    train: bool
    return_attention: bool

    @nn.compact
    def __call__(
        self, z: jax.Array, drop_rate: jax.Array | float, shared: jax.Array | None
    ) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        if cfg.posemb_at == "layers":
            z = add(z, PositionEmbedding(cfg, name="posembed_input")())
        elif shared is not None:
            z = add(z, shared)
        norm = lambda i: layer_norm(cfg.layer_norm_eps, cfg.dtype, f"LayerNorm_{i}")

        def branch(y: jax.Array, i: int) -> jax.Array:
            if cfg.layer_scale_init is not None:
                y = LayerScale(cfg.layer_scale_init, name=f"LayerScale_{i}")(y)
            if self.train and cfg.stochastic_depth:
                y = StochasticDepth()(y, drop_rate)
            return y

        y, weights = MultiHeadDotProductAttention(cfg, name="MultiHeadDotProductAttention_0")(
            norm(0)(z)
        )
        if self.return_attention:
            out["attention"] = weights()
        out["msa"] = y = nn.Dropout(cfg.dropout, deterministic=not self.train)(y)
        z = split_by_example(add(z, branch(y, 0)))
        out["mlp"] = y = MlpBlock(cfg, self.train, name="MlpBlock_0")(norm(1)(z))
        out["output"] = z = split_by_example(add(z, branch(y, 1)))
        return z, out


class Encoder(nn.Module):
    """Position embeddings, L blocks and the final LayerNorm, on (B, T, D) tokens."""

    cfg: ViTConfig
    train: bool
    return_attention: bool
    keep: jax.Array | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        z, shared = tokens, None
        if cfg.posemb_at != "layers":
            table = PositionEmbedding(cfg, name="posembed_input")()
            z, shared = (
                (tokens, table) if cfg.posemb_at == "shared" else (add(tokens, table), None)
            )
        if self.keep is not None:
            z = keep_patches(z, self.keep, cfg)
        if cfg.registers:
            init = nn.initializers.normal(0.02)
            registers = self.param("registers", init, (1, cfg.registers, cfg.width))
            shape = (z.shape[0], *registers.shape[1:])
            registers = jnp.broadcast_to(registers.astype(z.dtype), shape)
            before = cfg.positioned_prefix  # after the class token, before the patches
            z = jnp.concatenate([z[:, :before], registers, z[:, before:]], axis=1)
        z = split_by_example(nn.Dropout(cfg.dropout, deterministic=not self.train)(z))
        out["embedded"] = z
        z, blocks = self.blocks(z, shared)
        for i, block in enumerate(blocks):
            out |= {f"encoderblock_{i}/{name}": value for name, value in block.items()}
        if cfg.final_norm == "encoder":
            z = layer_norm(cfg.layer_norm_eps, cfg.dtype, "encoder_norm")(z)
        out["encoded"] = z
        return z, out

    def blocks(self, z: jax.Array, shared: jax.Array | None) -> tuple[jax.Array, list[Out]]:
        cfg, block = self.cfg, EncoderBlock
        if cfg.remat != "none":
            # Under scan the loop itself keeps XLA from merging the recomputation away.
            policy = remat_policy(cfg.remat, cfg.dtype)
            block = nn.remat(block, policy=policy, prevent_cse=not cfg.scan)
        if not cfg.scan:
            outs = []
            for i, rate in enumerate(cfg.block_rates):
                name = f"encoderblock_{i}"
                layer = block(cfg, self.train, self.return_attention, name=name)
                z, out = layer(z, rate, shared)
                outs.append(out)
            return z, outs
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=cfg.depth,
            unroll=unroll(cfg),
        )(cfg, self.train, self.return_attention, name="encoderblock")
        z, stacked = layers(z, jnp.asarray(cfg.block_rates), shared)
        return z, [{k: v[i] for k, v in stacked.items()} for i in range(cfg.depth)]


def keep_patches(z: jax.Array, keep: jax.Array, cfg: ViTConfig) -> jax.Array:
    """(B, T, D) tokens with positions to the class token and the (B, M) patches `keep`.

    Raises:
      UserError: later layers need to know where each patch is.
    """
    if cfg.posemb_at != "stem" or cfg.relative != "none":
        raise UserError(
            f"model.posemb_at={cfg.posemb_at!r} and model.relative={cfg.relative!r} add "
            f"positions in every layer, where patches that were left out cannot be told: use "
            f"'stem' and 'none'"
        )
    before = cfg.positioned_prefix
    kept = jnp.take_along_axis(z[:, before:], keep[..., None], axis=1)
    return jnp.concatenate([z[:, :before], kept], axis=1)


# Up to so many layers a TPU's program has them one after another; more would compile too long.
UNROLLED = 24


def unroll(cfg: ViTConfig) -> int:
    """How many layers one turn of the loop over layers computes.

    The parameters are stacked either way. A loop also stacks what it keeps for the gradient:
    it writes it twice, for the layer itself and for the stack, and reads it out of the stack
    again, a quarter more than a TPU's step moves otherwise. But it compiles in a fifth of the
    time.
    """
    if cfg.unroll is not None:
        return min(cfg.unroll, cfg.depth)
    compact = stored(cfg.dtype) == jnp.bfloat16 and devices.platform() == "tpu"
    return cfg.depth if compact and cfg.depth <= UNROLLED else 1


class MAPHead(nn.Module):
    """Multihead attention pooling (arXiv 2106.04560): a learned query over all tokens."""

    cfg: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.cfg
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, cfg.width))
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (tokens.shape[0], 1, cfg.width))
        attention = MultiHeadDotProductAttention(cfg, name="MultiHeadDotProductAttention_0")
        x, _ = attention(probe, tokens)
        y = layer_norm(cfg.layer_norm_eps, cfg.dtype, "LayerNorm_0")(x)
        return add(x, MlpBlock(cfg, self.train, name="MlpBlock_0")(y))[:, 0]


class VisionTransformer(nn.Module):
    """(B, H, W, C) float32 images, already normalised, to (B, K) float32 logits."""

    cfg: ViTConfig
    train: bool = False
    return_attention: bool = False
    edit_patches: EditPatches | None = None
    keep: jax.Array | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Out]:
        cfg = self.cfg
        if images.shape[1:] != (*cfg.image_size, cfg.channels):
            raise ValueError(
                f"images of shape {images.shape[1:]} given to a model built for "
                f"{(*cfg.image_size, cfg.channels)}: use `Model.at` for another size"
            )
        features, patch = images, cfg.patch_size
        if cfg.resnet is not None:  # a hybrid cuts patches from a feature map
            features = resnet_features(images, cfg.resnet, 1, cfg.dtype)
            patch //= reduction(cfg.resnet)
        patch_shape = (patch, patch, features.shape[-1])
        embedding = Dense(patch_shape, (cfg.width,), cfg.dtype, name="embedding")
        patches = embedding(patchify(features, patch))
        tokens = patches if self.edit_patches is None else self.edit_patches(patches)
        tokens = self.prepend("dist", tokens) if cfg.distillation != "none" else tokens
        tokens = self.prepend("cls", tokens) if cfg.has_class_token else tokens
        encoder = Encoder(cfg, self.train, self.return_attention, self.keep, name="Transformer")
        z, out = encoder(tokens)
        y = self.pool(z).astype(jnp.float32)  # from here on: one vector an image
        if cfg.final_norm == "pooled":
            y = layer_norm(cfg.layer_norm_eps, "float32", "fc_norm")(y)
        out |= {"patch_embedding": patches, "pooled": y}
        if cfg.representation_size:
            hidden = (cfg.representation_size,)
            dense = Dense(y.shape[-1:], hidden, cfg.dtype, exact=True, name="pre_logits")
            y = jnp.tanh(dense(y))
        out["pre_logits"] = y = split_by_example(y)
        if cfg.num_classes:
            y = self.head("head", y)
            if cfg.distillation == "heads":
                out |= {"logits_cls": y, "logits_dist": self.head("head_dist", z[:, 1])}
                y = (y + out["logits_dist"]) / 2
        out["logits"] = y
        return y, out

    def prepend(self, name: str, tokens: jax.Array) -> jax.Array:
        """Puts a learned token in front of (B, T, D) tokens."""
        token = self.param(name, nn.initializers.zeros, (1, 1, self.cfg.width))
        token = jnp.broadcast_to(token.astype(tokens.dtype), (len(tokens), 1, self.cfg.width))
        return jnp.concatenate([token, tokens], axis=1)

    def pool(self, z: jax.Array) -> jax.Array:
        """One (B, D) vector, with `cls_gap` (B, 2 D), for (B, T, D) tokens."""
        cfg, patches = self.cfg, z[:, self.cfg.prefix :]
        if cfg.pool == "map":
            return MAPHead(cfg, self.train, name="MAPHead_0")(patches)
        if cfg.pool == "cls":
            return z[:, 0]
        mean = patches.mean(axis=1, dtype=jnp.float32)
        return mean if cfg.pool == "gap" else jnp.concatenate([z[:, 0], mean], axis=-1)

    def head(self, name: str, y: jax.Array) -> jax.Array:
        """(B, K) float32 scores of (B, D) representations; zero at the start."""
        cfg = self.cfg
        zeros, bias = nn.initializers.zeros, nn.initializers.constant(cfg.head_bias_init)
        inits, classes = (zeros, bias), (cfg.num_classes,)
        return Dense(y.shape[-1:], classes, cfg.dtype, *inits, exact=True, name=name)(y)


def stack_layers(params: Params) -> Params:
    """Merges `encoderblock_0..L-1` into one `encoderblock` with a leading layer axis."""
    encoder = dict(params["Transformer"])
    depth = sum(name.startswith("encoderblock_") for name in encoder)
    blocks = [encoder.pop(f"encoderblock_{i}") for i in range(depth)]
    encoder["encoderblock"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return {**params, "Transformer": encoder}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    encoder = dict(params["Transformer"])
    stacked = encoder.pop("encoderblock")
    for i in range(len(jax.tree.leaves(stacked)[0])):
        encoder[f"encoderblock_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, "Transformer": encoder}


def build(cfg: ViTConfig) -> Model:
    """Returns the model that `cfg` describes."""

    def init(key: jax.Array) -> Params:
        # Always through scan: it compiles one block whatever the depth, and both layouts
        # start from the same numbers.
        module = VisionTransformer(dataclasses.replace(cfg, scan=True, remat="none"))
        images = jnp.zeros((1, *cfg.image_size, cfg.channels))
        params = module.init(key, images)["params"]
        return params if cfg.scan else unstack_layers(params)

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
        module = VisionTransformer(cfg, train, return_attention, edit_patches, keep)
        return cast(tuple[jax.Array, Out], module.apply({"params": params}, images, rngs=rngs))

    def at(image_size: tuple[int, int], method: str = "corner") -> Model:
        new = dataclasses.replace(cfg, image_size=image_size)
        other = build(new)

        def apply_at(params: Params, images: jax.Array, **options: Any) -> Any:
            resized = resize_params(params, cfg, new, method)
            return other.apply(resized, images, **options)

        return Model(new, init, apply_at, at)

    return Model(cfg, init, apply, at)
