"""RandAugment as Google trained with it, and the presets of AugReg.

The list of 16 operations and their strengths is that of the vision transformer papers
(AugReg, arXiv 2106.10270, section 3; Better plain ViT baselines, arXiv 2205.01580), which
differs from the RandAugment paper and from torchvision: it has no identity, so every layer
distorts, and magnitudes go up to 20. Images are 8-bit PIL images, grey (L) or RGB.

One deliberate difference: the original's Contrast blends towards the number of pixels
divided by 256 (196 at 224 x 224), a slip; here it blends towards the mean grey level, as
was meant.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = 128  # fills what rotation, shear, translation and cutout leave empty

# RandAugment layers, RandAugment magnitude, mixup alpha (AugReg, arXiv 2106.10270, app.).
# light1 is not free of effect: at magnitude 0 the operations still invert, equalise,
# posterise and so on.
AUGREG_PRESETS: dict[str, tuple[int, int, float]] = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}

Op = Callable[[Image.Image, float, np.random.Generator], Image.Image]


def randaugment(
    image: Image.Image, rng: np.random.Generator, layers: int, magnitude: float
) -> Image.Image:
    """Applies `layers` operations, each drawn anew from all 16, at strength magnitude / 10.

    Distances are in pixels whatever the image's size: they were chosen for 224 x 224.
    """
    for _ in range(layers):
        name = _NAMES[rng.integers(len(_NAMES))]
        image = OPS[name](image, magnitude / 10, rng)
    return image


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=_grey(image))


def shift(image: Image.Image, dx: float, dy: float) -> Image.Image:
    """Output pixel (x, y) shows input pixel (x + dx, y + dy), rounded."""
    return _affine(image, (1, 0, dx, 0, 1, dy))


def shear(image: Image.Image, sx: float, sy: float) -> Image.Image:
    """Output pixel (x, y) shows input pixel (x + sx y, sy x + y), rounded."""
    # PIL counts from pixel corners, where the formula counts from pixel centres.
    return _affine(image, (1, sx, -sx / 2, sy, 1, -sy / 2))


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest `bits` of each value; none at all gives a black image."""
    mask = 256 - (1 << (8 - min(bits, 8)))
    return image.point([x & mask for x in range(256)] * len(image.getbands()))


def solarize_add(image: Image.Image, addition: int) -> Image.Image:
    """Brightens what is darker than mid-grey."""
    table = [min(x + addition, 255) if x < GREY else x for x in range(256)]
    return image.point(table * len(image.getbands()))


def cutout(image: Image.Image, half: int, rng: np.random.Generator) -> Image.Image:
    """Greys a square of side 2 x `half` around any pixel, clipped at the border."""
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_grey(image), (x - half, y - half, x + half, y + half))
    return image


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    how, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
    return image.transform(image.size, how, matrix, nearest, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    return GREY if image.mode == "L" else (GREY,) * len(image.getbands())


def _sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _factor(v: float) -> float:
    """How far to blend from a degenerate image (0) to this one (1) and beyond."""
    return 1.8 * v + 0.1


OPS: dict[str, Op] = {
    "AutoContrast": lambda image, v, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, v, rng: ImageOps.equalize(image),
    "Invert": lambda image, v, rng: ImageOps.invert(image),
    "Rotate": lambda image, v, rng: rotate(image, _sign(rng) * 30 * v),
    "Posterize": lambda image, v, rng: posterize(image, int(4 * v)),
    "Solarize": lambda image, v, rng: ImageOps.solarize(image, int(256 * v)),
    "Color": lambda image, v, rng: ImageEnhance.Color(image).enhance(_factor(v)),
    "Contrast": lambda image, v, rng: ImageEnhance.Contrast(image).enhance(_factor(v)),
    "Brightness": lambda image, v, rng: ImageEnhance.Brightness(image).enhance(_factor(v)),
    "Sharpness": lambda image, v, rng: ImageEnhance.Sharpness(image).enhance(_factor(v)),
    "ShearX": lambda image, v, rng: shear(image, _sign(rng) * 0.3 * v, 0),
    "ShearY": lambda image, v, rng: shear(image, 0, _sign(rng) * 0.3 * v),
    "TranslateX": lambda image, v, rng: shift(image, _sign(rng) * 100 * v, 0),
    "TranslateY": lambda image, v, rng: shift(image, 0, _sign(rng) * 100 * v),
    "Cutout": lambda image, v, rng: cutout(image, int(40 * v), rng),
    "SolarizeAdd": lambda image, v, rng: solarize_add(image, int(110 * v)),
}
_NAMES = tuple(OPS)
