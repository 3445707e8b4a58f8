"""From an example to the model's input: decode, transform, normalise.

A transform is written as operations joined by `|`:

    inception_crop(0.05, 1.0)|flip|randaugment(2, 10)      pre-training: see recipes.py
    resize                                                 fine-tuning, evaluation
    resize_shorter(256, 'area')|center_crop                evaluation of big_vision's models

Everything here works on 8-bit PIL images on the host; only `normalize`, of `value_ranges`, runs
on the device. Sizes are (height, width) throughout and need not be square.
"""

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vit_jax.data.decode import BadImage, decode
from vit_jax.data.decode import check_channels as check_decoded
from vit_jax.data.planes import Planes
from vit_jax.data.transforms import augment
from vit_jax.data.transforms.crops import Box, Size, sample_inception_box, sample_resized_box
from vit_jax.data.transforms.deferred import Deferred, TooLarge, resize
from vit_jax.data.transforms.resize import METHODS, ROUNDING
from vit_jax.data.value_ranges import VALUE_RANGES, normalize
from vit_jax.system.errors import UserError

__all__ = [
    "VALUE_RANGES",
    "Transform",
    "decode",
    "normalize",
    "parse_transform",
    "sample_inception_box",
    "sample_resized_box",
]

# ---- operations: (image, rng, target size, arguments of its own) ---------------------

Rng = np.random.Generator


def _crop(image: Image.Image, box: Box) -> Image.Image:
    top, left, height, width = box
    if box == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def _resize(
    image: Image.Image,
    rng: Rng,
    target: Size,
    method: str = "bilinear",
    size: int | Size = 0,
    *,
    rounding: str = "nearest",
) -> Image.Image:
    wanted = (size, size) if isinstance(size, int) else size
    return resize(image, wanted if size else target, method, rounding)


def _resize_shorter(
    image: Image.Image,
    rng: Rng,
    target: Size,
    size: int,
    method: str = "area",
    *,
    rounding: str = "nearest",
) -> Image.Image:
    # big_vision, which resizes by area, rounds the longer edge; torch's code cuts it off.
    whole: Callable[[float], int] = round if method == "area" else int
    shorter = min(image.size)
    height, width = (whole(edge * size / shorter) for edge in (image.height, image.width))
    return resize(image, (height, width), method, rounding)


def _resize_fit(
    image: Image.Image,
    rng: Rng,
    target: Size,
    size: int | Size,
    method: str = "bicubic",
    fit: str = "cover",
) -> Image.Image:
    wanted = (size, size) if isinstance(size, int) else size
    ratios = [a / b for a, b in zip((image.height, image.width), wanted, strict=True)]
    ratio = min(ratios) if fit == "cover" else max(ratios)
    height, width = (max(round(edge / ratio), 1) for edge in (image.height, image.width))
    return resize(image, (height, width), method)


def _center_crop(
    image: Image.Image,
    rng: Rng,
    target: Size,
    half: str = "down",
    fill: int | tuple[int, ...] | None = None,
) -> Image.Image:
    whole: Callable[[float], int] = int if half == "down" else round
    if fill is not None:
        image = _pad(image, target, fill)
    top, left = (whole((a - b) / 2) for a, b in zip(image.size[::-1], target, strict=True))
    if top < 0 or left < 0:
        raise UserError(
            f"center_crop needs an image of at least {target[0]} x {target[1]}, but got "
            f"{image.height} x {image.width}; put resize_shorter({max(target)}) before it."
        )
    return _crop(image, (top, left, *target))


def _pad_planes(planes: Planes, target: Size, fill: int | tuple[int, ...]) -> Planes:
    """The same, with levels of 8 bits whatever those of the image are."""
    levels = (fill,) if isinstance(fill, int) else fill
    if len(levels) not in (1, len(planes.planes)):
        raise UserError(
            f"fill={fill} is a colour of {len(levels)} channels, not {len(planes.planes)}"
        )
    levels *= len(planes.planes) // len(levels)
    scale = 257 if planes.planes[0].mode == "F" else 1
    return Planes(
        tuple(_pad(x, target, v * scale) for x, v in zip(planes.planes, levels, strict=True))
    )


def _pad(image: Any, target: Size, fill: int | tuple[int, ...]) -> Any:
    """At least as large as `target`, one pixel more right and below where it is odd."""
    height, width = max(image.height, target[0]), max(image.width, target[1])
    if (height, width) == (image.height, image.width):
        return image
    if isinstance(image, Deferred):
        image = image.whole()
    if isinstance(image, Planes):
        return _pad_planes(image, target, fill)
    bands = len(image.getbands())
    if isinstance(fill, tuple):
        if len(fill) not in (1, bands):
            raise UserError(f"fill={fill} is a colour of {len(fill)} channels, not {bands}")
        fill = fill[0] if len(fill) == 1 else fill
    if isinstance(fill, int) and bands > 1:
        fill = (fill,) * bands
    padded = Image.new(image.mode, (width, height), fill)
    padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return padded


def _inception_crop(
    image: Image.Image,
    rng: Rng,
    target: Size,
    area_min: float = 0.05,
    area_max: float = 1.0,
    method: str = "bilinear",
) -> Image.Image:
    box = sample_inception_box(rng, image.height, image.width, (area_min, area_max))
    return resize(_crop(image, box), target, method)


def _random_resized_crop(
    image: Image.Image,
    rng: Rng,
    target: Size,
    scale_min: float = 0.08,
    scale_max: float = 1.0,
    method: str = "bicubic",
) -> Image.Image:
    box = sample_resized_box(rng, image.height, image.width, (scale_min, scale_max))
    return resize(_crop(image, box), target, method)


def _flip(image: Image.Image, rng: Rng, target: Size) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _shift(image: Image.Image, rng: Rng, target: Size, pixels: int) -> Image.Image:
    top, left = rng.integers(-pixels, pixels + 1, 2)
    # Beyond the border, Pillow crops black.
    return _crop(image, (int(top), int(left), image.height, image.width))


@dataclass(frozen=True)
class Op:
    """An operation of the mini-language; a random one needs a generator.

    Attributes:
      function: takes the image, the generator and, if `sized`, the target size; then its own
        arguments.
      random: whether it draws random numbers.
      sized: whether it takes the target size.
      moves: whether it only moves and resizes pixels, so that any channels will do.
    """

    function: Callable[..., Image.Image]
    random: bool = False
    sized: bool = True
    moves: bool = True

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Of the arguments of its own."""
        return list(inspect.signature(self.function).parameters.values())[2 + self.sized :]


def _distortion(function: Callable[..., Image.Image]) -> Op:
    return Op(function, random=True, sized=False, moves=False)


OPS = {
    "resize": Op(_resize),
    "resize_shorter": Op(_resize_shorter),
    "resize_fit": Op(_resize_fit),
    "center_crop": Op(_center_crop),
    "inception_crop": Op(_inception_crop, random=True),
    "random_resized_crop": Op(_random_resized_crop, random=True),
    "flip": Op(_flip, random=True),
    "shift": Op(_shift, random=True),
    "randaugment": _distortion(augment.randaugment),
    "randaugment_timm": _distortion(augment.randaugment_timm),
    "three_augment": _distortion(augment.three_augment),
    "color_jitter": _distortion(augment.color_jitter),
    "grayscale": _distortion(augment.grayscale),
    "gaussian_blur": _distortion(augment.gaussian_blur),
    "solarize": _distortion(augment.solarize),
    "random_erasing": _distortion(augment.random_erasing),
}


# ---- the mini-language -------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operation with its arguments, such as `randaugment(2, 10)`."""

    name: str
    arguments: dict[str, Any]

    def __call__(self, image: Image.Image, rng: Rng | None, target: Size) -> Image.Image:
        op = OPS[self.name]
        if op.random and rng is None:
            raise UserError(
                f"{self.name} is random and cannot be part of an evaluation transform; use "
                "resize, resize_shorter and center_crop there."
            )
        sized = (target,) if op.sized else ()
        return op.function(image, rng, *sized, **self.arguments)


@dataclass(frozen=True)
class Transform:
    """Steps that take an image of any size to one of `image_size`, (height, width).

    Of an image that a step makes enormous, only what the next crop keeps is made; if that is
    too much as well, `deferred.TooLarge` is raised.
    """

    spec: str
    image_size: Size
    steps: tuple[Step, ...]

    def __call__(self, image: Image.Image, rng: Rng | None = None) -> Image.Image:
        for step in self.steps:
            if isinstance(image, Deferred) and step.name != "center_crop":
                image = image.whole()
            image = step(image, rng, self.image_size)
        if isinstance(image, Deferred):
            image = image.whole()
        if (image.height, image.width) != self.image_size:
            raise UserError(
                f"transform {self.spec!r} leaves an image of {image.height} x {image.width} "
                f"where {self.image_size[0]} x {self.image_size[1]} is needed; add resize, "
                "or resize_shorter(...)|center_crop, or inception_crop."
            )
        return image

    def of(self, image: Image.Image, name: str, rng: Rng | None = None) -> Image.Image:
        """The same for an image called `name`. Raises BadImage for one that is too large."""
        try:
            return self(image, rng)
        except (TooLarge, MemoryError) as error:
            reason = str(error) or "there is not enough memory"
            raise BadImage(
                f"image {name} cannot be resized ({reason}); remove it, or make it smaller."
            ) from error


def check_channels(transform: Transform, channels: int, bits: int) -> None:
    """Raises UserError for an operation on colours that the images do not have."""
    check_decoded(channels, bits)
    if channels in (1, 3) and bits == 8:
        return
    for step in transform.steps:
        if not OPS[step.name].moves:
            raise UserError(
                f"{step.name} is for images of 1 or 3 channels of 8 bits, but data.channels is "
                f"{channels} and data.bits {bits}; leave it out of the transform."
            )


def parse_transform(spec: str, image_size: Size) -> Transform:
    """Reads a transform such as `inception_crop(0.05, 1.0)|flip|randaugment(2, 10)`.

        resize(method='bilinear', size=0, rounding='nearest')
                                                straight to image_size, or to size: pixels of
                                                an edge or (height, width)
        resize_shorter(size, method='area', rounding='nearest')
                                                keeps the aspect ratio; the longer edge is
                                                rounded by `area`, cut off by others
        resize_fit(size, method='bicubic', fit='cover')
                                                keeps it, too: the image covers size (an edge
                                                or (height, width)), or lies within: 'inside'
        center_crop(half='down', fill=None)     where half a pixel goes: 'down' (TensorFlow,
                                                Hugging Face) or to an 'even' one
                                                (torchvision); what a smaller image lacks is
                                                filled with a level or a colour, else refused
        inception_crop(area_min=0.05, area_max=1.0, method='bilinear')
        random_resized_crop(scale_min=0.08, scale_max=1.0, method='bicubic')
        flip                                    left and right, every other time
        shift(pixels)                           moves by up to as many, black comes in

    and, after the crop, the distortions of `augment`:

        randaugment(layers, magnitude, quirks=False)             Google's
        randaugment_timm(layers=2, magnitude=9, std=0.5, increasing=True, probability=0.5)
        three_augment                                            grey, solarized or blurred
        color_jitter(brightness, contrast, saturation, hue=0.0, probability=1.0)
        grayscale(probability=1.0)
        gaussian_blur(probability=1.0, sigma_min=0.1, sigma_max=2.0)       in pixels
        solarize(probability=1.0, threshold=128)
        random_erasing(probability, mode='pixel')                pixel, rand or const

    `rounding='floor'` cuts off fractions of a level, as big_vision does: 'bilinear' and 'area'.

    Raises UserError for an unknown operation and for arguments that do not fit.
    """
    steps = tuple(_parse_step(part.strip()) for part in spec.split("|") if spec.strip())
    return Transform(spec, (int(image_size[0]), int(image_size[1])), steps)


# Arguments that are words, and the words that there are.
WORDS = {
    "method": tuple(METHODS),
    "half": ("down", "even"),
    "fit": ("cover", "inside"),
    "rounding": tuple(ROUNDING),
    "mode": ("pixel", "rand", "const"),
}
# The largest numbers that there are, of arguments that have one; none may be below 0.
MOST = {
    "area_max": 1.0,
    "scale_max": 1.0,
    "probability": 1.0,
    "hue": 0.5,
    "threshold": 256,
}


def rescale(spec: str, old: Size, new: Size) -> str:
    """A transform that ends at size `old`, for size `new`: what is cut off keeps its share.

    `resize_shorter(256, ...)|center_crop` for 224 pixels is 438 of 384.
    """

    def scaled(match: re.Match[str]) -> str:
        enlarge = lambda number: str(int(number[0]) * max(new) // max(old))
        return match[1] + re.sub(r"\d+", enlarge, match[2])

    start = r"(resize_(?:shorter|fit)\((?:size=)?|resize\([^)]*size=)"
    return re.sub(rf"{start}(\d+|\([\d, ]+\))", scaled, spec)


def _parse_step(text: str) -> Step:
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = call.func.id  # type: ignore[attr-defined]  # anything but a name is an error
        args = [ast.literal_eval(arg) for arg in call.args]
        kwargs = {k.arg or "**": ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise UserError(
            f"transform step {text!r} is not understood; write it like resize or "
            "inception_crop(0.05, 1.0)."
        ) from error
    return Step(name, _bind(text, name, args, kwargs))


def _bind(text: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    if name not in OPS:
        close = difflib.get_close_matches(name, OPS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown transform {name!r}{hint}: use {', '.join(OPS)}.")
    parameters = OPS[name].parameters
    try:
        bound = inspect.Signature(parameters).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UserError(
            f"transform step {text!r}: {error}; {_usage(name, parameters)}."
        ) from error
    full = {p.name: bound.get(p.name, p.default) for p in parameters}
    for parameter in parameters:
        if not _fits(parameter, full):
            raise UserError(
                f"transform step {text!r}: {parameter.name} cannot be "
                f"{full[parameter.name]!r}; {_usage(name, parameters)}."
            )
    return bound


def _usage(name: str, parameters: list[inspect.Parameter]) -> str:
    usage = f"write {name}({', '.join(map(str, parameters))})"
    words = [parameter.name for parameter in parameters if parameter.name in WORDS]
    return usage + "".join(f", with a {word} among {', '.join(WORDS[word])}" for word in words)


def _fits(parameter: inspect.Parameter, arguments: dict[str, Any]) -> bool:
    name, value = parameter.name, arguments[parameter.name]
    if name == "rounding" and value != "nearest":  # of which PIL's methods know one
        return value in ROUNDING and arguments["method"] in ("bilinear", "area")
    if name in WORDS:
        return value in WORDS[name]
    if parameter.annotation is bool:
        return isinstance(value, bool)
    if name == "fill":
        levels = value if isinstance(value, tuple) else (value,)
        return value is None or all(type(x) is int and 0 <= x <= 255 for x in levels)
    if name == "size" and isinstance(value, tuple):
        pair = len(value) == 2 and all(type(x) is int and x > 0 for x in value)
        return pair and parameter.annotation is not int
    whole = parameter.annotation is int or name == "size"
    if not _is_number(value) or (whole and not isinstance(value, int)):
        return False
    if name.endswith("_min"):
        most = arguments[name.replace("_min", "_max")]
        return value > 0 and not (_is_number(most) and value > most)
    least = 1 if parameter.default is parameter.empty and name == "size" else 0
    return least <= value <= MOST.get(name, math.inf)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
