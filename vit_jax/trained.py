"""A trained model, opened with nothing else given: a work directory, or published weights."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

import vit_jax
from vit_jax import config as configuration
from vit_jax import experiment
from vit_jax.atomic import replacing
from vit_jax.errors import UserError
from vit_jax.interop import download
from vit_jax.interop.load import Imported, load_weights
from vit_jax.models import registry
from vit_jax.models.layers import store_in
from vit_jax.models.model import Model, Params
from vit_jax.objectives import masked_patches
from vit_jax.training import sharding, stored
from vit_jax.training.checkpoint import Checkpoints, abstract, first_intact, load_params


class Trained(NamedTuple):
    """Weights and all that is needed to use them.

    Attributes:
      config: the model and its preprocessing; of one's own runs, the whole configuration.
      class_names: one for each output; numbers where the file has no names.
      model: the network.
      params: its parameters.
      step: number of updates, 0 where that is not known.
      family: whose code the weights come from: `vit_jax`, or a name of `interop.families`.
      resize: how that code resizes position embeddings, of `interop.positions.METHODS`.
      notes: sentences about what was left out or assumed.
    """

    config: ConfigDict
    class_names: tuple[str, ...]
    model: Model
    params: Params
    step: int
    family: str = "vit_jax"
    resize: str = "corner"
    notes: tuple[str, ...] = ()


def define_flags() -> None:
    """The flags by which every door is told which model to use."""
    flags.DEFINE_string("workdir", None, "Work directory of a training run.")
    flags.DEFINE_string(
        "checkpoint", None, "Instead: a file or folder of weights, or a name like augreg:B_16."
    )
    flags.DEFINE_string("step", "last", "Of a work directory: last, best or a step number.")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"],
        "Operands of matrix products; as trained unless given, float32 for published weights.",
    )  # fmt: skip


def from_flags(mesh: Mesh) -> Trained:
    """Opens the model that the flags name.

    Raises:
      UserError: not exactly one of --workdir and --checkpoint is given, or it cannot be read.
    """
    given = flags.FLAGS
    if bool(given.workdir) == bool(given.checkpoint):
        raise UserError("pass one of --workdir and --checkpoint: see --help")
    if given.workdir:
        model = load(Path(given.workdir), given.step, mesh)
    else:
        model = load_any(given.checkpoint, given.step, mesh)
        for note in model.notes:
            print(f"note: {note}", file=sys.stderr)
    return for_inference(model, given.dtype)


def for_inference(model: Trained, dtype: str | None = None) -> Trained:
    """The same model, computing in `dtype`, its kernels stored in that once and for all.

    Args:
      model: as it was opened.
      dtype: `float32` or `bfloat16`; None: as it was trained.
    """
    config = model.config.copy_and_resolve_references()
    config.model.dtype = dtype or config.model.dtype
    network = experiment.build_model(config, len(model.class_names))
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
    card = stored.card(checkpoint)
    config = configuration.from_dict(card["config"])
    class_names = tuple(card["class_names"])
    model = experiment.build_model(config, len(class_names))
    objective = experiment.build_objective(config, len(class_names))
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    target = abstract(shapes, sharding.replicated(mesh))
    params = load_params(checkpoint, target)
    params.pop(masked_patches.NAME, None)  # of the objective, not of the model
    family, resize = card.get("family", "vit_jax"), card.get("resize", "corner")
    return Trained(config, class_names, model, params, card["step"], family, resize)


def load_any(name: str, which: str, mesh: Mesh | None) -> Trained:
    """Opens a work directory, an export, a file of published weights, or a name of some.

    Args:
      name: a path, or what `interop.download.resolve` fetches (`augreg:B_16`, `hf:...`).
      which: of a work directory, as for `load`.
      mesh: where the weights go; None leaves published ones in the host's memory.

    Raises:
      UserError: it cannot be found, fetched, read, or held exactly by our model.
    """
    path = download.resolve(name)
    if path.is_dir() and any((path / part).is_dir() for part in ("checkpoints", "best")):
        return load(path, which, mesh or sharding.make_mesh())
    return from_imported(load_weights(path), mesh)


def from_imported(imported: Imported, mesh: Mesh | None) -> Trained:
    """Somebody else's weights, with a configuration that describes them; see `load_any`."""
    cfg, params, config = imported.cfg, imported.params, configuration.get_config()
    config.image_size = cfg.image_size
    config.data.channels = cfg.channels
    config.data.value_range = imported.value_range
    config.data.eval_transform = imported.eval_transform
    config.init_resize = imported.posemb_resize
    config.model.update(registry.fields_of(cfg))
    names = imported.class_names or tuple(map(str, range(cfg.num_classes)))
    return Trained(
        config=config,
        class_names=names,
        model=experiment.build_model(config, len(names)),
        params=jax.device_put(params, sharding.replicated(mesh)) if mesh else params,
        step=0,
        family=imported.family,
        resize=imported.posemb_resize,
        notes=imported.notes,
    )


def export(trained: Trained, folder: Path) -> None:
    """Writes weights and card to `folder`, which every door can open; atomically.

    Raises:
      UserError: the folder cannot be written.
    """
    card = {
        "config": {**configuration.to_dict(trained.config), "ema_decay": 0.0},
        "class_names": list(trained.class_names),
        "family": trained.family,
        "resize": trained.resize,
        "vit_jax": vit_jax.__version__,
    }
    with replacing(folder) as part:
        part.mkdir()
        with Checkpoints(part, 1) as checkpoints:
            checkpoints.save_if_best(trained.step, trained.params, card, 0.0)
        (part / "checkpoints").rmdir()
        (part / "config.json").write_text(json.dumps(card["config"], indent=2) + "\n")
