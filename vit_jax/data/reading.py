"""How the images of a run are opened, read and transformed: typed, and checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data import pipeline
from vit_jax.data.pipeline import Batches, Views
from vit_jax.data.rehearsal import rehearse
from vit_jax.data.sources import catalog
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms import language
from vit_jax.data.transforms.language import Transform
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How images are read for an evaluation, and which part of a batch by this process.

    Attributes:
      transform: from a decoded image to pixels.
      channels: of an image.
      bits: of a channel, 8 or 16.
      max_bad: share of the images that may be unreadable.
      workers: processes that decode; 0: threads of this one.
      threads: that decode, at most.
      parts: of the `part_count` equal parts of a batch, those that this process reads.
      part_count: how many there are.
    """

    transform: Transform
    channels: int
    bits: int = 8
    max_bad: float = 0.0
    workers: int = 0
    threads: int = 16
    parts: tuple[int, ...] = (0,)
    part_count: int = 1

    def eval_batches(self, source: Source, batch_size: int) -> Batches:
        """Every example once; see `pipeline.eval_batches`."""
        how = {field.name: getattr(self, field.name) for field in fields(Reading)}
        return pipeline.eval_batches(source, batch_size=batch_size, **how)

    def rehearse(self, source: Source) -> None:
        """Reads one image of `source`. Raises UserError if none can be used."""
        self._try(source, training=False)

    def _try(self, source: Source, training: bool) -> None:
        rehearse(source, self.transform, self.channels, self.bits, self.max_bad, training)


@dataclass(frozen=True, kw_only=True)
class TrainReading(Reading):
    """The same for training.

    Attributes:
      batch_size: examples of all processes together.
      seed: of the order and of what is drawn for each example.
      repeats: how often each image comes in a row.
      views: more images of each example.
    """

    batch_size: int
    seed: int = 0
    repeats: int = 1
    views: Mapping[str, Views] = field(default_factory=dict)

    def train_batches(self, source: Source, first_step: int = 0) -> Batches:
        """Endless batches from a step on; see `pipeline.train_batches`."""
        return pipeline.train_batches(source, first_step=first_step, **vars(self))

    def rehearse(self, source: Source) -> None:
        self._try(source, training=True)


def open_source(config: ConfigDict, split: str) -> Source:
    """Raises UserError if it cannot be opened, or holds nothing."""
    data = config.data
    source = catalog.load(data.source, split, data.data_dir, data.multi_label)
    if len(source) == 0:
        raise UserError(
            f"split {split!r} of {config.data.source} holds no images: choose another split"
        )
    return source


def eval_reading(config: ConfigDict, mesh: Mesh | None = None) -> Reading:
    """How a configuration has images read for an evaluation.

    With a `mesh`, this process reads what its devices need, else everything.

    Raises:
      UserError: a field of `config.data` cannot be used.
    """
    return _reading(config, config.data.eval_transform, mesh)


def train_reading(
    config: ConfigDict, mesh: Mesh | None = None, views: Mapping[str, Views] | None = None
) -> TrainReading:
    """How a configuration has images read for training; as `eval_reading`."""
    base = _reading(config, config.data.train_transform, mesh)
    return TrainReading(
        **vars(base),
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.data.repeats,
        views=views or {},
    )


def _reading(config: ConfigDict, spec: str, mesh: Mesh | None) -> Reading:
    data = config.data
    transform = language.parse_transform(spec, tuple(config.image_size))
    language.check_channels(transform, data.channels, data.bits)
    if not 0 <= data.max_bad < 1:
        raise UserError(f"data.max_bad is {data.max_bad}: use a share of at least 0, below 1")
    parts, part_count = sharding.batch_parts(mesh) if mesh else ((0,), 1)
    return Reading(
        transform=transform,
        channels=data.channels,
        bits=data.bits,
        max_bad=data.max_bad,
        workers=data.workers,
        threads=data.threads,
        parts=parts,
        part_count=part_count,
    )
