"""Everything that decides what a Vision Transformer computes, checked as a whole."""

import dataclasses

from vit_jax.models.attention import ATTENTION_KERNELS
from vit_jax.models.checks import check_choices, check_positive, check_rates, check_tiles
from vit_jax.models.layers import GELU, REMAT_POLICIES
from vit_jax.models.resnet import reduction
from vit_jax.system.errors import UserError

CHOICES = {
    "pool": ("cls", "gap", "cls_gap", "map"),
    "distillation": ("none", "token", "heads"),
    "final_norm": ("encoder", "pooled"),
    "posemb": ("learned", "learned_2d", "sincos2d", "none"),
    "posemb_at": ("stem", "layers", "shared"),
    "relative": ("none", "keys", "bias"),
    "mlp": ("gelu", "swiglu"),
    "gelu": tuple(GELU),
    "attention": ATTENTION_KERNELS,
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", *REMAT_POLICIES),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The shape and numerics of a network; every layer reads this one object.

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
    resnet: tuple[int, ...] | None = None  # units in each stage of a ResNet in front (hybrids)
    pool: str = "cls"  # cls | gap (mean of the patches) | cls_gap (both) | map (by attention)
    class_token: bool | None = None  # None: if the pooling needs one
    distillation: str = "none"  # none | token (a second class token) | heads (and its own head)
    final_norm: str = "encoder"  # encoder | pooled: before or after pooling
    posemb: str = "learned"  # learned (1-D) | learned_2d | sincos2d | none
    posemb_at: str = "stem"  # stem | layers (each its own) | shared (the same at every layer)
    relative: str = "none"  # none | keys (arXiv 2010.11929, D.4) | bias (BEiT, 2106.08254)
    representation_size: int | None = None  # width of the tanh layer in the pre-training head
    head_bias_init: float = 0.0
    registers: int = 0  # extra learned tokens without a position (arXiv 2309.16588)
    dropout: float = 0.0
    stochastic_depth: float = 0.0  # rate of the last block; earlier blocks grow linearly to it
    layer_scale_init: float | None = None
    mlp: str = "gelu"  # gelu | swiglu (arXiv 2002.05202)
    key_bias: bool = True  # keys need none: it moves all scores of a query alike
    gelu: str = "tanh"  # tanh (Google) | erf (everybody else)
    layer_norm_eps: float = 1e-6
    dtype: str = "float32"  # operands of matrix products: float32 | bfloat16
    attention: str = "auto"  # auto | xla | cudnn | pallas: which kernel computes it
    scan: bool = False  # one array for the parameters of all layers, and a loop over them
    unroll: int | None = None  # layers in a turn of that loop; None: see `vit.unroll`
    remat: str = "none"  # none | dots | full: what the backward pass recomputes

    def __post_init__(self) -> None:
        check_choices(self, CHOICES)
        sizes = ("patch_size", "depth", "width", "mlp_dim", "num_heads", "channels")
        check_positive(self, sizes)
        check_rates(self, ("dropout", "stochastic_depth"))
        if self.unroll is not None and self.unroll < 1:
            raise UserError(f"model.unroll is {self.unroll}: use at least 1 layer, or None")
        if self.resnet is not None and self.patch_size % reduction(self.resnet):
            raise UserError(
                f"patches of {self.patch_size} pixels cannot be cut from the map of a ResNet "
                f"with model.resnet={self.resnet}, whose cells have {reduction(self.resnet)}"
            )
        check_tiles(self.image_size, self.patch_size)
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
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Which tokens there are must fit what is done with them."""
        if self.class_token is False and self.pool in ("cls", "cls_gap"):
            raise UserError(
                f"model.class_token is False, but model.pool={self.pool!r} reads it: "
                f"use model.pool='gap' or 'map'"
            )
        distilled = self.distillation != "none"
        if distilled and self.pool != "cls":
            raise UserError(
                f"model.distillation is {self.distillation!r}, a second class token: it needs "
                f"model.pool='cls', not {self.pool!r}"
            )
        if self.distillation == "heads" and (self.representation_size or not self.num_classes):
            raise UserError(
                "model.distillation='heads' is two linear heads: it needs classes and no "
                "model.representation_size"
            )
        special = self.registers or distilled
        if self.relative == "bias" and (special or not self.has_class_token):
            raise UserError(
                "model.relative='bias' has places for patches and one class token only: set "
                "model.class_token=True, model.registers=0, model.distillation='none'"
            )
        if self.registers and (self.posemb_at != "stem" or self.relative != "none"):
            raise UserError(
                f"model.registers is {self.registers}, but registers have no position: use "
                f"model.posemb_at='stem' and model.relative='none' with them"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def has_class_token(self) -> bool:
        return self.pool in ("cls", "cls_gap") if self.class_token is None else self.class_token

    @property
    def positioned_prefix(self) -> int:
        """How many tokens with a row in the position embeddings stand before the patches."""
        return self.has_class_token + (self.distillation != "none")

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches: class, distillation, registers."""
        return self.positioned_prefix + self.registers

    @property
    def block_rates(self) -> list[float]:
        """Stochastic-depth rate of each block, 0 at the first, linear in depth."""
        return [self.stochastic_depth * i / max(self.depth - 1, 1) for i in range(self.depth)]
