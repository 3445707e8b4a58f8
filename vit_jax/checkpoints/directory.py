"""The checkpoints of a work directory: which one is used, and what becomes of a damaged one.

A work directory holds `checkpoints/STEP`, the last few states, from which training resumes,
and `best/STEP`, the weights of the best evaluation so far. Beside the arrays of each lies a
*card*, a JSON object with the configuration, the class names and the metrics: whoever has
one of these folders needs nothing else. All of it is compared with its digests whenever it is
read. Training moves what is damaged to `unreadable/` and goes on from the one before;
everybody else changes nothing on disk.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vit_jax.checkpoints import older, orbax_io
from vit_jax.checkpoints.damage import agree, system_trouble
from vit_jax.checkpoints.digests import Damaged
from vit_jax.checkpoints.metadata import Card
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError


class Checkpoints:
    """The checkpoints of one run; as a context, it waits at its end until all is on disk."""

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self._last = orbax_io.manager(workdir / "checkpoints", keep)
        self._best = orbax_io.manager(workdir / "best", 1)
        self._best_score: float | None = None  # not known yet

    def card(self) -> Card | None:
        """The card of the newest checkpoint that has an intact one, or None.

        Raises:
          UserError: one cannot be read now.
        """
        for step in orbax_io.steps(self.workdir / "checkpoints"):
            try:
                return orbax_io.card(self._path(self._last, step))
            except Damaged:
                continue  # `restore` reports it
        return None

    def restore(self, target: Any, begin_anew: bool = False) -> Any | None:
        """Returns the newest intact state, or None where there has never been one.

        A damaged checkpoint is moved to `unreadable/` and the one before it is tried.

        Args:
          target: a tree of `jax.ShapeDtypeStruct` with shardings.
          begin_anew: return None, too, where all that there were are damaged.

        Raises:
          UserError: there were checkpoints, but none is intact; or one cannot be read now.
        """
        self._score_to_beat()
        for step in orbax_io.steps(self.workdir / "checkpoints"):
            try:
                return _restore(self._path(self._last, step), target)
            except Damaged as damage:
                self._set_aside(self._last, step, damage)
        shelf = self.workdir / "unreadable"
        damaged = sorted(p.name for p in shelf.glob("[0-9]*")) if shelf.is_dir() else []
        if damaged and not begin_anew:
            raise UserError(
                f"no checkpoint of {self.workdir} is intact, {shelf} holds the damaged ones "
                f"({', '.join(damaged)}): put a good copy of one into checkpoints/, or start "
                f"from step 0 by moving that folder away or passing --begin_anew"
            )
        return None

    def _score_to_beat(self) -> float:
        """The score of the best weights so far, if they are intact."""
        while self._best_score is None:
            step = self._best.latest_step()
            if step is None:
                self._best_score = -math.inf
                break
            path = self._path(self._best, step)
            try:
                score = orbax_io.card(path)["score"]
                self._check_best(path)
                self._best_score = score
            except Damaged as damage:
                self._set_aside(self._best, step, damage)
        return self._best_score

    def _check_best(self, path: Path) -> None:
        """Looks at its arrays, too: they are not needed now, but will be at the end."""
        failure = None
        try:
            if jax.process_index() == 0:
                orbax_io.verify(path)
        except (Damaged, UserError) as error:
            failure = error
        agree(failure)

    def _set_aside(self, manager: ocp.CheckpointManager, step: int, damage: Damaged) -> None:
        failure = None
        try:
            if jax.process_index() == 0:
                self._move_away(self._path(manager, step), damage)
        except OSError as error:
            failure = UserError(
                f"the damaged checkpoint {self._path(manager, step)} ({damage}) cannot be "
                f"moved away ({error.strerror}): delete it, or make {self.workdir} writable"
            )
        agree(failure)  # when process 0 has moved it
        manager.reload()

    def _move_away(self, source: Path, damage: Damaged) -> None:
        shelf = self.workdir / "unreadable"
        shelf.mkdir(exist_ok=True)
        name = f"best-{source.name}" if source.parent.name == "best" else source.name
        target = shelf / f"{name}-{len(list(shelf.glob(f'{name}-*')))}"
        source.rename(target)
        (target / "reason.txt").write_text(f"{damage}\n")
        instead = "evaluations from here on choose a new one"
        if name == source.name:
            instead = "falling back to the one before it"
        print(
            f"warning: checkpoint {source} is damaged ({damage}); moved it to {target}, "
            f"{instead}",
            file=sys.stderr,
        )

    def _path(self, manager: ocp.CheckpointManager, step: int) -> Path:
        return self.workdir / Path(manager.directory).name / str(step)

    def save(self, step: int, state: Any, card: Card) -> None:
        """Starts writing; returns as soon as `state` may be changed again.

        Raises:
          UserError: the disk is full, or the like.
        """
        with self._sentence():
            # Whoever resumes from this step relies on every earlier best one being there.
            self._best.wait_until_finished()
            if step not in self._last.all_steps():
                orbax_io.save(self._last, step, state, card)

    def save_if_best(self, step: int, params: Any, card: Card, score: float) -> None:
        """Keeps `params` in place of the best so far if `score` is higher.

        Raises:
          UserError: as `save`.
        """
        if score > self._score_to_beat():
            self._best_score = score
            with self._sentence():
                orbax_io.save(self._best, step, {"params": params}, {**card, "score": score})

    def announcement(self, state: Any) -> str:
        """What whoever sent a signal must know about the save that comes now."""
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        before = next(iter(orbax_io.steps(self.workdir / "checkpoints")), None)
        known = before is not None and orbax_io.seconds_to_save(self._path(self._last, before))
        took = (
            f"the last save took {known:.1f} s" if known else "how long that takes is unknown"
        )
        instead = "nothing" if before is None else f"step {before}"
        return (
            f"saving {sharding.readable(size)} ({took}); if the process is killed before that "
            f"is done, {instead} is what it continues from"
        )

    @contextlib.contextmanager
    def _sentence(self) -> Iterator[None]:
        """Says in a sentence why the system does not let a checkpoint be written."""
        try:
            yield
        except Exception as error:
            trouble = "" if isinstance(error, UserError) else system_trouble(error)
            if not trouble:
                raise
            raise UserError(
                f"a checkpoint could not be written in {self.workdir} ({trouble}): mend that "
                f"and run the same command again; it continues from the last complete one"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits until everything is on disk."""
        with self._sentence():
            try:
                self._last.close()
            finally:
                self._best.close()


def _restore(checkpoint: Path, target: Any) -> Any:
    if older.layout(orbax_io.card(checkpoint)) > 1:
        return orbax_io.restore(checkpoint, target)
    return older.from_layout_1(orbax_io.restore(checkpoint, older.to_layout_1(target)), target)


# --- For everybody but the run that trains ------------------------------------------------


def find(workdir: Path, which: str) -> list[Path]:
    """The checkpoints that `which` (`last`, `best` or a step number) means, in order.

    Of `last` that is every state, the newest first: where one is damaged, the next will do.

    Raises:
      UserError: there is none.
    """
    exported = not (workdir / "checkpoints").is_dir() and (workdir / "best").is_dir()
    if which == "last" and exported:
        which = "best"  # an export holds nothing else
    directory = workdir / ("best" if which == "best" else "checkpoints")
    if not directory.is_dir():
        raise UserError(
            f"{workdir} has no {directory.name}/ folder: pass the --workdir of a training run"
        )
    steps = orbax_io.steps(directory)
    if which in ("last", "best") and steps:
        return [directory / str(step) for step in (steps if which == "last" else steps[:1])]
    if which not in map(str, steps):
        found = ", ".join(map(str, reversed(steps))) or "none"
        raise UserError(f"{directory} has no checkpoint {which!r}: it holds {found}")
    return [directory / which]


def first_intact(workdir: Path, which: str, use: Callable[[Path], Any]) -> Any:
    """`use(checkpoint)` of the checkpoint that `which` means, or the first that is intact.

    Args:
      workdir: a work directory, in which nothing is changed.
      which: as for `find`; only of `last` there are several.
      use: opens it, and raises Damaged if it is.

    Raises:
      UserError: there is none, it cannot be read now, or it is damaged.
    """
    found = find(workdir, which)
    for checkpoint, before in itertools.zip_longest(found, found[1:]):
        try:
            return use(checkpoint)
        except Damaged as damage:
            sentence = f"checkpoint {checkpoint} is damaged ({damage})"
        if before and jax.process_index() == 0:
            print(f"warning: {sentence}; the one before it, {before}, is used", file=sys.stderr)
    raise UserError(
        f"{sentence}: pass --step with another one, or copy the work directory again"
    )


def load_card(workdir: Path, which: str = "last") -> Card:
    """Reads the card of checkpoint `which`; raises as `first_intact`."""
    return first_intact(workdir, which, orbax_io.card)


def load_params(checkpoint: Path, target: Any) -> Any:
    """Reads the weights of the model in a checkpoint, the averaged ones where they were kept.

    Args:
      checkpoint: its folder.
      target: a tree of `jax.ShapeDtypeStruct` with shardings, without those of the objective.

    Raises:
      Damaged: it is not what was saved.
      UserError: it cannot be read now.
    """
    # Only whole states have both; what `best` holds is named `params` whatever it is.
    card = orbax_io.card(checkpoint)
    averaged = card.get("averaged", bool(card["config"].get("ema_decay")))
    name = "ema" if averaged and checkpoint.parent.name == "checkpoints" else "params"
    if older.layout(card) == 1:
        return orbax_io.restore(checkpoint, {name: target})[name]
    return orbax_io.restore(checkpoint, {name: {"model": target}})[name]["model"]


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree`, to be restored with one sharding or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    describe = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(describe, tree, shardings)
