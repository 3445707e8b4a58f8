"""A trained model, opened with nothing else given: a work directory, or published weights."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import vit_jax
from vit_jax import config as configuration
from vit_jax.checkpoints import older, orbax_io
from vit_jax.checkpoints.directory import Checkpoints, abstract, first_intact, load_params
from vit_jax.checkpoints.metadata import Card
from vit_jax.distributed import sharding
from vit_jax.interop import download, stated
from vit_jax.interop.load import Imported, load_weights
from vit_jax.interop.stated import Stated
from vit_jax.models import registry, resize_positions
from vit_jax.models.layers import store_in
from vit_jax.models.model import Model, Params
from vit_jax.models.vit_config import ViTConfig
from vit_jax.objectives.objective import only_model
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError


class Trained(NamedTuple):
    """Weights and all that is needed to use them.

    Attributes:
      config: the model and its preprocessing; of one's own runs, the whole configuration.
      class_names: one for each output; numbers where the file has no names.
      model: the network.
      params: its parameters.
      step: number of updates, 0 where that is not known.
      family: whose code the weights come from: `vit_jax`, or a name of `interop.families`.
      resize: how that code resizes position embeddings, of `models.resize_positions.METHODS`.
      notes: sentences about what was left out or assumed.
      input_size: (H, W) of the images that the evaluation transform makes, where the positions
        are still for others: see `load_any`.
      unprepared: why images cannot be prepared as their publisher does, if so.
      multi_label: whether an image may have several classes.
    """

    config: ConfigDict
    class_names: tuple[str, ...]
    model: Model
    params: Params
    step: int
    family: str = "vit_jax"
    resize: str = "corner"
    notes: tuple[str, ...] = ()
    input_size: tuple[int, int] | None = None
    unprepared: str = ""
    multi_label: bool = False


def with_preprocessing(
    model: Trained, transform: str | None, value_range: str | None
) -> Trained:
    """The model with the preprocessing that the flags name.

    Raises:
      UserError: it has none, and they do not name one either.
    """
    if model.unprepared and not (transform and value_range):
        height, width = model.config.image_size
        raise UserError(
            f"{model.unprepared}: to prepare images otherwise, say how they are brought to "
            f"{height} x {width} and scaled, with --transform=resize and "
            f"--value_range=inception or others"
        )
    data = model.config.data
    data.eval_transform = transform or data.eval_transform
    data.value_range = value_range or data.value_range
    return model


def for_inference(model: Trained, dtype: str | None = None) -> Trained:
    """The same model, computing in `dtype`, its kernels stored in that once and for all.

    Args:
      model: as it was opened.
      dtype: `float32` or `bfloat16`; None: as it was trained.
    """
    config = model.config.copy_and_resolve_references()
    config.model.dtype = dtype or config.model.dtype
    network = registry.build_model(config, len(model.class_names))
    params = store_in(config.model.dtype, model.params)
    return model._replace(config=config, model=network, params=params)


def load(workdir: Path, which: str, mesh: Mesh) -> Trained:
    """Opens checkpoint `which` of `workdir`: `last`, `best` or a step number.

    The weights are the averaged ones where the run kept an average, on every device of `mesh`.

    Raises:
      UserError: there is no such work directory or checkpoint, or it cannot be read.
    """
    if not workdir.is_dir():
        raise UserError(
            f"there is no work directory {workdir}: train first, or check --workdir"
        )
    return first_intact(workdir, which, lambda checkpoint: _open(checkpoint, mesh))


def _open(checkpoint: Path, mesh: Mesh) -> Trained:
    card = orbax_io.card(checkpoint)
    config = configuration.from_dict(card["config"])
    class_names = tuple(card["class_names"])
    model = registry.build_model(config, len(class_names))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = load_params(checkpoint, abstract(shapes, sharding.replicated(mesh)))
    family, resize = card.get("family", "vit_jax"), card.get("resize", "corner")
    return Trained(
        config,
        class_names,
        model,
        params,
        card["step"],
        family,
        resize,
        unprepared=card.get("unprepared", ""),
        multi_label=card.get("multi_label", False),
    )


def load_any(
    name: str,
    which: str,
    mesh: Mesh | None,
    said: Stated = stated.NOTHING,
    as_stored: bool = False,
) -> Trained:
    """Opens a work directory, an export, a file of published weights, or a name of some.

    Args:
      name: a path, or what `interop.download.resolve` fetches (`augreg:B_16`, `hf:...`).
      which: of a work directory, as for `load`.
      mesh: where the weights go; None leaves published ones in the host's memory.
      said: what their file leaves open.
      as_stored: whether positions stay those of the file where its publisher prepares images
        of another size (then `input_size` is that). Else they are resized, as its code does.

    Raises:
      UserError: it cannot be found, fetched, read, or held exactly by our model.
    """
    path = download.resolve(name)
    if path.is_dir() and any((path / part).is_dir() for part in ("checkpoints", "best")):
        said.check_unused(name)
        return load(path, which, mesh or sharding.make_mesh())
    imported = load_weights(path, **said._asdict())
    return from_imported(imported if as_stored else at_input_size(imported), mesh)


def at_input_size(imported: Imported) -> Imported:
    """The weights with positions for the images that their publisher prepares."""
    old, size, method = imported.cfg, imported.input_size, imported.posemb_resize
    if size is None or not isinstance(old, ViTConfig):
        return imported
    new = dataclasses.replace(old, image_size=size)
    sizes = " to ".join(f"{rows}x{columns}" for rows, columns in (old.grid, new.grid))
    note = (
        f"Images are prepared at {size[0]} x {size[1]}, as published: position embeddings "
        f"resized from {sizes} patches ({method})."
    )
    params = resize_positions.resize_params(imported.params, old, new, method)
    return dataclasses.replace(
        imported, cfg=new, params=params, input_size=None, notes=(*imported.notes, note)
    )


def from_imported(imported: Imported, mesh: Mesh | None) -> Trained:
    """Somebody else's weights, with a configuration that describes them; see `load_any`."""
    cfg, params, config = imported.cfg, imported.params, configuration.get_config()
    config.image_size = cfg.image_size
    config.data.channels = cfg.channels
    config.data.value_range = imported.value_range
    config.data.eval_transform = imported.eval_transform
    config.init_resize = imported.posemb_resize
    config.objective.loss = "sigmoid" if imported.multi_label else config.objective.loss
    config.model.update(registry.fields_of(cfg))
    names = imported.class_names or tuple(map(str, range(cfg.num_classes)))
    return Trained(
        config=config,
        class_names=names,
        model=registry.build_model(config, len(names)),
        params=jax.device_put(params, sharding.replicated(mesh)) if mesh else params,
        step=0,
        family=imported.family,
        resize=imported.posemb_resize,
        notes=imported.notes,
        input_size=imported.input_size,
        unprepared=imported.unprepared,
        multi_label=imported.multi_label,
    )


def export(trained: Trained, folder: Path) -> None:
    """Writes weights and card to `folder`, which every command can open; atomically.

    Raises:
      UserError: the folder cannot be written.
    """
    card: Card = {
        "config": {**configuration.to_dict(trained.config), "ema_decay": 0.0},
        "class_names": list(trained.class_names),
        "family": trained.family,
        "resize": trained.resize,
        "vit_jax": vit_jax.__version__,
        "multi_label": trained.multi_label,
        "unprepared": trained.unprepared,
        "layout": older.LAYOUT,
        "averaged": False,
    }
    with replacing(folder) as part:
        part.mkdir()
        with Checkpoints(part, 1) as checkpoints:
            checkpoints.save_if_best(trained.step, only_model(trained.params), card, 0.0)
        (part / "checkpoints").rmdir()
        (part / "config.json").write_text(json.dumps(card["config"], indent=2) + "\n")
