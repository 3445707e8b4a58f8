"""One checkpoint on disk, written and read: the only file that knows Orbax.

A checkpoint is a folder named by its step, with the arrays in `state/`, the *card*, a JSON
object, in `card/metadata`, and in `digests/` what both are compared with when they are read.
Writing is asynchronous, and atomic: the folder has its name only when it is complete.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from vit_jax.checkpoints import digests
from vit_jax.checkpoints.damage import (
    agree,
    cannot_be_read,
    judge,
    strange_file,
    unreadable_file,
)
from vit_jax.checkpoints.digests import Damaged, Digests, named, read_json
from vit_jax.checkpoints.metadata import Card
from vit_jax.distributed.sharding import path_name
from vit_jax.system import bounded
from vit_jax.system.errors import UserError


def _not_raised_too(record: logging.LogRecord) -> bool:
    """Keeps to itself what Orbax logs, with a traceback, and then raises in our thread.

    So it is with the warning that a file is missing, where the folder was removed meanwhile.
    """
    missing = "Metadata file does not exist" in str(record.msg)
    return (record.levelno < logging.ERROR and not missing) or "orbax" not in record.pathname


def _is_asked_for(record: logging.LogRecord) -> bool:
    """Keeps to itself what asyncio says of reads and writes that were given up."""
    return "exception was never retrieved" not in record.getMessage()


def _silence_what_was_given_up() -> None:
    """Once one read or write has failed, and that is raised, the others are given up.

    TensorStore's threads report the ends of those to an event loop that Orbax has closed by
    then, dozens of times and at any moment after, and Python shows a traceback for each.
    """
    logging.getLogger("absl").addFilter(_not_raised_too)
    logging.getLogger("asyncio").addFilter(_is_asked_for)
    show = sys.unraisablehook

    def hook(said: Any) -> None:
        if str(said.exc_value) != "Event loop is closed":
            show(said)

    sys.unraisablehook = hook


_silence_what_was_given_up()


# --- Writing ------------------------------------------------------------------------------


class _DigestHandler(ocp.AsyncCheckpointHandler):
    """Writes `digests/` as a part of the checkpoint, in the background like the others."""

    async def async_save(self, directory: Any, args: "_DigestSave") -> list[ocp.Future]:
        arrays = digests.copy_to_host(args.tree)

        async def write() -> None:
            digests.write(Path(directory), arrays, args.card)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="digests")]

    def save(self, directory: Any, args: "_DigestSave") -> None:
        raise NotImplementedError("checkpoints are saved in the background")

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("`digests.read` reads them")


@ocp.args.register_with_handler(_DigestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _DigestSave(ocp.args.CheckpointArgs):
    tree: Any
    card: Card


def manager(directory: Path, keep: int) -> ocp.CheckpointManager:
    """For the one run that trains: it also clears away what a crash left half written."""
    # Processes meet by name: two managers that save at once must not use the same names.
    names = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
    handlers = {
        "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=names),
        "card": ocp.JsonCheckpointHandler(multiprocessing_options=names),
        digests.FOLDER: _DigestHandler(),
    }
    options = ocp.CheckpointManagerOptions(
        multiprocessing_options=names, max_to_keep=keep, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)


def save(to: ocp.CheckpointManager, step: int, tree: Any, card: Card) -> None:
    """Starts writing; returns as soon as `tree` may be changed again."""
    card = json.loads(json.dumps({**card, "step": step}))  # as it will be read
    items = {
        "state": ocp.args.PyTreeSave(tree),
        "card": ocp.args.JsonSave(card),
        digests.FOLDER: _DigestSave(tree, card),
    }
    to.save(step, args=ocp.args.Composite(**items), force=True)


def seconds_to_save(checkpoint: Path) -> float | None:
    """How long writing `checkpoint` took, None where that is not known."""
    try:
        times = bounded.parse_json(bounded.read(checkpoint / "_CHECKPOINT_METADATA"))
        begun, ended = times["init_timestamp_nsecs"], times["commit_timestamp_nsecs"]
        return max(0.0, (ended - begun) / 1e9)
    except (OSError, ValueError, TypeError, KeyError):
        return None


# --- Reading ------------------------------------------------------------------------------


def steps(directory: Path) -> list[int]:
    """The checkpoints in `directory`, the newest first.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return sorted(
            (int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True
        )
    except OSError as error:
        raise UserError(
            f"the folder {directory} cannot be read ({error.strerror}): mend that first"
        ) from error


def card(checkpoint: Path) -> Card:
    """Reads the card; of several processes, all must.

    Raises:
      Damaged: the checkpoint is not what was saved.
      UserError: it cannot be read now.
    """
    return _judged(checkpoint, lambda: _metadata(checkpoint)[0])


def restore(checkpoint: Path, target: Any) -> Any:
    """Reads the arrays that `target` names and compares them with their digests.

    Args:
      checkpoint: its folder; of several processes, all must read.
      target: a tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      Damaged: the checkpoint is not what was saved.
      UserError: it cannot be read now, or holds other arrays.
    """

    def read() -> tuple[Any, Digests | None]:
        _, saved = _metadata(checkpoint)
        return _read(checkpoint, _as_saved(checkpoint, target, saved)), saved

    tree, saved = _judged(checkpoint, read)
    if saved is not None:
        _judged(checkpoint, lambda: digests.check_arrays(tree, saved))
    elif jax.process_index() == 0:
        print(f"note: {checkpoint} {UNVERIFIABLE}", file=sys.stderr)
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), tree, target)


UNVERIFIABLE = "was saved by a version without digests, so damage to it may go unnoticed"


def _judged(checkpoint: Path, function: Callable[[], Any]) -> Any:
    """`function()`, all processes of one mind about what it raises."""
    result, failure = _attempt(checkpoint, function)
    agree(failure)
    return result


def _attempt(
    checkpoint: Path, function: Callable[[], Any]
) -> tuple[Any, Damaged | UserError | None]:
    """The result of `function`, or what its failure says about `checkpoint`."""
    # Where one array cannot be read, Orbax abandons reading the others, and Python would show
    # a traceback for each when it clears them away.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        try:
            return function(), None
        except Damaged as damage:
            return None, damage
        except Exception as error:  # whatever a damaged file makes the reader raise
            failure = judge(checkpoint, error)
        gc.collect()
        return None, failure
    finally:
        sys.unraisablehook = hook


def _metadata(checkpoint: Path) -> tuple[Card, Digests | None]:
    """The card, and the digests where there are any, if both are what was saved."""
    if strange := strange_file(checkpoint):
        raise Damaged(strange)
    found, saved = read_json(checkpoint / "card" / "metadata"), digests.read(checkpoint)
    if saved is None and digests.FOLDER in _items(checkpoint):
        raise Damaged(f"{digests.FOLDER}/ is missing")
    if saved is not None and digests.of_json(found) != saved.card:
        raise Damaged("card/metadata differs from what was saved")
    read_json(checkpoint / "state" / "_METADATA")  # without which Orbax guesses
    # The rest finds damage where there are no digests.
    kinds: dict[str, Any] = {"config": dict, "class_names": list, "step": int}
    if checkpoint.parent.name == "best":
        kinds["score"] = int | float
    for name, kind in kinds.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise Damaged(f"card/metadata has no {name}")
    return found, saved


def _items(checkpoint: Path) -> Any:
    """What Orbax has written down as the parts of the checkpoint."""
    try:
        return read_json(checkpoint / "_CHECKPOINT_METADATA")["item_handlers"]
    except (OSError, Damaged, KeyError, TypeError):
        return ()


def _as_saved(checkpoint: Path, target: Any, saved: Digests | None) -> Any:
    """`target` with the dtypes of the file, for digests are of what the file holds.

    Raises:
      UserError: the arrays are others.
    """
    if saved is None:
        return target

    def one(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = path_name(path)
        entry = saved.arrays.get(name)
        if entry is None or entry.shape != wanted.shape:
            found = f"with shape {entry.shape}" if entry else "not at all"
            raise UserError(
                f"checkpoint {checkpoint} holds {name} {found}, where shape {wanted.shape} is "
                f"asked for: open it with the version of vit_jax that wrote it"
            )
        return wanted.update(dtype=entry.dtype)

    return jax.tree_util.tree_map_with_path(one, target)


def _read(checkpoint: Path, target: Any) -> Any:
    """The arrays that `target` names, with its shapes, dtypes and shardings."""
    tree = _orbax_restore(
        checkpoint,
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    for name, x in named(tree).items():
        if not isinstance(x, jax.Array):  # of a name that it misses, Orbax returns the target
            raise Damaged(f"{name} is missing")
    return tree


def _orbax_restore(checkpoint: Path, **how: Any) -> Any:
    """Without Orbax's manager, where a process that fails leaves the others waiting."""
    if jax.process_index() == 0 and (trouble := unreadable_file(checkpoint, through=False)):
        raise cannot_be_read(checkpoint, trouble)  # of which Orbax makes many tracebacks
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        args = ocp.args.PyTreeRestore(**how)
        return handler.restore((checkpoint.absolute() / "state"), args=args)


class Found(NamedTuple):
    """An intact checkpoint: its card, its size, and whether there were digests to compare."""

    card: Card
    arrays: int
    bytes: int
    verified: bool


def verify(checkpoint: Path) -> Found:
    """Reads all of a checkpoint into the host's memory and compares it with its digests.

    Needs no other process and no device.

    Raises:
      Damaged: it is not what was saved.
      UserError: it cannot be read now.
    """

    def read() -> tuple[Card, Digests | None, dict[str, np.ndarray]]:
        found, saved = _metadata(checkpoint)
        arrays = _read_to_host(checkpoint)
        if saved is not None:
            if missing := saved.arrays.keys() - arrays.keys():
                raise Damaged(f"{min(missing)} is missing")
            digests.check_arrays({name: arrays[name] for name in saved.arrays}, saved)
        return found, saved, arrays

    result, failure = _attempt(checkpoint, read)
    if failure is not None:
        raise failure
    found, saved, arrays = result
    size = sum(x.nbytes for x in arrays.values())
    return Found(found, len(arrays), size, saved is not None)


def _read_to_host(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        described = handler.metadata(checkpoint.absolute() / "state").tree
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    tree = _orbax_restore(checkpoint, restore_args=jax.tree.map(lambda _: as_numpy, described))
    return {name: x for name, x in named(tree).items() if isinstance(x, np.ndarray)}
