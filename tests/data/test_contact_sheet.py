import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data import contact_sheet, recipes
from vit_jax.data.contact_sheet import draw_batch, draw_operations, open_photos, write_sheet
from vit_jax.data.mixing import Mixing
from vit_jax.data.transforms.augment import OPS, TIMM_OPS
from vit_jax.system.errors import UserError


def test_the_command_draws_a_photo(photos, tmp_path):
    photos[0].convert("L").save(tmp_path / "grey.jpg")
    output = tmp_path / "new" / "sheet.png"
    command = [sys.executable, "-m", "vit_jax.contact_sheet", f"--output={output}"]
    done = subprocess.run(
        [*command, "--tile=32", tmp_path / "grey.jpg"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sheet = Image.open(output).convert("RGB")
    assert f"{sheet.width} x {sheet.height} pixels in {output}" in done.stdout
    # A title and a row for each of Google's operations and its three slips, 36 pixels each.
    assert sheet.height == 36 * (1 + len(OPS) + 3)
    tiles = 36 * (5 + 5 + contact_sheet.DRAWS)
    assert tiles < sheet.width < tiles + 3 * 150
    # Below the titles and presets, in the right column: a photo, two crops and eight.
    top = 36 * (len(contact_sheet.all_recipes()) + 1)
    right = np.asarray(sheet)[top:, -(36 * contact_sheet.DRAWS + 12) :]
    tile = lambda row, i: right[36 * row : 36 * row + 32, 36 * i : 36 * i + 32]
    filled = [sum(tile(row, i).min() < 255 for i in range(8)) for row in (1, 2, 3, 4)]
    assert filled == [1, 2, 8, 0]
    assert output.stat().st_size < 300_000


def test_rows_hold_each_operation_at_each_magnitude(photo):
    rows = draw_operations(photo, TIMM_OPS, (0, 5, 10), seed=3)
    assert [name for name, _ in rows] == list(TIMM_OPS)
    for name, tiles in rows:
        expected = [TIMM_OPS[name](photo, v, np.random.default_rng(3)) for v in (0, 0.5, 1)]
        assert [tile.tobytes() for tile in tiles] == [tile.tobytes() for tile in expected]


def test_batches_are_transformed_and_mixed(photo):
    square = ImageOps.fit(photo, (contact_sheet.SIZE,) * 2)
    others = [square, ImageOps.invert(square)]
    plain = draw_batch(others, recipes.Recipe("resize"), seed=0)
    assert [tile.tobytes() for tile in plain] == [x.tobytes() for x in others * 4]
    mixed = draw_batch(others, recipes.Recipe("resize", Mixing(mixup=8.0)), seed=0)
    # A picture and its negative add up to 255, whatever the weight.
    total = np.asarray(mixed[0]).astype(int) + np.asarray(mixed[1])
    assert np.abs(total - 255).max() <= 1
    assert mixed[0].tobytes() != plain[0].tobytes()


def test_a_multi_crop_is_of_one_photo(photos):
    """A plain photo has crops of one colour, and another photo has others."""
    plain = Image.new("RGB", (300, 300), (90, 90, 90))
    rows = contact_sheet.draw_multi_crop(plain, seed=1)
    assert [name for name, _ in rows] == ["photo", "global, 224 px", "local, 96 px"]
    assert [len(images) for _, images in rows] == [1, 2, 8]
    assert [{image.size for image in images} for _, images in rows] == [
        {(300, 300)}, {(224, 224)}, {(96, 96)}
    ]  # fmt: skip
    assert all(len(image.getcolors()) == 1 for _, images in rows for image in images)
    crops = contact_sheet.draw_multi_crop(photos[0], seed=1)[2][1]
    assert len({crop.tobytes() for crop in crops}) == 8


def test_every_preset_is_on_the_sheet():
    names = [name.removeprefix("AugReg ") for name in contact_sheet.all_recipes()]
    assert names == [*recipes.AUGREG, *recipes.RECIPES]


def test_photos_are_the_middle_squares(photos, tmp_path):
    assert [photo.size for photo in open_photos([])] == [(427, 427)] * 2
    photos[0].crop((0, 0, 60, 40)).save(tmp_path / "a.png")
    [photo] = open_photos([str(tmp_path / "a.png")])
    np.testing.assert_array_equal(photo, np.asarray(photos[0])[:40, 10:50])


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(UserError, match=r"sheet\.jpg has to end in \.png"):
        write_sheet(tmp_path / "sheet.jpg", [], 32, 0)
    with pytest.raises(UserError, match=r"there is no image nowhere\.jpg: check the path"):
        open_photos(["nowhere.jpg"])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png is in no format that can be read"):
        open_photos([str(broken)])
