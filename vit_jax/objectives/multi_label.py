"""Classification of images with several labels, or none: K yes/no questions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.model import Model, Params
from vit_jax.objectives.classification import Batch, Metrics, sigmoid_cross_entropy

RANKING = "ranking"  # of the metrics: what average precision is computed from
LEFT_OUT = -1  # in place of 0 and 1, for examples that no metric counts


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Sigmoid cross-entropy, summed over classes.

    A batch holds `image` (B, H, W, C) float32, normalised; `targets` (B, K) float32, of 0 and 1
    before mixing, or `label` (B,) int32; and optionally `mask` (B,) with 0 for padding, which
    no metric counts.

    In evaluation the metrics have `RANKING`: (B, K) float32 scores, and (B, K) int8 with 1 for
    a label that is there, 0 for one that is not, and `LEFT_OUT`. Average precision is of all
    examples together, and no sum over batches.
    """

    model: Model

    def score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint has most of."""
        return metrics["mAP"]

    def init(self, key: jax.Array) -> tuple[Params, dict[str, Any]]:
        return self.model.init(key), {}

    def loss(
        self, params: Params, extra: dict[str, Any], batch: Batch, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, Any]]]:
        rngs = {"dropout": key} if train else None
        logits, _ = self.model.apply(params, batch["image"], train=train, rngs=rngs)
        targets = batch.get("targets")
        if targets is None:  # one label of each
            targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses = sigmoid_cross_entropy(logits, targets)
        mask = batch.get("mask", jnp.ones_like(losses))
        count = mask.sum()
        total = jnp.where(mask > 0, losses, 0.0).sum()
        exact = ((logits > 0) == (targets > 0.5)).all(axis=-1)
        metrics = {"loss": (total, count), "exact_match": ((exact * mask).sum(), count)}
        if not train:
            there = jnp.where(mask[:, None] > 0, targets, LEFT_OUT).astype(jnp.int8)
            metrics[RANKING] = (jax.nn.sigmoid(logits.astype(jnp.float32)), there)
        return total / count, (metrics, extra)
