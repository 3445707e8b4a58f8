"""Two starts on one work directory: one of them trains, the other says who is there.

Of three trials two start a run twice, with the same configuration or with another seed, up to
four seconds apart. In every third the first one is killed, and the second takes over.
"""

import json
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.campaign import runs
from tests.campaign.runs import Outcome, Run

# More steps than other trials have, so that the second comes while the first is there.
LONGER = ("--config.total_steps=300", "--config.log_every_steps=10")
LONGER += ("--config.eval_every_steps=100", "--config.checkpoint_every_steps=100")
SEEDS = (0, 1)  # the two configurations
REFUSED, AFTER, TAKEN_OVER = "one refused", "one after the other", "taken over"


def flags(seed: int) -> tuple[str, ...]:
    return (*LONGER, f"--config.seed={seed}")


def check_result(room: Path, workdir: Path, seed: int) -> None:
    runs.assert_same(workdir, runs.reference(room, *flags(seed)))
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["seed"] == seed, "config.json is that of the other one"
    assert not (workdir / "run.lock").exists(), "the lock was left behind"


def check_two(room: Path, workdir: Path, started: list[Run], seeds: list[int]) -> str:
    codes = runs.finish(started)
    if codes == [0, 0] and seeds[0] == seeds[1]:  # one was done when the other came
        assert any("already complete" in run.out() for run in started), "both have trained"
        check_result(room, workdir, seeds[0])
        return AFTER
    assert sorted(codes) == [0, 1], f"exit codes {codes}: {started[codes.index(1)].error()}"
    winner, loser = codes.index(0), codes.index(1)
    check_result(room, workdir, seeds[winner])
    said = started[loser].error()
    assert runs.is_one_sentence(said), f"more than a sentence: {said[-500:]}"
    if f"was trained with seed={seeds[winner]}" in said:
        return AFTER
    holder = f"process {started[winner].process.pid} on {socket.gethostname()}"
    assert f"another run is in {workdir} ({holder}" in said, f"not named: {said}"
    return REFUSED


def trial(room: Path, number: int, seed: int) -> Outcome:
    rng = random.Random(f"{seed}/{number}")
    workdir, started = room / "shared", []
    first, second = rng.choice(SEEDS), rng.choice(SEEDS)
    try:
        if number % 3 == 2:
            pause = rng.uniform(0, 8)
            what = f"killed after {pause:.1f} s, then started again"
            [killed] = started = runs.start(room, workdir, *flags(first))
            time.sleep(pause)
            runs.kill([killed], signal.SIGKILL)
            killed.wait()
            started += runs.start(room, workdir, *flags(first))
            code = started[1].wait()
            assert code == 0, f"exit code {code}: {started[1].error()[-300:]}"
            check_result(room, workdir, first)
            return Outcome(what, TAKEN_OVER, 2)
        pause = rng.choice([0, rng.uniform(0, 4)])
        what = f"seeds {first} and {second}, {pause:.1f} s apart"
        started = runs.start(room, workdir, *flags(first))
        time.sleep(pause)
        started += runs.start(room, workdir, *flags(second))
        return Outcome(what, check_two(room, workdir, started, [first, second]), 2)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return Outcome(what, f"wrong: {runs.one_line(error)}", 2)
    finally:
        runs.kill(started, signal.SIGKILL)
        shutil.rmtree(workdir, ignore_errors=True)


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    for each in SEEDS:
        runs.reference(room, *flags(each))
    return [trial(room, number, seed) for number in range(trials)]
