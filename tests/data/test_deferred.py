"""Thin images: the part that is kept is cut before it is made, and pixels stay the same."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import bad_images, pipeline
from vit_jax.data.decode import BadImage
from vit_jax.data.transforms import deferred
from vit_jax.data.transforms.language import parse_transform
from vit_jax.data.transforms.resize import METHODS, resize
from vit_jax.system.errors import UserError


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Encoded:
    """Images as files in memory."""

    class_names = ("a", "b")

    def __init__(self, images):
        self.encoded = [png(image) for image in images]

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, i):
        return {"image": self.encoded[i], "label": i % 2, "name": f"number {i}"}

    def fingerprint(self, start, stop):
        return ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(1, 150, 3), (150, 1, 3), (2, 171, 3), (171, 3, 1), (60, 45, 3)]
)
def test_a_part_has_the_pixels_of_the_whole(monkeypatch, method, shape):
    image = noise(*shape)
    shorter = min(shape[:2])
    height, width = (int(edge * 24 / shorter) for edge in shape[:2])
    whole = resize(image, (height, width), method)
    assert whole.size == (width, height)
    monkeypatch.setattr(deferred, "LARGE", 0)
    monkeypatch.setattr(deferred, "MOST", 20_000)  # so that columns come in several strips
    monkeypatch.setattr(deferred, "STRIPS", 100)
    part = deferred.resize(image, (height, width), method)
    for left, top, wide, tall in (
        (0, 0, 7, 9),
        (width - 5, height - 11, 5, 11),
        (3, 2, 20, 19),
    ):
        box = (left, top, left + wide, top + tall)
        np.testing.assert_array_equal(np.asarray(part.crop(box)), np.asarray(whole.crop(box)))


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 50_000)])
def test_a_crop_of_an_enormous_image_is_made_alone(shape):
    """In one direction such an image has 15 million pixels, in both 3.7 thousand million."""
    image = noise(*shape)
    out = parse_transform("resize_shorter(248, 'area')|center_crop", (224, 224))(image)
    # Around the middle, by the definition of the mean over an area: each pixel is repeated.
    pixels = np.asarray(image).reshape(shape[0], shape[1], 3)
    scale = 248 / min(shape)
    rows, columns = (
        ((np.arange(224) + int((round(edge * scale) - 224) / 2)) / scale).astype(int)
        for edge in shape
    )
    np.testing.assert_array_equal(np.asarray(out), pixels[rows][:, columns])


def test_what_is_beyond_a_bound_is_named_and_skipped():
    image = noise(1, 100_000)
    with pytest.raises(deferred.TooLarge, match="100000 x 1 pixels would become 102,400,000 x"):
        parse_transform("resize_shorter(1024, 'bicubic')|center_crop", (8, 8))(image)
    # Without a crop nothing says which part is wanted.
    transform = parse_transform("resize_shorter(1024, 'area')", (8, 8))
    with pytest.raises(BadImage, match=r"^image scan\.png cannot be resized \(its 100000 x 1"):
        transform.of(image, "scan.png")


@pytest.mark.parametrize("threads", [1, 4])
def test_an_image_that_asks_too_much_does_not_end_a_run(capsys, monkeypatch, threads):
    monkeypatch.setattr(bad_images, "_told", set())
    images = [noise(20, 20, seed=i) for i in range(9)]
    images[4] = noise(1, 70_000)
    source = Encoded(images)
    reading = {
        "transform": parse_transform("resize_shorter(1000, 'bicubic')|center_crop", (8, 8)),
        "channels": 3,
        "threads": threads,
        "max_bad": 0.2,
    }
    [batch] = pipeline.eval_batches(source, batch_size=9, **reading)
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 1, 0, 1, 1, 1, 1])
    assert "left out (1): image number 4 cannot be resized (its 70000 x 1 pixels would" in (
        capsys.readouterr().err
    )
    whole = reading["transform"]
    expected = {
        np.asarray(whole(image)).tobytes(): i for i, image in enumerate(images) if i != 4
    }
    with pipeline.train_batches(source, batch_size=9, seed=0, **reading) as batches:
        seen = [expected[image.tobytes()] for image in next(batches)["image"]]
    assert sorted(seen) == [0, 1, 2, 3, 5, 5, 6, 7, 8]  # the next one stands in
    with (
        pytest.raises(UserError, match="number 4 cannot be resized"),
        pipeline.eval_batches(source, batch_size=9, **{**reading, "max_bad": 0.0}) as batches,
    ):
        next(batches)
