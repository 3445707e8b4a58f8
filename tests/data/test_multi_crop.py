"""Several crops of one image: what a batch holds of them, and that they disturb nothing."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.data.test_pipeline import assert_same
from tests.data.test_pipeline import train as train_plain
from vit_jax.data import pipeline, recipes
from vit_jax.data.pipeline import Views
from vit_jax.data.sources import catalog
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.data.transforms.language import parse_transform
from vit_jax.system.errors import UserError

AUGMENT = parse_transform("inception_crop|flip|randaugment(2, 10)", (12, 8))
LARGE = Views(parse_transform("random_resized_crop(0.4, 1.0)|solarize(0.5)", (10, 14)), 1)
SMALL = Views(parse_transform("random_resized_crop(0.05, 0.4)|flip", (6, 4)), 3)
VIEWS = {"large": LARGE, "small": SMALL}


def train(source, steps, views=VIEWS, transform=AUGMENT, **options):
    return train_plain(source, steps, transform, views=views, **{"threads": 2} | options)


@pytest.fixture(scope="module")
def noise():
    return catalog.load("synthetic:20x24x3,classes=10,examples=19", "train")


@pytest.fixture(scope="module")
def reference(noise):
    """Four batches of 8 from 19 examples: an epoch ends inside the third."""
    return train(noise, 4)


def test_batches_hold_so_many_of_each_view(reference):
    for batch in reference:
        assert set(batch) == {"image", "label", "large", "small"}
        assert batch["image"].shape == (8, 12, 8, 3)
        assert batch["large"].shape == (8, 1, 10, 14, 3)
        assert batch["small"].shape == (8, 3, 6, 4, 3)
        assert {batch[name].dtype for name in ("image", *VIEWS)} == {np.dtype(np.uint8)}
        assert len({crop.tobytes() for crop in batch["small"].reshape(24, -1)}) == 24


def test_grey_images_keep_their_channel():
    [batch] = train(catalog.load("digits", "train"), 1, channels=1)
    assert batch["small"].shape == (8, 3, 6, 4, 1)


def test_images_are_the_same_as_without_views(noise, reference):
    alone = train(noise, 4, views=None)
    assert set(alone[0]) == {"image", "label"}
    assert_same([{key: batch[key] for key in alone[0]} for batch in reference], alone)
    # Nor do views change those before them.
    first = train(noise, 4, views={"large": LARGE})
    assert_same([{key: batch[key] for key in first[0]} for batch in reference], first)


def generator(seed, place):
    """The one of the example at this place: numpy's Philox, as Grain sets it up."""
    bits = np.random.Philox(np.random.SeedSequence([seed, 3]).generate_state(1)[0])
    state = bits.state
    state["state"]["counter"][:] = 0, 0, 0, place
    bits.state = state
    return np.random.Generator(bits)


def test_views_are_drawn_after_the_image_from_the_same_pixels():
    """All made anew, one example after the other, from the only image that there is."""
    alike = catalog.load("synthetic:20x24x3,classes=10,examples=1", "train")
    [batch] = train(alike, 1, seed=7)
    whole = Image.fromarray(alike[0]["image"])
    for place in range(8):
        rng = generator(7, place)
        np.testing.assert_array_equal(batch["image"][place], AUGMENT(whole, rng))
        np.testing.assert_array_equal(batch["large"][place, 0], LARGE.transform(whole, rng))
        for crop in batch["small"][place]:
            np.testing.assert_array_equal(crop, SMALL.transform(whole, rng))


def test_every_view_is_of_the_image_beside_it():
    grey = np.arange(30, dtype=np.uint8)
    plain = np.broadcast_to(grey[:, None, None], (30, 9, 9))
    source = ArraySource(plain, grey % 10, tuple("0123456789"), "plain")
    crop = Views(parse_transform("random_resized_crop(0.1, 0.5)", (2, 3)), 4)
    resize = parse_transform("resize", (1, 1))
    for batch in train(source, 5, {"crops": crop}, resize, channels=1, repeats=2):
        shown = batch["image"].reshape(8, 1, 1, 1, 1)
        np.testing.assert_array_equal(batch["crops"], np.broadcast_to(shown, (8, 4, 2, 3, 1)))
        np.testing.assert_array_equal(shown.ravel() % 10, batch["label"])


def test_an_image_is_decoded_once(photo, monkeypatch):
    encoded = io.BytesIO()
    photo.resize((80, 60)).save(encoded, "PNG")  # too large to be kept
    opened = []

    class Encoded(ArraySource):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"image": encoded.getvalue()}

    whole_open = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or whole_open(*a, **k))
    source = Encoded(np.zeros((5, 1)), np.zeros(5, int), ("a",), "encoded")
    counts = []
    for views in (None, VIEWS):
        opened.clear()
        train(source, 2, views, threads=0)  # without threads nothing is read ahead
        counts.append(len(opened))
    assert counts == [16, 16]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(noise, reference, workers):
    assert_same(train(noise, 4, workers=workers), reference)


@pytest.mark.parametrize("threads", [0, 5])
def test_threads_do_not_matter(noise, reference, threads, monkeypatch):
    monkeypatch.setattr(pipeline, "_useful", lambda threads, local: threads)
    assert_same(train(noise, 4, threads=threads), reference)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_views(noise, reference, count):
    parts = [train(noise, 4, parts=(i,), part_count=count) for i in range(count)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_is_exact(noise, reference, workers):
    assert_same(train(noise, 2, first_step=2, workers=workers), reference[2:])


# ---- DINO's ------------------------------------------------------------------------------


def test_dinos_crops_are_as_published():
    """Counts and sizes of `main_dino.py`'s defaults; the transforms are the presets'."""
    transform, views = recipes.dino()
    assert list(views) == ["global_2", "local"]
    assert [view.count for view in views.values()] == [1, 8]
    transforms = [transform, *(view.transform for view in views.values())]
    assert [each.image_size for each in transforms] == [(224, 224), (224, 224), (96, 96)]
    names = ("dino_global_1", "dino_global_2", "dino_local")
    assert [each.spec for each in transforms] == [recipes.RECIPES[n].transform for n in names]


def test_dinos_crops_come_in_other_sizes_and_numbers(noise):
    transform, views = recipes.dino(6, global_size=(28, 42), local_size=(14, 14))
    [batch] = train(noise, 1, views, transform, batch_size=2)
    assert batch["image"].shape == (2, 28, 42, 3)
    assert batch["global_2"].shape == (2, 1, 28, 42, 3)
    assert batch["local"].shape == (2, 6, 14, 14, 3)


def test_local_crops_show_less_than_global_ones():
    """Crops of a ramp from 0 to 255 tell how much of its width they show."""
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    shown = {}
    for name in ("dino_global_1", "dino_local"):
        crop = recipes.RECIPES[name].transform.split("|")[0]
        transform, rng = parse_transform(crop, (32, 32)), np.random.default_rng(0)
        spans = [np.ptp(np.asarray(transform(ramp, rng)).mean(0)) / 248 for _ in range(500)]
        shown[name] = np.mean(np.square(spans))  # about the area
    # The means of uniform areas from 0.4 to 1 and from 0.05 to 0.4; the largest seldom fit.
    assert abs(shown["dino_global_1"] - 0.7) < 0.06
    assert abs(shown["dino_local"] - 0.225) < 0.03


# ---- mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_counts_that_cannot_be_are_explained(noise, count):
    message = f"the count of views 'small' is {count}: make it a whole number of at least 1"
    with pytest.raises(UserError, match=re.escape(message)):
        train(noise, 1, {"small": Views(SMALL.transform, count)})


@pytest.mark.parametrize("name", ["image", "label", "mask", "bad"])
def test_names_that_a_batch_has_are_explained(noise, name):
    with pytest.raises(UserError, match=f"views cannot be named '{name}'.*: rename them"):
        train(noise, 1, {name: SMALL})


def test_a_view_of_another_size_than_its_own_is_explained(noise):
    with pytest.raises(UserError, match="transform 'flip' leaves an image of 20 x 24 where 6"):
        train(noise, 1, {"small": Views(parse_transform("flip", (6, 4)), 2)})
