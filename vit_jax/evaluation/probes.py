"""How good is a representation, without fine-tuning? Three probes of frozen features.

    few-shot       regularised least squares on a few images a class, in closed form
                   (arXiv 2010.11929, section 4.1)
    k neighbours   a weighted vote of the nearest training images (arXiv 2104.14294)
    linear probe   softmax regression on the whole training set (as in arXiv 2103.00020)

Features are the `pre_logits` of a model, what its head sees: of a plain Vision Transformer
the pooled token after the last LayerNorm; with `representation_size` the tanh of the layer
after that. They are computed once for each set of images and shared by all probes:

    step = make_feature_step(model, prepare, mesh)
    test = extract(lambda batch: step(params, batch), batches)

Features, labels and results lie on the host. The probes compute on one device, in float32
with full-precision products; whitening is done on the host in float64.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax.distributed import sharding
from vit_jax.models.model import Model
from vit_jax.system.errors import UserError
from vit_jax.training.step import Batch, Prepare

# Not in the paper: the constants of big_vision, its authors' code. Whether the paper's own
# numbers were made with them is not verified.
SEEDS = (0, 1, 2)
L2 = 1024.0
_CONSTANT = 100.0  # the value of the feature that acts as bias: hardly regularised
_EPSILON = 1e-5  # added to standard deviations

TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO

_SWEEP = tuple(10.0**power for power in range(1, -7, -1))  # L2 strengths, strongest first
_HELD_OUT = 0.2  # of the training examples, to choose the strength on
_MAX_UPDATES = 1000
_GRADIENT_TOLERANCE = 1e-5

_ROWS = 8192  # examples at a time where all of them would make too large a product


# --- Features -----------------------------------------------------------------------------


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


def _whitening(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation + 1e-5 of each feature, (D,) float64."""
    mean = values.mean(axis=0, dtype=np.float64)
    squares = sum(((rows - mean) ** 2).sum(axis=0) for rows in _blocks(values))
    return mean, np.sqrt(squares / len(values)) + _EPSILON


def _whiten(values: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N, D) float32, worked out in float64.

    A feature that hardly varies is divided by almost nothing, and with it the rounding of
    its mean.
    """
    return np.concatenate([np.float32((rows - mean) / scale) for rows in _blocks(values)])


def _blocks(values: np.ndarray) -> Iterable[np.ndarray]:
    return (values[i : i + _ROWS] for i in range(0, len(values), _ROWS))


def _accuracy(predicted: Any, labels: np.ndarray) -> float:
    return int((np.asarray(predicted) == labels).sum()) / len(labels)


# --- Few-shot: regularised least squares --------------------------------------------------


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
    mean, scale = _whitening(train.values)
    x = _whiten(train.values, mean, scale)
    targets = 2 * np.eye(num_classes, dtype=np.float32)[train.labels] - 1
    weights = _least_squares(x, targets, l2)
    # The whitened features have mean 0, so the constant one is orthogonal to them and its
    # weights can be had apart, exactly. Left in, it adds 100 * 100 to every entry of X X^T,
    # which costs float32 about one digit and a half.
    square = _CONSTANT**2
    bias = square * targets.sum(axis=0, dtype=np.float64) / (square * len(targets) + l2)
    tested = _whiten(test.values, mean, scale)
    return _accuracy(_linear_prediction(tested, weights, np.float32(bias)), test.labels)


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


# --- k nearest neighbours -----------------------------------------------------------------

Nearest = tuple[jax.Array, jax.Array]  # similarities and labels, (N, k), nearest first


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@jax.jit
def _closer(nearest: Nearest, queries: jax.Array, x: jax.Array, labels: jax.Array) -> Nearest:
    """The k nearest of those found so far and one more block of training features.

    Of equal similarities the one found earlier stays in front.
    """
    with jax.default_matmul_precision("highest"):
        similarity = _unit(queries) @ _unit(x).T
    similarity = jnp.concatenate([nearest[0], similarity], axis=1)
    labels = jnp.concatenate(
        [nearest[1], jnp.broadcast_to(labels, (len(queries), len(labels)))], axis=1
    )
    best, at = jax.lax.top_k(similarity, nearest[0].shape[1])
    return best, jnp.take_along_axis(labels, at, axis=1)


@functools.partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(nearest: Nearest, num_classes: int, k: int, temperature: float) -> jax.Array:
    similarity, labels = nearest[0][:, :k], nearest[1][:, :k]
    rows = jnp.arange(len(labels))[:, None]
    votes = jnp.zeros((len(labels), num_classes))
    return votes.at[rows, labels].add(jnp.exp(similarity / temperature)).argmax(axis=-1)


def knn_accuracy(
    train: Features,
    test: Features,
    num_classes: int,
    neighbours: Sequence[int] = (20,),
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """{k: accuracy} when the k most similar training images vote for the class of each image.

    Similarity is the cosine of the angle between two features; a vote weighs
    exp(similarity / temperature).

    Raises:
      UserError: there are fewer training examples than neighbours asked for.
    """
    if max(neighbours) > len(train.labels):
        raise UserError(
            f"--knn asks for {max(neighbours)} neighbours, but there are {len(train.labels)} "
            f"training examples: use fewer neighbours"
        )
    k = max(neighbours)
    # Blocks of training features are moved to the device once, and meet all queries there.
    queries = [jnp.asarray(rows) for rows in _blocks(test.values)]
    nearest = [
        (jnp.full((len(q), k), -jnp.inf), jnp.zeros((len(q), k), jnp.int32)) for q in queries
    ]
    for start in range(0, len(train.labels), _ROWS):
        block = train.take(slice(start, start + _ROWS))
        x, labels = jnp.asarray(block.values), jnp.asarray(block.labels)
        nearest = [_closer(n, q, x, labels) for n, q in zip(nearest, queries, strict=True)]

    def accuracy(k: int) -> float:
        votes = [_vote(n, num_classes, k, temperature) for n in nearest]
        return _accuracy(np.concatenate(jax.device_get(votes)), test.labels)

    return {k: accuracy(k) for k in neighbours}


# --- Linear probe: softmax regression -----------------------------------------------------


class Linear(NamedTuple):
    """A linear classifier: (D, K) weights and (K,) bias."""

    weights: jax.Array
    bias: jax.Array


class LinearProbe(NamedTuple):
    """The test accuracy, and the L2 strength that was chosen on held-out training images."""

    accuracy: float
    l2: float


def fit_softmax(x: np.ndarray, labels: np.ndarray, l2: float, start: Linear) -> Linear:
    """Minimises the mean cross-entropy in nats + l2 / 2 |W|^2 by full-batch L-BFGS.

    The bias is not regularised. Ends when no entry of the gradient exceeds 1e-5, or after
    1000 updates.

    Args:
      x: (N, D) float32 features of about unit size.
      labels: (N,) integers.
      start: where to begin; its shapes decide the number of classes.
    """
    blocks = math.ceil(len(x) / _ROWS)
    padding = blocks * _ROWS - len(x) if blocks > 1 else 0

    def blocked(array: np.ndarray) -> np.ndarray:
        padded = np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(blocks, -1, *array.shape[1:])

    weight = np.full(len(x), 1 / len(x), np.float32)  # 0 for the padding
    return _lbfgs(start, tuple(map(blocked, (x, labels, weight))), l2)


@jax.jit
def _lbfgs(start: Linear, blocks: tuple[jax.Array, ...], l2: float) -> Linear:
    # Checkpointed: the backward pass makes the logits of a block again, as those of all
    # examples at once may not fit.
    @jax.checkpoint
    def add(total: jax.Array, block: Any, linear: Linear) -> jax.Array:
        x, labels, weight = block
        logits = x @ linear.weights + linear.bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return total + (losses * weight).sum()

    def loss(linear: Linear) -> jax.Array:
        body = lambda total, block: (add(total, block, linear), None)
        total, _ = jax.lax.scan(body, jnp.float32(0), blocks)
        return total + l2 / 2 * (linear.weights**2).sum()

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def update(carry: Any) -> Any:
        linear, state, count, _ = carry
        value, grad = value_and_grad(linear, state=state)
        updates, state = optimizer.update(
            grad, state, linear, value=value, grad=grad, value_fn=loss
        )
        linear = optax.apply_updates(linear, updates)
        # The line search has just computed the gradient at the new place.
        grad = optax.tree.get(state, "grad")
        return linear, state, count + 1, optax.tree.norm(grad, ord=jnp.inf)

    def unfinished(carry: Any) -> jax.Array:
        return (carry[2] < _MAX_UPDATES) & (carry[3] > _GRADIENT_TOLERANCE)

    with jax.default_matmul_precision("highest"):
        first = (start, optimizer.init(start), 0, jnp.float32(jnp.inf))
        linear: Linear = jax.lax.while_loop(unfinished, update, first)[0]
    return linear


def _hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to choose on: a fifth of each class, one image at least.

    Classes with a single image are fitted only.
    """
    rng, held_out = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held_out[members[: max(1, int(_HELD_OUT * len(members)))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def linear_probe_accuracy(train: Features, test: Features, num_classes: int) -> LinearProbe:
    """Softmax regression on standardised features, its L2 strength chosen without the test.

    Of the powers of ten from 10 to 1e-6 the one is taken (of equals, the strongest) that does
    best on a fifth of the training examples after a fit to the others; then all are fitted.

    Raises:
      UserError: no class has two training examples.
    """
    fitted, held_out = _hold_out(train.labels)
    if not len(held_out):
        raise UserError(
            "--linear_probe needs a class with two training examples: use another --train_split"
        )
    width = train.values.shape[1]
    start = Linear(jnp.zeros((width, num_classes)), jnp.zeros(num_classes))

    def standardised(to: Features, *others: Features) -> list[np.ndarray]:
        mean, scale = _whitening(to.values)
        return [_whiten(features.values, mean, scale) for features in (to, *others)]

    inner, outer = train.take(fitted), train.take(held_out)
    x, x_outer = standardised(inner, outer)
    found: list[tuple[float, float, Linear]] = []
    linear = start
    for l2 in _SWEEP:
        linear = fit_softmax(x, inner.labels, l2, linear)  # from the optimum next to it
        score = _accuracy(_linear_prediction(x_outer, *linear), outer.labels)
        found.append((score, l2, linear))
    _, l2, linear = max(found, key=lambda item: item[0])
    x, x_test = standardised(train, test)
    linear = fit_softmax(x, train.labels, l2, linear)
    return LinearProbe(_accuracy(_linear_prediction(x_test, *linear), test.labels), l2)
