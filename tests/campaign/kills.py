"""Kills at random moments: the end is bit for bit that of a run that was never stopped.

Each trial starts the run, kills it one to three times in a row, each time with a signal and at
a moment drawn anew, lets it come to its end, and compares every array of the last state and
every line of the log with those of the reference.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.test_train import ROOT, TINY, assert_same_run
from tests.tiny_config import LONG

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGSTOP")
MOMENTS = ("start", "save", "evaluation", "last save", "any")
TIMEOUT = 900  # seconds that a run may take
SAME = "identical"


def start(workdir: Path, workers: int) -> subprocess.Popen:
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=1")
    command = [sys.executable, "-m", "vit_jax.train", f"--config={TINY}"]
    command += [f"--workdir={workdir}", f"--config.data.workers={workers}"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def arrived(workdir: Path, moment: str) -> bool:
    """Whether the run in `workdir` has come to the moment at which it is to be killed."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    if moment == "save":
        return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    if moment == "evaluation":  # the eighth step is logged, its evaluation is not
        return bool(lines) and '"step": ' in lines[-1] and len(lines) % 9 == 8
    return len(lines) >= LONG + LONG // 8 - 1  # last save


def wait_for(moment: str, workdir: Path, run: subprocess.Popen, rng: random.Random) -> None:
    if moment in ("start", "any"):
        time.sleep(rng.uniform(0, 4 if moment == "start" else 15))
        return
    end = time.monotonic() + TIMEOUT
    while run.poll() is None and not arrived(workdir, moment) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.05))


def kill(run: subprocess.Popen, name: str) -> None:
    """Sends the signal and waits; what a stopped process gets after a second is SIGKILL."""
    run.send_signal(signal.Signals[name])
    if name == "SIGSTOP":
        time.sleep(1)
        run.kill()
    run.wait(TIMEOUT)


def trial(room: Path, number: int, seed: int) -> tuple[str, str]:
    """Returns what was done and what came of it."""
    rng = random.Random(f"{seed}/{number}")
    workdir, workers = room / "killed", number % 2 * 2
    told = [f"workers {workers}"]
    try:
        for _ in range(rng.randint(1, 3)):
            moment, name = rng.choice(MOMENTS), rng.choice(SIGNALS)
            told.append(f"{name} at {moment}")
            run = start(workdir, workers)
            wait_for(moment, workdir, run, rng)
            kill(run, name)
        code = start(workdir, workers).wait(TIMEOUT)
        if code:
            return ", ".join(told), f"wrong: the last run ended with exit code {code}"
        assert_same_run(workdir, reference(room))
        return ", ".join(told), SAME
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return ", ".join(told), f"wrong: {str(error).splitlines()[0][:200]}"
    finally:
        shutil.rmtree(workdir, ignore_errors=True)


def reference(room: Path) -> Path:
    """A run that nobody has stopped, made once."""
    workdir = room / "reference"
    if not workdir.exists() and start(workdir, 0).wait(TIMEOUT):
        raise RuntimeError("the run that nobody stops has failed")
    return workdir


def run(room: Path, trials: int, seed: int) -> list[tuple[str, str]]:
    reference(room)
    return [trial(room, number, seed) for number in range(trials)]
