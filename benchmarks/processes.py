"""Contestants in separate processes that take turns.

In one process they would share an allocator, thread pools and memory contents; measured one
after the other, they would run under different conditions. So each has a process, all are
warmed up, and in every round each runs for a moment while the others wait.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers import Contestant
from benchmarks.task import Task

ROOT = Path(__file__).parents[1]


class Failed(Exception):
    """A contestant's process ended early; the message is the last line that it wrote."""


class Process:
    """The process of one contestant.

    Attributes:
      facts: what it reported when it was ready: seconds of each part of its start
        (`import`, `init`, `trace`, `compile`, `first_step`, `total`), bytes resident after
        the imports (`import_bytes`) and that XLA plans to use (`program_bytes`).

    Raises (on construction):
      Failed: it could not prepare or run.
    """

    def __init__(
        self,
        contestant: Contestant,
        task: Task,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | dict(contestant.environment) | dict(environment or {}),
        )
        order = {
            "library": contestant.framework,
            "builder": contestant.builder,
            "options": {**contestant.options, **(contestant.training if task.training else {})},
            "task": task._asdict(),
            "threads": threads,
            "started": time.time(),
        }
        self.facts = self._ask(json.dumps(order))

    def seconds(self, repeats: int) -> float:
        """Seconds of one call, the mean of `repeats`. Raises Failed."""
        return float(self._ask(str(repeats))["seconds"])

    def end(self) -> dict[str, float]:
        """Ends it; returns `peak_bytes` and `page_faults` (of one call). Raises Failed."""
        last = self._ask("end")
        self._process.wait()
        self.close()
        return last

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self.close()
        raise Failed(lines[-1] if lines else f"ended with code {code}")


class Measured(NamedTuple):
    """The results of a contestant; `failed` says why if they are incomplete."""

    seconds: list[float]  # of one call, in each round
    facts: dict[str, float]
    failed: str | None = None


class Entry(NamedTuple):
    """A contestant and its task."""

    contestant: Contestant
    task: Task


def measure(
    entries: Mapping[str, Entry],
    rounds: int,
    threads: int,
    sample: float = 0.5,
    one_at_a_time: bool = False,
) -> dict[str, Measured]:
    """Measures each entry in `rounds` turns of about `sample` seconds, at least one call.

    Every other round has the opposite order, so that none always follows the same contestant.
    With `one_at_a_time` each is measured and ended before the next starts: for devices that
    serve one process only, and for contestants that do not fit in memory together.
    """
    if one_at_a_time:
        measured: dict[str, Measured] = {}
        for name, entry in entries.items():
            measured |= measure({name: entry}, rounds, threads, sample)
        return measured
    processes: dict[str, Process] = {}
    times: dict[str, list[float]] = {name: [] for name in entries}
    facts: dict[str, dict[str, float]] = {name: {} for name in entries}
    failed: dict[str, str] = {}
    try:
        for name, (contestant, task) in entries.items():
            try:
                processes[name] = Process(contestant, task, threads)
                facts[name] = processes[name].facts
            except Failed as error:
                failed[name] = str(error)
        repeats: dict[str, int] = {}
        for number in range(-1, rounds):  # round -1 finds out how long a call takes
            for name in _order(list(processes), number):
                try:
                    found = processes[name].seconds(repeats.get(name, 1))
                except Failed as error:
                    failed[name] = str(error)
                    del processes[name]
                    continue
                if number < 0:
                    repeats[name] = max(1, round(sample / found))
                else:
                    times[name].append(found)
        for name, process in processes.items():
            facts[name] |= process.end()
    finally:
        for process in processes.values():
            process.close()
    return {name: Measured(times[name], facts[name], failed.get(name)) for name in entries}


def _order(names: Sequence[str], number: int) -> list[str]:
    return list(names) if number % 2 == 0 else list(reversed(names))
