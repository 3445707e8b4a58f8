import math

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data.transforms import augment
from vit_jax.data.transforms.augment import (
    INCREASING_OPS,
    OPS,
    QUIRKS,
    TIMM_OPS,
    randaugment,
    randaugment_timm,
)


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


# ---- the slips of Google's code ----------------------------------------------------------


@pytest.mark.parametrize("magnitude", [0, 3, 5, 10, 20])
@pytest.mark.parametrize(
    ("size", "constant"), [((224, 224), 196), ((200, 250), 195), (None, 255)]
)
def test_quirky_contrast_blends_towards_a_constant(photos, size, constant, magnitude):
    image = photos[0].resize(size) if size else photos[0]
    out = np.asarray(QUIRKS["Contrast"](image, magnitude / 10, Fixed())).astype(int)
    pixels = np.asarray(image).astype(int)
    expected = np.clip(constant + (0.18 * magnitude + 0.1) * (pixels - constant), 0, 255)
    assert np.abs(out - np.trunc(expected)).max() <= 1
    assert (out != np.trunc(expected)).mean() < 0.01  # where rounding in float32 shows


@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 0), (5, 128), (10, 0), (12, 51), (15, 128), (20, 0)]
)
def test_quirky_solarize_has_its_threshold_modulo_256(image, pixels, magnitude, threshold):
    out = np.asarray(QUIRKS["Solarize"](image, magnitude / 10, Fixed())).astype(int)
    np.testing.assert_array_equal(out, np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize(("magnitude", "bits"), [(0, 1), (2, 1), (5, 2), (10, 4), (20, 8)])
def test_quirky_posterize_keeps_a_bit(image, pixels, magnitude, bits):
    out = np.asarray(QUIRKS["Posterize"](image, magnitude / 10, Fixed())).astype(int)
    np.testing.assert_array_equal(out, (pixels >> (8 - bits)) << (8 - bits))


@pytest.mark.parametrize("name", OPS)
def test_the_switch_changes_three_operations(image, name):
    choice = [list(OPS).index(name), 7, 7]  # the last two are Cutout's centre
    plain, quirky = (
        randaugment(image, Fixed(integers=choice), 1, 15, quirks=switch).tobytes()
        for switch in (False, True)
    )
    assert plain == OPS[name](image, 1.5, Fixed(integers=[7, 7])).tobytes()
    assert (plain != quirky) == (name in ("Contrast", "Solarize"))  # 6 bits stay 6 bits
    low = randaugment(image, Fixed(integers=choice), 1, 0, quirks=True).tobytes()
    if name in QUIRKS:
        assert low == QUIRKS[name](image, 0, Fixed()).tobytes()


# ---- timm's RandAugment ------------------------------------------------------------------


def test_timms_list_is_googles_without_cutout():
    assert list(TIMM_OPS) == [name for name in OPS if name != "Cutout"]
    assert set(INCREASING_OPS) < set(TIMM_OPS)


@pytest.mark.parametrize("v", [0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("name", TIMM_OPS)
def test_timms_operations_keep_size_and_mode(image, name, v):
    before = image.tobytes()
    for op in filter(None, (TIMM_OPS[name], INCREASING_OPS.get(name))):
        out = op(image, v, np.random.default_rng(0))
        assert (out.size, out.mode) == (image.size, image.mode)
        assert image.tobytes() == before


@pytest.mark.parametrize(("v", "bits"), [(0, 4), (0.3, 3), (0.9, 1), (1.0, 0)])
def test_increasing_posterize_keeps_ever_fewer_bits(image, pixels, v, bits):
    out = np.asarray(INCREASING_OPS["Posterize"](image, v, Fixed()))
    np.testing.assert_array_equal(out, (pixels >> (8 - bits)) << (8 - bits))


@pytest.mark.parametrize(("v", "threshold"), [(0, 256), (0.5, 128), (0.9, 26), (1.0, 0)])
def test_increasing_solarize_inverts_ever_more(image, pixels, v, threshold):
    out = np.asarray(INCREASING_OPS["Solarize"](image, v, Fixed()))
    np.testing.assert_array_equal(out, np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
@pytest.mark.parametrize(
    ("v", "heads", "factor"),
    [(0, True, 1), (0.9, True, 1.81), (0.9, False, 0.19), (1, False, 0.1), (0.5, False, 0.55)],
)
def test_increasing_blends_move_away_from_one(image, name, v, heads, factor):
    out = INCREASING_OPS[name](image, v, Fixed(heads))
    expected = getattr(ImageEnhance, name)(image).enhance(factor)
    assert np.abs(np.asarray(out).astype(int) - np.asarray(expected).astype(int)).max() <= 1


TIMM_WARPS = {
    # Held at the top left corner, half a pixel before the centre of the first pixel.
    "ShearX": lambda v, y, x: (y, x + 0.3 * v * (y + 0.5)),
    "ShearY": lambda v, y, x: (y + 0.3 * v * (x + 0.5), x),
    "TranslateX": lambda v, y, x: (y, x + 0.45 * v * x.shape[1]),
    "TranslateY": lambda v, y, x: (y + 0.45 * v * x.shape[0], x),
    "Rotate": turned,
}


def cubic(t):
    """Keys's kernel with a = -1, which Pillow warps by (it resizes by a = -0.5)."""
    t = np.abs(t)
    return np.where(
        t < 1, t**3 - 2 * t**2 + 1, np.where(t < 2, -(t**3) + 5 * t**2 - 8 * t + 4, 0)
    )


def interpolated(pixels, y, x):
    """(H, W, 3) pixels at fractional places, from 4 x 4 neighbours, cut off to integers."""
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    total = 0.0
    for i in range(-1, 3):
        for j in range(-1, 3):
            weight = cubic(y - top - i) * cubic(x - left - j)
            rows = (top + i).clip(0, pixels.shape[0] - 1)
            columns = (left + j).clip(0, pixels.shape[1] - 1)
            total += weight[..., None] * pixels[rows, columns]
    return np.floor(total.clip(0, 255) + 1e-9)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("v", [0, 0.5, 0.9])
@pytest.mark.parametrize("name", TIMM_WARPS)
def test_timms_geometry_is_interpolated(photo, name, v, heads):
    pixels = np.asarray(photo).astype(float)
    y, x = np.mgrid[: photo.height, : photo.width].astype(float)
    y, x = TIMM_WARPS[name](v if heads else -v, y, x)
    got = np.asarray(TIMM_OPS[name](photo, v, Fixed(heads))).astype(float)
    inside = (y > 1) & (y < photo.height - 2) & (x > 1) & (x < photo.width - 2)
    difference = np.abs(got - interpolated(pixels, y, x))[inside]
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
    outside = (y < -1) | (y > photo.height) | (x < -1) | (x > photo.width)
    assert (got[outside] == (124, 116, 104)).all()
    assert outside.any() or v == 0


def test_timms_draws(monkeypatch, photo):
    """Half of the draws apply; magnitudes are N(9, 0.5), clipped at 10; names are uniform."""
    drawn = []
    record = lambda name: lambda image, v, rng: (drawn.append((name, v)), image)[1]
    monkeypatch.setattr(augment, "TIMM_OPS", {name: record(name) for name in TIMM_OPS})
    monkeypatch.setattr(augment, "INCREASING_OPS", {})
    rng = np.random.default_rng(0)
    for _ in range(3000):
        randaugment_timm(photo, rng)
    counts = np.unique([name for name, _ in drawn], return_counts=True)[1]
    assert len(counts) == 15
    assert abs(len(drawn) - 3000) < 4 * math.sqrt(6000 / 4)
    assert np.abs(counts - 200).max() < 4 * math.sqrt(200)
    magnitudes = 10 * np.asarray([v for _, v in drawn])
    assert abs(np.median(magnitudes) - 9) < 0.05
    assert abs(np.percentile(magnitudes, 15.87) - 8.5) < 0.08
    assert magnitudes.max() == 10
    assert abs((magnitudes == 10).mean() - 0.0228) < 0.011
    drawn.clear()
    for _ in range(500):
        randaugment_timm(photo, rng, layers=3, magnitude=0.1, std=1.0, probability=1.0)
    assert len(drawn) == 1500
    assert min(v for _, v in drawn) == 0


def test_increasing_is_a_choice(photo):
    brightness = list(TIMM_OPS).index("Brightness")
    for increasing, factor in [(True, 1.45), (False, 1.0)]:
        rng = Fixed(integers=[brightness])
        rng.normal = lambda mean, std: mean
        out = randaugment_timm(photo, rng, 1, 5, 0.0, increasing, 1.0)
        expected = ImageEnhance.Brightness(photo).enhance(factor)
        assert out.tobytes() == expected.tobytes()


# ---- 3-Augment, DINO's, erasing ----------------------------------------------------------

SINGLE = {
    "three_augment": augment.three_augment,
    "color_jitter": lambda image, rng: augment.color_jitter(image, rng, 0.4, 0.4, 0.2, 0.1),
    "grayscale": augment.grayscale,
    "gaussian_blur": augment.gaussian_blur,
    "solarize": augment.solarize,
    "pixel": lambda image, rng: augment.random_erasing(image, rng, 1.0),
    "rand": lambda image, rng: augment.random_erasing(image, rng, 1.0, "rand"),
    "const": lambda image, rng: augment.random_erasing(image, rng, 1.0, "const"),
    "randaugment_timm": randaugment_timm,
}


@pytest.mark.parametrize("name", SINGLE)
def test_the_generator_decides_and_size_and_mode_stay(image, name):
    before = image.tobytes()
    outs = [SINGLE[name](image, np.random.default_rng(seed)) for seed in (*range(8), 0)]
    assert {(out.size, out.mode) for out in outs} == {(image.size, image.mode)}
    assert outs[0].tobytes() == outs[-1].tobytes()
    assert image.tobytes() == before
    kinds = {"grayscale": 1, "solarize": 1}.get(name, 2)
    assert len({out.tobytes() for out in outs}) >= kinds


def test_three_augment_is_one_of_three(photo):
    grey, solarized = photo.convert("L").convert("RGB"), ImageOps.solarize(photo, 128)
    rng, counts = np.random.default_rng(0), [0, 0, 0]
    for _ in range(600):
        out = augment.three_augment(photo, rng)
        kinds = [out.tobytes() == other.tobytes() for other in (grey, solarized)]
        if not any(kinds):
            # A blur leaves the mean where it was, and is far from both of the others.
            means = [np.asarray(x).mean((0, 1)) for x in (out, photo)]
            np.testing.assert_allclose(*means, atol=0.7)
        counts[kinds.index(True) if any(kinds) else 2] += 1
    assert max(abs(count - 200) for count in counts) < 4 * math.sqrt(600 * 2 / 9)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_gaussian_blur_has_its_deviation_in_pixels(photo, image, sigma):
    rng = np.random.default_rng(0)
    out = augment.gaussian_blur(image, rng, 1.0, sigma, sigma)
    pixels = np.asarray(image).astype(float)
    deviations = (sigma, sigma, 0)[: pixels.ndim]
    expected = scipy.ndimage.gaussian_filter(pixels, deviations, mode="nearest")
    assert np.abs(np.asarray(out) - expected).mean() < 0.9
    blurs = {augment.gaussian_blur(photo, rng).tobytes() for _ in range(20)}
    assert len(blurs) > 15


def test_a_probability_is_the_share_of_images_that_change(photo):
    rng = np.random.default_rng(0)
    for op in (
        lambda: augment.grayscale(photo, rng, 0.2),
        lambda: augment.gaussian_blur(photo, rng, 0.2, 1.0, 2.0),
        lambda: augment.solarize(photo, rng, 0.2),
        lambda: augment.color_jitter(photo, rng, 0.4, 0.4, 0.2, 0.1, 0.2),
        lambda: augment.random_erasing(photo, rng, 0.2),
    ):
        changed = sum(op().tobytes() != photo.tobytes() for _ in range(500))
        assert abs(changed - 100) < 4 * math.sqrt(80)


@pytest.mark.parametrize("threshold", [0, 100, 256])
def test_solarize_takes_a_threshold(image, pixels, rng, threshold):
    out = np.asarray(augment.solarize(image, rng, 1.0, threshold))
    np.testing.assert_array_equal(out, np.where(pixels < threshold, pixels, 255 - pixels))


@pytest.mark.parametrize("share", [-0.5, -0.1, 0, 0.25, 0.5])
def test_hue_is_turned(share):
    """Pure colours, by the hexagon that hue runs around."""
    colours = np.asarray([[[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    out = np.asarray(augment.turn_hue(Image.fromarray(colours), share)).astype(int)[0]
    for degrees, found in zip((0, 60, 120, 240), out, strict=True):
        hexagon = (np.asarray([0, 240, 120]) + degrees + 360 * share) % 360
        expected = 255 * np.clip(np.abs(hexagon / 60 - 3) - 1, 0, 1)
        assert np.abs(found - expected).max() <= 14  # hues come in steps of 360 / 256 degrees


def test_hue_leaves_grey_images_alone(photo):
    grey = photo.convert("L")
    assert augment.turn_hue(grey, 0.3).tobytes() == grey.tobytes()


def test_color_jitter_draws_uniform_factors_in_any_order(monkeypatch, photo):
    calls = []
    for name in ("scale_brightness", "scale_contrast", "scale_saturation", "turn_hue"):
        record = lambda image, value, name=name: (calls.append((name, value)), image)[1]
        monkeypatch.setattr(augment, name, record)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        augment.color_jitter(photo, rng, 0.4, 1.5, 0.2, 0.1)
    bounds = {
        "scale_brightness": (0.6, 1.4),
        "scale_contrast": (0.0, 2.5),
        "scale_saturation": (0.8, 1.2),
        "turn_hue": (-0.1, 0.1),
    }
    for name, (low, high) in bounds.items():
        values = np.asarray([value for called, value in calls if called == name])
        assert len(values) == 1000
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 0.04 * (high - low)
    orders = {tuple(name for name, _ in calls[i : i + 4]) for i in range(0, 4000, 4)}
    assert len(orders) == 24
    calls.clear()
    augment.color_jitter(photo, rng, 0.0, 0.4, 0.0)
    assert [name for name, _ in calls] == ["scale_contrast"]


def erased(image, seed, mode="pixel"):
    """The box that changed, as (top, left, height, width), and what is in it."""
    out = np.asarray(augment.random_erasing(image, np.random.default_rng(seed), 1.0, mode))
    changed = (out != np.asarray(image)).reshape(image.height, image.width, -1).any(-1)
    ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    box = ys[0], xs[0], ys[-1] - ys[0] + 1, xs[-1] - xs[0] + 1
    return box, out[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1], changed


def test_random_erasing_covers_a_rectangle():
    black = Image.new("RGB", (120, 80))
    areas, ratios, tops = [], [], []
    for seed in range(300):
        (top, _, height, width), _, changed = erased(black, seed, "const")
        assert changed.sum() == height * width
        areas.append(height * width / 9600)
        ratios.append(height / width)
        tops.append(top / (80 - height))
    assert 0.018 < min(areas) < 0.04
    assert 0.25 < max(areas) < 0.35
    assert 0.27 < min(ratios) < 0.4
    assert 2.0 < max(ratios) < 3.6  # tall ones do not always fit into 80 rows
    assert abs(np.mean(tops) - 0.5) < 0.07


def test_random_erasing_fills_in_three_ways(photo):
    mean, deviation = np.asarray([123.675, 116.28, 103.53]), np.asarray([58.4, 57.12, 57.38])
    _, const, _ = erased(photo, 3, "const")
    assert (const == np.rint(mean)).all()
    _, rand, _ = erased(photo, 3, "rand")
    assert len(np.unique(rand.reshape(-1, 3), axis=0)) == 1
    colours = [erased(photo, seed, "rand")[1][0, 0] for seed in range(150)]
    np.testing.assert_allclose(np.mean(colours, 0), mean, atol=15)
    np.testing.assert_allclose(np.std(colours, 0), deviation, rtol=0.2)
    pixels = np.concatenate([erased(photo, seed)[1].reshape(-1, 3) for seed in range(20)])
    np.testing.assert_allclose(pixels.mean(0), mean, atol=2)
    np.testing.assert_allclose(pixels.std(0), deviation, rtol=0.06)
    assert ((pixels == 0) | (pixels == 255)).mean() == pytest.approx(0.0325, abs=0.005)


def test_random_erasing_leaves_alone_what_no_rectangle_fits(rng):
    line = Image.new("L", (1, 50), 7)
    assert augment.random_erasing(line, rng, 1.0).tobytes() == line.tobytes()
