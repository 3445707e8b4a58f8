"""From a configuration to the things it names, for every door alike."""

from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.data import mixing, preprocess, sources
from vit_jax.errors import UserError
from vit_jax.models import registry
from vit_jax.models.model import Model
from vit_jax.objectives.classification import Classification
from vit_jax.training.optimizer import Schedule, make_schedule
from vit_jax.training.step import Batch, Prepare


def build_model(config: ConfigDict, num_classes: int) -> Model:
    """Returns the network of a `config`.

    Raises:
      UserError: there is no such variant, or a field does not fit it.
    """
    if config.model.variant is None:
        raise UserError(
            "config.model.variant and config.init_from are both unset: name a variant such as "
            "B/16, or set config.init_from to weights that bring their own"
        )
    cfg = registry.configure(config.model, config.image_size, config.data.channels, num_classes)
    return registry.build(cfg)


def build_objective(config: ConfigDict, num_classes: int) -> Classification:
    model = build_model(config, num_classes)
    return Classification(model, config.objective.loss, config.objective.label_smoothing)


def build_schedule(config: ConfigDict, examples: int) -> Schedule:
    """The learning rate of each update; `examples` is the size of an epoch."""
    optimizer = config.optimizer
    duration = lambda node, name: configuration.steps(node, name, examples, config.batch_size)
    return make_schedule(
        optimizer.schedule,
        optimizer.lr,
        total=duration(config, "total"),
        warmup=duration(optimizer, "warmup"),
        cooldown=duration(optimizer, "cooldown"),
        timescale=duration(optimizer, "timescale"),
        linear_end=optimizer.linear_end,
    )


def open_source(config: ConfigDict, split: str) -> sources.Source:
    return sources.load(config.data.source, split, config.data.data_dir)


def eval_pipeline(config: ConfigDict) -> dict[str, Any]:
    """How `data.pipeline.eval_batches` shall read for this configuration."""
    data = config.data
    return {
        "transform": preprocess.parse_transform(data.eval_transform, tuple(config.image_size)),
        "channels": data.channels,
        **_reading(data),
    }


def train_pipeline(config: ConfigDict) -> dict[str, Any]:
    """How `data.pipeline.train_batches` shall read for this configuration."""
    data = config.data
    return {
        "transform": preprocess.parse_transform(data.train_transform, tuple(config.image_size)),
        "channels": data.channels,
        "batch_size": config.batch_size,
        "seed": config.seed,
        **_reading(data),
    }


def _reading(data: ConfigDict) -> dict[str, int]:
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "workers": data.workers,
        "threads": data.threads,
    }


def prepare_for_eval(config: ConfigDict) -> Prepare:
    """uint8 images to the range that the model expects, on the device."""
    value_range = config.data.value_range

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        return {**batch, "image": preprocess.normalize(batch["image"], value_range)}

    return prepare


def prepare_for_training(config: ConfigDict, num_classes: int) -> Prepare:
    """The same, then mixup where the configuration asks for it."""
    normalize, alpha = prepare_for_eval(config), config.data.mixup

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        batch = normalize(batch, key)
        if not alpha:
            return batch
        targets = jax.nn.one_hot(batch["label"], num_classes)
        images, targets = mixing.mixup(key, batch["image"], targets, alpha)
        return {**batch, "image": images, "targets": targets}

    return prepare
