"""How a run begins: with the state of its work directory, with weights of others, or afresh."""

import dataclasses
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.checkpoints.directory import Checkpoints, abstract
from vit_jax.checkpoints.metadata import DataCard
from vit_jax.checkpoints.trained import Trained
from vit_jax.data import value_ranges
from vit_jax.distributed import processes, sharding
from vit_jax.interop import stated
from vit_jax.interop.stated import Stated
from vit_jax.interop.transfer import adapt
from vit_jax.system import bounded
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError
from vit_jax.training.run import Run
from vit_jax.training.step import TrainState


def resolve(
    config: ConfigDict,
    workdir: Path,
    overridden: Collection[str],
    said: Stated = stated.NOTHING,
) -> tuple[ConfigDict, Trained | None]:
    """Fills in the model of a configuration that leaves it to `init_from`.

    Args:
      config: stays as it is.
      workdir: where a run may have begun already.
      overridden: fields set on the command line, which stay.
      said: about the weights.

    Returns:
      The complete configuration, and the weights if they had to be opened for it: a work
      directory with a checkpoint knows its model, and needs them no more.

    Raises:
      UserError: the weights cannot be found, fetched or read.
    """
    if config.model.variant is not None or not config.init_from:
        return config, None
    config = config.copy_and_resolve_references()
    if (known := model_of_workdir(workdir, config.init_from)) is not None:
        configuration.take_model(config, known, overridden)
        return config, None
    before = trained.load_any(config.init_from, "last", None, said, as_stored=True)
    configuration.take_model(config, before.config, overridden)
    if config.data.channels != before.config.data.channels:
        fitting = value_ranges.for_channels(config.data.value_range, config.data.channels)
        if "data.value_range" not in overridden:
            config.data.value_range = fitting
    return config, before


def weights_to_begin_with(config: ConfigDict, workdir: Path, said: Stated) -> Trained | None:
    """The weights of `config.init_from`, None where none are needed.

    Raises:
      UserError: they cannot be found, fetched or read.
    """
    if not config.init_from or has_checkpoints(workdir):
        return None
    return trained.load_any(config.init_from, "last", None, said, as_stored=True)


def has_checkpoints(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def model_of_workdir(workdir: Path, init_from: str) -> ConfigDict | None:
    """The configuration that checkpoints in `workdir` were begun with from `init_from`."""
    if not has_checkpoints(workdir):
        return None  # what the run will begin with is read anew
    try:
        stored = configuration.from_dict(
            bounded.parse_json(bounded.read(workdir / "config.json"))
        )
    except (OSError, ValueError):
        return None
    return stored if stored.init_from == init_from else None


def begin(
    run: Run,
    checkpoints: Checkpoints,
    workdir: Path,
    before: Trained | None = None,
    said: Stated = stated.NOTHING,
    begin_anew: bool = False,
) -> TrainState:
    """Returns the newest intact state, or a first one, divided over the mesh.

    `before` are the weights of `config.init_from`, if they are open already, and `said` is
    what their file leaves open. `begin_anew` is for where there were states and all of them
    are damaged.

    Raises:
      UserError: the work directory belongs to a run with another configuration or other
        data, none of its states is intact, or the weights to begin with do not fit.
    """
    if stored := checkpoints.card():
        configuration.check_resumable(stored["config"], run.config, workdir)
        check_classes(stored["class_names"], run.card["class_names"], workdir)
        if "data" in stored:  # not in cards written before there were fingerprints
            check_data(stored["data"], run.card["data"], workdir)
        check_frozen(stored.get("frozen"), run.card["frozen"], workdir)
    target = abstract(run.learning.abstract_state, run.learning.shardings)
    state = checkpoints.restore(target, begin_anew)
    if state is None:
        # Each device makes its own part: nobody ever holds the whole.
        state = run.learning.init()
        if run.config.init_from:
            name = run.config.init_from
            before = before or trained.load_any(name, "last", None, said, as_stored=True)
            state = take_over(state, run, before)
    if processes.is_first():
        write_config(run.card["config"], workdir / "config.json")
    return state


def write_config(config: dict[str, Any], path: Path) -> None:
    """Writes a configuration where it differs from the one that is there. Raises UserError."""
    text = json.dumps(config, indent=2) + "\n"
    try:
        same = bounded.read_text(path) == text
    except (OSError, ValueError):
        same = False
    if not same:
        with replacing(path) as part:
            part.write_text(text)


def check_classes(stored: list[str], found: list[str], workdir: Path) -> None:
    """Refuses to go on where an output of the model would come to mean another class.

    Raises:
      UserError: the data set has other classes than the run began with.
    """
    if stored != found:
        different = sorted(set(stored) ^ set(found)) or ["their order"]
        raise UserError(
            f"{workdir} was begun with {len(stored)} classes and the data have {len(found)} "
            f"now; different: {', '.join(different[:5])}. Restore the data, or choose another "
            f"--workdir"
        )


def check_data(stored: dict[str, DataCard], found: dict[str, DataCard], workdir: Path) -> None:
    """Refuses to go on with other examples to train on than the run began with.

    Each batch is drawn by position, so one image more or less would change all that come. The
    evaluation split changes no weight, and may be chosen anew: there a note is enough, since
    scores are compared, to keep the best, across the change.

    Raises:
      UserError: the training split holds other examples, in another order or with other labels.
    """
    if different := changed(stored["train"], found["train"]):
        raise UserError(
            f"{workdir} was trained on {different}: the batches would not be those of the "
            f"run. Restore the data, or choose another --workdir"
        )
    different = changed(stored["eval"], found["eval"])
    if different and processes.is_first():
        print(
            f"note: {workdir} was evaluated on {different}: scores from here on do not compare "
            f"with those before, yet best/ is chosen among all",
            file=sys.stderr,
        )


def check_frozen(stored: str | None, found: str | None, workdir: Path) -> None:
    """Refuses to go on beside another frozen network. Raises UserError."""
    if stored != found:
        raise UserError(
            f"{workdir} was trained beside a frozen network with other weights ({stored}, now "
            f"{found}): restore them, or choose another --workdir"
        )


def changed(before: DataCard, now: DataCard) -> str:
    """What is different about the examples of a split, or nothing."""
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    others = ", with other names, labels or order" * (before["examples"] == now["examples"])
    return (
        f"{before['examples']:,} examples in {before['split']!r} of {before['source']}, and "
        f"there are {now['examples']:,} in {now['split']!r} now{others}"
    )


def take_over(state: TrainState, run: Run, before: Trained) -> TrainState:
    """Puts the trained weights of `config.init_from` in place of the model's initial ones.

    Parameters of the objective stay as they are at the beginning.
    """
    config, old, new = run.config, before.model.config, run.learning.objective.model.config
    fresh = sharding.gather(state.params, run.mesh)
    resize = config.init_resize or before.resize
    model, notes = adapt(before.params, old, fresh["model"], new, resize)
    if processes.is_first():
        print(f"begins with {config.init_from} ({before.family}); {'; '.join(notes)}")
        for note in (*before.notes, *mismatches(config, before.config)):
            print(f"note: {note}", file=sys.stderr)
    params = sharding.put_params({**fresh, "model": model}, run.mesh)
    ema = jax.tree.map(jnp.copy, params) if state.ema else {}
    return dataclasses.replace(state, params=params, ema=ema)


def mismatches(config: ConfigDict, weights: ConfigDict) -> list[str]:
    """A sentence on numerics that differ from those of the weights: shapes do not show them."""
    wrong = []
    for path in ("model.gelu", "model.layer_norm_eps", "data.value_range"):
        node, _, name = path.partition(".")
        old, new = weights[node][name], config[node][name]
        if name == "value_range" and config.data.channels != weights.data.channels:
            old = value_ranges.for_channels(old, config.data.channels)
        if old != new:
            wrong.append(f"{path}={old!r} (here {new!r})")
    if not wrong:
        return []
    return [
        f"{config.init_from} was trained with {', '.join(wrong)}: set config to the same, "
        f"unless the difference is meant"
    ]
