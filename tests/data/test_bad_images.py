"""A folder salted with what one finds in folders of images, through every source."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import bad_images
from vit_jax.data.bad_images import NONE, BadImages, Replacing
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.image_cache import Kept
from vit_jax.data.packing import Options, prepare
from vit_jax.data.sources import catalog
from vit_jax.system.errors import UserError

# Pillow tells of camera notes that it cannot read, and reads the pixels.
pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, data):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )


def png(width, height, pixels, *extra):
    """A grey 8-bit PNG of any promised size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def cut(encoded):
    return encoded[: len(encoded) // 2]


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a.txt", "a")
    return file.getvalue()


def bad_kinds(photo):
    jpeg, rng = encode(photo, "JPEG"), np.random.default_rng(0)
    broken = bytearray(encode(photo, "PNG"))
    broken[len(broken) // 2] ^= 255
    grey, inflating = np.zeros((4, 4)), zlib.compress(bytes(1 << 22))
    return {
        "empty.jpg": b"",
        "zeros.jpg": bytes(1000),
        "noise.jpg": rng.bytes(1000),
        "text.jpg": b"a photo of a cat",
        "page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>",
        "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "paper.jpg": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zipped.jpg": archive(),
        "program.jpg": encode(photo, "EPS"),
        "beginning.jpg": jpeg[:20],
        "marker.jpg": b"\xff\xd8\xff" + rng.bytes(500),
        "cut.jpg": cut(jpeg),
        "cut_progressive.jpg": cut(encode(photo, "JPEG", progressive=True)),
        "cut.png": cut(encode(photo, "PNG")),
        "cut.gif": cut(encode(photo, "GIF")),
        "cut.webp": cut(encode(photo, "WEBP")),
        "cut.bmp": cut(encode(photo, "BMP")),
        "cut.tif": cut(encode(photo, "TIFF")),
        "flipped_bit.png": bytes(broken),
        "no_frame.gif": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
        "no_pixels.png": png(0, 0, b""),
        "bomb.png": png(50_000, 50_000, b"\0"),
        "text_bomb.png": png(1, 1, b"\0\0", chunk(b"zTXt", b"a\0\0" + inflating)),
        "float.tif": encode(Image.fromarray(grey.astype("f4")), "TIFF"),
        "wide.tif": encode(Image.fromarray((grey + 100_000).astype("i4")), "TIFF"),
    }  # fmt: skip


def odd_kinds(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", photo.size, colour) for colour in ("red", "blue")]
    see_through = photo.convert("RGBA")
    see_through.putalpha(100)
    return {
        "cmyk.jpg": encode(photo.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(photo.convert("L"), "JPEG"),
        "wide.png": encode(Image.fromarray(np.full((4, 4), 40_000, np.uint16)), "PNG"),
        "palette.png": encode(photo.quantize(16), "PNG"),
        "palette_alpha.png": encode(photo.quantize(8), "PNG", transparency=b"\0\x80\xff"),
        "alpha.png": encode(see_through, "PNG"),
        "grey_alpha.png": encode(see_through.convert("LA"), "PNG"),
        "bits.png": encode(photo.convert("1"), "PNG"),
        "moves.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "turned.jpg": encode(photo, "JPEG", exif=exif),
        "bad_exif.jpg": encode(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffx"),
        "dot.png": png(1, 1, b"\0\0"),
        "line.png": png(3000, 1, bytes(3001)),
        "really_png.jpg": encode(photo, "PNG"),
        "two_in_one.jpg": encode(photo, "MPO", save_all=True, append_images=frames[1:]),
        "jpeg2000.JPG": encode(photo, "JPEG2000"),
    }


@pytest.fixture(scope="session")
def salted(tmp_path_factory, photos):
    """Folders of 25 bad and 16 odd files, in classes `bad` and `odd`."""
    root, photo = tmp_path_factory.mktemp("salted"), photos[0].resize((60, 40))
    for name, kinds in (("bad", bad_kinds(photo)), ("odd", odd_kinds(photo))):
        (root / name).mkdir()
        for file, content in kinds.items():
            (root / name / file).write_bytes(content)
    return root


def sort(source):
    """Which examples of a source decode, and the complaints about those that do not."""
    good, complaints = [], []
    for i in range(len(source)):
        example = source[i]
        try:
            image = decode(example, 3)
        except BadImage as error:
            complaints.append((example, str(error)))
        else:
            assert image.mode == "RGB"
            good.append((example["label"], image.tobytes()))
    assert {label for label, _ in good} == {1}  # class `odd`
    for example, text in complaints:
        assert example["label"] == 0, text  # class `bad`
        assert example["name"] in text
        assert text.endswith("repair or remove it.")
    return sorted(good), sorted(text for _, text in complaints)


def test_every_kind_is_decoded_right_or_named(salted, photos):
    good, complaints = sort(catalog.load(f"folder:{salted}", "all"))
    assert (len(good), len(complaints)) == (16, 25)
    for file in os.listdir(salted / "bad"):
        assert sum(str(salted / "bad" / file) in text for text in complaints) == 1
    assert [f"{salted}/bad/empty.jpg is empty" in text for text in complaints].count(True) == 1
    photo = np.asarray(photos[0].resize((60, 40)), int)
    for name, tolerance in [("cmyk.jpg", 8), ("alpha.png", 0), ("really_png.jpg", 0)]:
        got = np.asarray(decode({"image": str(salted / "odd" / name), "name": ""}, 3), int)
        assert np.abs(got - photo).mean() <= tolerance, name
    turned = decode({"image": str(salted / "odd" / "turned.jpg"), "name": ""}, 3)
    assert turned.size == (40, 60)
    wide = decode({"image": str(salted / "odd" / "wide.png"), "name": ""}, 1)
    assert np.asarray(wide)[0, 0] == round(40_000 / 257)


def test_the_same_from_a_file_of_labels(salted, tmp_path):
    lines = [f"{path},{path.parent.name}" for path in sorted(salted.glob("*/*"))]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *lines]))
    assert sort(catalog.load(f"folder:{tmp_path}", "all")) == sort(
        catalog.load(f"folder:{salted}", "all")
    )


def test_the_same_from_hugging_face(salted, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    paths = sorted(salted.glob("*/*"))
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": p.read_bytes(), "path": p.name} for p in paths],
            "label": [int(p.parent.name == "odd") for p in paths],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["bad", "odd"])}
        ),
    )
    table.save_to_disk(str(tmp_path / "saved"))
    good, complaints = sort(catalog.load(f"hf:{tmp_path / 'saved'}", "train"))
    assert good == sort(catalog.load(f"folder:{salted}", "all"))[0]
    assert len(complaints) == 25
    assert sum("(cut.png)" in text for text in complaints) == 1


BUILDER = """
import pathlib, sys
import tensorflow_datasets as tfds

class Salted(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=["bad", "odd"]),
        }))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in pathlib.Path(sys.argv[1]).glob("*/*"):
            yield path.name + path.parent.name, {"image": path, "label": path.parent.name}
"""


def test_the_same_from_tensorflow_datasets(salted, tmp_path):
    (tmp_path / "salted.py").write_text(BUILDER)
    code = "import salted; salted.Salted(data_dir='data', file_format='array_record')"
    command = [sys.executable, "-c", code + ".download_and_prepare()", str(salted)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    good, complaints = sort(catalog.load("tfds:salted", "train", str(tmp_path / "data")))
    assert good == sort(catalog.load(f"folder:{salted}", "all"))[0]
    assert len(complaints) == 25


def test_packing_leaves_the_bad_ones_out_and_lists_them(salted, tmp_path, capfd):
    packed = prepare(
        f"folder:{salted}", tmp_path / "packed", {"train": "all"}, Options(max_bad=25), None
    )
    source = catalog.load(f"records:{tmp_path / 'packed'}", "train")
    good, complaints = sort(source)
    assert good == sort(catalog.load(f"folder:{salted}", "all"))[0]
    assert (len(complaints), packed["train"]["examples"]) == (0, 16)
    told = capfd.readouterr().err
    for file in os.listdir(salted / "bad"):
        assert f"image {salted}/bad/{file} " in told
        assert any(f"/bad/{file} " in text for text in packed["train"]["left_out"])
    with pytest.raises(UserError, match="of 41 images at least 25 cannot be used, and 24 are"):
        prepare(f"folder:{salted}", tmp_path / "x", {"a": "all"}, Options(max_bad=24), None)
    assert os.listdir(tmp_path) == ["packed"]


# --- standing in --------------------------------------------------------------------------


def test_the_next_good_image_stands_in_for_a_bad_one(salted):
    source = catalog.load(f"folder:{salted}", "all")
    replaced = Replacing(Kept(source, 3), limit=25)
    is_bad = [source[i]["label"] == 0 for i in range(41)]
    for i in range(41):
        example = replaced[i]
        standing_in = next(j % 41 for j in range(i, i + 41) if not is_bad[j % 41])
        assert example["name"] == source[standing_in]["name"]
        assert example["bad"] == (i if is_bad[i] else NONE)
        assert example["label"] == 1
        expected = decode(source[standing_in], 3)
        assert example["image"].tobytes() == expected.tobytes()
        assert decode(example, 3) is example["image"]
    assert len(pickle.loads(pickle.dumps(replaced))) == len(replaced) == 41
    assert replaced.class_names == ("bad", "odd")


def test_too_many_bad_images_in_a_row_are_an_error(salted):
    source = catalog.load(f"folder:{salted}", "all")
    bad = [i for i in range(41) if source[i]["label"] == 0]
    with pytest.raises(BadImage) as caught:
        Replacing(Kept(source, 3), limit=0)[bad[0]]
    assert source[bad[0]]["name"] in str(caught.value)


def test_bad_images_are_told_of_once_and_counted(salted, capfd, monkeypatch):
    monkeypatch.setattr(bad_images, "_told", set())
    source = catalog.load(f"folder:{salted}", "all")
    bad = [i for i in range(41) if source[i]["label"] == 0]
    found = BadImages(source, limit=2)
    for i in (bad[0], bad[1], bad[0]):
        found.add(i)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ")[2] for line in lines] == ["(1):", "(2):"]
    assert source[bad[1]]["name"] in lines[1]
    with pytest.raises(UserError) as caught:
        found.add(bad[2])
    assert source[bad[2]]["name"] in str(caught.value)
    assert "of 41 images at least 3 cannot be used, and 2 are allowed" in str(caught.value)
    BadImages(source, limit=2).add(bad[0])  # a second evaluation
    assert capfd.readouterr().err == ""


def test_a_vanished_file_is_no_bad_image(salted, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes((salted / "odd" / "dot.png").read_bytes())
    source = catalog.load(f"folder:{tmp_path}", "all")
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(
        UserError, match=r"a/x\.png cannot be decoded \(.*No such file"
    ) as caught:
        Replacing(Kept(source, 3), limit=1)[0]
    assert not isinstance(caught.value, BadImage)
