"""Runs of training in processes of their own, started cheaply, and what is compared of them."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests import commands
from tests.commands import ROOT
from tests.test_processes import free_port
from tests.test_train import metrics
from vit_jax.checkpoints import orbax_io

CONFIG = ROOT / "tests" / "campaign" / "small_config.py"
TIMEOUT = 600  # seconds that a run may take
TOGETHER = 20  # seconds that two processes wait for each other to start
BOUND = 60  # seconds within which all processes of a run must have ended after a signal


class Outcome(NamedTuple):
    """What was done in a trial, what came of it, and how many kills or starts it took."""

    what: str
    came: str
    events: int = 0


class Run:
    """A process that trains, and what it says, which files of the folder `room` hold."""

    def __init__(self, room: Path, command: list[str], environment: dict[str, str], **how):
        said = Path(tempfile.mkdtemp(prefix="said-", dir=room))  # a pipe would fill up
        self._out, self._error = said / "out", said / "error"
        with self._out.open("w") as out, self._error.open("w") as error:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=out, stderr=error, **how,
            )  # fmt: skip

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = TIMEOUT) -> int:
        """The exit code; a run that takes longer is killed, and TimeoutExpired raised."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def out(self) -> str:
        return self._out.read_text()

    def error(self) -> str:
        return self._error.read_text()


def environment(room: Path) -> dict[str, str]:
    """Of one device; with programs compiled once, and without what takes long to import."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(room / "compiled"),
        **commands.environment(optimized=False),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


TRAIN = ("-m", "vit_jax.train")


def _pass(number: int, frame: object) -> None:
    """Nothing happens, which the processes that are started do not inherit."""


def start(
    room: Path,
    workdir: Path,
    *flags: str,
    count: int = 1,
    program: tuple[str, str] = TRAIN,
    before: Sequence[str] = (),
    **how,
) -> list[Run]:
    """Starts the processes of one run.

    Args:
      room: what all runs share.
      workdir: of this one.
      *flags: more of them.
      count: of processes.
      program: what Python runs.
      before: what comes before Python on the command line.
      **how: for `subprocess.Popen`.
    """
    # What is ignored here, as after `nohup` or behind `&`, the run would ignore, too.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, _pass),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    command = [*before, sys.executable, *program, f"--config={CONFIG}"]
    command += [f"--workdir={workdir}", *flags]
    env = environment(room)
    if count == 1:
        return [Run(room, command, env, **how)]
    command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    command += [f"--process_timeout={TOGETHER}"]
    own = [f"--process_id={index}" for index in range(count)]
    return [Run(room, [*command, each], env, **how) for each in own]


def finish(started: list[Run], seconds: float = TIMEOUT) -> list[int]:
    """The exit codes of all; raises TimeoutExpired, and leaves nobody behind."""
    end = time.monotonic() + seconds
    try:
        return [run.wait(max(end - time.monotonic(), 0.01)) for run in started]
    finally:
        kill(started, signal.SIGKILL)


def kill(started: list[Run], number: signal.Signals) -> int:
    """Sends a signal to those that have not ended; returns how many these were."""
    alive = [run for run in started if run.alive()]
    for run in alive:
        run.process.send_signal(number)
    return len(alive)


def reference(room: Path, *flags: str, count: int = 1) -> Path:
    """The work directory of a run that nobody has disturbed, made once."""
    workdir = room / "-".join(["reference", str(count), *(flag.strip("-") for flag in flags)])
    if not workdir.exists():
        started = start(room, workdir, *flags, count=count)
        if any(finish(started)):
            raise RuntimeError(f"the undisturbed run has failed: {started[0].error()}")
    return workdir


# --- Other users ---------------------------------------------------------------------------

_OTHER = 65534  # the number of a user who is not this one


def may_only_read(folder: Path) -> list[str] | None:
    """Makes a folder one that a command may read and not write.

    For root its files become those of another user.

    Returns:
      What to put before the command, or None where that does not work.
    """
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    if os.geteuid():
        for path in folders:
            path.chmod(0o555)
        return []
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _OTHER, -1)
        path.chmod(0o755 if path.is_dir() else 0o644)
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    with contextlib.suppress(OSError):  # `setpriv` is not everywhere
        probe = subprocess.run([*plain, "touch", folder], capture_output=True)
        return plain if b"Permission denied" in probe.stderr else None
    return None


def may_write(folder: Path) -> None:
    """Undoes `may_only_read`."""
    for path in (folder, *folder.rglob("*")):
        if not os.geteuid():
            os.chown(path, 0, -1)
        if path.is_dir():
            path.chmod(0o755)


# --- What is compared ---------------------------------------------------------------------


def newest(folder: Path) -> Path:
    return folder / str(orbax_io.steps(folder)[0])


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint; raises what `stored.verify` does if it is damaged."""
    orbax_io.verify(checkpoint)
    return orbax_io._read_to_host(checkpoint)


def assert_same(workdir: Path, reference: Path) -> None:
    """Raises AssertionError unless both hold the same log, last state and best weights."""
    assert metrics(workdir) == metrics(reference), "metrics.jsonl is another"
    for name in ("checkpoints", "best"):
        found, expected = newest(workdir / name), newest(reference / name)
        assert found.name == expected.name, f"{name}/ ends with {found.name}"
        one, other = arrays(found), arrays(expected)
        assert one.keys() == other.keys(), f"{name}/{found.name} holds other arrays"
        for key, x in one.items():
            same = x.dtype == other[key].dtype and x.tobytes() == other[key].tobytes()
            assert same, f"{key} of {name}/{found.name} is another"


def one_line(error: BaseException) -> str:
    return " | ".join(str(error).splitlines())[:1000] or type(error).__name__


def is_one_sentence(said: str) -> bool:
    """Whether stderr ends with one line of an error, and has nothing but notes before it."""
    lines = said.splitlines()
    notes = all(line.startswith(("note: ", "warning: ")) for line in lines[:-1])
    return bool(lines) and lines[-1].startswith("error: ") and notes
