"""The time until the first update is done: `python -m benchmarks.compile_time`.

Every process is new and makes one update; processes take turns. "Cached" means that an earlier
process has written its compiled programs to disk: to JAX's persistent cache, or to that of
torch's compiler. All others start with empty caches.
"""

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from benchmarks import options, peers
from benchmarks.measure import Row
from benchmarks.processes import Failed, Process
from benchmarks.task import Task
from vit_jax.command_line import cli

CONTESTANTS = (
    peers.OURS,
    "vit_jax, unrolled",
    "Flax layers",
    "timm",
    "timm, compiled",
    "Hugging Face",
)
BATCH_SIZES = {"cpu": [4], "gpu": [64], "tpu": [64]}
PARTS = ("import", "init", "trace", "compile", "first_step", "total")


def cache(folder: Path) -> dict[str, str]:
    """Variables that make both libraries keep compiled programs in `folder`, however small."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
    }


def start(
    contestant: peers.Contestant, task: Task, threads: int, environment: Mapping[str, str]
) -> dict[str, float]:
    """Seconds of each part of a start. Raises Failed."""
    process = Process(contestant, task, threads, environment)
    try:
        return process.facts
    finally:
        process.close()


def measure(
    model: str, task: Task, chosen: list[peers.Contestant], rounds: int, threads: int
) -> list[Row]:
    """A row for each contestant, and one more for each that compiles."""
    about = {"model": model, "batch_size": task.batch_size, "dtype": task.dtype}
    starts: dict[str, list[dict[str, float]]] = {}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for contestant in chosen:
            compiles = contestant.framework == "jax" or contestant.options.get("compiled")
            names = [contestant.name, f"{contestant.name}, cached"]
            with tempfile.TemporaryDirectory() as folder:
                for name in names[: 2 if compiles else 1]:
                    starts.setdefault(name, [])
                    try:
                        facts = start(contestant, task, threads, cache(Path(folder)))
                        starts[name].append(facts)
                    except Failed as error:
                        failed[name] = str(error)
    rows: list[Row] = []
    for name, found in starts.items():
        row: Row = {**about, "contestant": name}
        if name in failed:
            rows.append(row | {"failed": failed[name]})
            continue
        parts = [part for part in PARTS if part in found[0]]
        medians = {part: statistics.median(each[part] for each in found) for part in parts}
        rows.append(row | medians | {"totals": [each["total"] for each in found]})
    return rows


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    session = options.start("compile_time")
    chosen = options.contestants(session, CONTESTANTS)
    rounds = flags.FLAGS.rounds
    for model, task in options.tasks(session, "B/16", BATCH_SIZES, training=True):
        rows = measure(model, task, chosen, rounds, session.threads)
        session.add(rows)


if __name__ == "__main__":
    cli.run(main, lambda: options.define("compile_time", rounds=3))
