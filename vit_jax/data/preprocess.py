"""From an example to the pixels a model sees: decode, transform, normalise.

A transform is written as operations joined by `|`:

    inception_crop(0.05, 1.0)|flip|randaugment(2, 10)      pretraining: see presets.py
    resize                                                 fine-tuning, evaluation
    resize_shorter(256, 'area')|center_crop                evaluation of big_vision's models

Everything here works on 8-bit PIL images on the host; only `normalize` runs on the device.
Sizes are (height, width) throughout and need not be square.
"""

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from vit_jax.data import augment
from vit_jax.data.crops import Box, Size, sample_inception_box, sample_resized_box
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.decode import check_channels as check_decoded
from vit_jax.data.deferred import Deferred, TooLarge, resize
from vit_jax.data.resize import METHODS
from vit_jax.errors import UserError

__all__ = [
    "VALUE_RANGES",
    "Transform",
    "decode",
    "normalize",
    "parse_transform",
    "sample_inception_box",
    "sample_resized_box",
]

# Mean and standard deviation, in levels of 0 .. 255.
VALUE_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "inception": ((127.5,), (127.5,)),  # [-1, 1]: Google's models, BEiT-22k
    "imagenet": (  # DeiT, DINO, MAE
        (0.485 * 255, 0.456 * 255, 0.406 * 255),
        (0.229 * 255, 0.224 * 255, 0.225 * 255),
    ),
}


def normalize(images: jax.Array, value_range: str) -> jax.Array:
    """Scales uint8 images (B, H, W, C) to the float32 values a checkpoint family expects.

    Raises UserError for an unknown range, and for one that does not fit the channels.
    """
    if value_range not in VALUE_RANGES:
        raise UserError(
            f"unknown value range {value_range!r}; use {' or '.join(VALUE_RANGES)}."
        )
    mean, std = VALUE_RANGES[value_range]
    if len(mean) not in (1, images.shape[-1]):
        raise UserError(
            f"value range {value_range!r} is for {len(mean)} channels, but the images have "
            f"{images.shape[-1]}; use 'inception' for them."
        )
    return (images.astype(jnp.float32) - jnp.float32(mean)) / jnp.float32(std)


# ---- operations: (image, rng, target size, arguments of its own) ---------------------

Rng = np.random.Generator


def _crop(image: Image.Image, box: Box) -> Image.Image:
    top, left, height, width = box
    if box == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def _resize(
    image: Image.Image, rng: Rng, target: Size, method: str = "bilinear", size: int = 0
) -> Image.Image:
    return resize(image, (size, size) if size else target, method)


def _resize_shorter(
    image: Image.Image, rng: Rng, target: Size, size: int, method: str = "area"
) -> Image.Image:
    # big_vision, which resizes by area, rounds the longer edge; torch's code cuts it off.
    whole: Callable[[float], int] = round if method == "area" else int
    shorter = min(image.size)
    height, width = (whole(edge * size / shorter) for edge in (image.height, image.width))
    return resize(image, (height, width), method)


def _center_crop(image: Image.Image, rng: Rng, target: Size, half: str = "down") -> Image.Image:
    whole: Callable[[float], int] = int if half == "down" else round
    top, left = (whole((a - b) / 2) for a, b in zip(image.size[::-1], target, strict=True))
    if top < 0 or left < 0:
        raise UserError(
            f"center_crop needs an image of at least {target[0]} x {target[1]}, but got "
            f"{image.height} x {image.width}; put resize_shorter({max(target)}) before it."
        )
    return _crop(image, (top, left, *target))


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
      random: whether it draws.
      sized: whether it is told the target size.
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
        """The same for an image called `name`. Raises BadImage for one that asks too much."""
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

        resize(method='bilinear', size=0)       straight to image_size, or to size x size
        resize_shorter(size, method='area')     keeps the aspect ratio; the longer edge is
                                                rounded by `area`, cut off by others
        center_crop(half='down')                where half a pixel goes: 'down' (TensorFlow,
                                                Hugging Face) or to an 'even' one (torchvision)
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

    Raises UserError for an unknown operation and for arguments that do not fit.
    """
    steps = tuple(_parse_step(part.strip()) for part in spec.split("|") if spec.strip())
    return Transform(spec, (int(image_size[0]), int(image_size[1])), steps)


# Arguments that are words, and the words that there are.
WORDS = {
    "method": tuple(METHODS),
    "half": ("down", "even"),
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
        return f"{match[1]}{int(match[2]) * max(new) // max(old)}"

    return re.sub(r"(resize_shorter\((?:size=)?|resize\([^)]*size=)(\d+)", scaled, spec)


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
    if name in WORDS:
        return value in WORDS[name]
    if parameter.annotation is bool:
        return isinstance(value, bool)
    if not _is_number(value) or (parameter.annotation is int and not isinstance(value, int)):
        return False
    if name.endswith("_min"):
        most = arguments[name.replace("_min", "_max")]
        return value > 0 and not (_is_number(most) and value > most)
    least = 1 if parameter.default is parameter.empty and name == "size" else 0
    return least <= value <= MOST.get(name, math.inf)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
