"""Converts weights between formats, sizes and numbers of classes.

  python -m vit_jax.convert SOURCE DESTINATION [--format=npz|hf|timm|vit_jax]
      [--image_size=384 or 224x448] [--num_classes=10] [--dtype=bfloat16]

SOURCE is a work directory, a file or folder of weights (Google's .npz, big_vision's, Hugging
Face's, timm's, PyTorch's), recognised by what is in it, or a name such as `augreg:B_16`,
`google:ViT-B_16` or `hf:google/vit-base-patch16-224`. Nothing is overwritten without --force,
and DESTINATION appears when it is complete.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vit_jax import cli, trained
from vit_jax.errors import UserError
from vit_jax.interop import google, huggingface, positions, timm
from vit_jax.models import registry, vit
from vit_jax.models.model import count_parameters
from vit_jax.trained import Trained
from vit_jax.training import sharding


def describe(model: Trained) -> str:
    """What was found, a line for each thing."""
    cfg = model.model.config
    rows, columns = cfg.grid
    names = model.class_names
    shown = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    shape = f"{cfg.depth} layers, width {cfg.width}, MLP {cfg.mlp_dim}, {cfg.num_heads} heads"
    lines = [
        f"family     {model.family}",
        f"variant    {registry.variant_name(cfg) or 'of its own'}: {shape}",
        f"images     {cfg.image_size[0]}x{cfg.image_size[1]}x{cfg.channels}, "
        f"{rows}x{columns} patches of {cfg.patch_size}",
        f"classes    {len(names)}{shown}",
        f"parameters {count_parameters(model.params):,}",
    ]
    return "\n".join(lines + [f"note       {note}" for note in model.notes])


def parse_size(text: str) -> tuple[int, int]:
    """`384` or `224x448` (height x width) as (height, width) in pixels."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--image_size={text} does not read as a size: write 384 or 224x448")
    return int(parts[0]), int(parts[-1])


def resize(model: Trained, size: tuple[int, int], method: str) -> tuple[Trained, str]:
    """The model for images of another (height, width); its position embeddings follow."""
    old = model.model.config
    new = dataclasses.replace(old, image_size=size)
    params = vit.unstack_layers(model.params) if old.scan else model.params
    params = positions.resize_params(params, old, new, method)
    model.config.image_size = size
    model = model._replace(
        model=registry.build(new), params=vit.stack_layers(params) if old.scan else params
    )
    sizes = " to ".join(f"{rows}x{columns}" for rows, columns in (old.grid, new.grid))
    return model, f"position embeddings from {sizes} patches ({method})"


def replace_head(model: Trained, num_classes: int) -> tuple[Trained, str]:
    """The model with a zero-initialised head for so many classes; 0 takes the head away."""
    if num_classes < 0:
        raise UserError(f"--num_classes={num_classes}: use 0 (no head) or more")
    new = dataclasses.replace(model.model.config, num_classes=num_classes)
    params = {name: value for name, value in model.params.items() if name != "head"}
    if num_classes:
        width = new.representation_size or new.width
        params["head"] = {
            "kernel": jnp.zeros((width, num_classes)),
            "bias": jnp.full((num_classes,), new.head_bias_init),
        }
    names = tuple(map(str, range(num_classes)))
    model = model._replace(model=registry.build(new), params=params, class_names=names)
    return model, f"head: zero-initialised, {num_classes} classes"


def write(model: Trained, destination: Path, form: str, dtype: str) -> tuple[str, ...]:
    """Writes the model in a format; returns sentences about what its reader must know."""
    cfg, params = model.model.config, model.params
    if cfg.scan:
        params, cfg = vit.unstack_layers(params), dataclasses.replace(cfg, scan=False)
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)
    if form == "vit_jax":
        model.config.model.scan = False
        trained.export(model._replace(params=params), destination)
        return ()
    if form == "npz":
        return google.write(destination, cfg, params)
    if form == "timm":
        return timm.write(destination, cfg, params)
    return huggingface.write(
        destination,
        cfg,
        params,
        class_names=model.class_names,
        value_range=model.config.data.value_range,
        eval_transform=model.config.data.eval_transform,
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


def write_once(destination: Path, force: bool, write_to: Callable[[Path], Any]) -> Any:
    """Calls `write_to` with a path beside `destination`, then moves it there."""
    if destination.exists() and not force:
        raise UserError(f"{destination} exists: pass --force to replace it")
    part = destination.with_name(f".{destination.name}.part{destination.suffix}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        result = write_to(part)
        if destination.is_dir():
            shutil.rmtree(destination)
        os.replace(part, destination)
        return result
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if part.is_file():
            part.unlink()


def define_flags() -> None:
    flags.DEFINE_string("step", "last", "Of a work directory: last, best or a step number.")
    flags.DEFINE_string("format", None, f"One of {', '.join(FORMATS)}; else by the ending.")
    flags.DEFINE_string(
        "image_size", None, "New size in pixels: 384, or 224x448 (height first)."
    )
    flags.DEFINE_string("resize", None, "How to resize positions; else as the family does.")
    flags.DEFINE_integer("num_classes", None, "New head for so many classes; 0: no head.")
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
    model = trained.load_any(positional[0], given.step, sharding.make_mesh())
    print(describe(model))
    changes = []
    if given.image_size:
        size = parse_size(given.image_size)
        model, change = resize(model, size, given.resize or model.resize)
        changes.append(change)
    if given.num_classes is not None:
        model, change = replace_head(model, given.num_classes)
        changes.append(change)
    notes = write_once(
        destination, given.force, lambda part: write(model, part, form, given.dtype)
    )
    for line in [f"changed    {change}" for change in changes] + [
        f"note       {n}" for n in notes
    ]:
        print(line)
    print(f"wrote      {destination} ({form}, {given.dtype})")


if __name__ == "__main__":
    cli.run(main, define_flags)
