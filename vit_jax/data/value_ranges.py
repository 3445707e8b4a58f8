"""Normalisation of the 256 levels of a pixel by a mean and a standard deviation.

A *value range* is what `config.data.value_range` names:

    inception           to [-1, 1]
    imagenet            by the mean and the standard deviation of ImageNet's three channels
    openclip            by those of the images that CLIP was trained on
    mean=0.48,0.46,0.41 std=0.27,0.26,0.28     by any others, of pixels in [0, 1]

The numbers are one for all channels, or one for each.
"""

import math
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.system.errors import UserError

Numbers = tuple[float, ...]

# Of pixels in [0, 1], for each channel.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Mean and standard deviation, in levels of 0 .. 255.
VALUE_RANGES: dict[str, tuple[Numbers, Numbers]] = {
    "inception": ((127.5,), (127.5,)),  # [-1, 1]: Google's models, BEiT-22k
    "imagenet": (  # DeiT, DINO, MAE
        tuple(255 * x for x in IMAGENET_MEAN),
        tuple(255 * x for x in IMAGENET_STD),
    ),
    "openclip": (
        (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255),
        (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255),
    ),
}
_SPECIFIED = re.compile(r"mean=(?P<mean>[^\s=]+)\s+std=(?P<std>[^\s=]+)")


def parse(value_range: str, channels: int | None = None) -> tuple[Numbers, Numbers]:
    """Mean and deviation in levels of 0 .. 255, each one number or one a channel.

    Args:
      value_range: a name of `VALUE_RANGES`, or `mean=... std=...` in parts of 255.
      channels: of the images that it is meant for; None: of whatever images.

    Raises:
      UserError: the range is unknown, or does not fit the channels.
    """
    if value_range in VALUE_RANGES:
        mean, std = VALUE_RANGES[value_range]
    else:
        mean, std = _specified(value_range)
    wrong = [len(x) for x in (mean, std) if channels and len(x) not in (1, channels)]
    if wrong:
        raise UserError(
            f"value range {value_range!r} is for {wrong[0]} channels, but the images have "
            f"{channels}; use 'inception' for them, or one 'mean=... std=...' a channel."
        )
    return mean, std


def _specified(value_range: str) -> tuple[Numbers, Numbers]:
    match = _SPECIFIED.fullmatch(value_range.strip())
    texts = (match["mean"], match["std"]) if match else ("", "")
    try:
        mean, std = (tuple(255 * float(x) for x in text.split(",")) for text in texts)
    except ValueError:
        mean, std = (), ()
    known = all(map(math.isfinite, mean + std)) and all(x > 0 for x in std)
    if not mean or not std or not known:
        raise UserError(
            f"unknown value range {value_range!r}; use {' or '.join(VALUE_RANGES)}, or numbers "
            f"for pixels in [0, 1], such as 'mean=0.5,0.4,0.3 std=0.2,0.2,0.2'."
        )
    return mean, std


def name(mean: Iterable[float], std: Iterable[float]) -> str:
    """The value range with this mean and deviation of pixels in [0, 1].

    A name where the numbers are those that it stands for, to six places.
    """
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    for known, pair in VALUE_RANGES.items():
        if all(_same(a, b) for a, b in zip((mean, std), pair, strict=True)):
            return known
    text = lambda numbers: ",".join(map(repr, _short(numbers)))
    return f"mean={text(mean)} std={text(std)}"


def _short(numbers: Numbers) -> Numbers:
    return numbers[:1] if len(set(numbers)) == 1 else numbers


def _same(numbers: Numbers, levels: Numbers) -> bool:
    numbers = _short(numbers)
    return len(numbers) == len(levels) and np.allclose(numbers, np.divide(levels, 255), 0, 1e-6)


def for_channels(value_range: str, channels: int) -> str:
    """The range for images of another number of channels.

    One channel is scaled by the mean of the numbers of all, more are scaled in turn by those
    that there are, as `interop.channels` does with the kernel that reads them.
    """
    mean, std = (np.divide(x, 255) for x in parse(value_range))
    if len(mean) == len(std) == 1:
        return value_range
    mean, std = np.broadcast_arrays(mean, std)
    if channels == 1:
        return name([round(float(mean.mean()), 9)], [round(float(std.mean()), 9)])
    return name(np.resize(mean, channels).tolist(), np.resize(std, channels).tolist())


def normalize(images: jax.Array, value_range: str) -> jax.Array:
    """Scales uint8 images (B, H, W, C) to the float32 values a checkpoint family expects.

    Raises UserError for an unknown range, and for one that does not fit the channels.
    """
    mean, std = parse(value_range, images.shape[-1])
    return (images.astype(jnp.float32) - jnp.float32(mean)) / jnp.float32(std)
