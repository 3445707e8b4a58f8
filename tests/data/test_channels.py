"""Images of any number of channels, of 8 and 16 bits: files, arrays, batches."""

import io
import struct
import time
import tracemalloc
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.campaign.large_tiffs import large_tiffs
from tests.tiny_config import tiny
from vit_jax.data import on_device, pipeline, tiff
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.packing import encoded as packed
from vit_jax.data.planes import Planes
from vit_jax.data.sources import catalog
from vit_jax.data.transforms.language import parse_transform
from vit_jax.data.transforms.resize import METHODS
from vit_jax.evaluation import inference
from vit_jax.system.errors import UserError
from vit_jax.training import run


def noise(channels, dtype=np.uint8, shape=(13, 9), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (*shape, channels), dtype, endpoint=True)


def saved(pixels, form, **options):
    file = io.BytesIO()
    if form == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels.squeeze()).save(file, form, **options)
    return file.getvalue()


def chunk(kind, data):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )


def wide_png(pixels):
    """A PNG of 16 bits, each second row stored as differences to the row above."""
    height, width, channels = pixels.shape
    raw = np.frombuffer(pixels.astype(">u2").tobytes(), np.uint8).reshape(height, -1).copy()
    rows = [
        b"\2" + (raw[i] - raw[i - 1]).tobytes() if i % 2 else b"\0" + raw[i].tobytes()
        for i in range(height)
    ]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def make_tiff(pixels, order="<", apart=False, rows=4, deflate=False, tile=None):
    """A TIFF of many channels, as programs for satellite images write it."""
    height, width, channels = pixels.shape
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    blocks = []
    tall, wide = tile or (rows, width)
    for layer in range(channels) if apart else (slice(None),):
        part = stored[..., layer : layer + 1] if apart else stored
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                block = part[top : top + tall, left : left + wide]
                if tile:
                    lacks = [(0, tall - block.shape[0]), (0, wide - block.shape[1]), (0, 0)]
                    block = np.pad(block, lacks)
                blocks.append(zlib.compress(block.tobytes()) if deflate else block.tobytes())
    body, offsets = b"", []
    for block in blocks:
        offsets.append(8 + len(body))
        body += block
    bits = [pixels.dtype.itemsize * 8] * channels
    places = (324, 325) if tile else (273, 279)
    tags = {256: [width], 257: [height], 258: bits, 259: [8 if deflate else 1], 262: [1],
            277: [channels], 284: [2 if apart else 1], places[0]: offsets,
            places[1]: list(map(len, blocks))}  # fmt: skip
    tags |= {322: [wide], 323: [tall]} if tile else {278: [rows]}
    at, extra = 8 + len(body), b""
    end, entries = at + 2 + 12 * len(tags) + 4, b""
    for tag, values in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            data, extra = struct.pack(order + "I", end + len(extra)), extra + data
        entries += struct.pack(order + "HHI", tag, 4, len(values)) + data
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "I", at)
    return head + body + struct.pack(order + "H", len(tags)) + entries + bytes(4) + extra


def pixels_of(image, channels, bits=8):
    found = decode({"image": image, "label": 0, "name": "some/scan"}, channels, bits)
    return np.asarray(found)


# ---- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"order": ">"},
        {"apart": True},
        {"apart": True, "deflate": True, "order": ">"},
        {"deflate": True, "rows": 5},
        {"tile": (16, 16)},
        {"tile": (8, 4), "apart": True, "deflate": True},
    ],
)
def test_tiff_of_many_channels(channels, dtype, how):
    pixels = noise(channels, dtype)
    found = tiff.read(make_tiff(pixels, **how))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels)
    bits = 8 * pixels.dtype.itemsize
    if channels > 1:
        np.testing.assert_array_equal(
            pixels_of(make_tiff(pixels, **how), channels, bits), pixels
        )


@pytest.mark.parametrize("method", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "I;16"])
def test_what_pillow_writes_is_read_as_pillow_reads_it(photo, method, mode):
    image = photo.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 251 + noise(1)[0, 0])
    for orientation in range(1, 9):
        tags = {274: orientation}
        file = io.BytesIO()
        image.save(file, "TIFF", compression=method, tiffinfo=tags)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))))
        found = tiff.read(file.getvalue())
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_differences_of_neighbours(photo):
    file = io.BytesIO()
    photo.save(file, "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    assert Image.open(io.BytesIO(file.getvalue())).tag_v2[317] == 2
    np.testing.assert_array_equal(tiff.read(file.getvalue()), np.asarray(photo))


def test_broken_tiffs_are_bad_images(rng):
    whole = make_tiff(noise(5))
    for i in range(300):
        broken = bytearray(whole[: len(whole) if i % 3 else int(rng.integers(9, len(whole)))])
        for place in rng.integers(0, len(broken), 6):
            broken[place] = rng.integers(256)
        try:
            found = pixels_of(bytes(broken), 5)
            assert found.shape[2] == 5
        except BadImage:
            pass


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 3, 4, 7])
def test_arrays_in_files(channels, dtype):
    pixels, bits = noise(channels, dtype), 8 * np.dtype(dtype).itemsize
    np.testing.assert_array_equal(pixels_of(saved(pixels, "npy"), channels, bits), pixels)
    first = saved(np.moveaxis(pixels, -1, 0), "npy")  # as torch has it
    np.testing.assert_array_equal(pixels_of(first, channels, bits), pixels)
    np.testing.assert_array_equal(pixels_of(pixels, channels, bits), pixels)


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_kept_where_it_is_asked_for(channels):
    pixels = noise(channels)
    for form, options in (
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True, "exact": True}),
    ):
        if (form, channels) == ("WEBP", 2):
            continue
        found = pixels_of(saved(pixels, form, **options), channels)
        np.testing.assert_array_equal(found, pixels)
    palette = Image.fromarray(noise(3)).quantize(8)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([0, 128, 255]))
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGBA"))
    np.testing.assert_array_equal(pixels_of(file.getvalue(), 4), expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_of_a_png_are_kept(channels):
    pixels = noise(channels, np.uint16)
    np.testing.assert_array_equal(pixels_of(wide_png(pixels), channels, 16), pixels)
    if channels == 4:  # in 8 bits the brightest stays the brightest
        expected = np.rint(pixels / 257).astype(np.uint8)
        np.testing.assert_array_equal(pixels_of(wide_png(pixels), 4, 8), expected)
        np.testing.assert_array_equal(pixels_of(wide_png(pixels), 3, 16), pixels[..., :3])


def test_eight_bits_become_sixteen():
    pixels = noise(3)
    found = pixels_of(saved(pixels, "PNG"), 3, 16)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels.astype(np.uint16) * 257)
    grey = pixels_of(saved(pixels[..., :1], "PNG"), 3, 16)
    np.testing.assert_array_equal(grey, pixels[..., :1].repeat(3, -1).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    ("image", "channels", "bits", "said"),
    [
        (noise(3), 4, 8, r"has 3 channels, and data\.channels is 4; set that to what"),
        (saved(noise(1), "PNG"), 2, 8, r"has 1 channel, and data\.channels is 2"),
        (saved(noise(4), "PNG"), 5, 8, r"has 4 channels, and data\.channels is 5"),
        (make_tiff(noise(5)), 4, 16, r"has 5 channels, and data\.channels is 4"),
        (noise(5), 3, 8, r"has 5 channels, and data\.channels is 3"),
        (np.zeros((4, 4, 5), "f4"), 5, 8, "an array of float32"),
        (make_tiff(noise(5))[:300], 5, 8, "TIFF is"),
        (saved(noise(4), "npy")[:200], 4, 8, "cannot be decoded"),
        (wide_png(noise(2, np.uint16)), 2, 16, "grey with transparency in 16 bits"),
    ],
)
def test_other_channels_are_bad_images(image, channels, bits, said):
    with pytest.raises(BadImage, match=said) as caught:
        pixels_of(image, channels, bits)
    assert "some/scan" in str(caught.value)


@pytest.mark.parametrize(("channels", "bits"), [(0, 8), (-3, 8), (3, 12), (2.5, 8)])
def test_settings_that_no_image_has(channels, bits):
    with pytest.raises(UserError, match=r"data\.(channels|bits) is"):
        pixels_of(noise(3), channels, bits)


# ---- transforms --------------------------------------------------------------------------

MOVES = ("resize", "resize_shorter(9)|center_crop", "resize_shorter(8, 'bicubic')|center_crop")


@pytest.mark.parametrize(
    "spec", [*MOVES, "random_resized_crop|flip", "inception_crop|shift(2)"]
)
def test_each_channel_is_what_a_grey_image_would_be(spec):
    pixels = noise(5, shape=(40, 30))
    transform = parse_transform(spec, (8, 8))
    whole = np.asarray(transform(Planes.of(pixels), np.random.default_rng(3)))
    assert whole.shape == (8, 8, 5)
    for c in range(5):
        grey = Image.fromarray(np.ascontiguousarray(pixels[..., c]))
        alone = transform(grey, np.random.default_rng(3))
        np.testing.assert_array_equal(whole[..., c], np.asarray(alone))


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits_are_resized_to_their_own_levels(method):
    """Levels that differ by less than one of 256 come out as they should, within rounding."""
    pixels = 30_000 + noise(2, shape=(40, 36)).astype(np.uint16)
    transform = parse_transform(f"resize('{method}')", (10, 9))
    wide = np.asarray(transform(Planes.of(pixels))).astype(int) - 30_000
    narrow = np.asarray(transform(Planes.of((pixels - 30_000).astype(np.uint8)))).astype(int)
    inside = (narrow > 0) & (narrow < 255)  # where 8 bits do not clip what a filter overshoots
    assert np.abs(wide - narrow)[inside].max() <= 2  # which round in between
    assert len(np.unique(wide)) > 30
    flat = parse_transform(f"resize('{method}')", (10, 9))(
        Planes.of(np.full_like(pixels, 40_001))
    )
    np.testing.assert_allclose(np.asarray(flat), 40_001, atol=1)


def test_what_changes_colours_is_refused_early():
    for field, bits, channels in (("train_transform", 8, 4), ("train_transform", 16, 3)):
        config = tiny()
        config.data.source = f"synthetic:8x8x{channels},classes=3,examples=64"
        config.data.update({field: "flip|color_jitter(0.1, 0.1, 0.1)", "bits": bits})
        config.data.channels = channels
        with pytest.raises(
            UserError, match="color_jitter is for images of 1 or 3 channels of 8"
        ):
            run.build(config)


# ---- all the way -------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path):
    """Twelve files of five channels of 16 bits in two folders, as TIFF and as .npy."""
    for form in ("tif", "npy"):
        for i in range(12):
            pixels = noise(5, np.uint16, (8, 8), seed=i)
            path = tmp_path / form / "ab"[i % 2] / f"{i}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_tiff(pixels) if form == "tif" else saved(pixels, "npy"))
    return tmp_path


@pytest.mark.parametrize("form", ["tif", "npy"])
@pytest.mark.parametrize("bits", [8, 16])
def test_batches_have_the_channels_and_levels_of_files(scans, form, bits):
    source = catalog.load(f"folder:{scans}/{form}", "all")
    reading = {"transform": parse_transform("resize", (8, 8)), "channels": 5, "bits": bits}
    [batch] = pipeline.eval_batches(source, batch_size=16, threads=1, **reading)
    assert batch["image"].dtype == (np.uint8 if bits == 8 else np.uint16)
    for i in range(12):
        number = int(source[i]["name"].rpartition("/")[2].partition(".")[0])
        pixels = noise(5, np.uint16, (8, 8), seed=number)
        expected = pixels if bits == 16 else np.rint(pixels / 257)
        np.testing.assert_array_equal(batch["image"][i], expected)
    assert not batch["image"][12:].any()
    with pipeline.train_batches(source, batch_size=4, seed=0, threads=1, **reading) as batches:
        assert next(batches)["image"].shape == (4, 8, 8, 5)


def test_levels_of_sixteen_bits_reach_the_model_as_they_are():
    config = tiny()
    config.data.bits, config.data.channels = 16, 5
    prepare = on_device.prepare_for_eval(config)
    pixels = np.array([0, 1, 257, 32767, 65535], np.uint16).reshape(1, 1, 1, 5)
    found = prepare({"image": pixels}, jax.random.key(0))["image"]
    np.testing.assert_allclose(np.ravel(found), pixels.ravel() / 32767.5 - 1, atol=1e-6)


def test_a_folder_of_arrays_is_found_and_a_model_run_on_it(scans):
    paths = inference.find_images([f"{scans}/npy/a"])
    assert len(paths) == 6
    config = tiny()
    config.data.bits, config.data.channels = 16, 5
    config.image_size = (8, 8)
    read = list(inference._read([*paths, __file__], config))
    assert all(image.shape == (8, 8, 5) and image.dtype == np.uint16 for image in read[:6])
    assert isinstance(read[6], inference.Unreadable)


def test_packing_keeps_channels_and_levels(scans):
    pixels = noise(5, np.uint16, (40, 24))
    for content in (pixels, saved(pixels, "npy"), make_tiff(pixels)):
        example = {"image": content, "label": 0, "name": "x"}
        np.testing.assert_array_equal(pixels_of(packed(example, None), 5, 16), pixels)
        smaller = pixels_of(packed(example, 12), 5, 16)
        assert smaller.shape == (20, 12, 5)
        assert abs(float(smaller.mean()) - float(pixels.mean())) < 500


# ---- TIFF files made to mislead ----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tiles.tif", "rows.tif", "channels.tif", "lzw.tif", "packbits.tif", "entries.tif"]
)
def test_a_small_tiff_takes_no_time_and_no_memory(name):
    """It would take minutes or gigabytes to see that what is promised is not there."""
    begun = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"strips or tiles|declares|no whole numbers"):
        tiff.read(large_tiffs()[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.process_time() - begun < 5


def test_colours_of_16_bits_in_a_tiff_are_read_at_8():
    pixels = noise(3, np.uint16)
    found = decode({"image": make_tiff(pixels), "name": "x"}, 3)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.rint(pixels / 257))
    with pytest.raises(BadImage, match=r"has 5 channels, and data\.channels is 3"):
        decode({"image": make_tiff(noise(5)), "name": "x"}, 3)
