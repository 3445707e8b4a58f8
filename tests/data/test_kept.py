"""Small images come out of memory from the second time on, with the same pixels."""

import numpy as np
import pytest

from vit_jax.data import image_cache, pipeline
from vit_jax.data.decode import decode
from vit_jax.data.image_cache import Kept
from vit_jax.data.sources import catalog
from vit_jax.data.transforms import language
from vit_jax.system.errors import UserError


@pytest.fixture
def folder(tmp_path, photo):
    """Six small images, one of them grey."""
    (tmp_path / "a").mkdir()
    for i in range(6):
        small = photo.rotate(i).resize((30, 40))
        (small.convert("L") if i == 5 else small).save(tmp_path / "a" / f"{i}.png")
    return tmp_path


def remove_all(folder):
    for path in folder.glob("a/*"):
        path.unlink()


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_outlive_their_files(folder, channels):
    source = catalog.load(f"folder:{folder}", "all")
    expected = [np.asarray(decode(source[i], channels)) for i in range(6)]
    images = Kept(source, channels)
    first = [images[i] for i in range(6)]
    remove_all(folder)
    for i in range(6):
        again = images[i]
        np.testing.assert_array_equal(np.asarray(first[i]["image"]), expected[i])
        np.testing.assert_array_equal(np.asarray(again["image"]), expected[i])
        assert (again["label"], again["name"]) == (first[i]["label"], first[i]["name"])


def test_larger_images_are_read_again(tmp_path, photo):
    (tmp_path / "a").mkdir()
    photo.save(tmp_path / "a" / "0.png")
    images = Kept(catalog.load(f"folder:{tmp_path}", "all"), 3)
    assert images[0]["image"].size == photo.size
    remove_all(tmp_path)
    with pytest.raises(UserError, match="cannot be decoded"):
        images[0]


def test_what_is_kept_cannot_be_painted_over(folder):
    images = Kept(catalog.load(f"folder:{folder}", "all"), 3)
    before = np.asarray(images[1]["image"]).copy()
    images[1]["image"].paste((255, 0, 0), (0, 0, 30, 40))
    np.testing.assert_array_equal(np.asarray(images[1]["image"]), before)


def test_no_more_is_kept_than_there_is_room_for(folder):
    source = catalog.load(f"folder:{folder}", "all")
    each = 30 * 40 * 3 + image_cache.OVERHEAD
    images = Kept(source, 3, room=each + 1)  # begins a second one, and then is full
    for i in range(6):
        images[i]
    remove_all(folder)
    assert [images[i]["image"].width for i in (0, 1)] == [30, 30]
    with pytest.raises(UserError, match="cannot be decoded"):
        images[2]


def test_arrays_are_not_kept_twice():
    images = Kept(catalog.load("digits", "train"), 1)
    images[0]
    assert images.room == image_cache.ROOM


@pytest.mark.parametrize("threads", [0, 4])
def test_the_second_epoch_is_what_it_was_with_files(folder, threads):
    source = catalog.load(f"folder:{folder}", "all")
    transform = language.parse_transform("random_resized_crop|flip", (16, 16))

    def images(first_step, steps, meanwhile=lambda: None):
        options = {"transform": transform, "channels": 3, "batch_size": 6, "seed": 3}
        with pipeline.train_batches(
            source, **options, first_step=first_step, threads=threads, prefetch=1
        ) as batches:
            found = [next(batches)["image"]]
            meanwhile()  # an epoch is one batch
            return np.stack(found + [next(batches)["image"] for _ in range(steps - 1)])

    from_files = np.concatenate([images(step, 1) for step in range(4)])
    np.testing.assert_array_equal(images(0, 4, lambda: remove_all(folder)), from_files)
