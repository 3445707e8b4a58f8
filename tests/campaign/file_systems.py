"""File systems that are full, read-only, gone or not what they should be: one sentence.

Each trial takes a run that was stopped half way, lets the file system fail it, and expects exit
code 1, one sentence and no traceback. Then the checkpoints that are there must be intact, and
once the fault is mended, the run must come to the end of one that was never disturbed.

Full disks are small tmpfs where these may be mounted; elsewhere the size of files is limited.
"""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.campaign import kills, runs
from tests.campaign.runs import Outcome, Run
from vit_jax.checkpoints import orbax_io

MEMORY = 8 << 20  # bytes of a file system that holds a whole run
RARELY = ("--config.checkpoint_every_steps=1000", "--config.eval_every_steps=0")
TOLD, ENDED = "one sentence", "ended before the fault"


class Skipped(Exception):
    """The trial cannot be made on this machine."""


# --- Faults -------------------------------------------------------------------------------

Mend = Callable[[], object]
Fault = Callable[..., tuple[Run, Mend]]


def start(room: Path, workdir: Path, *flags: str, **how) -> Run:
    [run] = runs.start(room, workdir, *flags, **how)
    return run


def mount(*arguments: str) -> None:
    made = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if made.returncode:
        raise Skipped(f"mount {' '.join(arguments)}: {made.stderr.strip()}")


def fill(workdir: Path, leave: int) -> Path:
    """Writes a file that leaves so many bytes free."""
    filler = workdir / "filler"
    with open(filler, "wb", buffering=0) as file:
        free = os.statvfs(workdir)
        file.write(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))
    return filler


def full(room: Path, workdir: Path, rng: random.Random, leave: int, *flags: str):
    filler = fill(workdir, leave)
    return start(room, workdir, *flags), filler.unlink


def full_on_resume(room: Path, workdir: Path, rng: random.Random):
    return full(room, workdir, rng, 0)


def full_while_saving(room: Path, workdir: Path, rng: random.Random):
    return full(room, workdir, rng, rng.randrange(16, 200) << 10)


def full_while_logging(room: Path, workdir: Path, rng: random.Random):
    """There is room for the lock and a few lines, and nothing else is written by then."""
    return full(room, workdir, rng, rng.randrange(12, 20) << 10, *RARELY)


def small_files(room: Path, workdir: Path, rng: random.Random):
    """The system refuses files of more than a few bytes, as a full disk would."""
    most = rng.randrange(2048, 20_000)
    # What the run says goes to files, too: they must hold a sentence.
    run = start(room, workdir)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (most, most))
    return run, lambda: None


def read_only(room: Path, workdir: Path, rng: random.Random):
    mount("-o", "remount,ro", str(workdir))
    return start(room, workdir), functools.partial(mount, "-o", "remount,rw", str(workdir))


def of_another_user(room: Path, workdir: Path, rng: random.Random):
    """The work directory may be read, not written."""
    before = runs.may_only_read(workdir)
    if before is None:
        raise Skipped("there is no `setpriv` to give up the rights of root")
    return start(room, workdir, before=before), lambda: runs.may_write(workdir)


def taken_away(room: Path, workdir: Path, rng: random.Random):
    """The work directory gets another name while the run is in it, and then its old one."""
    run, aside = start(room, workdir), workdir.with_name("aside")
    within(workdir, run, rng)
    if not run.alive():
        return run, lambda: None
    workdir.rename(aside)

    def put_back() -> None:
        if workdir.exists():  # what a save that was under way has made
            shutil.rmtree(workdir)
        aside.rename(workdir)

    return run, put_back


def removed(room: Path, workdir: Path, rng: random.Random):
    """As a run would see that somebody has deleted; mended from a copy."""
    copy = shutil.copytree(workdir, workdir.with_name("copy"))
    run = start(room, workdir)
    within(workdir, run, rng)
    shutil.rmtree(workdir, ignore_errors=True)

    def restore() -> None:
        shutil.rmtree(workdir, ignore_errors=True)
        copy.rename(workdir)

    return run, restore


def within(workdir: Path, run: Run, rng: random.Random) -> None:
    """Returns at a moment drawn at random, after the run has begun to write."""
    log = workdir / "metrics.jsonl"
    before = log.stat().st_size
    deadline = time.monotonic() + runs.TIMEOUT
    while run.alive() and log.stat().st_size <= before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))


def wrong_kind(room: Path, workdir: Path, rng: random.Random, name: str):
    """A file stands where a folder belongs, or the other way round."""
    path, aside = workdir / name, workdir.with_name("aside")
    path.rename(aside)
    if aside.is_dir():
        path.write_text("no folder\n")
    else:
        path.mkdir()
        (path / "no file").touch()

    def mend() -> None:
        kept = path.read_text() if path.is_file() else (path / "no file").exists()
        assert kept in ("no folder\n", True), f"what stood at {name} is gone"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(path)

    return start(room, workdir), mend


def kind_of(name: str) -> Fault:
    return functools.partial(wrong_kind, name=name)


class Kind(NamedTuple):
    """A fault, and what is peculiar to it.

    Attributes:
      fault: starts the run and returns it and what mends the fault.
      own: whether it needs a file system of its own.
      late: whether the run may have come to its end before.
    """

    fault: Fault
    own: bool = False
    late: bool = False


FAULTS = {
    "full on resume": Kind(full_on_resume, own=True),
    "full while saving": Kind(full_while_saving, own=True, late=True),
    "full while logging": Kind(full_while_logging, own=True, late=True),
    "limited size of files": Kind(small_files),
    "read-only file system": Kind(read_only, own=True),
    "permissions": Kind(of_another_user),
    "renamed under the run": Kind(taken_away, late=True),
    "removed under the run": Kind(removed, late=True),
    "tensorboard is a file": Kind(kind_of("tensorboard")),
    "metrics.jsonl is a folder": Kind(kind_of("metrics.jsonl")),
    "config.json is a folder": Kind(kind_of("config.json")),
    "best is a file": Kind(kind_of("best")),
}


# --- Trials -------------------------------------------------------------------------------


def stopped_half_way(room: Path) -> Path:
    """A work directory with a checkpoint and more to do, made once."""
    workdir = room / "half"
    if not workdir.exists():
        run = start(room, workdir)
        kills.wait_for("evaluation", workdir, [run], random.Random(0))
        runs.kill([run], signal.SIGTERM)
        if run.wait():
            raise RuntimeError(f"the run that is to be stopped has failed: {run.error()}")
    return workdir


def check(workdir: Path, before: dict[str, bytes]) -> None:
    """Nothing that was saved is damaged, and what was logged is still there."""
    for folder in ("checkpoints", "best"):
        for step in orbax_io.steps(workdir / folder):
            orbax_io.verify(workdir / folder / str(step))
    assert orbax_io.steps(workdir / "checkpoints"), "no checkpoint is left"
    log = (workdir / "metrics.jsonl").read_bytes()
    assert log.startswith(before["metrics.jsonl"]), "what was logged is gone"


def fail(room: Path, workdir: Path, kind: Kind, rng: random.Random) -> str:
    before = {path.name: path.read_bytes() for path in workdir.glob("*.json*")}
    run, mend = kind.fault(room, workdir, rng)
    try:
        code = run.wait(runs.BOUND)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still ran after {runs.BOUND} s") from None
    finally:
        mend()
    said = run.error()
    assert code or kind.late, "the run has not noticed"
    if code:
        assert code == 1, f"exit code {code}: {said[-300:]}"
        assert "Traceback" not in said, f"a traceback: {said[-1500:]}"
        assert runs.is_one_sentence(said), f"more than a sentence: {said[-500:]}"
    check(workdir, before)
    again = start(room, workdir)
    assert again.wait() == 0, f"does not go on: {again.error()[-300:]}"
    runs.assert_same(workdir, runs.reference(room))
    return TOLD if code else ENDED


def trial(room: Path, number: int, seed: int) -> Outcome:
    rng = random.Random(f"{seed}/{number}")
    name = list(FAULTS)[number % len(FAULTS)]
    with tempfile.TemporaryDirectory(dir=room) as own:
        workdir = Path(own) / "run"
        workdir.mkdir()
        try:
            if FAULTS[name].own:
                mount("-t", "tmpfs", "-o", f"size={MEMORY}", "none", str(workdir))
            shutil.copytree(stopped_half_way(room), workdir, dirs_exist_ok=True)
            return Outcome(name, fail(room, workdir, FAULTS[name], rng))
        except Skipped as reason:
            return Outcome(name, f"skipped: {reason}")
        except Exception as error:
            return Outcome(name, f"wrong: {type(error).__name__}: {error}"[:1500])
        finally:
            if os.path.ismount(workdir):
                subprocess.run(["umount", "--lazy", workdir], check=True)


def run(room: Path, trials: int, seed: int) -> list[Outcome]:
    runs.reference(room)
    stopped_half_way(room)
    return [trial(room, number, seed) for number in range(trials)]
