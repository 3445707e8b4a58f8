"""What published folders say about images, in words of `data.preprocess`, and back."""

import math
import re
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.registry import ModelConfig
from vit_jax.models.vit_config import ViTConfig

# Mean and standard deviation of the channels of pixels in [0, 1].
RANGES = {
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def known_range(mean: Any, std: Any) -> str | None:
    """The value range with this mean and deviation of pixels in [0, 1]."""
    for name, pair in RANGES.items():
        try:
            if all(
                np.allclose(x, y, atol=1e-3) for x, y in zip((mean, std), pair, strict=True)
            ):
                return name
        except (TypeError, ValueError):
            return None  # no numbers, or not one a channel
    return None


def unknown_range(mean: Any, std: Any) -> str:
    """A note on pixels that are scaled in a way that has no name here."""
    return (
        f"Pixels are scaled by mean {mean} and deviation {std}, which value_range cannot say."
    )


_RESAMPLE = {1: "lanczos", 2: "bilinear_antialias", 3: "bicubic"}  # PIL's codes


def from_timm(config: dict[str, Any], cfg: ModelConfig, notes: list[str]) -> dict[str, Any]:
    """What a timm `config.json` says about images and classes."""
    data = config.get("pretrained_cfg")
    given: dict[str, Any] = {}
    data = data if isinstance(data, dict) else {}
    if "mean" in data and "std" in data:
        if value_range := known_range(data["mean"], data["std"]):
            given["value_range"] = value_range
        else:
            notes.append(unknown_range(data["mean"], data["std"]))
    crop, method = data.get("crop_pct"), data.get("interpolation")
    if isinstance(crop, float | int) and 0.1 < crop <= 1 and method in ("bicubic", "bilinear"):
        method = {"bilinear": "bilinear_antialias"}.get(method, method)
        shorter = math.floor(max(cfg.image_size) / crop)
        crop = "center_crop('even')"
        given["eval_transform"] = f"resize_shorter({shorter}, method='{method}')|{crop}"
    labels = data.get("label_names", config.get("label_names"))
    if isinstance(labels, list) and len(labels) == cfg.num_classes and labels:
        given["class_names"] = tuple(map(str, labels))
    return given


def from_processor(
    processor: dict[str, Any], cfg: ViTConfig, notes: list[str]
) -> dict[str, Any]:
    """What a `preprocessor_config.json` says about images."""
    given: dict[str, Any] = {}
    mean, std = processor.get("image_mean", 0.5), processor.get("image_std", 0.5)
    if value_range := known_range(mean, std):
        given["value_range"] = value_range
    else:
        notes.append(unknown_range(mean, std))
    codes = [code for code in _RESAMPLE if code == processor.get("resample", 2)]
    method = _RESAMPLE[codes[0]] if codes else None
    size = processor.get("size")
    size = {"height": size, "width": size} if isinstance(size, int) else size
    size = size if isinstance(size, dict) else {}
    edges = [size.get(key) for key in ("shortest_edge", "height", "width")]
    crop = "|center_crop" if processor.get("do_center_crop") else ""
    if method and type(edges[0]) is int and crop:
        given["eval_transform"] = f"resize_shorter({edges[0]}, method='{method}'){crop}"
    elif method and crop and type(edges[1]) is int and edges[1] == edges[2]:
        given["eval_transform"] = f"resize(method='{method}', size={edges[1]}){crop}"
    elif method and not crop and tuple(edges[1:]) == cfg.image_size:
        given["eval_transform"] = f"resize(method='{method}')"
    else:
        notes.append("How images are resized could not be read: the family's way assumed.")
    return given


def to_processor(
    cfg: ViTConfig, value_range: str, eval_transform: str, notes: list[str]
) -> dict[str, Any]:
    """The `preprocessor_config.json` for a transform that ends in the right size."""
    number, text = r"(?:size=)?(?P<size>\d+)", r"(?:method=)?'(?P<method>\w+)'"
    pattern = (
        rf"(?P<name>resize|resize_shorter)(\(({number}|{text}|, )*\))?"
        r"(?P<crop>\|center_crop(\((?:half=)?'(?P<half>down|even)'\))?)?"
    )
    match = re.fullmatch(pattern, eval_transform)
    shorter = match is not None and match["name"] == "resize_shorter"
    if match is None or (shorter and not (match["size"] and match["crop"])):
        raise UserError(f"Hugging Face's image processors cannot do {eval_transform!r}")
    if value_range not in RANGES:
        raise UserError(f"there is no value range {value_range!r}: use {' or '.join(RANGES)}")
    if value_range == "imagenet" and cfg.channels != 3:
        raise UserError(
            f"value range 'imagenet' is for 3 channels, the model has {cfg.channels}"
        )
    method = match["method"] or ("bilinear" if match["name"] == "resize" else "area")
    codes = {name: code for code, name in _RESAMPLE.items()}
    if method not in codes:
        notes.append(f"Images are resized by bilinear_antialias there, by {method} here.")
    if match["half"] == "even":
        notes.append("The crop may stand one pixel further up or left there.")
    height, width = cfg.image_size
    size: dict[str, int] = {"height": height, "width": width}
    kind = "ViTImageProcessor"
    if shorter:
        size, kind = {"shortest_edge": int(match["size"])}, "BitImageProcessor"
    elif match["size"]:
        size = {"height": int(match["size"]), "width": int(match["size"])}
        kind = "DeiTImageProcessor"
    mean, std = (values[: cfg.channels] for values in RANGES[value_range])
    processor = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": codes.get(method, codes["bilinear_antialias"]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": cfg.channels == 3,
    }
    if match["crop"]:
        processor |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return processor
