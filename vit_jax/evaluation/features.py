"""Features of images: what probes of a frozen network read.

Features are the `pre_logits` of a model, what its head sees: of a plain Vision Transformer
the pooled token after the last LayerNorm; with `representation_size` the tanh of the layer
after that. They are computed once for each set of images and shared by all probes:

    step = make_feature_step(model, prepare, mesh)
    test = extract(lambda batch: step(params, batch), batches)

Features, labels and results lie on the host. The probes compute on one device, in float32
with full-precision products; whitening is done on the host in float64.
"""

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.data.on_device import Batch, Prepare
from vit_jax.distributed import sharding
from vit_jax.models.model import Model
from vit_jax.system.errors import UserError

EPSILON = 1e-5  # added to standard deviations

ROWS = 8192  # examples at a time where all of them would make too large a product


class Features(NamedTuple):
    """The representations of a set of images: (N, D) float32, and (N,) int32 labels."""

    values: np.ndarray
    labels: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "Features":
        return Features(self.values[rows], self.labels[rows])


def make_feature_step(model: Model, prepare: Prepare, mesh: Mesh) -> Callable[..., Any]:
    """Returns `step(params, batch) -> (features (B, D) float32, labels (B,), mask (B,))`.

    The batch is one of `eval_batches`, split over `mesh`; the results are whole in every
    process.
    """

    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch = prepare(batch, jax.random.key(0))  # evaluation draws nothing
        _, out = model.apply(params, batch["image"])
        return out["pre_logits"].astype(jnp.float32), batch["label"], batch["mask"]

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def extract(step: Callable[[Any], Any], batches: Iterable[Any]) -> Features:
    """The features that `step(batch) -> (features, labels, mask)` gives, in order.

    Rows whose mask is 0, the padding of the last batch, are left out.

    Raises:
      UserError: a feature is NaN or infinite.
    """
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    queued: list[Any] = []

    def fetch() -> None:
        values, labels, mask = jax.device_get(queued.pop(0))
        parts.append((values[mask > 0], labels[mask > 0]))

    for batch in batches:
        queued.append(step(batch))
        if len(queued) > 2:  # the device works on two batches while the first is fetched
            fetch()
    while queued:
        fetch()
    values, labels = map(np.concatenate, zip(*parts, strict=True))
    if not np.isfinite(values).all():
        raise UserError("the model's features hold NaN or infinity: use another checkpoint")
    return Features(values, labels)


def whitening(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation + 1e-5 of each feature, (D,) float64."""
    mean = values.mean(axis=0, dtype=np.float64)
    squares = sum(((rows - mean) ** 2).sum(axis=0) for rows in blocks(values))
    return mean, np.sqrt(squares / len(values)) + EPSILON


def whiten(values: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N, D) float32, worked out in float64.

    A feature that hardly varies is divided by almost nothing, and with it the rounding of
    its mean.
    """
    return np.concatenate([np.float32((rows - mean) / scale) for rows in blocks(values)])


def blocks(values: np.ndarray) -> Iterable[np.ndarray]:
    return (values[i : i + ROWS] for i in range(0, len(values), ROWS))


def accuracy(predicted: Any, labels: np.ndarray) -> float:
    return int((np.asarray(predicted) == labels).sum()) / len(labels)


def read_labels(source: Any, threads: int) -> np.ndarray:
    """(N,) int32: the label of every example of a source.

    No image is decoded for it, but where labels and images lie in one record (`tfds:`) all
    records are read.
    """

    def read(start: int) -> list[int]:
        return [source[i]["label"] for i in range(start, min(start + 1024, len(source)))]

    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(read, range(0, len(source), 1024))
        return np.fromiter(itertools.chain.from_iterable(parts), np.int32, len(source))


@dataclass(frozen=True)
class Rows:
    """The examples `indices` of a source, as a source."""

    source: Any
    indices: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.source.class_names)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example: dict[str, Any] = self.source[int(self.indices[i])]
        return example
