"""Recognising files, and what the families promise to the rest of the house."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.interop.tiny_models import model
from vit_jax.data.transforms.language import VALUE_RANGES, parse_transform
from vit_jax.interop import checkpoints_page, google, huggingface, timm, weight_files
from vit_jax.interop.families import FAMILIES
from vit_jax.interop.load import load_weights
from vit_jax.models.registry import variant_name
from vit_jax.models.resize_positions import METHODS
from vit_jax.models.variants import VARIANTS
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (160, 320)])
def test_what_a_family_says_is_understood_elsewhere(name, size):
    family = FAMILIES[name]
    assert family.posemb_resize in METHODS
    assert family.value_range in VALUE_RANGES
    parse_transform(family.eval_transform(size), size)
    numbers = [int(n) for n in re.findall(r"\d+", family.eval_transform(size))]
    assert all(n >= max(size) for n in numbers)  # or the crop would not fit


def test_the_transforms_of_the_papers():
    assert FAMILIES["deit"].eval_transform((224, 224)) == (
        "resize_shorter(256, method='bicubic')|center_crop('even')"
    )
    assert "248" in FAMILIES["timm"].eval_transform((224, 224))


def test_the_family_is_found_in_the_file_whatever_its_name(tmp_path):
    cfg, params = model()
    google.write(tmp_path / "model.safetensors", cfg, params)
    assert load_weights(tmp_path / "model.safetensors").family == "google"
    timm.write(tmp_path / "google.npz", cfg, params)
    assert load_weights(tmp_path / "google.npz", num_heads=3).family == "timm"
    huggingface.write(tmp_path / "vit.npz", cfg, params)
    assert load_weights(tmp_path / "vit.npz").family == "huggingface"
    arrays, _ = weight_files.read(tmp_path / "model.safetensors")
    weight_files.write_safetensors(tmp_path / "w", arrays)
    assert load_weights(tmp_path / "w").family == "google"


def test_another_network_is_named_by_its_arrays(tmp_path):
    weight_files.write_npz(tmp_path / "w", {"conv1.weight": np.ones(3), "fc.bias": np.ones(3)})
    with pytest.raises(
        UserError, match=r"no Vision Transformer.*2 arrays such as conv1\.weight"
    ):
        load_weights(tmp_path / "w")


def test_every_variant_has_its_name():
    for size, shape in VARIANTS.items():
        cfg = ViTConfig((28, 28), 3, 14, num_classes=0, **shape._asdict())
        assert variant_name(cfg) == f"{size}/14"


def test_the_page_of_checkpoints_is_up_to_date():
    """`python -m vit_jax.interop.checkpoints_page > docs/checkpoints.md` makes it so."""
    path = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    assert path.read_text() == checkpoints_page.page()
    for name in FAMILIES:
        assert f"| {name} |" in checkpoints_page.page()
