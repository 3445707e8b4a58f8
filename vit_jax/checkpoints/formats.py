"""A trained model written in the form of somebody else."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints import trained
from vit_jax.checkpoints.trained import Trained
from vit_jax.interop import google, huggingface, timm
from vit_jax.interop.families import FAMILIES
from vit_jax.models import registry, vit
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import count_parameters
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError


def describe(model: Trained) -> str:
    """What was found, a line for each thing."""
    cfg, names = model.model.config, model.class_names
    height, width = cfg.image_size
    shown = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    images, shape = f"{height}x{width}x{cfg.channels}", ""
    if isinstance(cfg, ViTConfig | MixerConfig):
        rows, columns = cfg.grid
        images += f", {rows}x{columns} patches of {cfg.patch_size}"
        shape = f"{cfg.depth} layers, width {cfg.width}, MLP {cfg.mlp_dim}"
    if isinstance(cfg, ViTConfig):
        shape += f", {cfg.num_heads} heads"
    if isinstance(cfg, ResNetConfig):
        shape = f"stages of {cfg.resnet} units, {cfg.resnet_width} times as wide as ResNet-50"
    if model.input_size:
        images += ", prepared at {}x{} as published".format(*model.input_size)
    lines = [
        f"family     {model.family}",
        f"variant    {registry.variant_name(cfg) or 'of its own'}: {shape}",
        f"images     {images}",
        f"classes    {len(names)}{shown}",
        f"parameters {count_parameters(model.params):,}",
    ]
    return "\n".join(lines + [f"note       {note}" for note in model.notes])


def about_images(model: Trained) -> dict[str, Any]:
    """What a file of arrays alone cannot say, for our own header of it."""
    data, said = model.config.data, dict[str, Any]()
    if model.family in FAMILIES:
        said["family"] = model.family
    if model.class_names != tuple(map(str, range(len(model.class_names)))):
        said["class_names"] = model.class_names
    if model.input_size:
        said["input_size"] = model.input_size
    said |= {"value_range": data.value_range, "eval_transform": data.eval_transform}
    return said | {"posemb_resize": model.resize}


def write(model: Trained, destination: Path, form: str, dtype: str) -> tuple[str, ...]:
    """Writes the model in a format; returns sentences about what its reader must know."""
    cfg, params = model.model.config, model.params
    if isinstance(cfg, ViTConfig) and cfg.scan:
        params, cfg = vit.unstack_layers(params), dataclasses.replace(cfg, scan=False)
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype), copy=False), params)
    if form == "vit_jax":
        model.config.model.scan = False
        trained.export(model._replace(params=params), destination)
        return ()
    if form == "npz":
        return google.write(destination, cfg, params)
    if form == "timm":
        return timm.write(destination, cfg, params, about_images(model))
    return huggingface.write(
        destination,
        cfg,
        params,
        class_names=model.class_names,
        value_range=model.config.data.value_range,
        eval_transform=model.config.data.eval_transform,
        input_size=model.input_size,
        multi_label=model.multi_label,
    )


FORMATS = ("npz", "hf", "timm", "vit_jax")

_BY_ENDING = {".npz": "npz", ".safetensors": "timm"}


def choose_format(given: str | None, destination: Path) -> str:
    form = given or _BY_ENDING.get(destination.suffix)
    if form not in FORMATS:
        raise UserError(
            f"--format={given}: use one of {', '.join(FORMATS)}"
            if given
            else f"the ending of {destination} names no format: pass --format=hf or vit_jax"
        )
    return form
