import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode
from vit_jax.data.packing import EXAMPLES_A_SHARD, Options, encoded, prepare
from vit_jax.data.pipeline import train_batches
from vit_jax.data.sources import catalog
from vit_jax.data.sources.source import known_labels
from vit_jax.data.transforms.language import parse_transform
from vit_jax.system.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, **options):
    command = [sys.executable, "-m", "vit_jax.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def pack(source, output, splits, **options):
    return prepare(source, output, splits, Options(**options), None)


def message(path, split="train"):
    with pytest.raises(UserError) as caught:
        catalog.load(f"records:{path}", split)
    return str(caught.value)


def same(left, right, channels=1):
    assert len(left) == len(right)
    assert left.class_names == right.class_names
    for i in range(len(left)):
        assert left[i]["label"] == right[i]["label"]
        one, two = decode(left[i], channels), decode(right[i], channels)
        assert one.tobytes() == two.tobytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", path, {"train": "train", "test": "test"}, shards=4)
    return path


@pytest.fixture
def pictures(tmp_path, photo):
    for i in range(20):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.rotate(i).save(path)
    return tmp_path / "pictures"


# --- what is packed -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "train[:33%]", "train[-7:]+test", "val"])
def test_packed_data_are_those_of_the_source(digits, split):
    packed = catalog.load(f"records:{digits}", split)
    source = catalog.load("digits", split)
    same(packed, source)
    np.testing.assert_array_equal(
        known_labels(packed), [source[i]["label"] for i in range(len(source))]
    )


def test_shards_and_labels_lie_beside_a_description(digits):
    assert sorted(os.listdir(digits)) == sorted(
        ["dataset.json", "test-labels.npy", "train-labels.npy"]
        + [f"{s}-{k:05}-of-00004.array_record" for s in ("train", "test") for k in range(4)]
    )
    info = json.loads((digits / "dataset.json").read_text())
    assert info["class_names"] == list("0123456789")
    train = info["splits"]["train"]
    assert train["examples"] == 1437
    assert [shard["examples"] for shard in train["shards"].values()] == [359, 359, 359, 360]
    assert info["splits"]["test"]["source"] == "digits"
    assert catalog.split_names(f"records:{digits}") == ("train", "test")


def test_files_keep_their_bytes_and_names(pictures, tmp_path):
    packed = pack(f"folder:{pictures}", tmp_path / "packed", {"all": "all"})
    source = catalog.load(f"folder:{pictures}", "all")
    read = catalog.load(f"records:{tmp_path / 'packed'}", "all")
    assert len(packed["all"]["shards"]) == 1
    for i in range(20):
        assert read[i]["image"] == Path(source[i]["image"]).read_bytes()
        assert (
            read[i]["name"] == f"records:{tmp_path / 'packed'} all[{i}] ({source[i]['name']})"
        )


def test_anyone_can_read_a_record(digits):
    """The format that records.py describes, read without our code."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(digits / "train-00000-of-00004.array_record"))
    assert reader.num_records() == 1437 // 4
    record = msgpack.unpackb(reader.read())
    reader.close()
    assert (record.keys(), record["name"]) == ({"image", "label", "name"}, "digits[0]")
    assert record["label"] == np.load(digits / "train-labels.npy")[0]
    pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
    np.testing.assert_array_equal(pixels, catalog.load("digits", "train")[0]["image"])


@pytest.mark.parametrize("shards", [1, 3, 20, 50])
def test_any_number_of_shards_holds_everything(pictures, tmp_path, shards):
    packed = pack(f"folder:{pictures}", tmp_path / "x", {"all": "all"}, shards=shards)
    assert len(packed["all"]["shards"]) == min(shards, 20)
    same(
        catalog.load(f"records:{tmp_path}/x", "all"), catalog.load(f"folder:{pictures}", "all")
    )


def test_the_default_number_of_shards_grows_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("vit_jax.data.packing.EXAMPLES_A_SHARD", 500)
    packed = pack("digits", tmp_path / "x", {"train": "train", "test": "test"})
    assert [len(packed[s]["shards"]) for s in ("train", "test")] == [3, 1]
    assert EXAMPLES_A_SHARD == 10_000


def test_larger_images_can_be_made_smaller(photo, tmp_path):
    grey = photo.convert("L")
    for name, image in (("large", photo), ("small", photo.resize((40, 30))), ("grey", grey)):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "in" / "a" / f"{name}.png")
    pack(f"folder:{tmp_path}/in", tmp_path / "out", {"all": "all"}, resize_shorter=30)
    source = catalog.load(f"records:{tmp_path}/out", "all")
    images = {source[i]["name"].split("/")[-1]: source[i]["image"] for i in range(3)}
    opened = {name: Image.open(io.BytesIO(image)) for name, image in images.items()}
    assert opened["large.png)"].size == (45, 30)  # of 120 x 80
    assert (opened["large.png)"].format, opened["large.png)"].mode) == ("JPEG", "RGB")
    assert (opened["grey.png)"].mode, opened["grey.png)"].size) == ("L", (45, 30))
    assert images["small.png)"] == (tmp_path / "in" / "a" / "small.png").read_bytes()
    expected = np.asarray(photo.resize((45, 30), Image.Resampling.BICUBIC), int)
    assert np.abs(np.asarray(opened["large.png)"], int) - expected).mean() < 4


def test_the_camera_orientation_outlives_resizing(photo):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif)
    example = {"image": file.getvalue(), "label": 0, "name": ""}
    assert encoded(example, None) == file.getvalue()
    small = encoded(example, 30)
    assert decode({**example, "image": small}, 3).size == (30, 45)


def test_a_packed_set_trains_as_its_source_does(digits):
    """The same batches, bit for bit, from worker processes too."""

    def batches(name, workers):
        options = {"channels": 1, "batch_size": 32, "seed": 1, "workers": workers}
        transform = parse_transform("shift(1)|resize", (8, 8))
        with train_batches(catalog.load(name, "train"), transform=transform, **options) as it:
            return [next(it) for _ in range(3)]

    expected = batches("digits", 0)
    for workers in (0, 1):
        for one, two in zip(batches(f"records:{digits}", workers), expected, strict=True):
            np.testing.assert_array_equal(one["image"], two["image"])
            np.testing.assert_array_equal(one["label"], two["label"])


def test_packed_sources_can_be_pickled(digits):
    source = catalog.load(f"records:{digits}", "train[5:]")
    again = pickle.loads(pickle.dumps(source))
    assert again[-1] == source[len(source) - 1]
    with pytest.raises(IndexError):
        catalog.load(f"records:{digits}", "train")[1437]


# --- what cannot be packed or read --------------------------------------------------------


def test_splits_of_different_classes_are_refused(tmp_path):
    opened = {"one": catalog.load("digits", "train"), "two": catalog.load("synthetic", "train")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vit_jax.prepare.catalog.load", lambda name, split, data_dir: opened[split]
        )
        with pytest.raises(UserError, match="splits one, two of any have different classes"):
            pack("any", tmp_path / "x", {"one": "one", "two": "two"})
    assert not (tmp_path / "x").exists()


def test_a_file_that_vanishes_stops_it(pictures, tmp_path):
    source = catalog.load(f"folder:{pictures}", "all")
    os.unlink(source[3]["image"])
    with pytest.raises(UserError, match=r"\.jpg cannot be read \(No such file or directory\)"):
        encoded(source[3], None)


def test_nothing_is_packed_if_nothing_is_good(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image of split 'all' can be used"):
        pack(f"folder:{tmp_path}/in", tmp_path / "out", {"all": "all"}, max_bad=1)
    assert os.listdir(tmp_path) == ["in"]


def test_a_set_that_is_not_whole_is_not_read(digits, tmp_path):
    def copy(name):
        return shutil.copytree(digits, tmp_path / name)

    assert "nowhere is no packed data set, for it has no readable" in message("nowhere")
    assert "dev'; it has train, test" in message(digits, "dev")
    (copy("a") / "train-00001-of-00004.array_record").unlink()
    assert "has no whole split 'train' (" in message(tmp_path / "a")
    assert "pack it again" in message(tmp_path / "a")
    assert len(catalog.load(f"records:{tmp_path / 'a'}", "test")) == 360
    (copy("b") / "train-labels.npy").unlink()
    assert "has no whole split 'train' (" in message(tmp_path / "b")
    shard = copy("c") / "train-00003-of-00004.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    assert f"{shard}' has 1,000 bytes and should have " in message(tmp_path / "c")
    shard.write_bytes(whole[:50_000] + bytes(20_000) + whole[70_000:])
    source = catalog.load(f"records:{tmp_path / 'c'}", "train")
    with pytest.raises(UserError, match=r"c train\[\d+\] cannot be read .*; copy or pack"):
        [source[i] for i in range(1077, 1437)]
    np.save(copy("d") / "train-labels.npy", np.zeros(1436, np.int32))
    said = message(tmp_path / "d")
    assert "should hold 1437 examples of 'train', but has 1437 records and 1436 lab" in said
    info = copy("e") / "dataset.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"format": 2}))
    assert "has format 2, and this version of vit_jax reads 1" in message(tmp_path / "e")
    np.save(copy("f") / "test-labels.npy", np.full(360, 10, np.int32))
    assert "test[0] (digits[0]) has label 10, but the classes are" in message(
        tmp_path / "f", "test"
    )


# --- the door -----------------------------------------------------------------------------


def test_the_door_packs_all_splits_and_says_so(pictures, tmp_path):
    (pictures / "a" / "bad.jpg").write_bytes(b"")
    output = tmp_path / "packed"
    result = run(f"folder:{pictures}", output, "--max_bad=1", "--shards=2")
    assert result.returncode == 0, result.stderr
    assert f"image {pictures}/a/bad.jpg is empty" in result.stderr
    counts = [len(catalog.load(f"records:{output}", split)) for split in ("train", "test")]
    assert sum(counts) == 20
    for split, count in zip(("train", "test"), counts, strict=True):
        assert f"{split}: {count} examples in 2 files" in result.stdout
    assert result.stdout.count(", 1 left out") == 1
    assert f"--config.data.source=records:{output}" in result.stdout
    again = run(f"folder:{pictures}", output)
    assert (again.returncode, again.stderr) == (
        1,
        f"error: {output} exists: choose another OUTPUT, or replace it with --force.\n",
    )
    result = run(
        f"folder:{pictures}",
        output,
        "--force",
        "--split=one=train[:4],two=test[:1]",
        "--max_bad=1",
    )
    assert result.returncode == 0, result.stderr
    assert catalog.split_names(f"records:{output}") == ("one", "two")
    assert sorted(os.listdir(tmp_path)) == ["packed", "pictures"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "0 arguments were given: SOURCE and OUTPUT are wanted"),
        (["digits", "setup.py"], "setup.py exists: choose another OUTPUT"),
        (
            ["digits", "vit_jax", "--force"],
            "vit_jax is no packed data set, so --force does not",
        ),
        (
            ["digits", "X", "--split=train[:5]"],
            "--split=train[:5] cannot be the name of a packed",
        ),
        (["digits", "X", "--split=a=train,a=test"], "--split=a=test cannot be the name"),
        (["digits", "X", "--split=dev"], "digits has no split 'dev'; it has train, test"),
        (["clouds", "X"], "unknown data source 'clouds'"),
    ],
)
def test_the_door_says_errors_in_one_sentence(arguments, part, tmp_path):
    result = run(*(tmp_path / "x" if argument == "X" else argument for argument in arguments))
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr
    assert not os.listdir(tmp_path)


def test_an_interrupted_run_leaves_nothing_that_looks_whole(tmp_path):
    """Killed while it writes, it cannot clean up; what is there is not taken for a data set."""
    command = [sys.executable, "-m", "vit_jax.prepare", "synthetic:64x64x3,examples=100000"]
    output = tmp_path / "packed"
    process = subprocess.Popen(
        [*command, str(output), "--split=train"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.array_record")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.rglob("*.array_record"))
    process.kill()
    process.wait()
    assert not output.exists()
    assert "is no packed data set" in message(output)
    assert not list(tmp_path.rglob("dataset.json"))
    command[-1] = "synthetic:4x4x3,examples=10"
    done = subprocess.run(
        [*command, str(output), "--split=train"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(catalog.load(f"records:{output}", "train")) == 10


def test_help_names_every_flag():
    shown = run("--help").stdout
    for flag in ("split", "shards", "resize_shorter", "max_bad", "[no]force", "data_dir"):
        assert f"--{flag}:" in shown
    assert "python -m vit_jax.prepare SOURCE OUTPUT" in shown


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.pop("class_names"), "no packed data set"),
        (lambda info: info.update(splits=[1]), "no packed data set"),
        (lambda info: info.update(class_names=["a"] * 10), "no packed data set"),
        (lambda info: info["splits"]["train"].update(shards={}), "no packed data set"),
        (lambda info: info["splits"]["train"].update(examples="3"), "no packed data set"),
        (lambda info: info["splits"]["train"].update(shards={"../x": 1}), "no packed data set"),
        (
            lambda info: info["splits"].update({"../x": info["splits"]["train"]}),
            "no packed data",
        ),
    ],
)
def test_a_description_that_nobody_has_written_is_refused(digits, tmp_path, change, said):
    shutil.copytree(digits, tmp_path / "a")
    info = json.loads((tmp_path / "a/dataset.json").read_text())
    change(info)
    (tmp_path / "a/dataset.json").write_text(json.dumps(info))
    assert said in message(tmp_path / "a")


def test_labels_that_are_none_are_refused(digits, tmp_path):
    labels = shutil.copytree(digits, tmp_path / "a") / "train-labels.npy"
    whole = labels.read_bytes()
    for data in (b"", whole[:60], whole.replace(b"(1437,)", b"(1437, "), whole[:-1]):
        labels.write_bytes(data)
        assert "has no whole split 'train' (" in message(tmp_path / "a")
    np.save(labels, np.zeros((1437, 2), np.float32))
    assert "holds an array of float32 (1437, 2)" in message(tmp_path / "a")
