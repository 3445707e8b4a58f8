"""The largest batch that fits, for every way to recompute in the backward pass."""

import functools
from collections.abc import Callable, Sequence

from vit_jax.planning.step import Plan

POLICIES = ("none", "dots", "full")  # what is recomputed: the cheapest first


def largest(attempt: Callable[[int], Plan], most: int = 4096) -> list[Plan]:
    """Tries batches until the largest that fits is known, to 8 or a sixteenth of it.

    Starts from the top, since a compiler refuses quickly, and reports how much it would need:
    memory grows about linearly with the batch, so that two sizes predict the largest one.

    Args:
      attempt: plans for so many examples a device.
      most: never tries more.

    Returns:
      What was tried, in order.
    """
    tried: list[Plan] = []
    low, high = 0, 2 * most
    while high - low > max(1 if high <= 8 else 8, low // 16 // 8 * 8):
        size = most if not tried else _next(tried, low, high)
        tried.append(attempt(size))
        low, high = (size, high) if tried[-1].fits else (low, size)
        if low == most:
            break
    return tried


def _next(tried: list[Plan], low: int, high: int) -> int:
    """Between `low`, which fits, and `high`, which does not: multiples of 8, or below 8."""
    known = {p.per_device_batch: p.used for p in tried if p.used}
    predicted, limit = (low + high) // 2 if low else high // 2, tried[0].limit
    near = sorted(known, key=lambda size: abs(known[size] - (limit or 0)))[:2]
    if limit and len(near) == 2 and known[near[0]] != known[near[1]]:
        each = (known[near[1]] - known[near[0]]) / (near[1] - near[0])
        predicted = int(near[0] + (limit - known[near[0]]) / each)
    if high <= 8:
        return min(max(predicted, low + 1), high - 1)
    # Near the limit the compiler saves memory by itself, so the prediction may be surpassed.
    return min(max(predicted // 8 * 8, low + 8 - low % 8), (high - 1) // 8 * 8)


def search(
    attempt: Callable[[str, int], Plan], policies: Sequence[str] = POLICIES
) -> dict[str, list[Plan]]:
    """For every policy of recomputation, the plans of `largest`."""
    return {policy: largest(functools.partial(attempt, policy)) for policy in policies}


def best(tried: list[Plan]) -> Plan | None:
    """The one with the largest batch that fits."""
    return max((p for p in tried if p.fits), key=lambda p: p.per_device_batch, default=None)
