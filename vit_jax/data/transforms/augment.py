"""Distortions of one 8-bit image: Google's RandAugment, timm's, 3-Augment and single ones.

    randaugment         AugReg (arXiv 2106.10270), Better plain ViT baselines (2205.01580)
    randaugment_timm    DeiT (2012.12877), BEiT (2106.08254)
    three_augment       DeiT III (2204.07118)
    color_jitter, grayscale, gaussian_blur, solarize    DINO (2104.14294)
    random_erasing      Random erasing (1708.04896), as DeiT and BEiT use it

All take a PIL image, grey (L) or RGB, and a generator, which alone decides the outcome; size
and mode stay. At strength v = magnitude / 10, the operations of Google's list are:

    AutoContrast, Equalize, Invert       the same at every strength
    Rotate                               by 30 v degrees, either way
    ShearX, ShearY                       by 0.3 v, either way
    TranslateX, TranslateY               by 100 v pixels, either way
    Color, Contrast, Brightness, Sharpness    blended by 1.8 v + 0.1 with their opposite: at
                                         0.5 the image stays, and it is weakest at 0
    Posterize                            keeps int(4 v) bits: none, all black, at 0
    Solarize                             inverts what is at least int(256 v): all of it at 0
    SolarizeAdd                          adds int(110 v) to what is below 128
    Cutout                               greys a square of side 2 int(40 v)

The list differs from that of the RandAugment paper (arXiv 1909.13719): it has no identity, so
every layer distorts, and magnitudes go up to 20. Google's code has three mistakes, which are
reproduced here only with `quirks`: Contrast blends towards the number of pixels divided by
256 (196 at 224 x 224) and not towards the mean grey; Solarize has its threshold modulo 256, so
that it inverts everything at magnitudes 10 and 20, and from 128 on at 15, where as written it
would do nothing from 10 on; and Posterize keeps one bit where as written it would keep none.

timm's list has no Cutout. With `increasing`, every operation is the stronger the greater v is:
Posterize keeps 4 - int(4 v) bits, Solarize inverts from 256 - int(256 v) on, and the four
blends go by 1 - 0.9 v or 1 + 0.9 v. Translations are shares of the image's size (up to 0.45),
pixels are interpolated (bicubic), and what is left empty has ImageNet's mean colour.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.data.value_ranges import VALUE_RANGES

GREY = (128, 128, 128)  # fills what Google's operations leave empty
# Of ImageNet, in levels of 0 .. 255: DeiT's fill, and the noise that it erases with.
MEAN, DEVIATION = VALUE_RANGES["imagenet"]
MEAN_COLOUR = (124, 116, 104)

Rng = np.random.Generator
Colour = tuple[int, int, int]
Op = Callable[[Image.Image, float, Rng], Image.Image]


def randaugment(
    image: Image.Image, rng: Rng, layers: int, magnitude: float, quirks: bool = False
) -> Image.Image:
    """Applies `layers` operations, each drawn from all 16, at strength magnitude / 10.

    Distances are in pixels whatever the image's size: they were chosen for 224 x 224. With
    `quirks`, Contrast, Solarize and Posterize do what the original code does.
    """
    for _ in range(layers):
        name = _NAMES[rng.integers(len(_NAMES))]
        op = QUIRKS.get(name, OPS[name]) if quirks else OPS[name]
        image = op(image, magnitude / 10, rng)
    return image


def randaugment_timm(
    image: Image.Image,
    rng: Rng,
    layers: int = 2,
    magnitude: float = 9,
    std: float = 0.5,
    increasing: bool = True,
    probability: float = 0.5,
) -> Image.Image:
    """timm's RandAugment; the defaults are its `rand-m9-mstd0.5-inc1`.

    Draws `layers` of the 15 operations, and applies each with the given probability, at a
    magnitude from N(magnitude, std) that is clipped to between 0 and 10.
    """
    ops = TIMM_OPS | INCREASING_OPS if increasing else TIMM_OPS
    for _ in range(layers):
        name = _TIMM_NAMES[rng.integers(len(_TIMM_NAMES))]
        if rng.random() < probability:
            drawn = rng.normal(magnitude, std)
            image = ops[name](image, min(max(drawn, 0.0), 10.0) / 10, rng)
    return image


def three_augment(image: Image.Image, rng: Rng) -> Image.Image:
    """Makes the image grey, solarizes or blurs it: one of the three, each as likely."""
    choice = rng.integers(3)
    if choice == 0:
        return grayscale(image, rng)
    return solarize(image, rng) if choice == 1 else gaussian_blur(image, rng)


def color_jitter(
    image: Image.Image,
    rng: Rng,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Image.Image:
    """Changes all four in random order, as torchvision's ColorJitter does.

    The first three scale by a factor within 1 - x and 1 + x (never below 0), uniformly;
    `hue` turns the colour circle by up to that share of it, either way. 0 leaves out.
    """
    if rng.random() >= probability:
        return image
    jitters = [
        (scale_brightness, 1, brightness),
        (scale_contrast, 1, contrast),
        (scale_saturation, 1, saturation),
        (turn_hue, 0, hue),
    ]
    for i in rng.permutation(4):
        jitter, neutral, width = jitters[i]
        if width:
            low = max(neutral - width, 0) if neutral else -width
            image = jitter(image, rng.uniform(low, neutral + width))
    return image


def grayscale(image: Image.Image, rng: Rng, probability: float = 1.0) -> Image.Image:
    """Luminance only; an RGB image stays one."""
    return image.convert("L").convert(image.mode) if rng.random() < probability else image


def gaussian_blur(
    image: Image.Image,
    rng: Rng,
    probability: float = 1.0,
    sigma_min: float = 0.1,
    sigma_max: float = 2.0,
) -> Image.Image:
    """Blurs by a standard deviation in pixels that is uniform between the two."""
    if rng.random() >= probability:
        return image
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(sigma_min, sigma_max)))


def solarize(
    image: Image.Image, rng: Rng, probability: float = 1.0, threshold: int = 128
) -> Image.Image:
    """Inverts the values that are at least `threshold`."""
    return ImageOps.solarize(image, threshold) if rng.random() < probability else image


def random_erasing(
    image: Image.Image, rng: Rng, probability: float, mode: str = "pixel"
) -> Image.Image:
    """Overwrites one rectangle: 1/50 to 1/3 of the area, aspect from 0.3 to 1/0.3.

    `mode`, as in timm: `pixel` fills it with noise, `rand` with a random colour, `const` with
    the mean colour. timm does this after normalising, with numbers from N(0, 1) or 0; here
    they are scaled by ImageNet's mean and deviation, rounded and clipped to 8 bits. The clip
    reaches 3 % of them; that is the only difference for models with these statistics. Put it
    last in a transform. Of ten tries, the first that fits is taken.
    """
    if rng.random() >= probability:
        return image
    for _ in range(10):
        area = image.width * image.height * rng.uniform(1 / 50, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < image.height and width < image.width:
            top = int(rng.integers(image.height - height + 1))
            left = int(rng.integers(image.width - width + 1))
            return _erase(image, rng, (top, left, height, width), mode)
    return image


def _erase(
    image: Image.Image, rng: Rng, box: tuple[int, int, int, int], mode: str
) -> Image.Image:
    top, left, height, width = box
    channels = len(image.getbands())
    noise = {
        "pixel": lambda: rng.standard_normal((height, width, channels)),
        "rand": lambda: rng.standard_normal((1, 1, channels)),
        "const": lambda: np.zeros((1, 1, channels)),
    }[mode]()
    # Grey images have one channel, for which the three are averaged.
    mean, deviation = (np.reshape(x, (channels, -1)).mean(1) for x in (MEAN, DEVIATION))
    pixels = np.array(image).reshape(image.height, image.width, channels)
    values = np.rint(mean + deviation * noise).clip(0, 255)
    pixels[top : top + height, left : left + width] = values.astype(np.uint8)
    return Image.fromarray(pixels.reshape(np.asarray(image).shape))


# ---- single operations -------------------------------------------------------------------


def scale_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with black: 0 is black, 1 the image itself, 2 twice as bright."""
    return ImageEnhance.Brightness(image).enhance(factor)


def scale_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the mean grey of the image."""
    return ImageEnhance.Contrast(image).enhance(factor)


def scale_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the grey image."""
    return ImageEnhance.Color(image).enhance(factor)


def scale_sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with the image smoothed over 3 x 3 pixels."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Turns every hue by `share` of the circle, in 255ths cut off as torchvision does."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(x + int(share * 255)) % 256 for x in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert(image.mode)


def contrast_towards_size(image: Image.Image, factor: float) -> Image.Image:
    """Blends with grey at the number of pixels / 256, at most 255: Google's mistake."""
    level = min(image.width * image.height // 256, 255)
    constant = Image.new(image.mode, image.size, _fill(image, (level,) * 3))
    return Image.blend(constant, image, factor)


def rotate(
    image: Image.Image,
    degrees: float,
    fill: Colour = GREY,
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    return image.rotate(degrees, resample, fillcolor=_fill(image, fill))


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
    table = [min(x + addition, 255) if x < 128 else x for x in range(256)]
    return image.point(table * len(image.getbands()))


def cutout(image: Image.Image, half: int, rng: Rng) -> Image.Image:
    """Greys a square of side 2 x `half` around any pixel, clipped at the border."""
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    image = image.copy()
    image.paste(_fill(image, GREY), (x - half, y - half, x + half, y + half))
    return image


def _affine(
    image: Image.Image,
    matrix: tuple[float, ...],
    fill: Colour = GREY,
    resample: Image.Resampling = Image.Resampling.NEAREST,
) -> Image.Image:
    how = Image.Transform.AFFINE
    return image.transform(image.size, how, matrix, resample, fillcolor=_fill(image, fill))


def _bicubic(image: Image.Image, *matrix: float) -> Image.Image:
    return _affine(image, matrix, MEAN_COLOUR, Image.Resampling.BICUBIC)


def _fill(image: Image.Image, colour: Colour) -> int | Colour:
    return colour if image.mode == "RGB" else round(sum(colour) / 3)


def _sign(rng: Rng) -> int:
    return 1 if rng.random() < 0.5 else -1


def _factor(v: float) -> float:
    """How far to blend from a degenerate image (0) to this one (1) and beyond."""
    return 1.8 * v + 0.1


def _away(v: float, rng: Rng) -> float:
    """The same, at a distance from 1 that grows with v."""
    return 1 + _sign(rng) * 0.9 * v


OPS: dict[str, Op] = {
    "AutoContrast": lambda image, v, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, v, rng: ImageOps.equalize(image),
    "Invert": lambda image, v, rng: ImageOps.invert(image),
    "Rotate": lambda image, v, rng: rotate(image, _sign(rng) * 30 * v),
    "Posterize": lambda image, v, rng: posterize(image, int(4 * v)),
    "Solarize": lambda image, v, rng: ImageOps.solarize(image, int(256 * v)),
    "Color": lambda image, v, rng: scale_saturation(image, _factor(v)),
    "Contrast": lambda image, v, rng: scale_contrast(image, _factor(v)),
    "Brightness": lambda image, v, rng: scale_brightness(image, _factor(v)),
    "Sharpness": lambda image, v, rng: scale_sharpness(image, _factor(v)),
    "ShearX": lambda image, v, rng: shear(image, _sign(rng) * 0.3 * v, 0),
    "ShearY": lambda image, v, rng: shear(image, 0, _sign(rng) * 0.3 * v),
    "TranslateX": lambda image, v, rng: shift(image, _sign(rng) * 100 * v, 0),
    "TranslateY": lambda image, v, rng: shift(image, 0, _sign(rng) * 100 * v),
    "Cutout": lambda image, v, rng: cutout(image, int(40 * v), rng),
    "SolarizeAdd": lambda image, v, rng: solarize_add(image, int(110 * v)),
}
_NAMES = tuple(OPS)

QUIRKS: dict[str, Op] = {
    "Contrast": lambda image, v, rng: contrast_towards_size(image, _factor(v)),
    "Solarize": lambda image, v, rng: ImageOps.solarize(image, int(256 * v) % 256),
    "Posterize": lambda image, v, rng: posterize(image, max(int(4 * v), 1)),
}

TIMM_OPS: dict[str, Op] = {
    **{name: op for name, op in OPS.items() if name != "Cutout"},
    "Rotate": lambda image, v, rng: rotate(
        image, _sign(rng) * 30 * v, MEAN_COLOUR, Image.Resampling.BICUBIC
    ),
    # Unlike Google's shears, these hold the top left corner and not its pixel's centre.
    "ShearX": lambda image, v, rng: _bicubic(image, 1, _sign(rng) * 0.3 * v, 0, 0, 1, 0),
    "ShearY": lambda image, v, rng: _bicubic(image, 1, 0, 0, _sign(rng) * 0.3 * v, 1, 0),
    "TranslateX": lambda image, v, rng: _bicubic(
        image, 1, 0, _sign(rng) * 0.45 * v * image.width, 0, 1, 0
    ),
    "TranslateY": lambda image, v, rng: _bicubic(
        image, 1, 0, 0, 0, 1, _sign(rng) * 0.45 * v * image.height
    ),
}
_TIMM_NAMES = tuple(TIMM_OPS)

INCREASING_OPS: dict[str, Op] = {
    "Posterize": lambda image, v, rng: posterize(image, 4 - int(4 * v)),
    "Solarize": lambda image, v, rng: ImageOps.solarize(image, 256 - int(256 * v)),
    "Color": lambda image, v, rng: scale_saturation(image, _away(v, rng)),
    "Contrast": lambda image, v, rng: scale_contrast(image, _away(v, rng)),
    "Brightness": lambda image, v, rng: scale_brightness(image, _away(v, rng)),
    "Sharpness": lambda image, v, rng: scale_sharpness(image, _away(v, rng)),
}
