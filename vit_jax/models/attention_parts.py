"""Attention of some examples and heads at a time, whose scores stay on a TPU's chip."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# Bytes of float32 scores that a TPU keeps on the chip beside what else a step needs there: the
# largest for which the compiled step of L/16 on a v5e moved no scores to HBM.
ON_CHIP = 28 << 20


def fits(tokens: int) -> bool:
    """Whether the scores of one head of one example stay on the chip."""
    return _bytes_of_scores(tokens) <= ON_CHIP


def _bytes_of_scores(tokens: int) -> int:
    """Of one head, float32, as a TPU stores them: rows of a multiple of 128 numbers."""
    return 4 * tokens * -(-tokens // 128) * 128


def part_size(examples: int, heads: int, bytes_each: int) -> tuple[int, int]:
    """How many examples and heads a part has, whose scores take `bytes_each` a head.

    The most examples that divide the batch and stay on the chip, or else the most heads of one.
    Where not even one head would stay, all of them.
    """
    most = lambda count, size: max(
        (n for n in range(1, count + 1) if count % n == 0 and n * size <= ON_CHIP), default=0
    )
    if several := most(examples, heads * bytes_each):
        return several, heads
    if some := most(heads, bytes_each):
        return 1, some
    return examples, heads


def by_parts(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function(*arrays)`, computed part by part and put together.

    Args:
      function: to a tuple of arrays, (B, T, k, d) or (B, k, T) as the arguments are.
      arrays: the first is (B, T, k, d) and tells how large scores are.
    """
    count, tokens, heads, _ = arrays[0].shape
    n, h = part_size(count, heads, _bytes_of_scores(tokens))
    if (n, h) == (count, heads):
        return function(*arrays)

    def of_part(shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = _head_axis(shape)
        return (n, *shape[1:axis], h, *shape[axis + 1 :])

    def start(i: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Of part `i`: heads innermost."""
        at: list[Any] = [0] * len(shape)
        at[0], at[_head_axis(shape)] = i // (heads // h) * n, i % (heads // h) * h
        return tuple(at)

    def body(i: jax.Array, out: Any) -> Any:
        part = (lax.dynamic_slice(x, start(i, x.shape), of_part(x.shape)) for x in arrays)
        put = lambda whole, x: lax.dynamic_update_slice(whole, x, start(i, whole.shape))
        return jax.tree.map(put, out, function(*part))

    shapes = jax.eval_shape(function, *arrays)
    empty = lambda x: lax.empty(x.shape, x.dtype)  # zeros would be written first
    return lax.fori_loop(0, count // n * (heads // h), body, jax.tree.map(empty, shapes))


def _head_axis(shape: tuple[int, ...]) -> int:
    """Of (B, T, k, d) or (B, k, T)."""
    return 2 if len(shape) == 4 else 1
