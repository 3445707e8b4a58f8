"""What digests add to saving a checkpoint: `python -m benchmarks.saves`.

Saves the state of a network, weights and Adam's moments of random numbers, as training does,
with digests and without in turns, and says how long a save takes until it is on disk, how much
CPU time it takes in this process, and the share of the digests in both.

  --models=B/16,L/16   networks at 224 pixels with 1,000 classes
  --rounds=3           saves of each kind; the table shows medians and their range
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks import conditions
from benchmarks.measure import save
from vit_jax import config as configuration
from vit_jax.checkpoints import digests
from vit_jax.checkpoints.directory import Checkpoints
from vit_jax.command_line import cli
from vit_jax.models import registry
from vit_jax.system.errors import UserError

CARD = {"variant": "of a benchmark"}


def state_of(model: str) -> dict[str, Any]:
    """Weights and two moments, float32 on the host's device."""
    config = configuration.get_config().model
    config.variant = model
    built = registry.build(registry.configure(config, (224, 224), 3, 1000))
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = lambda s: jax.device_put(rng.standard_normal(s.shape, np.float32))
    return {name: jax.tree.map(noise, shapes) for name in ("params", "mu", "nu")}


@contextlib.contextmanager
def timed(spent: list[float], switched_on: bool) -> Iterator[None]:
    """Adds up the seconds for which digests are computed and written, or leaves them out."""
    write = digests.write

    def clocked(*args: Any) -> None:
        began = time.thread_time()
        if switched_on:
            write(*args)
        spent.append(time.thread_time() - began)

    with mock.patch.object(digests, "write", clocked):
        yield


def measure(state: Any, with_digests: bool) -> dict[str, float]:
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as folder, timed(spent, with_digests):
        began, worked = time.perf_counter(), time.process_time()
        with Checkpoints(Path(folder), keep=1) as checkpoints:
            checkpoints.save(1, state, CARD)
        found = {
            "seconds": time.perf_counter() - began,
            "processor": time.process_time() - worked,
            "digests": sum(spent),
        }
        files = (Path(folder) / "checkpoints/1").rglob("digests/*")
        found["bytes"] = sum(path.stat().st_size for path in files)
    return found


def row(model: str, rounds: int) -> dict[str, Any]:
    state = state_of(model)
    leaves = jax.tree.leaves(state)
    found: dict[str, Any] = {
        "model": model, "arrays": len(leaves), "size": sum(x.nbytes for x in leaves),
    }  # fmt: skip
    measured: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(rounds):
        for with_digests, done in measured.items():
            done.append(measure(state, with_digests))
    return found | {"with": measured[True], "without": measured[False]}


def _spread(rows: list[dict[str, float]], field: str) -> str:
    values = sorted(row[field] for row in rows)
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def table(rows: list[dict[str, Any]]) -> str:
    head = (
        *("state of", "bytes", "arrays", "save with digests (s)", "save without (s)"),
        *("digests (CPU s)", "whole save (CPU s)", "share of the digests"),
    )
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---:|---|---|---|---|---:|"]
    for found in rows:
        own = found["with"]
        share = statistics.median(each["digests"] / each["processor"] for each in own)
        cells = (
            *(found["model"], f"{found['size'] / 2**30:.2f} GiB", f"{found['arrays']:,}"),
            *(_spread(own, "seconds"), _spread(found["without"], "seconds")),
            *(_spread(own, "digests"), _spread(own, "processor"), f"{share:.1%}"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def define_flags() -> None:
    flags.DEFINE_list("models", ["B/16", "L/16"], "Networks.")
    flags.DEFINE_integer("rounds", 3, "Saves of each kind.", lower_bound=1)
    flags.DEFINE_string("output", "docs/saves.json", "The JSON file to write.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    if not given.models:
        raise UserError("--models is empty: name networks, such as B/16,L/16")
    rows: list[dict[str, Any]] = []
    found = conditions.look(conditions.limit_threads(None))
    for model in given.models:
        rows.append(row(model, given.rounds))
        save(Path(given.output), {"benchmark": "saves", "conditions": found, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    cli.run(main, define_flags)
