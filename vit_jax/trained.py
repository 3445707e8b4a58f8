"""A trained model, opened from a work directory with nothing else given."""

from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax import experiment
from vit_jax.errors import UserError
from vit_jax.models.vit import Model, Params
from vit_jax.training import sharding
from vit_jax.training.checkpoint import abstract, load_card, load_params


class Trained(NamedTuple):
    config: ConfigDict
    class_names: tuple[str, ...]
    model: Model
    params: Params
    step: int


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
    card = load_card(workdir, which)
    config = configuration.from_dict(card["config"])
    class_names = tuple(card["class_names"])
    model = experiment.build_model(config, len(class_names))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    target = abstract(shapes, sharding.replicated(mesh))
    params = load_params(workdir, which, target)
    return Trained(config, class_names, model, params, card["step"])
