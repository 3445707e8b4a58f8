"""A long run takes no more memory, threads or open files at its end than at its beginning.

One process makes many steps of a very small model, saves and evaluates ten times, and is looked
at from outside all the while. Compared are the second and the last quarter of its steps: in the
first one it still compiles.
"""

import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from tests.campaign import runs
from tests.campaign.runs import Outcome

STEPS = 20_000
MORE = 0.03  # the share by which memory may grow: that of JAX's allocator varies
FLAT = "flat"


class Sample(NamedTuple):
    step: int
    memory: int  # bytes of its own: pages of files come and go as the system likes
    threads: int
    files: int


def look(process: int, step: int) -> Sample:
    """What a process has now, as Linux tells. Raises OSError or KeyError if it has ended."""
    folder = Path("/proc") / str(process)
    lines = (folder / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    memory = int(status["RssAnon"].split()[0]) << 10
    return Sample(step, memory, int(status["Threads"]), len(list((folder / "fd").iterdir())))


def last_step(log: Path) -> int:
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 1000, 0))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def growth(samples: list[Sample], steps: int) -> list[str]:
    """What the last quarter of the steps has more of than the second, in words.

    Threads and files come and go with each save, so that their smallest numbers are compared,
    which are those between saves; of memory the median. After the last step the run only ends.
    """
    before, after = (
        [s for s in samples if (n - 1) * steps < 4 * s.step <= n * steps and s.step < steps]
        for n in (2, 4)
    )
    grown = []
    for name, level, more in [
        ("memory", statistics.median, MORE),
        ("threads", min, 0.0),
        ("files", min, 0.0),
    ]:
        first, last = (level(getattr(s, name) for s in part) for part in (before, after))
        if last > first * (1 + more):
            grown.append(f"{name} {first:,.0f} to {last:,.0f}")
    return grown


def trial(room: Path, steps: int, seed: int) -> Outcome:
    workdir = room / "long"
    flags = [f"--config.total_steps={steps}", "--config.batch_size=8", f"--config.seed={seed}"]
    flags += [f"--config.log_every_steps={steps // 400}"]
    flags += [f"--config.{each}_every_steps={steps // 10}" for each in ("eval", "checkpoint")]
    [run] = runs.start(room, workdir, *flags)
    samples = []
    try:
        while run.alive():
            try:
                samples.append(look(run.process.pid, last_step(workdir / "metrics.jsonl")))
            except (OSError, KeyError):  # it has ended meanwhile
                break
            time.sleep(0.05)
        if run.wait():
            return Outcome(f"{steps} steps", f"wrong: {run.error()[-300:]}")
    finally:
        run.process.kill()
        shutil.rmtree(workdir, ignore_errors=True)
    grown = growth(samples, steps)
    last = [sample for sample in samples if sample.step < steps][-1]
    what = f"{steps} steps, at the end {last.memory >> 20} MiB, {last.threads} threads, "
    return Outcome(
        what + f"{last.files} files", f"wrong: {', '.join(grown)}" if grown else FLAT
    )


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    rng = random.Random(seed)
    return [trial(room, STEPS, rng.randrange(1000)) for _ in range(trials)]
