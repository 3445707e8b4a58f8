"""Objectives by name."""

from collections.abc import Callable

from ml_collections import ConfigDict

from vit_jax.data.mixing import build_mixing
from vit_jax.models import registry
from vit_jax.models.model import Model
from vit_jax.models.registry import Builder, build_model
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.masked_patches import MaskedPatches
from vit_jax.objectives.multi_label import MultiLabel
from vit_jax.objectives.objective import Objective
from vit_jax.system.errors import UserError

Build = Callable[[ConfigDict, int, Builder], Objective]


def build_objective(
    config: ConfigDict, num_classes: int, build: Builder = registry.build
) -> Objective:
    """What `config.objective` names, with a network that `build` makes for `num_classes`.

    Raises:
      UserError: there is no such objective, or it does not fit the rest.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise UserError(f"objective.name is {name!r}: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](config, num_classes, build)


def _classification(config: ConfigDict, num_classes: int, build: Builder) -> Objective:
    return classify(config, build_model(config, num_classes, build))


def _masked_patches(config: ConfigDict, num_classes: int, build: Builder) -> Objective:
    objective = config.objective
    if build_mixing(config).mixes:
        raise UserError(
            f"data.mixup is {config.data.mixup} and data.cutmix {config.data.cutmix}, which "
            f"mix labels, but objective.name={objective.name!r} has none: set both to 0"
        )
    return MaskedPatches(build_model(config, 0, build), objective.target, objective.mask_ratio)


OBJECTIVES: dict[str, Build] = {
    "classification": _classification,
    "masked_patches": _masked_patches,
}


def classify(config: ConfigDict, model: Model) -> Objective:
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
