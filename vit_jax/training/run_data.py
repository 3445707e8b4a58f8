"""The data of a training run: one numbering of the classes, and what is wrong, told early."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.checkpoints.directory import load_card
from vit_jax.data import reading
from vit_jax.data.reading import Reading, TrainReading
from vit_jax.data.sources.classes import as_classes, some
from vit_jax.data.sources.source import Source
from vit_jax.distributed import processes
from vit_jax.system.errors import UserError


def open_sources(config: ConfigDict, classes: tuple[str, ...]) -> tuple[Source, Source]:
    """What to train and to evaluate on, with one numbering of the classes; see `train.build`.

    Raises:
      UserError: they cannot be opened, or there are classes to evaluate that are not trained.
    """
    data = config.data
    source = reading.open_source(config, data.train_split)
    if set(classes) == set(source.class_names):
        source = as_classes(source, classes) or source
    found = reading.open_source(config, data.eval_split)
    eval_source = as_classes(found, source.class_names)
    if eval_source is None:
        raise UserError(
            f"{data.source} has the classes {some(source.class_names)} in "
            f"{data.train_split!r} and {some(found.class_names)} in {data.eval_split!r}: use "
            f"splits of the same classes"
        )
    return source, eval_source


def check_early(
    config: ConfigDict,
    training: tuple[Source, TrainReading],
    evaluation: tuple[Source, Reading],
) -> None:
    """Reads an image of each split, and says what is odd about their numbers.

    Raises:
      UserError: an image cannot be used as the configuration wants it.
    """
    for source, how in (training, evaluation):
        how.rehearse(source)
    examples, held_out = len(training[0]), len(evaluation[0])
    notes = []
    if config.batch_size > examples * config.data.repeats:
        notes.append(
            f"batch_size is {config.batch_size:,} and {config.data.train_split!r} has "
            f"{examples:,} images: every batch holds images several times"
        )
    if held_out < min(10, len(training[0].class_names)):
        notes.append(
            f"{config.data.eval_split!r} has {held_out} image{'s' * (held_out > 1)} to "
            f"evaluate on, fewer than classes: accuracy will say little"
        )
    if processes.is_first():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


def stored_classes(workdir: Path) -> tuple[str, ...]:
    """The classes of the run that `workdir` holds, in the order of its outputs, or none."""
    if not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        return ()
    try:
        return tuple(load_card(workdir)["class_names"])
    except (UserError, KeyError):
        return ()  # damaged: what is restored instead is checked later
