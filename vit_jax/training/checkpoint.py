"""Saving and restoring: the only file that knows Orbax.

A work directory holds `checkpoints/STEP`, the last few states, from which training resumes,
and `best/STEP`, the weights of the best evaluation so far. Beside the arrays of each lies a
*card*, a JSON object with the configuration, the class names and the metrics: whoever has
one of these folders needs nothing else. Writing is asynchronous, and atomic: a step appears
under its number only when it is complete.
"""

import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from vit_jax.errors import UserError

Card = dict[str, Any]


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """For the one run that trains: it also clears away what a crash left half written."""
    return _with_handlers(directory, max_to_keep=keep, cleanup_tmp_directories=True)


def _reader(directory: Path) -> ocp.CheckpointManager:
    """For everybody else, perhaps while training goes on: it changes nothing on disk."""
    # Orbax's own `read_only` does the same, with six warnings about it.
    return _with_handlers(directory, create=False, save_root_metadata=False)


def _with_handlers(directory: Path, **options: Any) -> ocp.CheckpointManager:
    # Processes meet by name: two managers that save at once must not use the same names.
    names = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=names),
        "card": ocp.JsonCheckpointHandler(multiprocessing_options=names),
    }
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(multiprocessing_options=names, **options),
        item_handlers=handlers,
    )


def _restore(manager: ocp.CheckpointManager, step: int, target: Any) -> Any:
    """Reads the arrays that `target` names, with its shapes, dtypes and shardings."""
    args = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def _read_card(manager: ocp.CheckpointManager, step: int) -> Card:
    return manager.restore(step, args=ocp.args.Composite(card=ocp.args.JsonRestore()))["card"]


def _everywhere(good: bool) -> bool:
    """Whether `good` holds in every process; each must ask."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self._last = _manager(workdir / "checkpoints", keep)
        self._best = _manager(workdir / "best", 1)
        step = self._best.latest_step()
        self._best_score = -math.inf if step is None else _read_card(self._best, step)["score"]

    def card(self) -> Card | None:
        """The card of the newest checkpoint that has a readable one, or None."""
        for step in sorted(self._last.all_steps(), reverse=True):
            try:
                return _read_card(self._last, step)
            except Exception:
                continue  # `restore` reports it
        return None

    def restore(self, target: Any) -> Any | None:
        """Returns the newest readable state, or None where there is no checkpoint.

        A checkpoint that cannot be read is moved to `unreadable/` and the one before it is
        tried.

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._last.all_steps(), reverse=True)
        for step in steps:
            error, state = None, None
            try:
                state = _restore(self._last, step, target)
            except Exception as failure:  # whatever a damaged file makes the reader raise
                error = failure
            if _everywhere(error is None):
                return state
            self._set_aside(step, error)
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self.workdir} could be read: they were "
                f"moved to {self.workdir / 'unreadable'}; run again to start from step 0"
            )
        return None

    def _set_aside(self, step: int, error: Exception | None) -> None:
        if jax.process_index() == 0:
            self._move_away(step, error or RuntimeError("another process could not read it"))
        _everywhere(True)  # when process 0 has moved it
        self._last.reload()

    def _move_away(self, step: int, error: Exception) -> None:
        source = self.workdir / "checkpoints" / str(step)
        shelf = self.workdir / "unreadable"
        shelf.mkdir(exist_ok=True)
        number = len(list(shelf.glob(f"{step}-*")))
        target = shelf / f"{step}-{number}"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(
            f"warning: checkpoint {source} cannot be read ({reason[0][:200]}); moved it to "
            f"{target}, falling back to the one before it",
            file=sys.stderr,
        )
        source.rename(target)

    def save(self, step: int, state: Any, card: Card) -> None:
        """Starts writing; returns as soon as `state` may be changed again."""
        # Whoever resumes from this step relies on every earlier best one being there.
        self._best.wait_until_finished()
        if step not in self._last.all_steps():
            self._write(self._last, step, state, card)

    def save_if_best(self, step: int, params: Any, card: Card, score: float) -> None:
        """Keeps `params` in place of the best so far if `score` is higher."""
        if score > self._best_score:
            self._best_score = score
            self._write(self._best, step, {"params": params}, {**card, "score": score})

    @staticmethod
    def _write(manager: ocp.CheckpointManager, step: int, state: Any, card: Card) -> None:
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), card=ocp.args.JsonSave({**card, "step": step})
        )
        manager.save(step, args=items, force=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits until everything is on disk."""
        self._last.close()
        self._best.close()


def _open(workdir: Path, which: str) -> tuple[ocp.CheckpointManager, int]:
    exported = not (workdir / "checkpoints").is_dir() and (workdir / "best").is_dir()
    if which == "last" and exported:
        which = "best"  # an export holds nothing else
    directory = workdir / ("best" if which == "best" else "checkpoints")
    if not directory.is_dir():
        raise UserError(
            f"{workdir} has no {directory.name}/ folder: pass the --workdir of a training run"
        )
    manager = _reader(directory)
    steps = sorted(manager.all_steps())
    if which in ("last", "best") and steps:
        return manager, steps[-1]
    if which not in map(str, steps):
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{directory} has no checkpoint {which!r}: it holds {found}")
    return manager, int(which)


def load_card(workdir: Path, which: str = "last") -> Card:
    """Reads the card of checkpoint `which`: `last`, `best` or a step number.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    manager, step = _open(workdir, which)
    with manager:
        try:
            return _read_card(manager, step)
        except Exception as error:
            raise _unreadable(workdir, step, error) from error


def load_params(workdir: Path, which: str, target: Any) -> Any:
    """Reads the weights of checkpoint `which`, the averaged ones where they were kept.

    Args:
      workdir: a work directory.
      which: `last`, `best` or a step number.
      target: a tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      UserError: there is no such checkpoint, or it cannot be read.
    """
    manager, step = _open(workdir, which)
    with manager:
        try:
            # Only whole states have both; what `best` holds is named `params` whatever it is.
            averaged = _read_card(manager, step)["config"]["ema_decay"]
            whole = Path(manager.directory).name == "checkpoints"
            name = "ema" if averaged and whole else "params"
            return _restore(manager, step, {name: target})[name]
        except Exception as error:
            raise _unreadable(workdir, step, error) from error


def _unreadable(workdir: Path, step: int, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"checkpoint {step} in {workdir} cannot be read ({reason[0][:200]}): pass --step with "
        f"another one, or copy the work directory again"
    )


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree`, to be restored with one sharding or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    describe = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(describe, tree, shardings)
