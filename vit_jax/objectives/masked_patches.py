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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.kernels import matmul
from vit_jax.models.layers import patchify
from vit_jax.models.model import Model
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives.objective import (
    Batch,
    Carried,
    Extra,
    Metrics,
    Objective,
    Params,
    Result,
)
from vit_jax.system.errors import UserError

TARGETS = ("mean_colour", "small_patch", "pixels")
LEVELS = 8  # 3 bits a channel
CELLS = 4  # rows and columns of the small patch
MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest stays


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


def keys_of(pixels: jax.Array) -> jax.Array:
    """(B,) random keys that depend on the (B, H, W, C) uint8 pixels of an image alone."""
    flat = pixels.reshape(len(pixels), -1).astype(jnp.uint32)
    # Odd weights, so that no change of a single value goes unseen; products wrap around.
    weights = 2 * jnp.uint32(2654435761) * jnp.arange(flat.shape[1], dtype=jnp.uint32) + 1
    return jax.vmap(jax.random.key)((flat * weights).sum(axis=1, dtype=jnp.uint32))


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
class MaskedPatches(Objective):
    """Predicts corrupted patches from a model without a head.

    A batch holds `image` (B, H, W, C) float32, normalised; `pixels`, the same as uint8; and
    optionally `mask` (B,) with 0 for padding, which no metric counts.

    Raises (on construction):
      UserError: the model is no Vision Transformer, or the target does not fit its patches.
    """

    model: Model
    target: str = "mean_colour"
    ratio: float = 0.5
    best = "-eval/loss"

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

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        width = self.model.config.width
        mask_key, head_key = jax.random.split(jax.random.fold_in(key, 1))
        own = {
            "mask": 0.02 * jax.random.normal(mask_key, (1, 1, width)),
            "head": {
                "kernel": jax.nn.initializers.lecun_normal()(head_key, (width, self.outputs)),
                "bias": jnp.zeros((self.outputs,)),
            },
        }
        return {"model": self.model.init(key), "objective": own}, {}

    def loss(self, params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Result:
        corrupt_key, dropout_key = jax.random.split(key)
        images = batch["image"]
        corruption = corrupt(corrupt_key, len(images), self._patches, self.ratio)
        rngs = {"dropout": dropout_key}
        metrics = self._metrics(params, batch, corruption, train=True, rngs=rngs)
        total, count = metrics["loss"]
        return Result(total / count, metrics, {})

    def evaluate(self, params: Params, carried: Carried, batch: Batch) -> Metrics:
        """An image is corrupted by a draw of its own, the same each time and in any batch."""
        draw = lambda key: corrupt(key, 1, self._patches, self.ratio)
        one_each = jax.vmap(draw)(keys_of(batch["pixels"]))
        corruption = jax.tree.map(lambda x: x[:, 0], one_each)
        return self._metrics(params, batch, corruption)

    @property
    def _patches(self) -> int:
        return math.prod(self.model.config.grid)

    def _metrics(
        self,
        params: Params,
        batch: Batch,
        corruption: Corruption,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
    ) -> Metrics:
        cfg, own, images = self.model.config, params["objective"], batch["image"]

        def edit(tokens: jax.Array) -> jax.Array:
            moved = jnp.take_along_axis(tokens, corruption.source[..., None], axis=1)
            return jnp.where(corruption.masked[..., None], own["mask"], moved)

        _, out = self.model.apply(
            params["model"], images, train=train, rngs=rngs, edit_patches=edit
        )
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

        return {name: (total(values), count) for name, values in per_patch.items()}

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
