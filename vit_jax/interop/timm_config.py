"""What the `config.json` of a timm folder says about images, sizes and classes.

timm's defaults stand in for what it leaves out, as `resolve_model_data_config` has them.
https://github.com/huggingface/pytorch-image-models
"""

import math
from collections.abc import Iterator
from typing import Any

from vit_jax.data import value_ranges
from vit_jax.data.value_ranges import IMAGENET_MEAN, IMAGENET_STD
from vit_jax.interop.preprocessing import Size, Unobeyed, at_size
from vit_jax.models.registry import ModelConfig

_METHODS = {
    "nearest": "nearest",
    "bilinear": "bilinear_antialias",
    "bicubic": "bicubic",
    "box": "box",
    "hamming": "hamming",
    "lanczos": "lanczos",
}
IMAGES: dict[str, Any] = {
    "mean": list(IMAGENET_MEAN),
    "std": list(IMAGENET_STD),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "input_size": None,  # that of the positions
}


def pretrained_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the weights; in old folders it is the whole."""
    data = config.get("pretrained_cfg", config)
    return data if isinstance(data, dict) else {}


def model_args(config: dict[str, Any] | None) -> dict[str, Any]:
    """What it says about the network."""
    config = config or {}
    args = config.get("model_args")
    args = dict(args) if isinstance(args, dict) else {}
    return {"global_pool": config.get("global_pool")} | args


def _pair(value: Any) -> Size | None:
    match [value, value] if type(value) is int else value:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None


def _input_size(config: dict[str, Any]) -> Size | None:
    """(H, W) of `input_size`, which counts the channels first.

    Where the size is fixed, it is the one that the network was made for.
    """
    data, args = pretrained_cfg(config), model_args(config)
    fixed = data.get("fixed_input_size") and not args.get("dynamic_img_size")
    if fixed and (made_for := _pair(args.get("img_size"))):
        return made_for
    value = data.get("input_size")
    return _pair(value[1:]) if isinstance(value, list) and len(value) == 3 else None


def sizes(config: dict[str, Any] | None) -> Iterator[Size]:
    """Sizes (H, W) that the positions may be for, the likelier first."""
    for size in (_pair(model_args(config).get("img_size")), _input_size(config or {})):
        if size is not None:
            yield size


def read_images(config: dict[str, Any], cfg: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """Fields of an `Imported`: pixels, transform, size and the names of classes."""
    given: dict[str, Any] = {}
    data = {name: x for name, x in pretrained_cfg(config).items() if x is not None}
    if IMAGES.keys() & data.keys():
        try:
            given |= _read(IMAGES | data, config, cfg)
        except Unobeyed as reason:
            notes.append(f"config.json {reason}: images are not prepared as published.")
            given["unprepared"] = f"config.json {reason}"
    said = config.get("num_classes", data.get("num_classes"))
    if type(said) is int and said != cfg.num_classes:
        notes.append(
            f"config.json has num_classes {said}, but the head has {cfg.num_classes} outputs: "
            f"those of the head count."
        )
    labels = data.get("label_names", config.get("label_names", data.get("labels")))
    if isinstance(labels, list) and labels:
        if len(labels) == cfg.num_classes:
            given["class_names"] = tuple(map(str, labels))
        else:
            notes.append(_other_number(len(labels), cfg.num_classes))
    return given


def _other_number(names: int, outputs: int) -> str:
    return f"config.json names {names} classes, but the head has {outputs} outputs: left out."


def _read(data: dict[str, Any], config: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    for name, args in (("crop_border_pixels", data), ("dynamic_img_pad", model_args(config))):
        if args.get(name):
            raise Unobeyed(f"has {name}={args[name]!r}, which is not done here")
    mean, std = (_numbers(data, name, cfg.channels) for name in ("mean", "std"))
    size = _input_size(config) or cfg.image_size
    given = at_size(cfg, _transform(data, size), size)
    return given | {"value_range": value_ranges.name(mean, std)}


def _numbers(data: dict[str, Any], name: str, channels: int) -> list[float]:
    value = data[name]
    numbers = list(value) if isinstance(value, list) else [value]
    known = all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
    if not numbers or not known or (name == "std" and min(numbers) <= 0):
        raise Unobeyed(f"has {name}={value!r}, which cannot be")
    numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
    if len(numbers) not in (1, channels):
        raise Unobeyed(f"has {len(numbers)} numbers in {name} for {channels} channels")
    return numbers


def _transform(data: dict[str, Any], size: Size) -> str:
    """As `transforms_imagenet_eval`."""
    crop, mode, method = (data[name] for name in ("crop_pct", "crop_mode", "interpolation"))
    if type(crop) not in (int, float) or not 0.01 < crop < 100:
        raise Unobeyed(f"has crop_pct={crop!r}, which is no share of an image")
    if (method := _METHODS.get(method)) is None:
        raise Unobeyed(f"has interpolation={data['interpolation']!r}, which is not known")
    scale = math.floor(size[0] / crop), math.floor(size[1] / crop)
    edge = scale[0] if scale[0] == scale[1] else scale
    smaller = any(a < b for a, b in zip(scale, size, strict=True))
    cut = "center_crop('even', fill=0)" if smaller else "center_crop('even')"
    if mode == "border":
        fill = tuple(round(255 * x) for x in data["mean"])
        cut = f"center_crop('even', fill={fill})"
        return f"resize_fit({edge}, method='{method}', fit='inside')|{cut}"
    if mode == "squash":
        first = f"resize(method='{method}', size={edge})"
        return f"resize(method='{method}')" if scale == size else f"{first}|{cut}"
    if mode != "center":
        raise Unobeyed(f"has crop_mode={mode!r}, which is not known")
    if scale[0] == scale[1]:
        return f"resize_shorter({edge}, method='{method}')|{cut}"
    return f"resize_fit({edge}, method='{method}')|{cut}"
