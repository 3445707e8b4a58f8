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
from typing import Any, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.layers import (
    GELU,
    Dense,
    LayerScale,
    StochasticDepth,
    attend,
    layer_norm,
)
from vit_jax.models.variants import decode_variant

Params = dict[str, Any]
Out = dict[str, jax.Array]

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": None,  # keep only each block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep dense products
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that decides what the network computes; every layer reads this one object.

    Raises (on construction):
      UserError: a combination that cannot be built, naming the field of `config.model`.
    """

    image_size: tuple[int, int]  # (H, W), pixels
    channels: int  # C
    patch_size: int  # P, pixels
    depth: int  # L
    width: int  # D
    mlp_dim: int  # M
    num_heads: int  # k
    num_classes: int  # K; 0 returns the representation instead of logits
    pool: str = "cls"  # cls | gap (mean of all tokens) | map (attention pooling)
    posemb: str = "learned"  # learned (1-D) | learned_2d | sincos2d | none
    representation_size: int | None = None  # width of the tanh layer in the pre-training head
    head_bias_init: float = 0.0
    registers: int = 0  # extra learned tokens without a position (arXiv 2309.16588)
    dropout: float = 0.0
    stochastic_depth: float = 0.0  # rate of the last block; earlier blocks grow linearly to it
    layer_scale_init: float | None = None
    gelu: str = "tanh"  # tanh (Google) | erf (everybody else)
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"  # operands of matrix products: float32 | bfloat16
    scan: bool = False  # one compiled block for all layers
    remat: str = "none"  # none | dots | full: what the backward pass recomputes

    def __post_init__(self) -> None:
        choices = {
            "pool": ("cls", "gap", "map"),
            "posemb": ("learned", "learned_2d", "sincos2d", "none"),
            "gelu": tuple(GELU),
            "dtype": ("float32", "bfloat16"),
            "remat": ("none", *REMAT_POLICIES),
        }
        for field, allowed in choices.items():
            if (value := getattr(self, field)) not in allowed:
                raise UserError(f"model.{field} is {value!r}: use one of {', '.join(allowed)}")
        for field in ("patch_size", "depth", "width", "mlp_dim", "num_heads", "channels"):
            if (value := getattr(self, field)) < 1:
                raise UserError(f"model.{field} is {value}: it must be at least 1")
        for field in ("dropout", "stochastic_depth"):
            if not 0 <= (value := getattr(self, field)) < 1:
                raise UserError(f"model.{field} is {value}: use a rate of at least 0, below 1")
        if any(size % self.patch_size or size < 1 for size in self.image_size):
            raise UserError(
                f"image_size is {self.image_size}, which patches of {self.patch_size} pixels "
                f"do not tile: use multiples of {self.patch_size}"
            )
        if self.width % self.num_heads:
            raise UserError(
                f"model.width is {self.width}, which {self.num_heads} heads do not divide: "
                f"change model.width or model.num_heads"
            )
        divisor = {"sincos2d": 4, "learned_2d": 2}.get(self.posemb, 1)
        if self.width % divisor or (self.posemb == "sincos2d" and self.width < 8):
            raise UserError(
                f"model.width is {self.width}, but model.posemb={self.posemb!r} needs a "
                f"multiple of {divisor}, at least 8"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def block_rates(self) -> list[float]:
        """Stochastic-depth rate of each block, 0 at the first, linear in depth."""
        return [self.stochastic_depth * i / max(self.depth - 1, 1) for i in range(self.depth)]


def config_from(
    fields: Any, image_size: tuple[int, int], channels: int, num_classes: int
) -> ViTConfig:
    """Reads a `config.model`: the variant's shape, with whatever fields are set beside it."""
    shape, patch_size = decode_variant(fields.variant)
    given = {
        field.name: getattr(fields, field.name)
        for field in dataclasses.fields(ViTConfig)
        if field.name not in ("image_size", "channels", "num_classes", "patch_size")
    }
    for name, value in shape._asdict().items():
        given[name] = value if given[name] is None else given[name]
    height, width = image_size
    return ViTConfig((height, width), channels, patch_size, num_classes=num_classes, **given)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts (B, H, W, C) images into (B, N, P, P, C) patches, row by row."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.swapaxes(2, 3).reshape(b, -1, patch, patch, c)


def posemb_sincos_2d(
    grid: tuple[int, int], width: int, temperature: float = 10_000.0
) -> jax.Array:
    """Fixed sine-cosine position embeddings, (N, D) float32 (MoCo v3; arXiv 2205.01580).

    Each row is [sin(x w), cos(x w), sin(y w), cos(y w)] with D/4 frequencies w that fall
    geometrically from 1 to 1/temperature, both ends included.
    """
    y, x = (jnp.asarray(a.ravel(), jnp.float32) for a in jnp.indices(grid))
    omega = temperature ** -jnp.linspace(0.0, 1.0, width // 4)
    x, y = x[:, None] * omega, y[:, None] * omega
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


class PositionEmbedding(nn.Module):
    """Adds E_pos of equation (1) to (B, T, D) tokens, the class token first if there is one.

    Only `learned` has a row for the class token, as in published checkpoints; for the other
    kinds that row would be one more constant on top of the learned class token itself.
    """

    cfg: ViTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg, (rows, columns) = self.cfg, self.cfg.grid
        init = nn.initializers.normal(0.02)
        if cfg.posemb == "none":
            return tokens
        if cfg.posemb == "learned":
            return tokens + self.param("pos_embedding", init, (1, *tokens.shape[1:]))
        if cfg.posemb == "sincos2d":
            table = posemb_sincos_2d(cfg.grid, cfg.width)
        else:
            x = self.param("pos_embedding_x", init, (columns, cfg.width // 2))
            y = self.param("pos_embedding_y", init, (rows, cfg.width // 2))
            shape = (rows, columns, cfg.width // 2)
            halves = (jnp.broadcast_to(x, shape), jnp.broadcast_to(y[:, None], shape))
            table = jnp.concatenate(halves, axis=-1).reshape(-1, cfg.width)
        first_patch = tokens.shape[1] - table.shape[0]
        return tokens.at[:, first_patch:].add(table)


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

        def project(name: str, tokens: jax.Array) -> jax.Array:  # -> (B, k, T, d)
            return Dense(width, heads, cfg.dtype, xavier, name=name)(tokens).swapaxes(1, 2)

        q, k, v = project("query", x), project("key", memory), project("value", memory)
        y, weights = attend(q, k, v, cfg.dtype)
        out = Dense(heads, width, cfg.dtype, xavier, name="out")
        return out(y.swapaxes(1, 2)), weights


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between them; dropout after each (Appendix B.1)."""

    cfg: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, width, hidden = self.cfg, (self.cfg.width,), (self.cfg.mlp_dim,)
        inits = nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.train)
        x = Dense(width, hidden, cfg.dtype, *inits, name="Dense_0")(x)
        x = dropout(GELU[cfg.gelu](x))
        x = Dense(hidden, width, cfg.dtype, *inits, name="Dense_1")(x)
        return dropout(x)


class EncoderBlock(nn.Module):
    """Equations (2) and (3) on (B, T, D) tokens; also returns what happened inside."""

    cfg: ViTConfig
    train: bool
    return_attention: bool

    @nn.compact
    def __call__(self, z: jax.Array, drop_rate: jax.Array | float) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        norm = lambda i: layer_norm(cfg.layer_norm_eps, f"LayerNorm_{i}")

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
        z = z + branch(y, 0)
        out["mlp"] = y = MlpBlock(cfg, self.train, name="MlpBlock_0")(norm(1)(z))
        out["output"] = z = z + branch(y, 1)
        return z, out


class Encoder(nn.Module):
    """Position embeddings, L blocks and the final LayerNorm, on (B, T, D) tokens."""

    cfg: ViTConfig
    train: bool
    return_attention: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Out]:
        cfg, out = self.cfg, {}
        z = PositionEmbedding(cfg, name="posembed_input")(tokens)
        if cfg.registers:
            init = nn.initializers.normal(0.02)
            registers = self.param("registers", init, (1, cfg.registers, cfg.width))
            registers = jnp.broadcast_to(registers, (z.shape[0], *registers.shape[1:]))
            position = cfg.pool == "cls"  # after the class token, before the patches
            z = jnp.concatenate([z[:, :position], registers, z[:, position:]], axis=1)
        out["embedded"] = z = nn.Dropout(cfg.dropout, deterministic=not self.train)(z)
        z, blocks = self.blocks(z)
        for i, block in enumerate(blocks):
            out |= {f"encoderblock_{i}/{name}": value for name, value in block.items()}
        out["encoded"] = z = layer_norm(cfg.layer_norm_eps, "encoder_norm")(z)
        return z, out

    def blocks(self, z: jax.Array) -> tuple[jax.Array, list[Out]]:
        cfg, block = self.cfg, EncoderBlock
        if cfg.remat != "none":
            # Under scan the loop itself keeps XLA from merging the recomputation away.
            policy = REMAT_POLICIES[cfg.remat]
            block = nn.remat(block, policy=policy, prevent_cse=not cfg.scan)
        if not cfg.scan:
            outs = []
            for i, rate in enumerate(cfg.block_rates):
                name = f"encoderblock_{i}"
                z, out = block(cfg, self.train, self.return_attention, name=name)(z, rate)
                outs.append(out)
            return z, outs
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=cfg.depth,
        )(cfg, self.train, self.return_attention, name="encoderblock")
        z, stacked = layers(z, jnp.asarray(cfg.block_rates))
        return z, [{k: v[i] for k, v in stacked.items()} for i in range(cfg.depth)]


class MAPHead(nn.Module):
    """Multihead attention pooling (arXiv 2106.04560): a learned query over all tokens."""

    cfg: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        cfg = self.cfg
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, cfg.width))
        probe = jnp.broadcast_to(probe, (tokens.shape[0], 1, cfg.width))
        attention = MultiHeadDotProductAttention(cfg, name="MultiHeadDotProductAttention_0")
        x, _ = attention(probe, tokens)
        y = layer_norm(cfg.layer_norm_eps, "LayerNorm_0")(x)
        return (x + MlpBlock(cfg, self.train, name="MlpBlock_0")(y))[:, 0]


class VisionTransformer(nn.Module):
    """(B, H, W, C) float32 images, already normalised, to (B, K) float32 logits."""

    cfg: ViTConfig
    train: bool = False
    return_attention: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, Out]:
        cfg = self.cfg
        if images.shape[1:] != (*cfg.image_size, cfg.channels):
            raise ValueError(
                f"images of shape {images.shape[1:]} given to a model built for "
                f"{(*cfg.image_size, cfg.channels)}"
            )
        patch_shape = (cfg.patch_size, cfg.patch_size, cfg.channels)
        embedding = Dense(patch_shape, (cfg.width,), cfg.dtype, name="embedding")
        tokens = patch_embedding = embedding(patchify(images, cfg.patch_size))
        if cfg.pool == "cls":
            cls = self.param("cls", nn.initializers.zeros, (1, 1, cfg.width))
            cls = jnp.broadcast_to(cls, (images.shape[0], 1, cfg.width))
            tokens = jnp.concatenate([cls, tokens], axis=1)
        z, out = Encoder(cfg, self.train, self.return_attention, name="Transformer")(tokens)
        if cfg.pool == "map":
            y = MAPHead(cfg, self.train, name="MAPHead_0")(z)
        else:
            y = z[:, 0] if cfg.pool == "cls" else z.mean(axis=1)
        out |= {"patch_embedding": patch_embedding, "pooled": y}
        if cfg.representation_size:
            hidden = (cfg.representation_size,)
            y = jnp.tanh(Dense((cfg.width,), hidden, cfg.dtype, name="pre_logits")(y))
        out["pre_logits"] = y
        if cfg.num_classes:
            zeros, bias = nn.initializers.zeros, nn.initializers.constant(cfg.head_bias_init)
            head = Dense(y.shape[-1:], (cfg.num_classes,), cfg.dtype, zeros, bias, name="head")
            y = head(y)
        out["logits"] = y
        return y, out


class Apply(Protocol):
    def __call__(
        self,
        params: Params,
        images: jax.Array,
        *,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        return_attention: bool = False,
    ) -> tuple[jax.Array, Out]: ...


class Model(NamedTuple):
    """The seam between a network and everything else; nothing outside `models` sees Flax.

    Attributes:
      config: what was built.
      init: `init(key) -> params`, nested dicts of float32 arrays.
      apply: `apply(params, images, train=False, rngs=None, return_attention=False)
        -> (logits, out)`: (B, H, W, C) float32 images to (B, K) float32 logits (with K = 0,
        to the representation), and a dict of named intermediates: `patch_embedding`
        (B, N, D), `embedded` z_0 and `encoded` (B, T, D), `encoderblock_i/{msa,mlp,output}`
        (B, T, D), `pooled`, `pre_logits`, `logits`; on request `encoderblock_i/attention`
        (B, k, T, T). Under jit, what is not used costs nothing. `rngs={"dropout": key}` is
        needed when training with dropout or stochastic depth.
    """

    config: ViTConfig
    init: Callable[[jax.Array], Params]
    apply: Apply


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
    ) -> tuple[jax.Array, Out]:
        module = VisionTransformer(cfg, train, return_attention)
        return cast(tuple[jax.Array, Out], module.apply({"params": params}, images, rngs=rngs))

    return Model(cfg, init, apply)


def count_parameters(params: Params) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
