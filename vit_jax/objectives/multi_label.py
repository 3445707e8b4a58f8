"""Classification of images with several labels, or none: K yes/no questions."""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.models.model import Model
from vit_jax.objectives.classification import sigmoid_cross_entropy, targets_of
from vit_jax.objectives.objective import Batch, Carried, Metrics, Objective, Params, Result

RANKING = "ranking"  # of the metrics: what average precision is computed from
LEFT_OUT = -1  # in place of 0 and 1, for examples that no metric counts


@dataclasses.dataclass(frozen=True)
class MultiLabel(Objective):
    """Sigmoid cross-entropy, summed over classes.

    A batch holds `image` (B, H, W, C) float32, normalised; `targets` (B, K) float32, of 0 and 1
    before mixing, or `label` (B,) int32; and optionally `mask` (B,) with 0 for padding, which
    no metric counts.

    In evaluation the metrics have `RANKING`: (B, K) float32 scores, and (B, K) int8 with 1 for
    a label that is there, 0 for one that is not, and `LEFT_OUT`. Average precision is of all
    examples together, and no sum over batches.
    """

    model: Model
    best = "eval/mAP"

    def loss(self, params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Result:
        rngs = {"dropout": key}
        logits, _ = self.model.apply(params["model"], batch["image"], train=True, rngs=rngs)
        metrics = self._metrics(logits, targets_of(batch, logits.shape[-1]), batch)
        total, count = metrics["loss"]
        return Result(total / count, metrics, {})

    def evaluate(self, params: Params, carried: Carried, batch: Batch) -> Metrics:
        logits, _ = self.model.apply(params["model"], batch["image"])
        targets = targets_of(batch, logits.shape[-1])
        metrics = self._metrics(logits, targets, batch)
        mask = batch.get("mask", jnp.ones(len(logits)))
        there = jnp.where(mask[:, None] > 0, targets, LEFT_OUT).astype(jnp.int8)
        metrics[RANKING] = (jax.nn.sigmoid(logits.astype(jnp.float32)), there)
        return metrics

    def _metrics(self, logits: jax.Array, targets: jax.Array, batch: Batch) -> Metrics:
        losses = sigmoid_cross_entropy(logits, targets)
        mask = batch.get("mask", jnp.ones_like(losses))
        count = mask.sum()
        total = jnp.where(mask > 0, losses, 0.0).sum()
        exact = ((logits > 0) == (targets > 0.5)).all(axis=-1)
        return {"loss": (total, count), "exact_match": ((exact * mask).sum(), count)}
