"""The papers' augmentation by name, for configuration files.

    from vit_jax.data import recipes

    config.data.train_transform, config.data.mixup = recipes.augreg("medium1")

    recipe = recipes.RECIPES["deit"]
    config.data.train_transform = recipe.transform
    config.data.update(dataclasses.asdict(recipe.mixing))

and for batches of your own, since no objective here takes several crops of an image yet:

    transform, views = recipes.dino()
    pipeline.train_batches(source, transform=transform, views=views, ...)

Values of DeiT III and DINO are those of their published code.
"""

import difflib
from typing import NamedTuple

from vit_jax.data.mixing import Mixing
from vit_jax.data.pipeline import Views
from vit_jax.data.transforms.crops import Size
from vit_jax.data.transforms.language import Transform, parse_transform
from vit_jax.system.errors import UserError


class Level(NamedTuple):
    """One of AugReg's seven strengths: RandAugment's layers and magnitude, mixup's alpha."""

    layers: int
    magnitude: int
    mixup: float


# How to train your ViT? (arXiv 2106.10270), appendix; its figures call the strong ones heavy.
AUGREG = {
    "none": Level(0, 0, 0.0),
    # Not without effect: at magnitude 0 the operations still invert, equalise and so on.
    "light1": Level(2, 0, 0.0),
    "light2": Level(2, 10, 0.2),
    "medium1": Level(2, 15, 0.2),
    "medium2": Level(2, 15, 0.5),
    "strong1": Level(2, 20, 0.5),
    "strong2": Level(2, 20, 0.8),
}


class Recipe(NamedTuple):
    """What happens to an image on the host, and to a batch on the device."""

    transform: str
    mixing: Mixing = Mixing()


def augreg(name: str, quirks: bool = False) -> tuple[str, float]:
    """The training transform and mixup's alpha of one of the seven strengths of AugReg.

    With `quirks`, RandAugment repeats the mistakes of the code that the paper used.
    Raises UserError for another name.
    """
    if name not in AUGREG:
        close = difflib.get_close_matches(name, AUGREG, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(
            f"AugReg has no augmentation {name!r}{hint}: use one of {', '.join(AUGREG)}"
        )
    layers, magnitude, mixup = AUGREG[name]
    transform = "inception_crop(0.05, 1.0)|flip"
    if layers:
        slips = ", quirks=True" if quirks else ""
        transform += f"|randaugment({layers}, {magnitude}{slips})"
    return transform, mixup


_CROP = "random_resized_crop(0.08, 1.0)|flip"
_JITTER = "color_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8)|grayscale(0.2)"

RECIPES = {
    # arXiv 2012.12877; BEiT (2106.08254) fine-tunes with the same.
    "deit": Recipe(
        f"{_CROP}|randaugment_timm(2, 9, std=0.5, increasing=True, probability=0.5)"
        "|random_erasing(0.25)",
        Mixing(mixup=0.8, cutmix=1.0, mix_form="timm"),
    ),
    # arXiv 2204.07118, on ImageNet-1k. Its sigmoid loss is a mean over classes.
    "deit3": Recipe(
        f"{_CROP}|three_augment|color_jitter(0.3, 0.3, 0.3)",
        Mixing(mixup=0.8, cutmix=1.0, mix_form="timm", binary_targets=True),
    ),
    # arXiv 2104.14294: the two large views and the small ones.
    "dino_global_1": Recipe(f"random_resized_crop(0.4, 1.0)|flip|{_JITTER}|gaussian_blur(1.0)"),
    "dino_global_2": Recipe(
        f"random_resized_crop(0.4, 1.0)|flip|{_JITTER}|gaussian_blur(0.1)|solarize(0.2)"
    ),
    "dino_local": Recipe(f"random_resized_crop(0.05, 0.4)|flip|{_JITTER}|gaussian_blur(0.5)"),
}


def dino(
    local_crops: int = 8,
    global_size: Size = (224, 224),
    local_size: Size = (96, 96),
) -> tuple[Transform, dict[str, Views]]:
    """DINO's multi-crop (arXiv 2104.14294): `transform` and `views` of `train_batches`.

    A batch then holds, all uint8, the two large crops, for the teacher, as `image`
    (b, 224, 224, C) and `global_2` (b, 1, 224, 224, C), and the small ones as `local`
    (b, 8, 96, 96, C). The counts and sizes are the defaults of the published code; with how
    many small crops the published weights were trained is unverified.
    """

    def made(name: str, size: Size) -> Transform:
        return parse_transform(RECIPES[f"dino_{name}"].transform, size)

    return made("global_1", global_size), {
        "global_2": Views(made("global_2", global_size), 1),
        "local": Views(made("local", local_size), local_crops),
    }
