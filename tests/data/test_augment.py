import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data import augment
from vit_jax.data.augment import OPS, randaugment


class Fixed:
    """A generator whose coin always falls the same way, and whose integers are given."""

    def __init__(self, heads=True, integers=()):
        self.heads, self.values = heads, list(integers)

    def random(self):
        return 0.0 if self.heads else 0.9

    def integers(self, high):
        value = self.values.pop(0)
        assert 0 <= value < high
        return value


def apply(name, image, magnitude, rng=None):
    return np.asarray(OPS[name](image, magnitude / 10, rng or Fixed())).astype(int)


@pytest.fixture(params=["RGB", "L"])
def image(photo, request):
    return photo.convert(request.param)


@pytest.fixture
def pixels(image):
    return np.asarray(image).astype(int)


def grey_mean(image):
    return int(np.asarray(image.convert("L")).mean() + 0.5)


def test_there_are_the_sixteen_of_the_paper():
    assert set(OPS) == {
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color",
        "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
        "Cutout", "SolarizeAdd",
    }  # fmt: skip


@pytest.mark.parametrize("magnitude", [0, 5, 10, 15, 20])
@pytest.mark.parametrize("name", OPS)
def test_operations_keep_size_and_mode(image, name, magnitude):
    for seed in range(3):
        before = image.tobytes()
        out = OPS[name](image, magnitude / 10, np.random.default_rng(seed))
        assert (out.size, out.mode) == (image.size, image.mode)
        assert image.tobytes() == before


def test_invert(image, pixels):
    np.testing.assert_array_equal(apply("Invert", image, 3), 255 - pixels)


def test_autocontrast_stretches_each_channel(image, pixels):
    dull = image.point([50 + x // 3 for x in range(256)] * len(image.getbands()))
    low = np.asarray(dull).min((0, 1)).astype(float)
    high = np.asarray(dull).max((0, 1)).astype(float)
    scale = 255 / (high - low)
    expected = np.floor(np.asarray(dull) * scale - low * scale + 1e-9)
    assert np.abs(apply("AutoContrast", dull, 3) - expected).max() <= 1


def test_equalize_flattens_the_histogram(image):
    out = apply("Equalize", image, 3).reshape(image.height * image.width, -1)
    for channel in out.T:
        ranks = np.searchsorted(np.sort(channel), channel, side="right") / len(channel)
        assert np.abs(channel / 255 - ranks).max() < 0.06


@pytest.mark.parametrize(
    ("magnitude", "bits"), [(0, 0), (5, 2), (10, 4), (15, 6), (20, 8), (25, 8)]
)
def test_posterize_keeps_high_bits(image, pixels, magnitude, bits):
    expected = (pixels >> (8 - bits)) << (8 - bits)
    np.testing.assert_array_equal(apply("Posterize", image, magnitude), expected)


@pytest.mark.parametrize("magnitude", [0, 3, 10, 20])
def test_solarize_inverts_what_is_bright(image, pixels, magnitude):
    threshold = int(25.6 * magnitude)
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    np.testing.assert_array_equal(apply("Solarize", image, magnitude), expected)


@pytest.mark.parametrize("magnitude", [0, 4, 10, 20])
def test_solarize_add_brightens_what_is_dark(image, pixels, magnitude):
    expected = np.where(pixels < 128, np.minimum(pixels + 11 * magnitude, 255), pixels)
    np.testing.assert_array_equal(apply("SolarizeAdd", image, magnitude), expected)


@pytest.mark.parametrize("magnitude", [0, 2, 5, 10, 20])
@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_blend_with_a_degenerate_image(image, pixels, name, magnitude):
    grey = np.asarray(image.convert("L").convert(image.mode)).astype(int)
    degenerate = {
        "Color": grey,
        "Contrast": np.full_like(pixels, grey_mean(image)),
        "Brightness": np.zeros_like(pixels),
        "Sharpness": smoothed(pixels),
    }[name]
    factor = 0.18 * magnitude + 0.1
    expected = np.clip(degenerate + factor * (pixels - degenerate), 0, 255)
    assert np.abs(apply(name, image, magnitude) - expected).max() <= 1 + 0.5 * abs(1 - factor)
    if magnitude == 5:
        assert np.abs(apply(name, image, magnitude) - pixels).max() <= 1


def smoothed(pixels):
    """3 x 3, the middle weighing 5 of 13, borders as they were."""
    out = pixels.astype(float)
    h, w = pixels.shape[:2]
    shifted = [pixels[y : h - 2 + y, x : w - 2 + x] for y in range(3) for x in range(3)]
    out[1:-1, 1:-1] = (sum(shifted) + 4 * shifted[4]) / 13
    return out


def test_contrast_blends_towards_the_true_mean_and_not_towards_the_pixel_count(photo):
    dark = photo.point([x // 4 for x in range(256)] * 3)
    out = apply("Contrast", dark, 0)  # a tenth of the image, nine tenths of the constant
    assert abs(out.mean() - np.asarray(dark).mean()) < 2
    assert np.asarray(dark).mean() < 64


def warped(pixels, y, x):
    """Pixels fetched from (y, x), rounded, and 128 from beyond the border."""
    h, w = pixels.shape[:2]
    y, x = np.rint(y).astype(int), np.rint(x).astype(int)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    out = np.full_like(pixels, 128)
    out[inside] = pixels[y[inside], x[inside]]
    return out


def turned(v, y, x):
    middle_y, middle_x, angle = y.mean(), x.mean(), np.pi / 6 * v
    y, x = y - middle_y, x - middle_x
    turned_y = x * np.sin(angle) + y * np.cos(angle)
    return turned_y + middle_y, x * np.cos(angle) - y * np.sin(angle) + middle_x


WARPS = {
    "ShearX": lambda v, y, x: (y, x + 0.3 * v * y),
    "ShearY": lambda v, y, x: (y + 0.3 * v * x, x),
    "TranslateX": lambda v, y, x: (y, x + 100 * v),
    "TranslateY": lambda v, y, x: (y + 100 * v, x),
    "Rotate": turned,
}


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("magnitude", [0, 3, 7.3, 15])
@pytest.mark.parametrize("name", WARPS)
def test_geometry(image, pixels, name, magnitude, heads):
    y, x = np.mgrid[: image.height, : image.width].astype(float)
    y, x = WARPS[name](magnitude / 10 * (1 if heads else -1), y, x)
    got = apply(name, image, magnitude, Fixed(heads))
    # Places halfway between two pixels may be rounded either way.
    clear = (np.abs(y % 1 - 0.5) > 0.002) & (np.abs(x % 1 - 0.5) > 0.002)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], warped(pixels, y, x)[clear])


def test_the_sign_is_random_in_half_the_cases(photo, rng):
    kinds = [OPS["TranslateX"](photo, 0.5, rng).tobytes() for _ in range(200)]
    assert len(set(kinds)) == 2
    assert 70 < kinds.count(kinds[0]) < 130


@pytest.mark.parametrize(("x", "y"), [(60, 40), (0, 0), (119, 79), (3, 70)])
@pytest.mark.parametrize("magnitude", [0, 5, 10, 20])
def test_cutout_greys_a_square(image, pixels, x, y, magnitude):
    half = 4 * magnitude
    expected = pixels.copy()
    expected[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 128
    np.testing.assert_array_equal(
        apply("Cutout", image, magnitude, Fixed(integers=[x, y])), expected
    )


def test_layers_are_applied_in_turn(photo):
    invert = list(OPS).index("Invert")
    equalize = list(OPS).index("Equalize")
    out = randaugment(photo, Fixed(integers=[invert, equalize]), 2, 10)
    expected = ImageOps.equalize(ImageOps.invert(photo))
    assert out.tobytes() == expected.tobytes()
    assert randaugment(photo, Fixed(), 0, 10).tobytes() == photo.tobytes()


def test_magnitude_is_a_tenth_of_strength(photo):
    out = randaugment(photo, Fixed(integers=[list(OPS).index("Brightness")]), 1, 15)
    expected = ImageEnhance.Brightness(photo).enhance(1.8 * 1.5 + 0.1)
    assert out.tobytes() == expected.tobytes()


def test_every_operation_is_drawn_as_often(monkeypatch):
    counts = dict.fromkeys(OPS, 0)

    def counting(name):
        def count(image, v, rng):
            counts[name] += 1
            return image

        return count

    monkeypatch.setattr(augment, "OPS", {name: counting(name) for name in OPS})
    rng = np.random.default_rng(0)
    for _ in range(1600):
        randaugment(Image.new("L", (1, 1)), rng, 2, 10)
    assert sum(counts.values()) == 3200
    assert min(counts.values()) > 150
    assert max(counts.values()) < 255


def test_the_same_generator_gives_the_same_image(image):
    outs = [randaugment(image, np.random.default_rng(5), 2, 15).tobytes() for _ in range(2)]
    assert outs[0] == outs[1]


def test_presets_are_those_of_augreg():
    assert augment.AUGREG_PRESETS == {
        "none": (0, 0, 0.0), "light1": (2, 0, 0.0), "light2": (2, 10, 0.2),
        "medium1": (2, 15, 0.2), "medium2": (2, 15, 0.5), "strong1": (2, 20, 0.5),
        "strong2": (2, 20, 0.8),
    }  # fmt: skip


def test_light1_is_not_free_of_effect(photo):
    layers, magnitude, _ = augment.AUGREG_PRESETS["light1"]
    outs = [randaugment(photo, np.random.default_rng(i), layers, magnitude) for i in range(30)]
    assert sum(out.tobytes() != photo.tobytes() for out in outs) > 15
