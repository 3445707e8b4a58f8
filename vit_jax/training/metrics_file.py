"""`metrics.jsonl`: one JSON object a line, in the order of steps, whatever befell the file.

A run only ever appends to it. When the run goes on at an earlier step, the later lines are cut
off; lines that cannot be read, and records that stand there twice, are taken out, and the file
as it was is kept beside. All of it is read a line at a time: memory does not grow with it.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.system import bounded
from vit_jax.system.atomic import replacing

_MOST = 16 << 30  # bytes: fifty million lines. What declares more is no file of ours

Record = dict[str, Any]
Names = tuple[str, ...]


class Line(NamedTuple):
    start: int  # of its first byte in the file
    text: bytes
    step: int | None  # None: it is no record

    def record(self) -> Record:
        """What a line with a step holds."""
        found: Record = json.loads(self.text)
        return found


# A line as `encode` writes it, of a record of numbers. To see that it is whole takes a fifth of
# the time of reading its numbers, and there may be millions; all others are read.
_OURS = re.compile(
    rb'\{"step": (0|[1-9]\d{0,17})'
    rb'(?:, "(?!step")[ !#-\[\]-~]*+": (?:-?(?:0|[1-9]\d{0,29})(?:\.\d++)?+(?:e[+-]?\d++)?+'
    rb"|NaN|-?Infinity)(?=[,}]))*+\}\n"
)


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file, or nothing where there is none. Raises OSError."""
    start = 0
    try:
        file = bounded.open_regular(path, _MOST)
    except FileNotFoundError:
        return
    with file:
        while text := file.readline(bounded.LABELS):
            ours = _OURS.fullmatch(text)
            yield Line(start, text, int(ours[1]) if ours else _step(text))
            start += len(text)


def _step(text: bytes) -> int | None:
    try:
        record = bounded.parse_json(text)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def encode(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def read_metrics(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; lines that cannot be read are left out, and told of.

    Of a last line without an end nothing is said: somebody may be writing it.
    """
    records, bad = [], 0
    for line in lines(path):
        if line.step is not None:
            records.append(line.record())
        bad += line.step is None and line.text.endswith(b"\n")
    if bad:
        print(f"warning: {bad} lines of {path} cannot be read: left out", file=sys.stderr)
    return records


# --- What a run that goes on has to know --------------------------------------------------


class Found(NamedTuple):
    """What stands in the file up to a step.

    Attributes:
      end: bytes up to the first later record; all that follows them is later, if in order.
      in_order: whether these bytes are records with growing steps, each once.
      bad: lines that cannot be read.
      first_bad: the number of the first of them.
      last: the last record.
      at_step: the records of the step itself.
      holds: whether `saved` is among the records.
    """

    end: int
    in_order: bool
    bad: int
    first_bad: int
    last: Record | None
    at_step: list[Record]
    holds: bool = False


def find(path: Path, step: int, saved: Record | None = None) -> Found:
    """Reads the file once. Raises OSError."""
    end, stopped, in_order, bad, first_bad = 0, False, True, 0, 0
    last: Line | None = None
    at_step: list[Record] = []
    wanted, holds = saved["step"] if saved else None, False
    seen: set[Names] = set()  # the names of the records of the last step, if it has several
    for number, line in enumerate(lines(path), 1):
        if line.step is None:
            if not stopped:
                bad, first_bad = bad + 1, first_bad or number
            continue
        if line.step == wanted:
            holds = holds or line.record() == saved
        if line.step > step:
            stopped = True
            continue
        if last is not None and last.step == line.step:
            names = tuple(line.record())
            seen.add(tuple(last.record()))
            in_order = in_order and names not in seen
            seen.add(names)
        else:
            seen.clear()
        backwards = last is not None and line.step < (last.step or 0)
        if stopped or backwards or not line.text.endswith(b"\n"):
            in_order = False
        last = line
        if line.step == step:
            at_step.append(line.record())
        if not stopped:
            end = line.start + len(line.text)
    newest = last.record() if last else None
    return Found(end, in_order and not bad, bad, first_bad, newest, at_step, holds)


def go_on(path: Path, step: int, found: Found, saved: Record | None) -> None:
    """Makes the file that of a run which has come as far as `step`.

    Args:
      path: of the file.
      step: the last step that counts.
      found: in this file, for this step and record.
      saved: a record that the checkpoint holds too, and that is put back if it is missing.

    Raises:
      OSError: it cannot be written.
      UserError: the same, where it is written anew.
    """
    if found.holds:
        saved = None
    last = found.last["step"] if found.last else 0
    if not found.in_order or (saved is not None and saved["step"] < last):
        _write_anew(path, step, found, saved)
        return
    with path.open("ab") as file:
        file.truncate(found.end)
        if saved is not None:
            file.write(encode(saved))


def _write_anew(path: Path, step: int, found: Found, saved: Record | None) -> None:
    beside = _keep(path)
    steps, starts = array("q"), array("q")
    for line in lines(path):
        if line.step is not None and line.step <= step:
            steps.append(line.step)
            starts.append(line.start)
    order = np.argsort(np.array(steps, np.int64), kind="stable")
    repeated, before, seen = 0, -1, set[Names]()
    with replacing(path) as part, part.open("wb") as new, path.open("rb") as old:
        for place, i in enumerate(order):
            if saved is not None and saved["step"] < steps[i]:
                new.write(encode(saved))
                saved = None
            old.seek(starts[i])
            text = old.readline(bounded.LABELS)
            if steps[i] != before:
                before = steps[i]
                seen.clear()
            alone = not seen and (place + 1 == len(order) or steps[order[place + 1]] != before)
            if not alone or not _OURS.fullmatch(text):
                record: Record = json.loads(text)
                if tuple(record) in seen:
                    repeated += 1
                    continue
                seen.add(tuple(record))
                text = encode(record)
            new.write(text)
        if saved is not None:
            new.write(encode(saved))
        new.flush()
        os.fsync(new.fileno())
    bad = f"{found.bad} lines that cannot be read, the first of them line {found.first_bad}"
    problems = [bad] * bool(found.bad) + [f"{repeated} records twice"] * bool(repeated)
    print(
        f"warning: {path} had {' and '.join(problems) or 'records out of order'}: mended, and "
        f"kept as it was in {beside}",
        file=sys.stderr,
    )


def _keep(path: Path) -> Path:
    """Another name for the file as it is."""
    number = 1
    while (beside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    with contextlib.suppress(OSError):  # some file systems have no second names
        os.link(path, beside)
        return beside
    shutil.copyfile(path, beside)
    return beside
