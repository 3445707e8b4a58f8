"""A weighted vote of the nearest training images (arXiv 2104.14294)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.evaluation import features
from vit_jax.evaluation.features import Features, blocks
from vit_jax.system.errors import UserError

TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO

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
    queries = [jnp.asarray(rows) for rows in blocks(test.values)]
    nearest = [
        (jnp.full((len(q), k), -jnp.inf), jnp.zeros((len(q), k), jnp.int32)) for q in queries
    ]
    for start in range(0, len(train.labels), features.ROWS):
        block = train.take(slice(start, start + features.ROWS))
        x, labels = jnp.asarray(block.values), jnp.asarray(block.labels)
        nearest = [_closer(n, q, x, labels) for n, q in zip(nearest, queries, strict=True)]

    def of(k: int) -> float:
        votes = [_vote(n, num_classes, k, temperature) for n in nearest]
        return features.accuracy(np.concatenate(jax.device_get(votes)), test.labels)

    return {k: of(k) for k in neighbours}
