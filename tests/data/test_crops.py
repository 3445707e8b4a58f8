import math

import numpy as np
import pytest

from vit_jax.data.transforms.crops import sample_inception_box, sample_resized_box

SIZES = [(375, 500), (500, 375), (8, 8), (224, 224), (31, 400)]


def boxes(sample, rng, size, n=2000, **options):
    return np.array([sample(rng, *size, **options) for _ in range(n)])


@pytest.mark.parametrize("sample", [sample_inception_box, sample_resized_box])
@pytest.mark.parametrize("size", SIZES)
def test_boxes_lie_inside_the_image(sample, size, rng):
    top, left, height, width = boxes(sample, rng, size).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height > 0).all()
    assert (width > 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize("area", [(0.05, 1.0), (0.3, 0.5), (0.5, 0.5001)])
def test_inception_area_is_within_bounds_exactly(size, area, rng):
    """Rounding is repaired or the draw rejected; only the whole image may exceed."""
    found = boxes(sample_inception_box, rng, size, area=area)
    whole = (found[:, 2:] == size).all(1)
    share = found[:, 2] * found[:, 3] / math.prod(size)
    assert ((area[0] <= share) & (share <= area[1]) | whole).all()


def test_inception_aspect_is_within_bounds_up_to_rounding(rng):
    _, _, height, width = boxes(sample_inception_box, rng, (375, 500)).T
    assert (width >= np.rint(height * 0.75) - 1).all()
    assert (width <= np.rint(height * 1.33) + 1).all()


def test_inception_never_draws_the_last_offset(rng):
    found = boxes(sample_inception_box, rng, (12, 12), n=20000)
    top, left, height, width = found.T
    assert (top[height < 12] < 12 - height[height < 12]).all()
    assert (left[width < 12] < 12 - width[width < 12]).all()
    seven = found[(height == 7)]
    assert set(seven[:, 0]) == set(range(5))  # of offsets 0 .. 5 all but the last


def test_inception_falls_back_to_the_whole_image(rng):
    # No box with an aspect below 1.33 covers 90 % of a panorama.
    assert sample_inception_box(rng, 10, 100, (0.9, 1.0)) == (0, 0, 10, 100)


def test_inception_height_is_uniform_among_those_that_fit(rng):
    """With the aspect fixed at 1, heights from round(sqrt(.05) 100) to 100 are as likely."""
    found = boxes(sample_inception_box, rng, (100, 100), n=30000, aspect=(1.0, 1.0))
    counts = np.bincount(found[:, 2], minlength=101)
    assert counts[:22].sum() == 0
    # The smallest cannot fill 5 % (22 * 22 < 500), so it is raised to 23.
    expected = np.r_[2, np.ones(77)] / 79 * 30000
    chi2 = ((counts[23:] - expected) ** 2 / expected).sum()
    assert counts[22] == 0
    assert chi2 < 78 + 4 * math.sqrt(2 * 78)


def test_inception_crops_are_smaller_than_torchvisions(rng):
    def mean_area(sample, options):
        found = boxes(sample, rng, (400, 400), n=4000, **options)
        return (found[:, 2] * found[:, 3] / 160000).mean()

    inception = mean_area(sample_inception_box, {"area": (0.08, 1.0)})
    torchvision = mean_area(sample_resized_box, {"scale": (0.08, 1.0)})
    assert inception < torchvision - 0.05


def golden_inception(rng, height, width, low, high):
    """Table of (aspect, height, box) drawn in the order TensorFlow draws, written anew."""
    ratio = rng.uniform(0.75, 1.33)
    tallest = min(int(math.sqrt(high * height * width / ratio) + 0.5), height)
    while round(tallest * ratio) > width:
        tallest -= 1
    shortest = min(int(math.sqrt(low * height * width / ratio) + 0.5), tallest)
    h = int(rng.integers(shortest, tallest + 1))
    w = round(h * ratio)
    if h * w < low * height * width:
        h, w = h + 1, round((h + 1) * ratio)
    if h * w > high * height * width:
        h, w = h - 1, round((h - 1) * ratio)
    top = int(rng.integers(0, height - h)) if h < height else 0
    left = int(rng.integers(0, width - w)) if w < width else 0
    return top, left, h, w


@pytest.mark.parametrize("size", SIZES[:4])
def test_inception_follows_the_written_rule(size):
    for seed in range(300):
        expected = golden_inception(np.random.default_rng(seed), *size, 0.05, 1.0)
        assert sample_inception_box(np.random.default_rng(seed), *size) == expected


def test_resized_area_is_uniform_and_aspect_log_uniform(rng):
    # Small crops always fit, so that nothing is drawn anew.
    _, _, height, width = boxes(
        sample_resized_box, rng, (1000, 1000), n=8000, scale=(0.1, 0.5)
    ).T
    share = np.sort(height * width / 1e6)
    aspect = np.sort(np.log(width / height))
    rank = np.arange(8000) / 8000
    assert np.abs(share - (0.1 + 0.4 * rank)).max() < 0.01
    limit = math.log(4 / 3)
    assert np.abs(aspect - limit * (2 * rank - 1)).max() < 0.015


def test_resized_draws_every_offset(rng):
    found = boxes(sample_resized_box, rng, (12, 12), n=5000)
    seven = found[found[:, 2] == 7]
    assert set(seven[:, 0]) == set(range(6))


@pytest.mark.parametrize(
    ("size", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))]
)
def test_resized_falls_back_to_the_largest_central_crop(size, box, rng):
    assert sample_resized_box(rng, *size, scale=(0.9, 1.0)) == box
