"""Few-shot accuracy: regularised least squares on a few images a class, in closed form.

The on-the-fly measure of arXiv 2010.11929, section 4.1.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.on_device import prepare_for_eval
from vit_jax.data.reading import eval_reading
from vit_jax.data.sources.source import Source
from vit_jax.distributed import sharding
from vit_jax.evaluation.features import (
    Features,
    Rows,
    accuracy,
    extract,
    make_feature_step,
    read_labels,
    whiten,
    whitening,
)
from vit_jax.models.model import Model
from vit_jax.system.errors import UserError

# Not in the paper: the constants of big_vision, its authors' code. Whether the paper's own
# numbers were made with them is not verified.
SEEDS = (0, 1, 2)


L2 = 1024.0

_CONSTANT = 100.0  # the value of the feature that acts as bias: hardly regularised


class Subsets(NamedTuple):
    """Which training examples the few-shot probe looks at.

    Attributes:
      indices: all of them, sorted.
      rows: {shots: one array of rows of `indices` for each seed}.
    """

    indices: np.ndarray
    rows: dict[int, list[np.ndarray]]


def choose_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Draws `shots` examples of each class, or all there are of a class with fewer.

    One generator, `default_rng(seed)`, permutes the examples of one class after the other;
    the first ones are taken. So five shots are among the ten of the same seed.

    Args:
      labels: (N,) integers; examples of no class (-1) are never drawn.

    Returns:
      Indices into `labels`, class by class.
    """
    rng = np.random.default_rng(seed)
    classes = (np.flatnonzero(labels == label) for label in range(num_classes))
    return np.concatenate([rng.permutation(members)[:shots] for members in classes])


def choose_subsets(
    labels: np.ndarray, num_classes: int, shots: Sequence[int], seeds: Sequence[int] = SEEDS
) -> Subsets:
    """Draws the training examples for every number of shots and every seed."""
    chosen = {n: [choose_shots(labels, num_classes, n, s) for s in seeds] for n in shots}
    drawn = [subset for of in chosen.values() for subset in of]
    indices = np.unique(np.concatenate([np.zeros(0, int), *drawn]))
    rows = {n: [np.searchsorted(indices, subset) for subset in of] for n, of in chosen.items()}
    return Subsets(indices, rows)


@jax.jit
def _least_squares(x: jax.Array, targets: jax.Array, l2: float) -> jax.Array:
    """W that minimises |XW - Y|^2 + l2 |W|^2: (n, D), (n, K) -> (D, K)."""
    n, width = x.shape
    with jax.default_matmul_precision("highest"):
        # Both forms give the same W; the smaller matrix is solved.
        if n >= width:
            gram = x.T @ x + l2 * jnp.eye(width)
            return jax.scipy.linalg.solve(gram, x.T @ targets, assume_a="pos")
        gram = x @ x.T + l2 * jnp.eye(n)
        return x.T @ jax.scipy.linalg.solve(gram, targets, assume_a="pos")


@jax.jit
def _linear_prediction(x: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return (x @ weights + bias).argmax(axis=-1)


def least_squares_accuracy(
    train: Features, test: Features, num_classes: int, l2: float = L2
) -> float:
    """Accuracy on `test` of least squares fitted to `train`.

    Features are whitened by the mean and deviation of `train` and get one more feature of
    constant value 100; targets are 1 for the class of an image, -1 for the others.

    Raises:
      UserError: `l2` is not above the rounding of the equations in float32.
    """
    # The squares of whitened features sum to at most n D, which bounds the eigenvalues too.
    least = float(np.finfo(np.float32).eps) * train.values.size
    if not l2 > least:
        raise UserError(f"--few_shot_l2 is {l2}: float32 needs more than {least:.1g} here")
    mean, scale = whitening(train.values)
    x = whiten(train.values, mean, scale)
    targets = 2 * np.eye(num_classes, dtype=np.float32)[train.labels] - 1
    weights = _least_squares(x, targets, l2)
    # The whitened features have mean 0, so the constant one is orthogonal to them and its
    # weights can be had apart, exactly. Left in, it adds 100 * 100 to every entry of X X^T,
    # which costs float32 about one digit and a half.
    square = _CONSTANT**2
    bias = square * targets.sum(axis=0, dtype=np.float64) / (square * len(targets) + l2)
    tested = whiten(test.values, mean, scale)
    return accuracy(_linear_prediction(tested, weights, np.float32(bias)), test.labels)


def few_shot_accuracy(
    train: Features, test: Features, subsets: Subsets, num_classes: int, l2: float = L2
) -> dict[int, list[float]]:
    """{shots: accuracy for each seed} of least squares on few images a class.

    Args:
      train: features of the examples `subsets.indices`, in that order.
      test: features of all test images.
      l2: strength of the regularisation.
    """

    def accuracy(rows: np.ndarray) -> float:
        return least_squares_accuracy(train.take(rows), test, num_classes, l2)

    return {shots: [accuracy(rows) for rows in of] for shots, of in subsets.rows.items()}


def build_few_shot(
    config: ConfigDict, model: Model, source: Source, eval_source: Source, mesh: Mesh
) -> Callable[[Any], dict[str, float]]:
    """Returns `probe(params) -> {"few_shot/5": accuracy}`, averaged over the choices of images.

    The images are chosen when it is called first, from the labels of all of `source`.
    """
    shots, classes = tuple(config.few_shot.shots), len(source.class_names)
    if shots and config.data.multi_label:
        raise UserError(
            f"few_shot.shots is {shots}, but it needs one label of each image, and "
            f"data.multi_label is {config.data.multi_label!r}: set few_shot.shots=()"
        )
    step = make_feature_step(model, prepare_for_eval(config), mesh)
    chosen: list[Subsets] = []

    def features_of(params: Any, source: Any) -> Features:
        batches = eval_reading(config, mesh).eval_batches(source, config.eval_batch_size)
        with contextlib.closing(batches):
            on_device = (sharding.put_batch(batch, mesh) for batch in batches)
            return extract(lambda batch: step(params, batch), on_device)

    def probe(params: Any) -> dict[str, float]:
        if not chosen:
            labels = read_labels(source, config.data.threads)
            chosen.append(choose_subsets(labels, classes, shots, SEEDS))
        [subsets] = chosen
        train = features_of(params, Rows(source, subsets.indices))
        found = few_shot_accuracy(train, features_of(params, eval_source), subsets, classes)
        return {f"few_shot/{n}": float(np.mean(each)) for n, each in found.items()}

    return probe
