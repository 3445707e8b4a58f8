"""Every number a run reports: `metrics.jsonl`, TensorBoard, a line, a progress bar."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricWriter:
    """Writes scalars to a work directory; all but process 0 only read what is there.

    Resuming at `first_step` drops what an interrupted run reported for later steps, so that
    each step stands in the file once.

    Args:
      workdir: an existing directory.
      first_step: number of updates already made.
      total_steps: where the progress bar ends. There is no bar when stderr is not a terminal.
    """

    def __init__(self, workdir: Path, first_step: int, total_steps: int):
        from tensorboardX import SummaryWriter  # here, as it imports torch where there is one

        path = workdir / "metrics.jsonl"
        self.records = [r for r in read_metrics(path) if r["step"] <= first_step]
        self._silent = jax.process_index() > 0
        if jax.process_count() > 1:  # nobody shall read what is being rewritten
            multihost_utils.sync_global_devices("metrics are read")
        if self._silent:
            return
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        os.replace(temporary, path)
        self._file = path.open("a")
        # The suffix keeps a quick restart from overwriting the file of the same second.
        self._board = SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=first_step + 1,
            filename_suffix=f".{first_step}",
        )
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one record; it is on disk when this returns."""
        record = {"step": step, **scalars}
        self.records.append(record)
        if self._silent:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self.say(f"step {step}/{self._bar.total}  {_readable(scalars)}")

    def say(self, message: str) -> None:
        """Prints a line without breaking the progress bar."""
        if not self._silent:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, step: int) -> None:
        if not self._silent:
            self._bar.update(step - self._bar.n)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._silent:
            return
        self._bar.close()
        self._board.close()
        self._file.close()


def _readable(scalars: dict[str, float]) -> str:
    def one(name: str, value: float) -> str:
        if isinstance(value, int):
            return f"{name} {value}"
        return f"{name} {value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{name} {value:.3g}"

    return "  ".join(one(name, value) for name, value in scalars.items())
