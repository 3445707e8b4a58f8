"""Supervised classification with softmax or sigmoid cross-entropy."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.model import Model
from vit_jax.objectives.objective import Batch, Carried, Metrics, Objective, Params, Result
from vit_jax.system.errors import UserError


def smooth_labels(targets: jax.Array, smoothing: float) -> jax.Array:
    """Moves `smoothing` of the mass of (B, K) targets to the uniform distribution."""
    return targets * (1.0 - smoothing) + smoothing / targets.shape[-1]


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-sum_k t_k log softmax(x)_k for (B, K) logits and targets; (B,) in nats."""
    return optax.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """K independent yes/no questions, *summed* over classes; (B,) in nats.

    The sum, not the mean, is what Google's ImageNet-21k models were trained with.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def targets_of(batch: Batch, classes: int) -> jax.Array:
    """(B, K) float32: `targets` where a batch has them (after mixing), else one-hot labels."""
    targets = batch.get("targets")
    return jax.nn.one_hot(batch["label"], classes) if targets is None else targets


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of a model's logits.

    A batch holds `image` (B, H, W, C) float32, normalised; `label` (B,) int32; optionally
    `targets` (B, K) float32 that replace the one-hot labels (after mixing), and `mask` (B,)
    with 0 for padding, which no metric counts.

    Raises (on construction):
      UserError: the loss is unknown, or the smoothing is not in [0, 1).
    """

    model: Model
    loss_name: str = "softmax"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_name not in LOSSES:
            raise UserError(
                f"objective.loss is {self.loss_name!r}: use one of {', '.join(LOSSES)}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"objective.label_smoothing is {self.label_smoothing}: use at least 0, below 1"
            )

    def loss(self, params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Result:
        rngs = {"dropout": key}
        logits, _ = self.model.apply(params["model"], batch["image"], train=True, rngs=rngs)
        targets = smooth_labels(targets_of(batch, logits.shape[-1]), self.label_smoothing)
        metrics = self._metrics(logits, targets, batch)
        total, count = metrics["loss"]
        return Result(total / count, metrics, {})

    def evaluate(self, params: Params, carried: Carried, batch: Batch) -> Metrics:
        logits, _ = self.model.apply(params["model"], batch["image"])
        return self._metrics(logits, targets_of(batch, logits.shape[-1]), batch)

    def _metrics(self, logits: jax.Array, targets: jax.Array, batch: Batch) -> Metrics:
        losses = LOSSES[self.loss_name](logits, targets)
        correct = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        mask = batch.get("mask", jnp.ones_like(losses))
        count = mask.sum()
        total = jnp.where(mask > 0, losses, 0.0).sum()
        return {"loss": (total, count), "accuracy": ((correct * mask).sum(), count)}
