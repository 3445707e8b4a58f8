"""A trained model at another resolution, with another head or other channels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.checkpoints.trained import Trained
from vit_jax.data import value_ranges
from vit_jax.data.transforms import language
from vit_jax.interop.channels import adapt_first
from vit_jax.models import registry, resize_positions, vit
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError


def resize(model: Trained, size: tuple[int, int], method: str) -> tuple[Trained, list[str]]:
    """The model for images of another (height, width): its positions, its evaluation transform.

    Raises:
      UserError: the network is tied to its size.
    """
    old = model.model.config
    if isinstance(old, MixerConfig):
        raise UserError(
            "--image_size: a Mixer is tied to the image size that it was trained at"
        )
    new = dataclasses.replace(old, image_size=size)
    before = model.input_size or old.image_size  # that the transform ends in
    transform = language.rescale(model.config.data.eval_transform, before, size)
    changes = []
    if transform != model.config.data.eval_transform:
        changes.append(f"evaluation transform: {transform}")
    model.config.image_size, model.config.data.eval_transform = size, transform
    params = model.params
    if isinstance(old, ViTConfig) and isinstance(new, ViTConfig):
        params = vit.unstack_layers(params) if old.scan else params
        params = resize_positions.resize_params(params, old, new, method)
        params = vit.stack_layers(params) if old.scan else params
        sizes = " to ".join(f"{rows}x{columns}" for rows, columns in (old.grid, new.grid))
        changes.append(f"position embeddings from {sizes} patches ({method})")
    model = model._replace(model=registry.build(new), params=params, input_size=None)
    return model, changes


def replace_head(model: Trained, num_classes: int) -> tuple[Trained, str]:
    """The model with a zero-initialised head for so many classes; 0 takes the head away."""
    if num_classes < 0:
        raise UserError(f"--num_classes={num_classes}: use 0 (no head) or more")
    changes: dict[str, Any] = {"num_classes": num_classes}
    if not num_classes and getattr(model.model.config, "distillation", "none") == "heads":
        changes["distillation"] = model.config.model.distillation = "token"
    new = registry.build(dataclasses.replace(model.model.config, **changes))
    heads = ("head", "head_dist")
    params = {name: value for name, value in model.params.items() if name not in heads}
    bias = new.config.head_bias_init
    for name, shapes in jax.eval_shape(new.init, jax.random.key(0)).items():
        if name in heads:
            params[name] = {
                "kernel": jnp.zeros(shapes["kernel"].shape),
                "bias": jnp.full(shapes["bias"].shape, bias),
            }
    names = tuple(map(str, range(num_classes)))
    model = model._replace(model=new, params=params, class_names=names)
    return model, f"head: zero-initialised, {num_classes} classes"


def change_channels(model: Trained, channels: int) -> tuple[Trained, str]:
    """The model for images of another number of channels: see `interop.channels`.

    Raises:
      UserError: it cannot have so many.
    """
    old = model.model.config
    if channels < 1:
        raise UserError(f"--channels={channels}: use 1 or more")
    if channels == old.channels:
        return model, f"channels: {channels} already"
    params, note = adapt_first(model.params, old.channels, channels)
    data = model.config.data
    data.channels = channels
    data.value_range = value_ranges.for_channels(data.value_range, channels)
    new = registry.build(dataclasses.replace(old, channels=channels))
    note += f", value range {data.value_range}"
    return model._replace(model=new, params=params), note
