"""Kills at random moments: the end is bit for bit that of a run that was never stopped.

Each trial starts the run, kills it one to three times in a row, each time with a signal and at
a moment drawn anew, lets it come to its end, and compares every array of the last state and of
the best weights, and every line of the log, with those of the reference. Every third run is one
of two processes, of which one or both get the signal; then all must end within a minute.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.campaign import runs
from tests.campaign.runs import BOUND, TIMEOUT, Outcome, Run
from tests.campaign.small_config import EVALUATION, STEPS

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGSTOP")
MOMENTS = ("start", "save", "evaluation", "last save", "any")
SAME = "identical"


def arrived(workdir: Path, moment: str, begun: float) -> bool:
    """Whether the run in `workdir` has come to the moment at which it is to be killed.

    What is older than `begun` was left behind by a run before it.
    """
    log = workdir / "metrics.jsonl"
    try:
        if moment == "save":
            parts = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
            return any(part.stat().st_mtime > begun for part in parts)
        record = json.loads(log.read_bytes().splitlines()[-1])
        if log.stat().st_mtime <= begun:
            return False
    except (OSError, ValueError, IndexError):  # it is being written, or complete by now
        return False
    if moment == "evaluation":  # its step is logged, itself it is not
        return "eval/count" not in record and record["step"] % EVALUATION == 0
    return record["step"] == STEPS  # last save


def wait_for(moment: str, workdir: Path, started: list[Run], rng: random.Random) -> None:
    if moment in ("start", "any"):
        time.sleep(rng.uniform(*((0, 3) if moment == "start" else (2, 7))))
        return
    begun = time.time()
    while all(run.alive() for run in started) and not arrived(workdir, moment, begun):
        if time.time() > begun + TIMEOUT:
            return
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.05))


def kill(started: list[Run], whom: list[Run], name: str) -> bool:
    """Sends the signal and waits for all; what a stopped process gets later is SIGKILL.

    Returns whether anybody was there to get it. Raises AssertionError if one of them goes on.
    """
    alive = runs.kill(whom, signal.Signals[name])
    if name == "SIGSTOP":
        time.sleep(1)
        runs.kill(whom, signal.SIGKILL)
    sent = time.monotonic()
    try:
        runs.finish(started, BOUND)
    except subprocess.TimeoutExpired:
        seconds = time.monotonic() - sent
        raise AssertionError(f"a process still ran {seconds:.0f} s after {name}") from None
    for run in started:
        said = run.error()
        early = "KeyboardInterrupt" in said and "vit_jax" not in said  # while Python starts
        assert "Traceback" not in said or early, f"a traceback after {name}: {said[-500:]}"
    return bool(alive)


def trial(room: Path, number: int, seed: int) -> Outcome:
    rng = random.Random(f"{seed}/{number}")
    workdir, workers = room / "killed", number % 2 * 2
    count = 1 + (number % 3 == 2)
    flags, kills = [f"--config.data.workers={workers}"], 0
    told = [f"processes {count}", f"workers {workers}"]
    try:
        for _ in range(rng.randint(1, 3)):
            moment, name = rng.choice(MOMENTS), rng.choice(SIGNALS)
            of = rng.choice([[0], [1], [0, 1]]) if count == 2 else [0]
            told.append(f"{name} at {moment} to {' and '.join(map(str, of))}")
            started = runs.start(room, workdir, *flags, count=count)
            wait_for(moment, workdir, started, rng)
            kills += kill(started, [started[index] for index in of], name)
        started = runs.start(room, workdir, *flags, count=count)
        codes = runs.finish(started)
        assert not any(codes), f"the last run ended with {codes}: {started[0].error()[-300:]}"
        runs.assert_same(workdir, runs.reference(room, count=count))
        return Outcome(", ".join(told), SAME, kills)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return Outcome(", ".join(told), f"wrong: {runs.one_line(error)}", kills)
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    for count in (1, 2):
        runs.reference(room, count=count)
    return [trial(room, number, seed) for number in range(trials)]
