"""Weights of one model as the beginning of another: fine-tuning (2010.11929, section 3.2).

The encoder is copied, position embeddings are resized to the new grid, the head is new.
The tanh layer of the pre-training head goes with the head, unless the new model has one of
the same width.
"""

from vit_jax.interop.channels import adapt_first
from vit_jax.interop.families import flatten
from vit_jax.models import vit
from vit_jax.models.model import Params
from vit_jax.models.registry import ModelConfig
from vit_jax.models.resize_positions import resize_params
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

_SHAPE = ("depth", "width", "mlp_dim", "num_heads", "pool")  # reported before other fields
_SHOWN = 30  # arrays that a message names
_NEW = ("head", "head_dist")  # always from the fresh initialisation


def adapt(
    params: Params, old: ModelConfig, fresh: Params, new: ModelConfig, resize: str = "corner"
) -> tuple[Params, list[str]]:
    """Returns parameters for model `new` that begin where those of model `old` ended.

    Args:
      params: the parameters of `old`.
      old: what they were trained as.
      fresh: initial parameters of `new`, which the head is taken from.
      new: the model to make them for.
      resize: a name of `models.resize_positions.METHODS`.

    Returns:
      The parameters, in the layout (scanned or not) of `new`, and sentences about what changed.

    Raises:
      UserError: arrays are missing, left over or of another shape; they are listed.
    """
    notes = ["head: new, zero-initialised"] if "head" in fresh else ["head: none"]
    # A ResNet has no layers to scan and no positions, a Mixer only its own size.
    scanned = [isinstance(cfg, ViTConfig) and cfg.scan for cfg in (old, new)]
    params = vit.unstack_layers(params) if scanned[0] else dict(params)
    target = vit.unstack_layers(fresh) if scanned[1] else dict(fresh)
    if type(old) is type(new) and old.channels != new.channels:
        params, note = adapt_first(params, old.channels, new.channels)
        notes.append(note)
    if isinstance(old, ViTConfig) and isinstance(new, ViTConfig) and old.grid != new.grid:
        params = resize_params(params, old, new, resize)
        how = {"sincos2d": "computed again", "none": "none"}.get(old.posemb, resize)
        sizes = " to ".join(f"{rows}x{columns}" for rows, columns in (old.grid, new.grid))
        notes.append(f"position embeddings: {sizes} ({how})")
    layers = [tree["pre_logits"] for tree in (params, target) if "pre_logits" in tree]
    kept = len(layers) == 2 and layers[0]["kernel"].shape == layers[1]["kernel"].shape
    if "pre_logits" in params and not kept:
        params.pop("pre_logits")
        notes.append("pre_logits: dropped with the old head")
    if "pre_logits" in target and not kept:
        params["pre_logits"] = target["pre_logits"]
        notes.append("pre_logits: new")
    params = {name: value for name, value in params.items() if name not in _NEW}
    params |= {name: target[name] for name in _NEW if name in target}
    _check(params, target, old, new)
    return (vit.stack_layers(params) if scanned[1] else params), notes


def _check(params: Params, target: Params, old: ModelConfig, new: ModelConfig) -> None:
    found, wanted = (
        {name: leaf.shape for name, leaf in flatten(tree).items()} for tree in (params, target)
    )
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is left over" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {found[name]}, not {wanted[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if wrong:
        has = lambda cfg, name: getattr(cfg, name, None)
        shape = [
            f"model.{name} is {has(old, name)} in them, not {has(new, name)}"
            for name in _SHAPE
            if has(old, name) != has(new, name)
        ]
        shown = shape + sorted(wrong)[:_SHOWN]
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise UserError(
            f"the weights do not fit the model: {'; '.join(shown + more)}: set config.model "
            f"to what they were trained as; a file that leaves model.variant None takes it "
            f"from the weights"
        )
