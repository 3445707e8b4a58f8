"""What stands in the figures, and that they come out whatever they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.analysis import plots


def drawn(figure):
    """The (H, W, 3) uint8 pixels of a figure."""
    picture = Image.open(io.BytesIO(plots.png(figure))).convert("RGB")
    expected = [round(inches * plots.DPI) for inches in figure.get_size_inches()]
    np.testing.assert_allclose(picture.size, expected, atol=1)
    assert picture.width <= plots.WIDTH * plots.DPI  # it fits the page
    return np.asarray(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_filter_spans_all_brightness(channels):
    rng = np.random.default_rng(0)
    components = rng.standard_normal((28, 4, 4, channels)) * 1e-3
    components[3] = 7.0  # a constant one must not divide by zero
    figure = plots.filters(components)
    images = [axes.images[0].get_array() for axes in figure.axes]
    assert len(images) == 28
    assert (images[0].min(), images[0].max()) == (0.0, 1.0)
    order = np.broadcast_to(components[0], (4, 4, 3)).ravel().argsort()
    assert (np.diff(images[0].ravel()[order]) >= 0).all()
    assert (images[3] == 0).all()
    colours = drawn(figure).reshape(-1, 3)
    assert (np.ptp(colours.astype(int), axis=1).max() > 50) == (channels == 3)


def test_a_tile_for_each_patch_at_its_place():
    similarity = np.random.default_rng(0).uniform(-0.4, 0.9, (2, 3, 2, 3))
    figure = plots.similarities(similarity)
    mosaic = figure.axes[0].images[0].get_array()
    assert mosaic.shape == (2 * 2 + 1, 3 * 3 + 2)
    np.testing.assert_array_equal(mosaic[3:5, 4:7], similarity[1, 1])
    np.testing.assert_array_equal(mosaic[:2, 8:], similarity[0, 2])
    assert mosaic.mask[2].all()  # the gap
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-0.4, 1.0))
    drawn(figure)


def test_of_a_large_grid_some_tiles_are_shown():
    similarity = np.zeros((2, 40, 2, 40)) + np.arange(40)[:, None, None]
    figure = plots.similarities(similarity / 40)
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["1", "4", "7", "10", "13", "16", "19", "22", "25", "28", "31", "34",
                      "37", "40"]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2"]
    assert axes.images[0].get_array()[0, -1] == 39 / 40
    drawn(figure)


def test_distances_of_every_head_and_their_mean():
    pixels = np.array([[10.0, 30.0], [50.0, np.nan], [np.nan, np.nan]])
    axes = plots.distances(pixels, 60.0).axes[0]
    offsets = axes.collections[0].get_offsets()
    np.testing.assert_array_equal(offsets[:3], [[0, 10], [0, 30], [1, 50]])
    mean, uniform = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(np.ma.filled(mean, -1.0), [20.0, 50.0, -1.0])
    assert list(uniform) == [60.0, 60.0]
    assert axes.get_ylim()[1] > 60
    assert "pixels" in axes.get_ylabel()
    drawn(plots.distances(pixels, 60.0))
    drawn(plots.distances(np.zeros((1, 1)), 0.0))  # one layer of one patch


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (3, 1)])
def test_photos_as_bright_as_their_rollout(count, channels):
    photos = [np.full((8, 16, channels), 255, np.uint8)] * count
    mask = np.array([[0.0, 0.1], [0.1, 0.2]])
    titles = ["price_$5$_日本.png"] * count  # neither mathematics nor a letter of the font
    figure = plots.rollouts(photos, [mask] * count, titles)
    panels = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    photo, bright, rollout = panels[:3]
    assert (photo == 1).all()
    assert (bright[0, 0, 0], bright[-1, -1, 0]) == (0.0, 1.0)
    assert (rollout[0, 0], rollout[-1, -1]) == (0.0, 2.0)  # twice the average
    assert rollout.shape == (8, 16)
    assert len(panels) == 3 * count
    drawn(figure)


def test_a_rollout_with_nothing_in_it():
    figure = plots.rollouts([np.full((4, 4, 3), 99, np.uint8)], [np.zeros((2, 2))], ["black"])
    assert (figure.axes[1].images[0].get_array() == 0).all()
    drawn(figure)


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_a_panel_for_every_layer(layers):
    masks = np.random.default_rng(0).uniform(size=(layers, 2, 3))
    figure = plots.rollout_layers(np.zeros((8, 12, 3), np.uint8), masks, "a" * 99)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == "photo"
    assert len(titles) == 1 + layers
    most = masks[-1].max() / masks[-1].mean()
    name = "layer 0" if layers == 1 else f"layers 0-{layers - 1}"
    assert titles[-1] == f"{name}\nmax {most:.2f}"
    assert len(figure.get_suptitle()) < 50
    drawn(figure)


def test_enlarging_keeps_what_is_even_and_the_corners():
    np.testing.assert_allclose(plots.enlarge(np.full((2, 3), 0.3), (8, 18)), 0.3, rtol=1e-6)
    ramp = plots.enlarge(np.array([[0.0, 1.0]]), (2, 8))
    np.testing.assert_allclose(ramp[0], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)


def test_evenly_spaced():
    assert list(plots.evenly(5, 8)) == [0, 1, 2, 3, 4]
    assert list(plots.evenly(101, 3)) == [0, 50, 100]
    assert list(plots.evenly(9, 1)) == [0]
