"""Every number a run reports: `metrics.jsonl`, TensorBoard, a line, a progress bar."""

import contextlib
import os
import sys
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from vit_jax.system.errors import about
from vit_jax.training import metrics_file
from vit_jax.training.metrics_file import Record, read_metrics

__all__ = ["MetricWriter", "read_metrics"]

_BOARD_EVERY = 30.0  # seconds until TensorBoard's file is written out


class MetricWriter:
    """Writes scalars to a work directory; all but process 0 only read what is there.

    Resuming at `first_step` drops what an interrupted run reported for later steps, so that
    each step stands in the file once.

    Args:
      workdir: an existing directory.
      first_step: number of updates already made.
      total_steps: where the progress bar ends. There is no bar when stderr is not a terminal.
      saved: the last record when the state of `first_step` was saved, as its card has it.

    Raises:
      OSError, UserError: a file cannot be read or written.
    """

    def __init__(
        self, workdir: Path, first_step: int, total_steps: int, saved: Record | None = None
    ):
        path = workdir / "metrics.jsonl"
        if saved is not None and saved["step"] > first_step:
            saved = None  # of a later state, which could not be read
        with about(path):
            found = metrics_file.find(path, first_step, saved)
        self.last = found.last or saved  # the record that was written last
        self._evaluation = next((r for r in found.at_step if "eval/count" in r), None)
        self._silent = jax.process_index() > 0
        if jax.process_count() > 1:  # nobody shall read what is being rewritten
            multihost_utils.sync_global_devices("metrics are read")
        if self._silent:
            return
        metrics_file.go_on(path, first_step, found, saved)
        self._board = _Board(workdir / "tensorboard", first_step)
        self._path, self._file = path, path.open("ab")
        _sync_folder(workdir)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def evaluation(self) -> Record | None:
        """The evaluation of the step that the run goes on from, if it is on record."""
        return self._evaluation

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one record; a crash of this process does not lose it, see `sync`."""
        self.last = {"step": step, **scalars}
        if self._silent:
            return
        with about(self._path):
            self._file.write(metrics_file.encode(self.last))
            self._file.flush()
        self._board.write(step, scalars)
        self.say(f"step {step}/{self._bar.total}  {_readable(scalars)}")

    def sync(self) -> None:
        """What was written is on the disk when this returns, and survives the machine."""
        if not self._silent:
            with about(self._path):
                os.fsync(self._file.fileno())
            self._board.sync()

    def say(self, message: str) -> None:
        """Prints a line without breaking the progress bar.

        A terminal that was closed, or a reader that has left, does not end the run.
        """
        if not self._silent:
            with contextlib.suppress(OSError):
                tqdm.write(message, file=sys.stdout)
                sys.stdout.flush()

    def progress(self, step: int) -> None:
        if not self._silent:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._silent:
            return
        with contextlib.suppress(OSError):
            self._bar.close()
        with contextlib.closing(self._file), self._board:
            if exception == (None, None, None):  # else that one is to be told
                self.sync()


class _Board:
    """A file of scalars for TensorBoard, written by the thread that calls.

    So that a full disk is an error here. (tensorboardX's own `SummaryWriter` has a thread for
    it, which then dies, and whoever waits for it waits for ever.)
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import event_file_writer  # here: it imports torch where there is one
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._folder, self._event, self._due = folder, event_pb2.Event, 0.0
        # The suffix keeps a quick restart from overwriting the file of the same second.
        prefix, suffix = str(folder / "events"), f".{first_step}"
        with about(folder):
            self._file = event_file_writer.EventsWriter(prefix, suffix)
            begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # What was shown of this step and later ones was made by a run that did not end.
            self._put(step=first_step + 1, session_log=begin)

    def _put(self, **fields: object) -> None:
        self._file.write_event(self._event(wall_time=time.time(), **fields))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        with about(self._folder):
            for name, value in scalars.items():
                self._put(step=step, summary=scalar(name, value))
        if time.monotonic() >= self._due:
            self.sync()

    def sync(self) -> None:
        self._due = time.monotonic() + _BOARD_EVERY
        with about(self._folder):
            self._file.flush()

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, *exception: object) -> None:
        with about(self._folder):
            self._file.close()


def _sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk."""
    with contextlib.suppress(OSError):  # not every file system has a notion of that
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _readable(scalars: dict[str, float]) -> str:
    def one(name: str, value: float) -> str:
        if isinstance(value, int):
            return f"{name} {value}"
        return f"{name} {value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{name} {value:.3g}"

    return "  ".join(one(name, value) for name, value in scalars.items())
