import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.transforms import resize as module
from vit_jax.data.transforms.resize import METHODS, resize

PIL_FILTERS = {"bilinear_antialias": 2, "bicubic": 3, "lanczos": 1}


@pytest.fixture(params=["cykooz", "PIL"], autouse=True)
def engine(request, monkeypatch):
    if request.param == "PIL":
        monkeypatch.setattr(module, "cykooz_resizer", None)
    elif module.cykooz_resizer is None:
        pytest.skip("cykooz.resizer is not installed")
    return request.param


SIZES = [(224, 224), (100, 333), (600, 700), (97, 31), (427, 640), (1, 1)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES)
def test_bilinear_is_that_of_tensorflow(photos, size, mode, engine):
    """Half-pixel centres, no antialiasing: what jax.image does with antialias=False."""
    for photo in photos:
        before = np.asarray(photo.convert(mode), np.float32)
        exact = jax.image.resize(
            before, (*size, *before.shape[2:]), "bilinear", antialias=False
        )
        got = np.asarray(resize(photo.convert(mode), size, "bilinear")).astype(float)
        assert np.abs(got - np.rint(exact)).max() <= 1
        # Halves are rounded up, by cykooz after rows and again after columns.
        assert abs((got - exact).mean()) <= {"PIL": 0.02, "cykooz": 0.04}[engine] or (
            got.size < 1000
        )


def area_weights(before, after):
    """The share of every old pixel in every new one."""
    low, high = np.arange(after) * before / after, (np.arange(after) + 1) * before / after
    old = np.arange(before)
    covered = np.minimum(high[:, None], old + 1) - np.maximum(low[:, None], old)
    return np.maximum(covered, 0) * after / before


@pytest.mark.parametrize("size", SIZES)
def test_area_is_the_mean_over_the_area_covered(photos, size):
    before = np.asarray(photos[0], float)
    rows, columns = (
        area_weights(*lengths) for lengths in zip(before.shape, size, strict=False)
    )
    exact = np.einsum("ah,hwc,bw->abc", rows, before, columns, optimize=True)
    got = np.asarray(resize(photos[0], size, "area")).astype(float)
    assert np.abs(got - exact).max() < 0.501


@pytest.mark.parametrize(("method", "name"), [("bicubic", "cubic"), ("lanczos", "lanczos3")])
def test_antialiased_methods_agree_with_jax(photos, method, name):
    # Half the contrast: else Pillow, which works in 8 bits, clips overshoots after rows.
    soft = photos[1].point([64 + x // 2 for x in range(256)] * 3)
    before = np.asarray(soft, np.float32)
    exact = jax.image.resize(before, (224, 200, 3), name, antialias=True)
    got = np.asarray(resize(soft, (224, 200), method)).astype(float)
    assert np.abs(got - np.rint(exact)).max() <= 2
    assert abs((got - exact).mean()) < 0.02


def test_reducing_needs_antialiasing_to_average():
    """What tells the two bilinear methods apart: fine stripes vanish or alias."""
    stripes = Image.fromarray(np.tile(np.uint8([0, 0, 0, 240]), (64, 16)))
    smooth = np.asarray(resize(stripes, (16, 16), "bilinear_antialias"))
    aliased = np.asarray(resize(stripes, (16, 16), "bilinear"))
    assert abs(int(smooth[8, 8]) - 60) < 12
    assert aliased[8, 8] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_same_size_changes_nothing(photo, method):
    assert resize(photo, (photo.height, photo.width), method).tobytes() == photo.tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_mode_stays_and_size_is_height_by_width(photo, method, mode):
    out = resize(photo.convert(mode), (31, 57), method)
    assert (out.mode, out.height, out.width) == (mode, 31, 57)


@pytest.mark.parametrize(("method", "filter_"), PIL_FILTERS.items())
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", SIZES)
def test_as_pil_resizes_rows_and_then_columns(photos, size, mode, method, filter_, engine):
    """Pass by pass: from a second one, a pixel that differs by a level spreads."""
    for photo in photos:
        photo = photo.convert(mode)
        rows = resize(photo, (photo.height, size[1]), method)
        whole = resize(photo, size, method)
        for before, after in ((photo, rows), (rows, whole)):
            expected = np.asarray(before.resize(after.size, filter_), int)
            off = np.abs(np.asarray(after, int) - expected)
            assert off.max() <= (1 if engine == "cykooz" else 0)
            assert (off > 0).mean() <= 0.01 or off.size < 10


def test_an_image_that_pil_keeps_in_several_blocks(photos, engine):
    """PIL divides what is larger than 16 MiB: its rows are not one behind the other."""
    large = Image.fromarray(np.tile(np.asarray(photos[0]), (6, 6, 1)))
    assert large.width * large.height * 4 > 2 * 2**24
    small = np.asarray(resize(large, (large.height, 300), "bicubic"), int)
    expected = np.asarray(large.resize((300, large.height), 3), int)
    assert np.abs(small - expected).max() <= (1 if engine == "cykooz" else 0)


@pytest.mark.parametrize("method", ["bilinear", "area"])
def test_rounding_down_cuts_off_the_fraction(photos, method):
    """As big_vision casts: half a level darker on average, never more than one."""
    for photo in photos:
        nearest = np.asarray(resize(photo, (97, 131), method), int)
        floor = np.asarray(resize(photo, (97, 131), method, "floor"), int)
        assert (nearest - floor).min() >= 0 or method == "bilinear"  # cykooz rounds twice
        assert abs(nearest - floor).max() <= 1
        assert (nearest - floor).mean() == pytest.approx(0.5, abs=0.1)
        assert np.asarray(resize(photo.crop((0, 0, 7, 7)), (7, 7), method, "floor")).any()


def test_rounding_down_is_exact_where_a_level_is_meant():
    flat = Image.fromarray(np.full((31, 17), 100, np.uint8))
    for method in ("bilinear", "area"):
        assert set(np.asarray(resize(flat, (9, 23), method, "floor")).ravel()) == {100}
    halves = Image.fromarray(np.array([[10, 11], [10, 11]], np.uint8))
    assert np.asarray(resize(halves, (1, 1), "area", "floor")).item() == 10
    assert np.asarray(resize(halves, (1, 1), "area")).item() == 11


@pytest.mark.parametrize(("method", "code"), [("box", 4), ("hamming", 5), ("nearest", 0)])
def test_pillows_other_filters(photos, method, code):
    for photo in photos:
        got = np.asarray(resize(photo, (100, 77), method), int)
        expected = photo.resize((77, photo.height), code).resize((77, 100), code)
        np.testing.assert_array_equal(got, np.asarray(expected, int))
