import io
import itertools

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode
from vit_jax.system.errors import UserError


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(encoded, channels=3):
    image = decode({"image": encoded, "label": 0, "name": "some/photo.jpg"}, channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    return np.asarray(image).astype(int)


def complaint(encoded, channels=3):
    with pytest.raises(UserError) as caught:
        pixels(encoded, channels)
    assert "some/photo.jpg" in str(caught.value)
    return str(caught.value)


LOSSLESS = [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]


@pytest.mark.parametrize(("format", "options"), LOSSLESS)
def test_lossless_formats_come_back_unchanged(photo, format, options):
    np.testing.assert_array_equal(pixels(encode(photo, format, **options)), np.asarray(photo))


@pytest.mark.parametrize(("mode", "tolerance"), [("RGB", 2.5), ("L", 2.5), ("CMYK", 5.0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_in_every_colour_mode(photo, mode, tolerance, channels):
    got = pixels(encode(photo.convert(mode), "JPEG", quality=95, subsampling=0), channels)
    expected = photo.convert("L" if mode == "L" or channels == 1 else "RGB")
    if channels == 3:
        expected = expected.convert("RGB")
    assert np.abs(got - np.asarray(expected)).mean() < tolerance


def test_palette_and_single_bit(photo):
    palette = photo.quantize(16)
    np.testing.assert_array_equal(
        pixels(encode(palette, "PNG")), np.asarray(palette.convert("RGB"))
    )
    bits = photo.convert("1")
    got = pixels(encode(bits, "PNG"), 1)
    np.testing.assert_array_equal(got, np.asarray(bits) * 255)


def test_transparency_is_dropped_and_colours_stay(photo):
    for mode, channels in (("RGBA", 3), ("LA", 1)):
        image = photo.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(photo.size))
        expected = np.asarray(photo.convert("RGB" if channels == 3 else "L"))
        np.testing.assert_array_equal(pixels(encode(image, "PNG"), channels), expected)


def test_transparent_palette_gives_no_warning(photo):
    palette = photo.quantize(8)
    encoded = encode(palette, "PNG", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(pixels(encoded), np.asarray(palette.convert("RGB")))


def test_sixteen_bits_are_scaled_to_eight():
    wide = np.array([[0, 128, 129, 257], [32768, 65535, 65278, 300]], np.uint16)
    expected = np.rint(wide / 257).astype(int)
    for format in ("PNG", "TIFF"):
        got = pixels(encode(Image.fromarray(wide), format), 1)
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        pixels(encode(Image.fromarray(wide), "PNG"), 3), expected[..., None].repeat(3, -1)
    )


def test_the_camera_orientation_is_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    got = pixels(encode(photo, "PNG", exif=exif))
    np.testing.assert_array_equal(got, np.asarray(photo.rotate(-90, expand=True)))


def test_broken_camera_notes_do_not_matter(photo, recwarn):
    encoded = encode(photo, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    np.testing.assert_array_equal(pixels(encoded), np.asarray(photo))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    encoded = encode(frames[0], format, save_all=True, append_images=frames[1:])
    got = pixels(encoded)
    assert got.shape == (6, 8, 3)
    assert (np.abs(got - [255, 0, 0]) < 6).all()


def test_paths_bytes_and_arrays_agree(photo, tmp_path):
    photo.save(tmp_path / "x.png")
    for form in (str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), np.asarray(photo)):
        np.testing.assert_array_equal(pixels(form), np.asarray(photo))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
def test_arrays_of_every_shape(shape, rng):
    array = rng.integers(0, 256, shape, np.uint8)
    got = pixels(array)
    expected = array.reshape(5, 4, -1)[..., :3]
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (5, 4, 3)))


def test_broken_images_are_named(photo, tmp_path):
    jpeg = encode(photo, "JPEG")
    assert "repair or remove it" in complaint(jpeg[: len(jpeg) // 2])
    assert "in no format that can be read" in complaint(b"not an image")
    assert "some/photo.jpg is empty; repair or remove it" in complaint(b"")
    assert "No such file" in complaint(str(tmp_path / "gone.jpg"))
    assert "float64" in complaint(np.zeros((4, 4)))
    assert "floating-point" in complaint(
        encode(Image.fromarray(np.zeros((4, 4), "f4")), "TIFF")
    )


def test_a_truncated_image_is_named_even_when_it_must_be_turned(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encode(photo, "JPEG", exif=exif)
    assert "repair or remove it" in complaint(jpeg[: len(jpeg) // 2])


def test_no_corruption_escapes_as_another_exception(photo, rng):
    """Flipped bytes give an image or a UserError, never a bare Pillow exception."""
    outcomes = set()
    for format, _ in itertools.product(
        ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"), range(30)
    ):
        broken = bytearray(encode(photo.resize((24, 16)), format))
        for place in rng.integers(0, len(broken), 8):
            broken[place] = rng.integers(256)
        try:
            outcomes.add(pixels(bytes(broken)).ndim)
        except UserError:
            outcomes.add("error")
    assert outcomes == {3, "error"}


def test_a_decompression_bomb_is_refused(monkeypatch, photo):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "exceeds limit" in complaint(encode(photo, "PNG"))


def test_an_image_that_is_one_endless_line_is_refused():
    line = io.BytesIO()
    Image.new("1", (1, 2_000_000)).save(line, "PNG")
    assert "it has 1 x 2000000 pixels" in complaint(line.getvalue())


@pytest.mark.parametrize("length", [60_000, 4])
def test_a_damaged_header_of_an_array_is_one_line(length):
    data = b"\x93NUMPY\x02\x00" + length.to_bytes(4, "little") + b"(" * length
    assert "\n" not in complaint(data)
