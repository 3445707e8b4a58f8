"""From a configuration to the things it names, for every door alike."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.data import mixing, pipeline, value_ranges
from vit_jax.data.decode import check_channels as check_decoded
from vit_jax.data.sources import catalog
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms import language
from vit_jax.distributed import sharding
from vit_jax.evaluation import probes
from vit_jax.models import registry
from vit_jax.models.model import Model
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.masked_patches import MaskedPatches
from vit_jax.objectives.multi_label import MultiLabel
from vit_jax.system.errors import UserError
from vit_jax.training.optimizer import Schedule, make_optimizer, make_schedule
from vit_jax.training.step import (
    Batch,
    Prepare,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)

Objective = Classification | MultiLabel | MaskedPatches
OBJECTIVES = ("classification", "masked_patches")


Builder = Callable[[Any], Model]


def build_model(config: ConfigDict, num_classes: int, build: Builder = registry.build) -> Model:
    """Returns the network of a `config`, which `build` makes of its checked description.

    Raises:
      UserError: there is no such variant, or a field does not fit it.
    """
    if config.model.variant is None:
        raise UserError(
            "config.model.variant and config.init_from are both unset: name a variant such as "
            "B/16, or set config.init_from to weights that bring their own"
        )
    cfg = registry.configure(config.model, config.image_size, config.data.channels, num_classes)
    return build(cfg)


def with_computation_chosen(config: ConfigDict) -> ConfigDict:
    """A configuration with `model.scan` and `model.remat` decided where they are None.

    Looping over layers while keeping the results of dense layers only was the fastest way to
    train a Vision Transformer here, from 4 layers on 8-pixel images to S/16 at 224 pixels, with
    less than half the memory of the unrolled network (docs/performance.md).

    Raises:
      UserError: there is no such variant.
    """
    config = config.copy_and_resolve_references()
    model = config.model
    if model.variant is not None:  # else the network's builder says what is missing
        if model.scan is None:
            model.scan = registry.decode(model.variant)[0] is ViTConfig
        if model.remat is None:
            model.remat = "dots" if model.scan else "none"
    return config


def class_names(config: ConfigDict, found: Sequence[str]) -> tuple[str, ...]:
    """The classes that the model has outputs for: those of the data, or none."""
    return tuple(found) if config.objective.name == "classification" else ()


def build_objective(
    config: ConfigDict, num_classes: int, build: Builder = registry.build
) -> Objective:
    """Raises UserError for an objective that does not exist or does not fit the rest."""
    objective = config.objective
    if objective.name not in OBJECTIVES:
        raise UserError(
            f"objective.name is {objective.name!r}: use one of {', '.join(OBJECTIVES)}"
        )
    if objective.name == "classification":
        return classify(config, build_model(config, num_classes, build))
    if build_mixing(config).mixes:
        raise UserError(
            f"data.mixup is {config.data.mixup} and data.cutmix {config.data.cutmix}, which "
            f"mix labels, but objective.name={objective.name!r} has none: set both to 0"
        )
    return MaskedPatches(build_model(config, 0, build), objective.target, objective.mask_ratio)


def classify(config: ConfigDict, model: Model) -> Classification | MultiLabel:
    """Learning, or measuring, of labels by the logits of `model`. Raises UserError."""
    objective, several = config.objective, config.data.multi_label
    if not several:
        return Classification(model, objective.loss, objective.label_smoothing)
    if objective.loss != "sigmoid" or objective.label_smoothing:
        field, value, need = (
            ("label_smoothing", objective.label_smoothing, 0)
            if objective.loss == "sigmoid"
            else ("loss", objective.loss, "sigmoid")
        )
        raise UserError(
            f"data.multi_label is {several!r}, so that images have several labels, but "
            f"objective.{field} is {value!r}: set objective.{field}={need}"
        )
    return MultiLabel(model)


def build_mixing(config: ConfigDict) -> mixing.Mixing:
    """Raises UserError for a value of `config.data` that mixing cannot have."""
    data = config.data
    return mixing.Mixing(
        data.mixup,
        data.cutmix,
        data.mix_probability,
        data.mix_switch,
        data.mix_form,
        data.binary_targets,
    )


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
    """How `data.pipeline.eval_batches` shall read for this configuration.

    With a `mesh`, this process reads what its devices need, else everything.
    """
    data = config.data
    return {
        "transform": _transform(config, data.eval_transform),
        "channels": data.channels,
        **_reading(data, mesh),
    }


def train_pipeline(config: ConfigDict, mesh: Mesh | None = None) -> dict[str, Any]:
    """How `data.pipeline.train_batches` shall read for this configuration; see above."""
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


def prepare_for_eval(config: ConfigDict) -> Prepare:
    """uint8 images to the range that the model expects, on the device."""
    value_range = config.data.value_range
    # What does not fit is found here, not when a program is compiled.
    check_decoded(config.data.channels, config.data.bits)
    value_ranges.parse(value_range, config.data.channels)

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        # What an objective does not read of this costs nothing under jit.
        pixels = batch["image"]
        if pixels.dtype == jnp.uint16:  # as levels of 0 .. 255, with what lies between
            pixels = pixels.astype(jnp.float32) / 257
        return {**batch, "image": language.normalize(pixels, value_range), "pixels": pixels}

    return prepare


def prepare_for_training(config: ConfigDict, num_classes: int) -> Prepare:
    """The same, then mixup and CutMix where the configuration asks for them."""
    normalize, how = prepare_for_eval(config), build_mixing(config)

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        batch = normalize(batch, key)
        if not how.mixes:
            return batch
        targets = batch.get("targets")
        if targets is None:
            targets = jax.nn.one_hot(batch["label"], num_classes)
        images, targets = mixing.mix(key, batch["image"], targets, how)
        return {**batch, "image": images, "targets": targets}

    return prepare


class Learning(NamedTuple):
    """What is learned and how, compiled when it is first called; no data yet.

    Attributes:
      objective: what is learned, with its network.
      abstract_state: shapes and dtypes of the state.
      shardings: where each array of it lives.
      init: makes the first state, each device its own part: nobody ever holds the whole.
      train_step: `(state, batch) -> (state, metrics)`, in the memory of the old state.
      eval_step: `(params, extra, batch) -> {name: (sum, count)}`.
    """

    objective: Objective
    abstract_state: TrainState
    shardings: TrainState
    init: Callable[[], TrainState]
    train_step: Any
    eval_step: Any


def build_learning(
    config: ConfigDict,
    mesh: Mesh,
    num_classes: int,
    examples: int,
    build: Builder = registry.build,
) -> Learning:
    """The computation of a configuration on a mesh, whose devices need not be there.

    Args:
      config: with `model.scan` and `model.remat` decided.
      mesh: of `distributed.sharding.make_mesh`.
      num_classes: of the data.
      examples: in an epoch.
      build: makes the network.

    Raises:
      UserError: a field does not fit the rest.
    """
    objective = build_objective(config, num_classes, build)
    schedule = build_schedule(config, examples)
    optimizer = make_optimizer(config.optimizer, schedule)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        prepare_for_training(config, num_classes),
        seed=config.seed,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
    )
    eval_step = make_eval_step(objective, prepare_for_eval(config))
    init = lambda: init_state(objective, optimizer, config.seed, bool(config.ema_decay))
    state, everywhere = jax.eval_shape(init), sharding.replicated(mesh)
    where = sharding.shardings(state, mesh)
    seeing = lambda function: sharding.seeing(mesh, function)
    return Learning(
        objective=objective,
        abstract_state=state,
        shardings=where,
        init=jax.jit(init, out_shardings=where),
        train_step=jax.jit(
            seeing(step),
            donate_argnums=0,
            out_shardings=(where, everywhere),
            compiler_options=sharding.compiler_options(mesh),
        ),
        eval_step=jax.jit(seeing(eval_step), out_shardings=everywhere),
    )


def build_few_shot(
    config: ConfigDict, model: Model, source: Source, eval_source: Source, mesh: Mesh
) -> Callable[[Any], dict[str, float]]:
    """Returns `probe(params) -> {"few_shot/5": accuracy}`, averaged over the choices of images.

    The images are chosen when it is called first, from the labels of all of `source`.
    """
    shots, classes = tuple(config.few_shot.shots), len(source.class_names)
    if shots and config.data.multi_label:
        raise UserError(
            f"few_shot.shots is {shots}, but it needs one label of each image, and "
            f"data.multi_label is {config.data.multi_label!r}: set few_shot.shots=()"
        )
    step = probes.make_feature_step(model, prepare_for_eval(config), mesh)
    chosen: list[probes.Subsets] = []

    def features(params: Any, source: Any) -> probes.Features:
        batches = pipeline.eval_batches(
            source, batch_size=config.eval_batch_size, **eval_pipeline(config, mesh)
        )
        with contextlib.closing(batches):
            on_device = (sharding.put_batch(batch, mesh) for batch in batches)
            return probes.extract(lambda batch: step(params, batch), on_device)

    def probe(params: Any) -> dict[str, float]:
        if not chosen:
            labels = probes.read_labels(source, config.data.threads)
            chosen.append(probes.choose_subsets(labels, classes, shots, probes.SEEDS))
        [subsets] = chosen
        train = features(params, probes.Rows(source, subsets.indices))
        found = probes.few_shot_accuracy(train, features(params, eval_source), subsets, classes)
        return {f"few_shot/{n}": float(np.mean(each)) for n, each in found.items()}

    return probe
