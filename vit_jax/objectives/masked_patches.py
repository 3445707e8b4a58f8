"""Masked patch prediction: self-supervision of arXiv 2010.11929, section 4.6 and B.1.2.

Half of the patch embeddings of an image are corrupted: 80% of these are replaced by a learned
[mask] embedding, 10% by that of another patch, 10% stay. From the output at each corrupted
place the patch is predicted, in one of three ways:

  mean_colour  the mean colour of the patch in 3 bits a channel: one of 512
  small_patch  the patch shrunk to 4 x 4, each cell's colour in 3 bits: 16 times one of 512
  pixels       all its values, by squared error

The paper reports the first. It does not say whether "another patch" comes from the same image
(here it does), nor how many patches an image with an odd number of them has corrupted (here
the half is rounded).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.kernels import matmul
from vit_jax.models.layers import patchify
from vit_jax.models.model import Model, Params
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

TARGETS = ("mean_colour", "small_patch", "pixels")
LEVELS = 8  # 3 bits a channel
CELLS = 4  # rows and columns of the small patch
MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest stays
# Where these parameters stand, beside those of the model.
NAME = "masked_patches"


class Corruption(NamedTuple):
    """What happens to each of the (B, N) patches.

    Attributes:
      predicted: whether it is to be predicted, bool.
      masked: whether [mask] takes its place, bool.
      source: whose embedding takes its place otherwise, int32; mostly its own.
    """

    predicted: jax.Array
    masked: jax.Array
    source: jax.Array


def corrupt(key: jax.Array, batch_size: int, patches: int, ratio: float) -> Corruption:
    """Draws which patches of each image are corrupted, and how; the same number in each."""
    choice_key, fate_key, swap_key = jax.random.split(key, 3)
    shape = (batch_size, patches)
    rank = jax.random.uniform(choice_key, shape).argsort(axis=1).argsort(axis=1)
    predicted = rank < round(ratio * patches)
    fate = jax.random.uniform(fate_key, shape)
    own = jnp.broadcast_to(jnp.arange(patches), shape)
    # Any but itself: one of the N - 1 steps to the right, around the end.
    other = (own + jax.random.randint(swap_key, shape, 1, max(patches, 2))) % patches
    swapped = predicted & (fate >= MASKED) & (fate < MASKED + SWAPPED)
    return Corruption(predicted, predicted & (fate < MASKED), jnp.where(swapped, other, own))


def quantise(pixels: jax.Array) -> jax.Array:
    """(..., C) colours in [0, 255] to (...) int32 classes below 8^C, 3 bits a channel."""
    levels = jnp.clip(jnp.floor(pixels * LEVELS / 256), 0, LEVELS - 1).astype(jnp.int32)
    weights = LEVELS ** jnp.arange(pixels.shape[-1] - 1, -1, -1)
    return (levels * weights).sum(axis=-1)


def colour_classes(pixels: jax.Array, patch: int, cells: int) -> jax.Array:
    """(B, H, W, C) uint8 images to (B, N, cells^2) classes of mean colours."""
    x = patchify(pixels.astype(jnp.float32), patch)
    b, n, _, _, c = x.shape
    x = x.reshape(b, n, cells, patch // cells, cells, patch // cells, c).mean(axis=(3, 5))
    return quantise(x).reshape(b, n, cells * cells)


@dataclasses.dataclass(frozen=True)
class MaskedPatches:
    """Predicts corrupted patches from a model without a head.

    A batch holds `image` (B, H, W, C) float32, normalised; `pixels`, the same as uint8; and
    optionally `mask` (B,) with 0 for padding, which no metric counts.

    Raises (on construction):
      UserError: the model is no Vision Transformer, or the target does not fit its patches.
    """

    model: Model
    target: str = "mean_colour"
    ratio: float = 0.5

    def score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint has most of."""
        return -metrics["loss"]

    def __post_init__(self) -> None:
        cfg = self.model.config
        if not isinstance(cfg, ViTConfig):
            raise UserError("objective.name='masked_patches' needs a Vision Transformer")
        if self.target not in TARGETS:
            raise UserError(
                f"objective.target is {self.target!r}: use one of {', '.join(TARGETS)}"
            )
        if not 0.0 < self.ratio <= 1.0:
            raise UserError(f"objective.mask_ratio is {self.ratio}: use above 0, at most 1")
        if round(self.ratio * math.prod(cfg.grid)) < 1:
            raise UserError(
                f"objective.mask_ratio is {self.ratio}, which is none of the "
                f"{math.prod(cfg.grid)} patches of an image: use more"
            )
        if self.target == "small_patch" and cfg.patch_size % CELLS:
            raise UserError(
                f"objective.target='small_patch' shrinks patches to {CELLS} x {CELLS}, which "
                f"{cfg.patch_size} pixels are no multiple of"
            )

    @property
    def outputs(self) -> int:
        """Numbers predicted for each patch."""
        cfg = self.model.config
        if self.target == "pixels":
            return int(cfg.patch_size**2 * cfg.channels)
        cells = CELLS if self.target == "small_patch" else 1
        return int(cells**2 * LEVELS**cfg.channels)

    def init(self, key: jax.Array) -> tuple[Params, dict[str, Any]]:
        width = self.model.config.width
        mask_key, head_key = jax.random.split(jax.random.fold_in(key, 1))
        own = {
            "mask": 0.02 * jax.random.normal(mask_key, (1, 1, width)),
            "head": {
                "kernel": jax.nn.initializers.lecun_normal()(head_key, (width, self.outputs)),
                "bias": jnp.zeros((self.outputs,)),
            },
        }
        return {**self.model.init(key), NAME: own}, {}

    def loss(
        self, params: Params, extra: dict[str, Any], batch: Batch, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
        cfg, own = self.model.config, params[NAME]
        model = {name: value for name, value in params.items() if name != NAME}
        corrupt_key, dropout_key = jax.random.split(key)
        images, patches = batch["image"], math.prod(cfg.grid)
        corruption = corrupt(corrupt_key, len(images), patches, self.ratio)

        def edit(tokens: jax.Array) -> jax.Array:
            moved = jnp.take_along_axis(tokens, corruption.source[..., None], axis=1)
            return jnp.where(corruption.masked[..., None], own["mask"], moved)

        rngs = {"dropout": dropout_key} if train else None
        _, out = self.model.apply(model, images, train=train, rngs=rngs, edit_patches=edit)
        encoded = out["encoded"][:, cfg.prefix :]
        flat = matmul(encoded.reshape(-1, cfg.width), own["head"]["kernel"], cfg.dtype)
        predictions = flat.reshape(*encoded.shape[:2], -1) + own["head"]["bias"]
        per_patch = self._compare(predictions, batch)
        mask = batch.get("mask", jnp.ones(len(images)))
        count = mask.sum()

        def total(values: jax.Array) -> jax.Array:
            """Sum over the examples of the mean over their corrupted patches."""
            means = values.mean(axis=1, where=corruption.predicted)
            return jnp.where(mask > 0, means, 0.0).sum()

        metrics = {name: (total(values), count) for name, values in per_patch.items()}
        return metrics["loss"][0] / count, (metrics, extra)

    def _compare(self, predictions: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """(B, N, outputs) predictions to (B, N) losses and, of classes, accuracies."""
        cfg = self.model.config
        if self.target == "pixels":
            targets = patchify(batch["image"], cfg.patch_size).reshape(predictions.shape)
            return {"loss": jnp.square(predictions - targets).mean(axis=-1)}
        cells = CELLS if self.target == "small_patch" else 1
        targets = colour_classes(batch["pixels"], cfg.patch_size, cells)
        logits = predictions.reshape(*targets.shape, -1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        correct = logits.argmax(axis=-1) == targets
        return {"loss": losses.mean(axis=-1), "accuracy": correct.mean(axis=-1)}
