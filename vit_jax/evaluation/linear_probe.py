"""Softmax regression on frozen features of the whole training set (as in arXiv 2103.00020)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.evaluation import features
from vit_jax.evaluation.features import Features, accuracy, whiten, whitening
from vit_jax.evaluation.few_shot import _linear_prediction
from vit_jax.system.errors import UserError

_SWEEP = tuple(10.0**power for power in range(1, -7, -1))  # L2 strengths, strongest first

_HELD_OUT = 0.2  # of the training examples, to choose the strength on

_MAX_UPDATES = 1000

_GRADIENT_TOLERANCE = 1e-5


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
    blocks = math.ceil(len(x) / features.ROWS)
    padding = blocks * features.ROWS - len(x) if blocks > 1 else 0

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
        mean, scale = whitening(to.values)
        return [whiten(features.values, mean, scale) for features in (to, *others)]

    inner, outer = train.take(fitted), train.take(held_out)
    x, x_outer = standardised(inner, outer)
    found: list[tuple[float, float, Linear]] = []
    linear = start
    for l2 in _SWEEP:
        linear = fit_softmax(x, inner.labels, l2, linear)  # from the optimum next to it
        score = accuracy(_linear_prediction(x_outer, *linear), outer.labels)
        found.append((score, l2, linear))
    _, l2, linear = max(found, key=lambda item: item[0])
    x, x_test = standardised(train, test)
    linear = fit_softmax(x, train.labels, l2, linear)
    return LinearProbe(accuracy(_linear_prediction(x_test, *linear), test.labels), l2)
