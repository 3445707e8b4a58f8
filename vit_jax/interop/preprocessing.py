"""What a `preprocessor_config.json` says about images, as `data.transforms.language`, and back.

Every setting is applied, or the reason why it cannot be is reported: pixels that are prepared
only partly as published are worse than none. https://github.com/huggingface/transformers
"""

import math
import re
from typing import Any, NamedTuple

from vit_jax.data import value_ranges
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

Size = tuple[int, int]  # height, width
# Largest plausible pixels of an edge and patches of an image: larger ones would exhaust the
# memory before an error is noticed.
_MOST_EDGE, _MOST_PATCHES = 20_000, 1 << 16

RESAMPLE = {  # PIL's codes
    0: "nearest",
    1: "lanczos",
    2: "bilinear_antialias",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": 0.5, "image_std": 0.5}
_COMMON: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
}
_COMMON |= {"rescale_factor": 1 / 255, "default_to_square": True, "crop_size": None}
_CROP = {"crop_size": 224, "do_center_crop": True}
_SHORTER = _CROP | {"size": {"shortest_edge": 224}, "default_to_square": False}
# The defaults of the classes of transformers 5.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": _COMMON | _HALF | {"size": 224, "resample": 2},
    "DeiT": _COMMON | _HALF | _CROP | {"size": 256, "resample": 3},
    "Beit": _COMMON | _HALF | {"size": 224, "resample": 3, "crop_size": 224},
    "Siglip": _COMMON | _HALF | {"size": 224, "resample": 3},
    "Bit": _COMMON | _CLIP | _SHORTER | {"resample": 3},
    "CLIP": _COMMON | _CLIP | _SHORTER | {"resample": 3},
}
# The class of a folder that names none, by `model_type`.
PROCESSOR_OF = {
    "vit": "ViT",
    "vit_mae": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
}
# Settings that change no pixel of what we read: colours are those that the model has.
NEUTRAL = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "data_format",
    "input_data_format",
    "device",
    "return_tensors",
    "disable_grouping",
    "do_reduce_labels",
    "reduce_labels",
    "pad_size",
    "image_seq_length",
    "auto_map",
    "_valid_processor_keys",
    "model_input_names",
)
OBEYED = tuple(PROCESSORS["ViT"])


class Unobeyed(Exception):
    """Why a published setting cannot be applied: the rest of a sentence that names the file."""


class Said(NamedTuple):
    """A size as published: all of (height, width), or the shorter edge alone."""

    exact: Size | None
    shorter: int = 0


def settings(processor: dict[str, Any], model: str, notes: list[str]) -> dict[str, Any]:
    """All settings, with the defaults of the class for what is missing.

    A switch that is null is off, as it is to transformers; other nulls count as missing.

    Raises:
      Unobeyed: the class is unknown, or does more than we do.
    """
    off = lambda name, value: False if value is None and name.startswith("do_") else value
    given = {name: off(name, value) for name, value in processor.items()}
    given = {name: value for name, value in given.items() if value is not None}
    named = given.get("image_processor_type", given.get("feature_extractor_type"))
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(named))
    kind = kind if named else PROCESSOR_OF.get(model, "")
    if kind not in PROCESSORS or (not named and "auto_map" in given):
        raise Unobeyed(f"prepares images by {named or 'code of its own'}, which is not known")
    if given.get("do_pad"):
        raise Unobeyed(
            "has do_pad=true, which fills images up after scaling and is not done here"
        )
    unread = sorted(given.keys() - {*OBEYED, *NEUTRAL, "do_pad"})
    unread = [name for name in unread if given[name] is not False]
    if unread:
        notes.append(
            f"preprocessor_config.json has {', '.join(unread)}, which an image processor of "
            f"kind {kind} does not read: not read here either."
        )
    return PROCESSORS[kind] | given


def _switch(said: dict[str, Any], name: str) -> bool:
    if not isinstance(said[name], bool):
        raise Unobeyed(f"has {name}={said[name]!r}, which is neither true nor false")
    return said[name]


def _whole(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST_EDGE


def size_of(value: Any, square: bool, name: str = "size") -> Said:
    """A size in any of the published forms; `square`: what one number alone means.

    Raises:
      Unobeyed: it is in none of them.
    """
    match value:
        case int() if _whole(value):
            return Said((value, value)) if square else Said(None, value)
        case [height, width] if _whole(height) and _whole(width):
            return Said((height, width))
        case {"height": height, "width": width, **rest} if not rest:
            if _whole(height) and _whole(width):
                return Said((height, width))
        case {"shortest_edge": edge, **rest} if not rest and _whole(edge):
            return Said(None, edge)
    raise Unobeyed(f"has {name}={value!r}, which leaves the size of images open")


def read_range(said: dict[str, Any], channels: int) -> str:
    """The value range of `do_rescale`, `do_normalize`, mean and deviation.

    Raises:
      Unobeyed: they are no numbers, or not those of so many channels.
    """
    factor = said["rescale_factor"] if _switch(said, "do_rescale") else 1.0
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise Unobeyed(f"has rescale_factor={factor!r}, which is no positive number")
    mean, std = [0.0], [1.0]
    if _switch(said, "do_normalize"):
        mean = _numbers(said, "image_mean", channels)
        std = _numbers(said, "image_std", channels)
    scale = 255.0 * factor
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale
    if not all(x / scale > 0 for x in std):
        raise Unobeyed(f"has image_std={std!r}, of which none may be 0 or below")
    return value_ranges.name([x / scale for x in mean], [x / scale for x in std])


def _numbers(said: dict[str, Any], name: str, channels: int) -> list[float]:
    value = said[name]
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise Unobeyed(f"has {name}={value!r}, which is no number")
    numbers = numbers[:1] if len(set(numbers)) == 1 else numbers
    if len(numbers) not in (1, channels):
        raise Unobeyed(f"has {len(numbers)} numbers in {name} for {channels} channels")
    return numbers


def read_transform(said: dict[str, Any], own: Size) -> tuple[str, Size | None]:
    """The evaluation transform, and the size that it ends in, None for that of its input.

    Args:
      said: all settings.
      own: (H, W) of the network, which a crop has where no class gives it a size.

    Raises:
      Unobeyed: it cannot be had, or does not end in one size.
    """
    steps, size, ends_in = [], Said(None), None
    if _switch(said, "do_resize"):
        size = size_of(said["size"], _switch(said, "default_to_square"))
        method = RESAMPLE.get(said["resample"]) if type(said["resample"]) is int else None
        if method is None:
            raise Unobeyed(f"has resample={said['resample']!r}, which is no code of Pillow's")
        how, ends_in = f"method='{method}'", size.exact
        if size.exact is None:
            steps.append(f"resize_shorter({size.shorter}, {how})")
        elif _switch(said, "do_center_crop"):
            height, width = size.exact
            edge = height if height == width else size.exact
            steps.append(f"resize({how}, size={edge})")
        else:
            steps.append(f"resize({how})")
    if _switch(said, "do_center_crop"):
        crop = own if said["crop_size"] is None else None
        crop = crop or size_of(said["crop_size"], True, "crop_size").exact
        if crop is None:
            raise Unobeyed(f"has crop_size={said['crop_size']!r}, which is no height and width")
        fits = all(a >= b for a, b in zip(size.exact or (size.shorter,) * 2, crop, strict=True))
        steps.append("center_crop" if fits else "center_crop(fill=0)")
        ends_in = crop
    elif size.shorter:
        raise Unobeyed(
            f"has size={said['size']!r} and no crop: images keep their shape, and the network "
            f"takes one"
        )
    return "|".join(steps), ends_in


def from_processor(
    processor: dict[str, Any], model: str, cfg: ViTConfig, notes: list[str]
) -> dict[str, Any]:
    """What a `preprocessor_config.json` says about images: fields of an `Imported`.

    Args:
      processor: its content.
      model: the `model_type` of the `config.json` beside it.
      cfg: the network.
      notes: gets a sentence for what cannot be applied.
    """
    given: dict[str, Any] = {}
    try:
        said = settings(processor, model, notes)
    except Unobeyed as reason:
        return {"unprepared": _note(notes, reason)}
    try:
        given["value_range"] = read_range(said, cfg.channels)
    except Unobeyed as reason:
        given["unprepared"] = _note(notes, reason)
    try:
        transform, size = read_transform(said, cfg.image_size)
        given |= at_size(cfg, transform, size)
    except Unobeyed as reason:
        given["unprepared"] = _note(notes, reason)
    return given


def at_size(cfg: Any, transform: str, size: Size | None) -> dict[str, Any]:
    """A transform for images of `size`, which need not be that of the network's positions.

    Raises:
      Unobeyed: the network cannot be run at that size.
    """
    given: dict[str, Any] = {"eval_transform": transform}
    if size is None or size == cfg.image_size:
        return given
    patch = getattr(cfg, "patch_size", 1)
    if not isinstance(cfg, ViTConfig) or any(edge % patch for edge in size):
        raise Unobeyed(
            f"prepares images of {size[0]} x {size[1]}, which the network, for "
            f"{cfg.image_size[0]} x {cfg.image_size[1]} in patches of {patch}, cannot take"
        )
    if (patches := size[0] * size[1] // patch**2) > _MOST_PATCHES:
        raise Unobeyed(f"prepares images of {size[0]} x {size[1]}: {patches:,} patches")
    return given | {"input_size": size}


def _note(notes: list[str], reason: Unobeyed, file: str = "preprocessor_config.json") -> str:
    notes.append(f"{file} {reason}: images are not prepared as published.")
    return f"{file} {reason}"


# ---- writing -------------------------------------------------------------------------------

_NUMBER = r"(?:size=)?(?P<size>\d+|\((?P<height>\d+), ?(?P<width>\d+)\))"
_TRANSFORM = re.compile(
    rf"(?P<name>resize|resize_shorter)(\(({_NUMBER}|(?:method=)?'(?P<method>\w+)'|"
    r"rounding='(?P<rounding>\w+)'|, )*\))?"
    r"(?P<crop>\|center_crop(\(((?:half=)?'(?P<half>down|even)'|fill=(?P<fill>0)|, )*\))?)?"
)


def to_processor(
    cfg: ViTConfig,
    value_range: str,
    eval_transform: str,
    notes: list[str],
    input_size: Size | None = None,
) -> dict[str, Any]:
    """The `preprocessor_config.json` for a transform that ends in the right size.

    Args:
      cfg: the network.
      value_range: of `data.value_ranges`.
      eval_transform: of `data.transforms.language`.
      notes: gets a sentence for what is said less exactly than we would.
      input_size: (H, W) of the images, None: that of the network.

    Raises:
      UserError: no image processor does that.
    """
    match = _TRANSFORM.fullmatch(eval_transform)
    shorter = match is not None and match["name"] == "resize_shorter"
    if match is None or (shorter and not (match["size"] and match["crop"])):
        raise UserError(f"Hugging Face's image processors cannot do {eval_transform!r}")
    mean, std = value_ranges.parse(value_range)
    if any(len(x) not in (1, cfg.channels) for x in (mean, std)):
        raise UserError(
            f"value range {value_range!r} is for {max(len(mean), len(std))} channels, the "
            f"model has {cfg.channels}"
        )
    method = match["method"] or ("bilinear" if match["name"] == "resize" else "area")
    codes = {name: code for code, name in RESAMPLE.items()}
    if method not in codes:
        notes.append(f"Images are resized by bilinear_antialias there, by {method} here.")
    if match["half"] == "even":
        notes.append("The crop may stand one pixel further up or left there.")
    height, width = input_size or cfg.image_size
    size: dict[str, int] = {"height": height, "width": width}
    kind = "ViTImageProcessor"
    if shorter:
        size, kind = {"shortest_edge": int(match["size"])}, "BitImageProcessor"
    elif match["size"]:
        size = {"height": int(match["height"] or match["size"])}
        size["width"] = int(match["width"] or match["size"])
        kind = "DeiTImageProcessor"
    each = lambda numbers: (
        [round(x / 255, 12) for x in numbers] * (cfg.channels if len(numbers) == 1 else 1)
    )
    processor = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": codes.get(method, codes["bilinear_antialias"]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": each(mean),
        "image_std": each(std),
        "do_convert_rgb": cfg.channels == 3,
    }
    if match["crop"]:
        processor |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    elif kind == "DeiTImageProcessor":
        processor["do_center_crop"] = False
    return processor
