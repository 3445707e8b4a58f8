"""A contact sheet: what augmentation does to a photo."""

import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vit_jax.data import mixing, recipes
from vit_jax.data.decode import decode
from vit_jax.data.transforms import augment, language
from vit_jax.data.transforms.augment import Op
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

GOOGLE_MAGNITUDES = (0, 5, 10, 15, 20)  # AugReg's, and the one that changes no colours

TIMM_MAGNITUDES = (0, 3, 6, 9, 10)

DRAWS = 8

SIZE = 224  # pixels of an augmented image, before it is reduced to the size of a tile

GAP = 4  # pixels between tiles

PAPER, INK = (255, 255, 255), (0, 0, 0)

Row = tuple[str, list[Image.Image]]


def draw_operations(
    photo: Image.Image, ops: Mapping[str, Op], magnitudes: Iterable[float], seed: int
) -> list[Row]:
    """One row for each operation, a tile for each magnitude; signs are the same in a row."""
    return [
        (name, [op(photo, m / 10, np.random.default_rng(seed)) for m in magnitudes])
        for name, op in ops.items()
    ]


def draw_batch(
    photos: list[Image.Image], recipe: recipes.Recipe, seed: int
) -> list[Image.Image]:
    """Eight images as the model gets them, mixed with one another."""
    transform = language.parse_transform(recipe.transform, (SIZE, SIZE))
    rngs = np.random.default_rng(seed).spawn(DRAWS)
    drawn = [transform(photos[i % len(photos)], rng) for i, rng in enumerate(rngs)]
    pixels = jnp.asarray(np.stack([np.asarray(image) for image in drawn]), jnp.float32)
    mixed, _ = mixing.mix(jax.random.key(seed), pixels, jnp.eye(DRAWS), recipe.mixing)
    return [Image.fromarray(image) for image in np.rint(np.asarray(mixed)).astype(np.uint8)]


def draw_multi_crop(photo: Image.Image, seed: int) -> list[Row]:
    """DINO's multi-crop of one photo: the photo, its global crops and its local crops."""
    rng = np.random.default_rng(seed)
    transform, views = recipes.dino(DRAWS)
    first = transform(photo, rng)
    crops = {name: view.draw(photo, rng) for name, view in views.items()}
    return [
        ("photo", [photo]),
        (f"global, {first.width} px", [first, *crops["global_2"]]),
        (f"local, {crops['local'][0].width} px", crops["local"]),
    ]


def all_recipes() -> dict[str, recipes.Recipe]:
    augreg = {}
    for name in recipes.AUGREG:
        transform, alpha = recipes.augreg(name)
        augreg[f"AugReg {name}"] = recipes.Recipe(transform, mixing.Mixing(mixup=alpha))
    return augreg | recipes.RECIPES


def draw_sheet(photos: list[Image.Image], tile: int, seed: int) -> Image.Image:
    """The whole sheet from square RGB photos, with tiles of tile x tile pixels."""
    photo = photos[0].resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    google = augment.OPS | {f"{name}, slip": op for name, op in augment.QUIRKS.items()}
    timm = augment.TIMM_OPS | augment.INCREASING_OPS
    batches = [
        (name, draw_batch(photos, recipe, seed + i))
        for i, (name, recipe) in enumerate(all_recipes().items())
    ]
    columns = [
        _block(
            f"Google's RandAugment at {_listed(GOOGLE_MAGNITUDES)}",
            draw_operations(photo, google, GOOGLE_MAGNITUDES, seed),
            tile,
        ),
        _block(
            f"timm's, increasing, at {_listed(TIMM_MAGNITUDES)}",
            draw_operations(photo, timm, TIMM_MAGNITUDES, seed),
            tile,
        ),
        _stacked(
            _block("presets: a batch of eight, augmented and mixed", batches, tile),
            _block("DINO's multi-crop of one photo", draw_multi_crop(photos[0], seed), tile),
        ),
    ]
    width, height = sum(each.width for each in columns), max(each.height for each in columns)
    sheet, x = Image.new("RGB", (width, height), PAPER), 0
    for column in columns:
        sheet.paste(column, (x, 0))
        x += column.width
    return sheet


def _stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """The one above the other, their right edges in line."""
    width, height = max(upper.width, lower.width), upper.height + lower.height
    column = Image.new("RGB", (width, height), PAPER)
    column.paste(upper, (width - upper.width, 0))
    column.paste(lower, (width - lower.width, upper.height))
    return column


def _block(title: str, rows: list[Row], tile: int) -> Image.Image:
    """A title, and below it rows of images with their names on the left."""
    font = ImageFont.load_default(11)
    size = tile + GAP
    names = max(int(font.getlength(name)) for name, _ in rows) + 3 * GAP
    width = names + size * max(len(images) for _, images in rows) + 3 * GAP
    block = Image.new("RGB", (width, size * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((names, size // 2), title, INK, font, anchor="lm")
    for i, (name, images) in enumerate(rows, 1):
        draw.text((names - GAP, size * i + size // 2), name, INK, font, anchor="rm")
        for j, image in enumerate(images):
            small = image.resize((tile, tile), Image.Resampling.BOX)
            block.paste(small, (names + size * j, size * i))
    return block


def _listed(magnitudes: Iterable[float]) -> str:
    return ", ".join(map(str, magnitudes))


def open_photos(paths: list[str]) -> list[Image.Image]:
    """RGB photos, the middle square of each. Raises UserError, naming the file."""
    if paths:
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"there is no image {path}: check the path")
        photos = [decode({"image": path, "name": path}, 3) for path in paths]
    else:
        from sklearn.datasets import load_sample_images

        photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [ImageOps.fit(photo, (min(photo.size),) * 2) for photo in photos]


def write_sheet(output: Path, paths: list[str], tile: int, seed: int) -> Image.Image:
    """Draws the sheet of the images at `paths` and saves it as a PNG file.

    Raises UserError for another kind of file, and for what cannot be read or written.
    """
    if output.suffix.lower() != ".png":
        raise UserError(f"--output={output} has to end in .png: choose such a name")
    sheet = draw_sheet(open_photos(paths), tile, seed)
    # A palette makes a file of a third of the size.
    palette = sheet.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with replacing(output) as part:
        palette.save(part, "PNG", optimize=True)
    return sheet


if __name__ == "__main__":  # where the command was before
    runpy.run_module("vit_jax.contact_sheet", run_name="__main__", alter_sys=True)
