"""Supervised classification with softmax or sigmoid cross-entropy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.models.model import Model, Params
from vit_jax.system.errors import UserError

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


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


@dataclasses.dataclass(frozen=True)
class Classification:
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

    def score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint has most of."""
        return metrics["accuracy"]

    def __post_init__(self) -> None:
        if self.loss_name not in LOSSES:
            raise UserError(
                f"objective.loss is {self.loss_name!r}: use one of {', '.join(LOSSES)}"
            )
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"objective.label_smoothing is {self.label_smoothing}: use at least 0, below 1"
            )

    def init(self, key: jax.Array) -> tuple[Params, dict[str, Any]]:
        return self.model.init(key), {}

    def loss(
        self, params: Params, extra: dict[str, Any], batch: Batch, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
        rngs = {"dropout": key} if train else None
        logits, _ = self.model.apply(params, batch["image"], train=train, rngs=rngs)
        targets = batch.get("targets")
        if targets is None:
            targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        if train:
            targets = smooth_labels(targets, self.label_smoothing)
        losses = LOSSES[self.loss_name](logits, targets)
        correct = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        mask = batch.get("mask", jnp.ones_like(losses))
        count = mask.sum()
        total = jnp.where(mask > 0, losses, 0.0).sum()
        metrics = {"loss": (total, count), "accuracy": ((correct * mask).sum(), count)}
        return total / count, (metrics, extra)
