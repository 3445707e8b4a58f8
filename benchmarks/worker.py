"""The process of one contestant: it prepares, then measures on request.

Standard input has one line of JSON with the task, then a line for each turn: how often to run.
Every line is answered by one line of JSON. `benchmarks.processes` writes and reads them.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.task import Task


def memory(field: str) -> int:
    """Bytes resident now (`VmRSS`) or at most so far (`VmHWM`).

    Not `getrusage`, whose maximum a process inherits from the one that started it; where there
    is no /proc it is used.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def page_faults() -> int:
    """The number of page faults of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def seconds(run: Callable[[], None], repeats: int) -> float:
    """Seconds of one call, the mean of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    # Libraries may print; answers go where the real standard output went.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    order = json.loads(sys.stdin.readline())
    task = Task(**order["task"])
    module = importlib.import_module(f"benchmarks.{order['library']}_contestants")
    facts = {"import": time.time() - order["started"], "import_bytes": memory("VmRSS")}
    run, prepared = module.prepare(order["builder"], order["options"], task, order["threads"])
    facts |= prepared | {"first_step": seconds(run, 1), "total": time.time() - order["started"]}
    seconds(run, 1)  # the second may still be slower: memory is laid out
    answer(facts)
    before, steps = page_faults(), 0
    for line in sys.stdin:
        if line.strip() == "end":
            peak = module.device_peak()
            faults = (page_faults() - before) / max(steps, 1)
            answer(
                {
                    "peak_bytes": memory("VmHWM") if peak is None else peak,
                    "page_faults": faults,
                }
            )
            return
        steps += int(line)
        answer({"seconds": seconds(run, int(line))})


if __name__ == "__main__":
    main()
