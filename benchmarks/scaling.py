"""The growth of time and memory of our update: `python -m benchmarks.scaling`.

One quantity at a time grows from a small network, and a power law is fitted to each: the
exponent of time, of the memory that XLA plans, and of the counted work, to compare. Devices are
real where there are several; on a CPU they are parts of it, which shows the cost of sharding,
not its gain.
"""

import math
import statistics
from typing import Any

import numpy as np
from absl import flags

from benchmarks import options, peers
from benchmarks.measure import Row, work
from benchmarks.processes import Entry, measure
from benchmarks.report import table
from benchmarks.task import Task
from vit_jax.command_line import cli

FACTORS = (1, 2, 4)
AXES = ("tokens", "depth", "width", "batch", "devices")
FITTED = {"time": "milliseconds", "memory": "program_bytes", "work": "work"}


def smallest(backend: str, dtype: str) -> Task:
    """What grows: 65 tokens on a CPU, 257 elsewhere."""
    if backend == "cpu":
        return Task((64, 64), 8, 4, 128, 512, 2, 16, dtype, True, backend)
    return Task((224, 224), 14, 12, 512, 2048, 8, 64, dtype, True, backend)


def tokens(task: Task) -> int:
    return math.prod(edge // task.patch_size for edge in task.image_size) + 1


def grown(axis: str, base: Task, factor: int) -> tuple[int, Task]:
    """The value of `axis` and the task in which it is about `factor` times that of `base`."""
    if axis == "tokens":
        edge = math.isqrt(factor * base.image_size[0] ** 2)
        edge -= edge % base.patch_size
        task = base._replace(image_size=(edge, edge))
        return tokens(task), task
    if axis == "width":  # wider by more heads, as the published sizes are
        names = ("width", "mlp_dim", "num_heads")
        return base.width * factor, base._replace(
            **{name: factor * getattr(base, name) for name in names}
        )
    field = {"batch": "batch_size"}.get(axis, axis)
    task = base._replace(**{field: factor * getattr(base, field)})
    return getattr(task, field), task


def exponent(x: list[float], y: list[float]) -> float:
    """b of the power law y = a x^b that fits best in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def entries(session: options.Session, axis: str, dtype: str) -> dict[int, Entry]:
    """What to measure for each value of an axis; none where the devices are missing."""
    base, ours = smallest(session.backend, dtype), peers.CONTESTANTS[peers.OURS]
    tasks = dict(grown(axis, base, factor) for factor in FACTORS)
    if session.backend == "cpu":
        most = f"--xla_force_host_platform_device_count={max(FACTORS)}"
        contestant = (
            ours._replace(environment={"XLA_FLAGS": most}) if axis == "devices" else ours
        )
        return {value: Entry(contestant, task) for value, task in tasks.items()}
    here = session.record["conditions"]["devices"]
    return {value: Entry(ours, task) for value, task in tasks.items() if task.devices <= here}


def grow(session: options.Session, axis: str, dtype: str, rounds: int) -> list[Row]:
    """A row for each value of an axis, in turns."""
    asked = entries(session, axis, dtype)
    names = {str(value): entry for value, entry in asked.items()}
    found = measure(names, rounds, session.threads, one_at_a_time=session.one_at_a_time)
    rows: list[Row] = []
    for value, entry in asked.items():
        row: Row = {"axis": axis, "value": value, "dtype": dtype}
        one = found[str(value)]
        if one.failed:
            rows.append(row | {"failed": one.failed})
            continue
        median = statistics.median(one.seconds)
        counted = {"milliseconds": 1000 * median, "work": work(entry.task)}
        rows.append(row | counted | one.facts | {"seconds": one.seconds})
    return rows


def fit(rows: list[Row]) -> dict[str, Any] | None:
    """The exponents of one axis; None with fewer than two values."""
    good = [row for row in rows if "failed" not in row]
    if len(good) < 2:
        return None
    x = [row["value"] for row in good]
    exponents = {
        f"{name} exponent": exponent(x, [row[field] for row in good])
        for name, field in FITTED.items()
    }
    return {"axis": rows[0]["axis"], "dtype": rows[0]["dtype"], **exponents}


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    session = options.start("scaling")
    session.record["fits"] = []
    for dtype in flags.FLAGS.dtypes:
        for axis in AXES:
            rows = grow(session, axis, dtype, flags.FLAGS.rounds)
            if fitted := fit(rows):
                session.record["fits"].append(fitted)
            session.add(rows)
    print(table(session.record["fits"]))


if __name__ == "__main__":
    cli.run(main, lambda: options.define("scaling", rounds=5))
