"""Our evaluation transforms on real photos, against the libraries whose weights we read.

Both sides round to 8 bits between resizing and scaling. timm resizes with Pillow: if we do so
too, nothing differs, and with cykooz.resizer, which is our default, up to 0.52% of the values
do, by one of 255 levels and very few by two. Hugging Face resizes with torch, in fixed point
of another precision: up to 4 levels differ (at the edges of saturated regions), 0.153 of one
on average.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.interop.tiny_models import model
from vit_jax.data.transforms import resize
from vit_jax.data.transforms.language import normalize, parse_transform
from vit_jax.interop import huggingface

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, on import
]
LEVEL = {"inception": 2 / 255, "imagenet": 1 / 255 / 0.224}  # the largest of the channels


def photos():
    """Landscape and portrait, 640 x 427, and one cut to sizes that leave odd rests."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    return [china, flower.transpose(Image.Transpose.ROTATE_90), china.crop((0, 0, 501, 333))]


def ours(photo, transform, value_range, size=(224, 224)):
    image = np.asarray(parse_transform(transform, size)(photo))
    return np.asarray(normalize(jnp.asarray(image), value_range))


@pytest.mark.parametrize("value_range", ["inception", "imagenet"])
@pytest.mark.parametrize(
    "transform",
    [
        "resize(method='bilinear_antialias')",
        "resize(method='bicubic')",
        "resize(method='bicubic', size=256)|center_crop",
        "resize_shorter(256, method='bicubic')|center_crop",
        "resize_shorter(248, method='bicubic')|center_crop",
        "resize_shorter(256, method='lanczos')|center_crop",
    ],
)
def test_hugging_faces_image_processors(tmp_path: Path, transform, value_range):
    transformers = pytest.importorskip("transformers")
    cfg, params = model(image_size=(224, 224), patch_size=16)
    huggingface.write(tmp_path, cfg, params, None, value_range, transform)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    for photo in photos():
        theirs = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        difference = abs(ours(photo, transform, value_range) - theirs)
        assert difference.max() < 4.01 * LEVEL[value_range]
        assert difference.mean() < 0.16 * LEVEL[value_range]


@pytest.mark.parametrize(("size", "crop"), [(224, 0.9), (224, 0.875), (384, 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("engine", ["cykooz", "PIL"])
def test_timms_transforms(size, crop, interpolation, engine, monkeypatch):
    timm = pytest.importorskip("timm")
    if engine == "PIL":
        monkeypatch.setattr(resize, "cykooz_resizer", None)
    theirs = timm.data.create_transform(
        (3, size, size),
        interpolation=interpolation,
        crop_pct=crop,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    method = {"bilinear": "bilinear_antialias"}.get(interpolation, interpolation)
    shorter = int(size / crop)
    transform = f"resize_shorter({shorter}, method='{method}')|center_crop('even')"
    for photo in photos():
        expected = theirs(photo).numpy().transpose(1, 2, 0)
        found = ours(photo, transform, "inception", (size, size))
        off = np.rint(abs(found - expected) / LEVEL["inception"])
        assert off.max() <= (0 if engine == "PIL" else 2)
        assert off.mean() <= 0.006
        np.testing.assert_allclose(found[off == 0], expected[off == 0], atol=1e-6)
