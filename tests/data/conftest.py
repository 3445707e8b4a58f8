"""Real pixels for every test of the data room."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Two photographs, 640 x 427, RGB."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@pytest.fixture(scope="session")
def photo(photos) -> Image.Image:
    return photos[0].resize((120, 80), Image.Resampling.BICUBIC)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
