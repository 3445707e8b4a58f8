"""Hostile inputs: each is refused in one line or read right, soon and in little memory.

A process of its own reads one input after the other, as the commands do. What hangs it, or ends
it, is the fault of the input that it was reading. One that does wrong is kept in a folder.

python -m tests.campaign.inputs FOLDER SEED FIRST COUNT

makes some of the trials, FOLDER being empty, and prints a line of JSON before and after each.
"""

import collections
import contextlib
import gc
import io
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.runs import Outcome

SECONDS = 20.0  # of processor time that reading an input may take
HANG = 60.0  # seconds after which a process that is silent is ended
BEGIN = 180.0  # seconds until it must have begun
# Bytes by which memory may grow. An image may be as large as Pillow decodes, 179 million
# pixels, for each of which there may be 16 bytes while its colours are converted, or 40 where
# it is made four channels of 16 bits.
MEMORY = 512 << 20
MEMORY_OF = {"images": 16 * 179_000_000, "large images": 40 * 179_000_000}
LIMIT = 8 << 30  # of address space, so that an input does not take the machine with it


class Trial(NamedTuple):
    """An input, what came of it, and what it took."""

    kind: str
    what: str
    outcome: str  # refused, read, or what is wrong
    seconds: float = 0.0
    bytes: int = 0


# --- In the process that reads ------------------------------------------------------------


def make_trials(room: Path, seed: int, numbers: range, say: Any) -> None:
    from tests.campaign import input_kinds

    materials, place = room / "materials", room / "input"
    materials.mkdir()
    input_kinds.prepare(materials)
    names = list(input_kinds.KINDS)
    shares = [share for _, share in input_kinds.KINDS.values()]
    soft = _status("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        kind = rng.choices(names, shares)[0]
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        say({"number": number, "kind": kind})
        what, use = input_kinds.KINDS[kind][0](place, rng)
        say({"number": number, "kind": kind, "what": what})
        outcome, seconds, grown = _judge(use, MEMORY_OF.get(kind, MEMORY))
        say(Trial(kind, what, outcome, round(seconds, 3), grown)._asdict())


def _judge(use: Any, most: int) -> tuple[str, float, int]:
    _forget_peak()
    before, begun = _status("VmRSS"), time.process_time()
    try:
        use()
        outcome = "read"
    except Exception as error:
        outcome = _refusal(error)
    seconds, grown = time.process_time() - begun, max(0, _status("VmHWM") - before)
    if seconds > 1 or grown > MEMORY:
        gc.collect()
    if not outcome.startswith("wrong") and seconds > SECONDS:
        outcome = f"wrong: took {seconds:.1f} s"
    if not outcome.startswith("wrong") and grown > most:
        outcome = f"wrong: {grown >> 20} MiB"
    return outcome, seconds, grown


def _refusal(error: Exception) -> str:
    from vit_jax.system.errors import UserError

    if not isinstance(error, UserError):
        return f"wrong: {''.join(traceback.format_exception(error)).strip()}"
    if len(str(error).splitlines()) != 1:
        return f"wrong: a message of several lines: {str(error)[:500]!r}"
    return "refused"


def _status(name: str) -> int:
    """Bytes, from what Linux says about this process."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) << 10


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main(room: Path, seed: int, first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # libraries print, too
    with contextlib.redirect_stderr(io.StringIO()) as heard:

        def say(line: dict[str, Any]) -> None:
            heard.seek(0)
            heard.truncate()
            out.write(json.dumps(line) + "\n")

        make_trials(room, seed, range(first, first + count), say)


# --- In the process that watches ----------------------------------------------------------


def watched(room: Path, seed: int, trials: int) -> Iterator[Trial]:
    """Makes the trials in processes, a new one after each that had to be ended."""
    number = 0
    while number < trials:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        command = [sys.executable, "-m", "tests.campaign.inputs", str(room)]
        command += [str(seed), str(number), str(trials - number)]
        environment = dict(os.environ, JAX_PLATFORMS="cpu", VIT_JAX_CACHE=str(room / "cache"))
        with (
            (room / "errors.txt").open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as process,
        ):
            try:
                for trial in _heard(process, errors.name):
                    yield _kept(trial, room / "input", seed, number)
                    number += 1
            finally:
                process.kill()


def _heard(process: subprocess.Popen, errors: str) -> Iterator[Trial]:
    """The trials that a process tells of; the last is wrong if it hangs or ends too early."""
    lines: queue.Queue[str] = queue.Queue()
    # A thread, since waiting for a line has no end of its own.
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    at: dict[str, Any] = {}
    while True:
        try:
            line = lines.get(timeout=HANG if at else BEGIN)
        except queue.Empty:
            yield _lost(at, f"wrong: hangs, ended after {HANG if at else BEGIN:.0f} s")
            return
        if not line:
            if "outcome" not in at:
                said = Path(errors).read_text().strip()[-2000:]
                yield _lost(at, f"wrong: the process ended with {process.wait()}: {said}")
            return
        at = json.loads(line)
        if "outcome" in at:
            yield Trial(**at)


def _pass_on(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _lost(at: dict[str, Any], outcome: str) -> Trial:
    if not at:
        raise RuntimeError(outcome)
    return Trial(at["kind"], at.get("what", "being made"), outcome)


def _kept(trial: Trial, place: Path, seed: int, number: int) -> Trial:
    if not trial.outcome.startswith("wrong"):
        return trial
    folder = Path(tempfile.mkdtemp(prefix="vit_jax_input_"))
    with contextlib.suppress(OSError):
        os.rename(place, folder / "input")
    again = f"python -m tests.campaign.inputs EMPTY_FOLDER {seed} {number} 1"
    return trial._replace(outcome=f"{trial.outcome} [kept in {folder}; again: {again}]")


def trials_of(room: Path, trials: int, seed: int) -> list[Trial]:
    with tempfile.TemporaryDirectory(dir=room) as own:
        return list(watched(Path(own) / "inputs", seed, trials))


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    done = trials_of(room, trials, seed)
    return [Outcome(f"{trial.kind}: {trial.what}", trial.outcome) for trial in done]


def table(done: list[Trial]) -> str:
    """Of each kind how many were made, what came of them, and the most that one took."""
    lines = ["| kind | inputs | refused | read | wrong | slowest (s) | most memory (MiB) |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for kind in sorted({trial.kind for trial in done}):
        own = [trial for trial in done if trial.kind == kind]
        counts = collections.Counter(trial.outcome.partition(":")[0] for trial in own)
        slowest, most = max(t.seconds for t in own), max(t.bytes for t in own)
        lines.append(
            f"| {kind} | {len(own):,} | {counts['refused']:,} | {counts['read']:,} | "
            f"{counts['wrong']} | {slowest:.1f} | {most >> 20:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
