"""From the name of a variant to a network, and back.

  B/16        a Vision Transformer     R50+B/16    a hybrid: patches from a ResNet's map
  R50x1       a ResNet                 Mixer-B/16  an MLP-Mixer

A field of `config.model` that is set beside the name replaces what the name says.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vit_jax.models import mixer, resnet, vit
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import Model
from vit_jax.models.resnet import ResNetConfig
from vit_jax.models.variants import (
    MIXERS,
    RESNETS,
    VARIANTS,
    Variant,
    decode_hybrid,
    decode_mixer,
    decode_resnet,
    decode_variant,
)
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

ModelConfig = ViTConfig | ResNetConfig | MixerConfig
_DATA = ("image_size", "channels", "num_classes")  # which the data decide, not `config.model`


def decode(name: str) -> tuple[type[ModelConfig], dict[str, Any]]:
    """The kind of network that `name` stands for, and the fields that the name decides.

    Raises:
      UserError: there is no such variant.
    """
    if name.startswith("Mixer-"):
        shape, patch = decode_mixer(name)
        return MixerConfig, {**shape._asdict(), "patch_size": patch}
    if name.startswith("R") and "x" in name and "/" not in name:
        units, factor = decode_resnet(name)
        return ResNetConfig, {"resnet": units, "resnet_width": factor}
    if "+" in name:
        units, variant, patch = decode_hybrid(name)
        return ViTConfig, {**variant._asdict(), "patch_size": patch, "resnet": units}
    variant, patch = decode_variant(name)
    return ViTConfig, {**variant._asdict(), "patch_size": patch}


def configure(
    fields: Any, image_size: tuple[int, int], channels: int, num_classes: int
) -> ModelConfig:
    """Reads a `config.model`.

    Raises:
      UserError: there is no such variant, or a field does not fit it.
    """
    if len(image_size) != 2 or not all(isinstance(edge, int) for edge in image_size):
        raise UserError(f"image_size is {image_size}: use (height, width)")
    kind, named = decode(fields.variant)
    own = {field.name for field in dataclasses.fields(kind)}
    for field in dataclasses.fields(ViTConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        value = getattr(fields, field.name, default)
        if field.name not in own and value not in (None, default):
            raise UserError(
                f"model.{field.name} is {value!r}, but a {fields.variant} has no such thing: "
                f"leave it at {default!r}"
            )
    given: dict[str, Any] = {
        "image_size": (image_size[0], image_size[1]),
        "channels": channels,
        "num_classes": num_classes,
    }
    for field in dataclasses.fields(kind):
        value = getattr(fields, field.name, None)
        value = named.get(field.name) if value is None else value
        if field.name not in given and (value is not None or field.default is None):
            given[field.name] = value
    return kind(**given)


def fields_of(cfg: ModelConfig) -> dict[str, Any]:
    """The inverse of `configure`: values for `config.model`, the variant's name included."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    fields = {name: value for name, value in fields.items() if name not in _DATA}
    patch = fields.pop("patch_size", None)
    name = variant_name(cfg)
    if name is None:  # any variant of its kind will do, all that it says is said beside it
        name = {MixerConfig: f"Mixer-S/{patch}", ResNetConfig: "R26x1"}.get(
            type(cfg), f"mu/{patch}"
        )
    return {"variant": name, **fields}


def variant_name(cfg: ModelConfig) -> str | None:
    """The name of a variant with the shape of `cfg`, or None if no table has it."""
    if isinstance(cfg, ResNetConfig):
        names = [f"{name}x{cfg.resnet_width}" for name in RESNETS]
    elif isinstance(cfg, MixerConfig):
        names = [f"Mixer-{name}/{cfg.patch_size}" for name in MIXERS]
    else:
        shape = Variant(cfg.depth, cfg.width, cfg.mlp_dim, cfg.num_heads)
        sizes = [name for name, variant in VARIANTS.items() if variant == shape]
        names = [f"{size}/{cfg.patch_size}" for size in sizes]
        if cfg.resnet is not None:
            names = [f"{r}+{s}/{p}" for r in ("R", *RESNETS) for s in sizes for p in (16, 32)]
            names = [name for name in names if name[:2] != "R+" or name.endswith("/16")]
    for name in names:
        if all(getattr(cfg, field) == value for field, value in decode(name)[1].items()):
            return name
    return None


def build(cfg: ModelConfig) -> Model:
    """Returns the network that `cfg` describes."""
    if isinstance(cfg, ResNetConfig):
        return resnet.build(cfg)
    if isinstance(cfg, MixerConfig):
        return mixer.build(cfg)
    return vit.build(cfg)


Builder = Callable[[Any], Model]


def build_model(config: ConfigDict, num_classes: int, build: Builder = build) -> Model:
    """Returns the network of a `config`, which `build` makes of its checked description.

    Raises:
      UserError: there is no such variant, or a field does not fit it.
    """
    if config.model.variant is None:
        raise UserError(
            "config.model.variant and config.init_from are both unset: name a variant such as "
            "B/16, or set config.init_from to weights that bring their own"
        )
    cfg = configure(config.model, config.image_size, config.data.channels, num_classes)
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
            model.scan = decode(model.variant)[0] is ViTConfig
        if model.remat is None:
            model.remat = "dots" if model.scan else "none"
    return config
