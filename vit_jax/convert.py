"""Converts weights between formats, sizes and numbers of classes.

  python -m vit_jax.convert SOURCE DESTINATION [--format=npz|hf|timm|vit_jax]
      [--image_size=384 or 224x448] [--num_classes=10] [--channels=1] [--dtype=bfloat16]

SOURCE is a work directory, a file or folder of weights (Google's .npz, big_vision's, Hugging
Face's, timm's, PyTorch's), recognised by what is in it, or a name such as `augreg:B_16`,
`google:ViT-B_16` or `hf:google/vit-base-patch16-224`. Nothing is overwritten without --force,
and DESTINATION appears when it is complete.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vit_jax.checkpoints import trained
from vit_jax.checkpoints.trained import Trained
from vit_jax.command_line import cli
from vit_jax.data import value_ranges
from vit_jax.data.transforms import language
from vit_jax.interop import google, huggingface, resize_positions, stated, timm
from vit_jax.interop.channels import adapt_first
from vit_jax.interop.families import FAMILIES
from vit_jax.models import registry, vit
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import count_parameters
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.atomic import replacing
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


def parse_size(text: str) -> tuple[int, int]:
    """`384` or `224x448` (height x width) as (height, width) in pixels."""
    return stated.parse_size("image_size", text)


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


def define_flags() -> None:
    stated.define_flags()
    flags.adopt_module_key_flags(stated)
    flags.DEFINE_string("step", "last", "Of a work directory: last, best or a step number.")
    flags.DEFINE_string("format", None, f"One of {', '.join(FORMATS)}; else by the ending.")
    flags.DEFINE_string(
        "image_size", None, "New size in pixels: 384, or 224x448 (height first)."
    )
    flags.DEFINE_string("resize", None, "How to resize positions; else as the family does.")
    flags.DEFINE_integer("num_classes", None, "New head for so many classes; 0: no head.")
    flags.DEFINE_integer("channels", None, "New number of input channels, as timm adapts them.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of the arrays.")
    flags.DEFINE_bool("force", False, "Replace DESTINATION if it exists.")


def main(positional: list[str]) -> None:
    given = flags.FLAGS
    if len(positional) != 2:
        raise UserError("pass SOURCE and DESTINATION: run with --help to see what they can be")
    destination = Path(positional[1])
    form = choose_format(given.format, destination)
    if destination.exists() and not given.force:  # before anything is fetched
        raise UserError(f"{destination} exists: pass --force to replace it")
    said = stated.from_flags()
    model = trained.load_any(positional[0], given.step, None, said, as_stored=True)
    print(describe(model))
    changes: list[str] = []
    size = parse_size(given.image_size) if given.image_size else None
    if form == "vit_jax":  # which has one size for positions and images
        size = size or model.input_size
    if size:
        model, changes = resize(model, size, given.resize or model.resize)
    if given.channels is not None:
        model, change = change_channels(model, given.channels)
        changes.append(change)
    if given.num_classes is not None:
        model, change = replace_head(model, given.num_classes)
        changes.append(change)
    with replacing(destination) as part:
        notes = write(model, part, form, given.dtype)
    for line in [f"changed    {change}" for change in changes] + [
        f"note       {n}" for n in notes
    ]:
        print(line)
    print(f"wrote      {destination} ({form}, {given.dtype})")


if __name__ == "__main__":
    cli.run(main, define_flags)
