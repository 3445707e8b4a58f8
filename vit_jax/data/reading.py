"""How the data of a configuration are opened, read and transformed."""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.sources import catalog
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms import language
from vit_jax.distributed import sharding
from vit_jax.system.errors import UserError


def open_source(config: ConfigDict, split: str) -> Source:
    """Raises UserError if it cannot be opened, or holds nothing."""
    data = config.data
    source = catalog.load(data.source, split, data.data_dir, data.multi_label)
    if len(source) == 0:
        raise UserError(
            f"split {split!r} of {config.data.source} holds no images: choose another split"
        )
    return source


def eval_pipeline(config: ConfigDict, mesh: Mesh | None = None) -> dict[str, Any]:
    """Arguments of `data.pipeline.eval_batches` for this configuration.

    With a `mesh`, this process reads what its devices need, else everything.
    """
    data = config.data
    return {
        "transform": _transform(config, data.eval_transform),
        "channels": data.channels,
        **_reading(data, mesh),
    }


def train_pipeline(config: ConfigDict, mesh: Mesh | None = None) -> dict[str, Any]:
    """Arguments of `data.pipeline.train_batches` for this configuration; see above."""
    data = config.data
    return {
        "transform": _transform(config, data.train_transform),
        "channels": data.channels,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "repeats": data.repeats,
        **_reading(data, mesh),
    }


def _transform(config: ConfigDict, spec: str) -> language.Transform:
    transform = language.parse_transform(spec, tuple(config.image_size))
    language.check_channels(transform, config.data.channels, config.data.bits)
    return transform


def _reading(data: ConfigDict, mesh: Mesh | None) -> dict[str, Any]:
    if not 0 <= data.max_bad < 1:
        raise UserError(f"data.max_bad is {data.max_bad}: use a share of at least 0, below 1")
    parts, part_count = sharding.batch_parts(mesh) if mesh else ((0,), 1)
    return {
        "bits": data.bits,
        "max_bad": data.max_bad,
        "parts": parts,
        "part_count": part_count,
        "workers": data.workers,
        "threads": data.threads,
    }
