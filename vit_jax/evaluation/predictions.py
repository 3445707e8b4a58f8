"""The most probable classes of images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax.checkpoints import trained
from vit_jax.evaluation import inference
from vit_jax.evaluation.inference import Unreadable
from vit_jax.system.errors import UserError


class Prediction(NamedTuple):
    path: str
    classes: list[tuple[str, float]]  # names with probabilities, most probable first


def predict(
    model: trained.Trained,
    paths: list[str],
    topk: int,
    batch_size: int | None,
    mesh: Any,
    threshold: float | None = None,
) -> Iterator[Prediction | Unreadable]:
    """Yields one result for each path, in order.

    Args:
      model: the weights.
      paths: of image files.
      topk: how many classes, the most probable first; with a threshold at most so many.
      batch_size: images at a time; None: the fastest.
      mesh: the devices.
      threshold: the least probability of a class that counts; None: whatever it is.

    Raises:
      UserError: the model has no classes.
    """
    if not model.class_names:
        raise UserError("the model has no head to predict with: fine-tune it first")
    names, loss = model.class_names, model.config.objective.loss
    to_probabilities = jax.nn.sigmoid if loss == "sigmoid" else jax.nn.softmax
    rows = inference.apply_to_images(
        model, lambda logits, out: to_probabilities(logits), paths, batch_size, mesh
    )
    for path, row in zip(paths, rows, strict=True):
        if isinstance(row, Unreadable):
            yield row
        else:
            order = np.argsort(-row, kind="stable")[:topk]
            best = [k for k in order if threshold is None or row[k] >= threshold]
            yield Prediction(path, [(names[k], float(row[k])) for k in best])
