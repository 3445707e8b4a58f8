"""Our distortions and mixing, against timm's and torchvision's on real photos.

All of them draw with Pillow, and given the same random choices no pixel differs.
"""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_jax.data import mixing
from vit_jax.data.transforms import augment
from vit_jax.objectives.classification import smooth_labels

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
THEIRS = {
    "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
    **{name: f"{name}Increasing" for name in augment.INCREASING_OPS},
}


class Fixed:
    """A generator whose coin always falls the same way."""

    def __init__(self, heads):
        self.heads = heads

    def random(self):
        return 0.0 if self.heads else 0.9


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_images().images[0]).resize((96, 72))


def test_the_list_is_timms():
    timm = pytest.importorskip("timm.data.auto_augment")
    ours = [THEIRS.get(name, name) for name in augment.TIMM_OPS]
    assert sorted(ours) == sorted(timm._RAND_INCREASING_TRANSFORMS)
    plain = [name.removesuffix("Increasing") for name in ours]
    assert sorted(plain) == sorted(timm._RAND_TRANSFORMS)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", augment.TIMM_OPS)
def test_timms_operations(photo, monkeypatch, name, increasing, heads):
    timm = pytest.importorskip("timm.data.auto_augment")
    ops = augment.TIMM_OPS | augment.INCREASING_OPS if increasing else augment.TIMM_OPS
    plain = not increasing and name in augment.INCREASING_OPS
    theirs = name if plain else THEIRS.get(name, name)
    # As timm's training transform sets them for ImageNet and bicubic crops.
    hparams = {
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    for magnitude in (0, 2.5, 5, 9, 9.7, 10):
        op = timm.AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=hparams)
        monkeypatch.setattr(random, "random", lambda: 0.1 if heads else 0.9)
        found = np.asarray(ops[name](photo, magnitude / 10, Fixed(heads)))
        if name == "Posterize" and op.level_fn(magnitude, hparams)[0] == 0:
            assert not found.any()  # as Pillow did, until it refused to keep no bits
            continue
        expected = np.asarray(op(photo))
        np.testing.assert_array_equal(found, expected, err_msg=f"magnitude {magnitude}")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        ("scale_brightness", "adjust_brightness", (0, 0.6, 1, 1.7)),
        ("scale_contrast", "adjust_contrast", (0, 0.6, 1, 1.7)),
        ("scale_saturation", "adjust_saturation", (0, 0.6, 1, 1.7)),
        ("turn_hue", "adjust_hue", (-0.5, -0.1, -0.003, 0, 0.1, 0.5)),
    ],
)
def test_torchvisions_colour_changes(photo, ours, theirs, values, mode):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = photo.convert(mode)
    for value in values:
        expected = getattr(functional, theirs)(image, value)
        found = getattr(augment, ours)(image, value)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_torchvisions_jitter_draws_from_the_same_ranges():
    transforms = pytest.importorskip("torchvision.transforms")
    theirs = transforms.ColorJitter(0.4, 1.5, 0.2, 0.1)
    assert theirs.brightness == pytest.approx((0.6, 1.4))  # as tests/data/test_augment.py
    assert theirs.contrast == pytest.approx((0.0, 2.5))
    assert theirs.saturation == pytest.approx((0.8, 1.2))
    assert theirs.hue == pytest.approx((-0.1, 0.1))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_timms_erasing_before_8_bits(mode, monkeypatch):
    """The same rectangles, and the same values once ours are normalised."""
    torch = pytest.importorskip("torch")
    erasing = pytest.importorskip("timm.data.random_erasing")
    their_boxes, our_boxes, values = [], [], []
    theirs = erasing.RandomErasing(1.0, mode=mode, device="cpu")
    random.seed(0)
    torch.manual_seed(0)
    for _ in range(400):
        image = theirs(torch.full((3, 60, 90), 99.0)).numpy()
        ys, xs = np.nonzero(image[0] != 99)
        their_boxes.append([np.ptp(ys) + 1, np.ptp(xs) + 1, ys.min(), xs.min()])
        values.append(image[:, ys[0], xs[0]])
    black = Image.new("RGB", (90, 60), (1, 2, 3))
    ours = []
    for seed in range(400):
        out = augment.random_erasing(black, np.random.default_rng(seed), 1.0, mode)
        pixels = np.asarray(out)
        ys, xs = np.nonzero((pixels != (1, 2, 3)).any(-1))
        our_boxes.append([np.ptp(ys) + 1, np.ptp(xs) + 1, ys.min(), xs.min()])
        colour = pixels[ys[0], xs[0]] / 255
        ours.append((colour - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    quantiles = np.linspace(0.1, 0.9, 9)
    difference = np.quantile(our_boxes, quantiles, 0) - np.quantile(their_boxes, quantiles, 0)
    assert np.abs(difference).max() < 6
    difference = np.quantile(ours, quantiles, 0) - np.quantile(values, quantiles, 0)
    assert np.abs(difference).max() < 0.35


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timms_mixup_of_images_and_targets(monkeypatch, smoothing):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.data.mixup")
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(6, 10, 12, 3)).astype(np.float32), rng.integers(0, 5, 6)
    ours = mixing.Mixing(mixup=0.8, mix_form="timm")
    found, targets = mixing.mix(
        jax.random.key(1), jnp.asarray(images), jax.nn.one_hot(labels, 5), ours
    )
    _, identity = mixing.mix(jax.random.key(1), jnp.asarray(images), jnp.eye(6), ours)
    weight = float(identity[0, 0])
    theirs = timm.Mixup(0.8, 0.0, label_smoothing=smoothing, num_classes=5)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (weight, False))
    expected, expected_targets = theirs(
        torch.from_numpy(images).permute(0, 3, 1, 2).clone(), torch.from_numpy(labels)
    )
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-6)
    np.testing.assert_allclose(smooth_labels(targets, smoothing), expected_targets, atol=1e-6)


def test_timms_boxes(monkeypatch):
    """Given our weight and centre, timm cuts the box that we cut."""
    timm = pytest.importorskip("timm.data.mixup")
    height, width = 15, 22
    for seed, weight in enumerate([0.0, 0.1, 0.37, 0.5, 0.83, 0.999, 1.0]):
        key = jax.random.key(seed)
        kept = np.asarray(mixing._outside_box(key, (height, width), jnp.float32(weight)))
        centres = [
            int(jax.random.randint(jax.random.fold_in(key, axis), (), 0, length))
            for axis, length in enumerate((height, width))
        ]
        monkeypatch.setattr(np.random, "randint", lambda *a, c=centres, **k: c.pop(0))
        (top, bottom, left, right), share = timm.cutmix_bbox_and_lam(
            (3, height, width), np.float32(weight)
        )
        expected = np.ones((height, width))
        expected[top:bottom, left:right] = 0
        np.testing.assert_array_equal(kept, expected)
        assert math.isclose(kept.mean(), share, abs_tol=1e-6)
