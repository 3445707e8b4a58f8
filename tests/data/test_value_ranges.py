"""Mean and deviation of any kind, in words of `config.data.value_range`."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_config import tiny
from vit_jax.data import on_device, value_ranges
from vit_jax.system.errors import UserError


def test_any_mean_and_deviation():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 4, 4), np.uint8)
    mean, std = [0.1, 0.25, 0.4, 0.9], [0.2, 0.4, 0.6, 1.5]
    spec = value_ranges.name(mean, std)
    assert spec == "mean=0.1,0.25,0.4,0.9 std=0.2,0.4,0.6,1.5"
    found = value_ranges.normalize(jnp.asarray(images), spec)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (images / 255 - mean) / std, atol=2e-6)
    one = value_ranges.normalize(jnp.asarray(images), "mean=0.5 std=0.25")
    np.testing.assert_allclose(one, (images / 255 - 0.5) / 0.25, atol=2e-6)


@pytest.mark.parametrize("name", value_ranges.VALUE_RANGES)
def test_known_numbers_have_a_name(name):
    mean, std = (np.divide(x, 255).tolist() for x in value_ranges.parse(name))
    assert value_ranges.name(mean, std) == name
    wide = [round(x, 7) for x in mean], [round(x, 7) for x in std]
    assert value_ranges.name(*wide) == name
    assert value_ranges.name(mean, [x + 1e-4 for x in std]) != name
    specified = f"mean={','.join(map(str, mean))} std={','.join(map(str, std))}"
    np.testing.assert_allclose(value_ranges.parse(specified), value_ranges.parse(name))


def test_half_on_all_channels_is_inception():
    assert value_ranges.name([0.5] * 3, [0.5] * 3) == "inception"
    assert value_ranges.name([0.5], [0.5, 0.5]) == "inception"
    assert value_ranges.name([0.0], [1.0]) == "mean=0.0 std=1.0"


@pytest.mark.parametrize(
    "wrong",
    ["clip", "", "mean=0.5", "mean= std=1", "mean=a std=1", "mean=0 std=0", "mean=0 std=-1",
     "mean=nan std=1", "mean=0 std=inf", "std=1 mean=0", "mean=0,1 std=1 x"],
)  # fmt: skip
def test_what_is_no_range(wrong):
    with pytest.raises(UserError, match=r"unknown value range .*use inception or imagenet"):
        value_ranges.parse(wrong)


def test_ranges_for_other_channels():
    assert value_ranges.for_channels("inception", 7) == "inception"
    assert value_ranges.for_channels("mean=0.2 std=0.4", 7) == "mean=0.2 std=0.4"
    assert value_ranges.for_channels("imagenet", 1) == "mean=0.449 std=0.226"
    assert value_ranges.for_channels("mean=0.1,0.2 std=0.3,0.4", 3) == (
        "mean=0.1,0.2,0.1 std=0.3,0.4,0.3"
    )
    assert value_ranges.for_channels("imagenet", 6).startswith("mean=0.485,0.456,0.406,0.485,")


@pytest.mark.parametrize("wrong", ["imagenet", "grey", "mean=0,0 std=1"])
def test_a_range_that_does_not_fit_is_refused_before_anything_is_built(wrong):
    config = tiny()
    config.data.value_range = wrong
    with pytest.raises(UserError, match="value range"):
        on_device.prepare_for_eval(config)
