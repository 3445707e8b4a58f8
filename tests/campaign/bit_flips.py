"""Damage to one file of a checkpoint: it is noticed, or the state that is restored is the same.

Each trial takes a copy of a work directory with two states and a best one, damages one file of
the newest state or of the best one, and restores it as training does and as every other
command does. What comes back is compared bit for bit.
"""

import collections
import contextlib
import functools
import io
import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.checkpoints.directory import Checkpoints, abstract, first_intact, load_params
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError
from vit_jax.training.step import TrainState

CARD = {"config": {"ema_decay": 0.9}, "class_names": ["cat", "dog"]}
OLD, NEW = 10, 20


class Trial(NamedTuple):
    """What was done to which file, and what came of it."""

    file: str
    damage: str
    outcome: str  # noticed, without effect, or what is wrong


# --- Kinds of damage ----------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random) -> str:
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    return f"bit {bit} of byte {at} flipped"


def zero(data: bytearray, rng: random.Random) -> str:
    size = min(len(data), rng.choice([16, 64, 512, 4096]))
    at = rng.randrange(0, len(data) - size + 1)
    data[at : at + size] = bytes(size)
    return f"{size} bytes from {at} on zeroed"


def scramble(data: bytearray, rng: random.Random) -> str:
    size = min(len(data), rng.choice([16, 64, 512]))
    at = rng.randrange(0, len(data) - size + 1)
    data[at : at + size] = rng.randbytes(size)
    return f"{size} bytes from {at} on replaced by random ones"


def truncate(data: bytearray, rng: random.Random) -> str:
    size = rng.randrange(len(data))
    del data[size:]
    return f"cut to {size} bytes"


KINDS = {"flip": flip, "zero": zero, "scramble": scramble, "truncate": truncate}


def damage(folder: Path, kind: str, rng: random.Random) -> tuple[Path, str]:
    """Damages one file below `folder`; half of the times each byte is as likely as another."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sizes = [p.stat().st_size for p in files]
    path = rng.choices(files, sizes if rng.random() < 0.5 else None)[0]
    if kind == "remove":
        path.unlink()
        return path, "removed"
    data = bytearray(path.read_bytes())
    told = KINDS[kind](data, rng)
    path.write_bytes(data)
    return path, told


# --- A work directory, and what must come back --------------------------------------------


@functools.cache
def state(step: int) -> TrainState:
    """Large arrays and small ones, equal numbers and random ones, of three dtypes."""
    key = jax.random.key(step)
    params = {
        "kernel": jax.random.normal(key, (48, 64)),
        "low": jax.random.normal(key, (32, 33), jnp.bfloat16),
        "bias": jnp.full((64,), step, jnp.float32),
        "scale": jnp.float32(step),
    }
    average = jax.tree.map(lambda x: x / 2, params)
    return TrainState(jnp.int32(step), params, optax.adam(1e-3).init(params), average, {})


@functools.cache
def target() -> TrainState:
    everywhere = sharding.replicated(sharding.make_mesh())
    return abstract(jax.eval_shape(lambda: state(0)), everywhere)


def make(workdir: Path) -> None:
    with Checkpoints(workdir, 2) as checkpoints:
        for step in (OLD, NEW):
            checkpoints.save(step, state(step), CARD)
        checkpoints.save_if_best(OLD, state(OLD).params, CARD, 0.5)


def forget_digests(checkpoint):
    """Makes it a checkpoint of before there were digests."""
    shutil.rmtree(checkpoint / "digests")
    path = checkpoint / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    del metadata["item_handlers"]["digests"]
    path.write_text(json.dumps(metadata))


def equal(one: object, other: object) -> bool:
    """Whether two trees hold the same bits."""
    bits = lambda tree: [(np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]
    return bits(one) == bits(other)


def resume(workdir: Path) -> str:
    """Training: the newest state, or the one before it and the reason why."""
    with Checkpoints(workdir, 2) as checkpoints:
        found = checkpoints.restore(target())
        checkpoints.save(30, found, CARD)  # the work directory goes on being used
    shelf = workdir / "unreadable"
    if equal(found, state(NEW)):
        return "wrong: set aside, yet used" if (shelf / f"{NEW}-0").exists() else SAME
    if equal(found, state(OLD)) and (shelf / f"{NEW}-0" / "reason.txt").read_text().strip():
        return NOTICED
    return "wrong: another state came back"


def read_last(workdir: Path) -> str:
    """Other commands: the newest averaged weights, or the ones before them; nothing changes."""
    before = contents(workdir)
    found = first_intact(workdir, "last", lambda path: load_params(path, target().params))
    if contents(workdir) != before:
        return "wrong: reading has changed something"
    if equal(found, state(NEW).ema):
        return SAME
    return NOTICED if equal(found, state(OLD).ema) else "wrong: other weights came back"


def read_best(workdir: Path) -> str:
    """The best weights, or one sentence."""
    try:
        found = first_intact(workdir, "best", lambda path: load_params(path, target().params))
    except UserError as error:
        return NOTICED if "is damaged" in str(error) else f"wrong: {error}"
    return SAME if equal(found, state(OLD).params) else "wrong: other weights came back"


def resume_with_best(workdir: Path) -> str:
    """Training: a damaged best is set aside, and the next evaluation takes its place."""
    with Checkpoints(workdir, 2) as checkpoints:
        found = checkpoints.restore(target())
        checkpoints.save_if_best(NEW, state(NEW).params, CARD, 0.4)
    if not equal(found, state(NEW)):
        return "wrong: another state came back"
    if (workdir / "best" / str(OLD)).exists():
        return read_best(workdir)
    again = read_best_of(workdir, NEW)
    return NOTICED if again and any((workdir / "unreadable").glob("best-*")) else "wrong: lost"


def read_best_of(workdir: Path, step: int) -> bool:
    found = first_intact(workdir, "best", lambda path: load_params(path, target().params))
    return equal(found, state(step).params)


def contents(workdir: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


NOTICED, SAME = "noticed", "without effect"
USES = [
    (f"checkpoints/{NEW}", resume),
    (f"checkpoints/{NEW}", read_last),
    (f"best/{OLD}", read_best),
    (f"best/{OLD}", resume_with_best),
]


# --- Trials -------------------------------------------------------------------------------


def run(room: Path, trials: int, seed: int, kinds: tuple[str, ...]) -> list[Trial]:
    """Damages and restores so many times; deterministic but for the names of Orbax's files.

    Args:
      room: an empty folder.
      trials: how many.
      seed: of everything that is random.
      kinds: kinds of damage, of `KINDS`, and `remove`; they take turns.
    """
    make(room / "pristine")
    done = []
    for number in range(trials):
        rng = random.Random(f"{seed}/{number}")
        folder, use = USES[number // len(kinds) % len(USES)]
        workdir = shutil.copytree(room / "pristine", room / "damaged")
        path, told = damage(workdir / folder, kinds[number % len(kinds)], rng)
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard):
                outcome = use(workdir)
        except Exception as error:
            outcome = f"wrong: {type(error).__name__}: {error}"
        done.append(Trial(str(path.relative_to(workdir)), told, f"{outcome}"))
        shutil.rmtree(workdir)
    return done


def wrong(done: list[Trial]) -> list[Trial]:
    return [trial for trial in done if trial.outcome not in (NOTICED, SAME)]


def counts(done: list[Trial]) -> dict[str, int]:
    """How many trials came out in which way."""
    short = (trial.outcome.partition(":")[0] for trial in done)
    return dict(collections.Counter(short))
