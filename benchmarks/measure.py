"""From times to rows: ratios within rounds, work, shares of the device's speed."""

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers import PRODUCTS, REFERENCE, Contestant, is_here
from benchmarks.processes import Entry, Measured, measure
from benchmarks.task import Task, product_size
from vit_jax.models.flops import forward_flops, train_flops
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.atomic import replacing

Row = dict[str, Any]


class Comparison(NamedTuple):
    """How much faster one contestant is than another, from pairs of the same round."""

    median: float
    low: float  # the quartiles
    high: float


def speed_ratio(own: list[float], other: list[float]) -> Comparison:
    """Speed of `own` over that of `other`, which are seconds in each round.

    On a shared machine the clock drifts by more than the differences that matter; within a
    round both ran under the same conditions.
    """
    ratios = sorted(b / a for a, b in zip(own, other, strict=True))
    if len(ratios) == 1:
        return Comparison(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(median, low, high)


def work(task: Task) -> int:
    """Analytic FLOPs of one call."""
    cfg = ViTConfig(**task.shape)
    return task.batch_size * (train_flops(cfg) if task.training else forward_flops(cfg))


def peak(products: list[Measured], size: int) -> float | None:
    """FLOP/s of the fastest library's product of two `size` x `size` matrices.

    The median of the rounds and not the best, since networks are reported by theirs; None
    where none could be measured.
    """
    times = [statistics.median(found.seconds) for found in products if found.seconds]
    return 2 * size**3 / min(times) if times else None


def compare(
    model: str,
    task: Task,
    contestants: list[Contestant],
    rounds: int,
    threads: int,
    one_at_a_time: bool = False,
    sample: float = 0.5,
) -> list[Row]:
    """Measures contestants in turns, with the reference product among them; a row for each.

    In bfloat16 the reference is measured in float32 as well, and `ratio_float32` is against
    it.
    """
    entries = {
        found.name: Entry(found, task) for found in contestants if task.dtype in found.dtypes
    }
    single = f"{REFERENCE} float32"
    if REFERENCE in entries and task.dtype != "float32":
        contestant = entries[REFERENCE].contestant
        entries[single] = Entry(contestant, task._replace(dtype="float32"))
    yardsticks = {
        found.name: Entry(found, task) for found in PRODUCTS if is_here(found, task.backend)
    }
    found = measure(entries | yardsticks, rounds, threads, sample, one_at_a_time)
    best = peak([found[name] for name in yardsticks], product_size(task.backend))
    references = {"ratio": found.get(REFERENCE), "ratio_float32": found.get(single)}
    about = {"model": model, "batch_size": task.batch_size, "dtype": task.dtype}
    return [
        {**about, **describe(name, found[name], task, best, references)}
        for name in entries
        if name != single
    ]


def describe(
    name: str,
    found: Measured,
    task: Task,
    best: float | None,
    references: Mapping[str, Measured | None],
) -> Row:
    """A row: times in each round, rates, ratios, and what the process reported."""
    row: Row = {"contestant": name, **found.facts}
    if found.failed:
        return row | {"failed": found.failed}
    median, flops = statistics.median(found.seconds), work(task)
    row |= {
        "seconds": found.seconds,
        "milliseconds": 1000 * median,
        "images_per_second": task.batch_size / median,
        "gflops_per_second": flops / median / 1e9,
    }
    if best is not None:
        row |= {"of_peak": flops / median / best, "peak_gflops_per_second": best / 1e9}
    for field, reference in references.items():
        if reference is not None and not reference.failed:
            row[field] = speed_ratio(found.seconds, reference.seconds)._asdict()
    if (reference := references["ratio"]) is not None and not reference.failed:
        row["memory_ratio"] = found.facts["peak_bytes"] / reference.facts["peak_bytes"]
    return row


def save(path: Path, record: dict[str, Any]) -> None:
    """Writes one run as JSON.

    Raises:
      UserError: it cannot be written.
    """
    record["conditions"]["load_after"] = os.getloadavg()
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
