"""A fingerprint tells which examples a source holds, in which order, with which labels."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data.test_tfds import BUILDER
from vit_jax.data import packing
from vit_jax.data.sources import catalog, image_files, records
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.data.sources.source import Concatenation, digest, fingerprint

HOW = packing.Options(shards=3, resize_shorter=None, max_bad=None, threads=2)


def of(source, split="train", data_dir=None):
    return fingerprint(catalog.load(source, split, data_dir))


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


# ---- all kinds ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One data set of each kind that lies in files, with 40 examples in `train`."""
    root = tmp_path_factory.mktemp("kept")
    paths = [f"train/{name}/{i}.png" for name in ("ant", "bee") for i in range(20)]
    touch(root / "folder", *paths, "test/ant/0.png")
    write_labels(root / "listed", LABELS)
    source = "synthetic:4x4x3,classes=3,examples=40"
    packing.prepare(source, root / "packed", {"train": "train"}, HOW, None)
    return root


LABELS = [(f"{i}.png", "ant" if i % 3 else "bee") for i in range(50)]


def write_labels(root, rows):
    touch(root, *(file for file, _ in rows))
    lines = ["file_name,label", *(f"{file},{label}" for file, label in rows)]
    (root / "labels.csv").write_text("\n".join(lines))


@pytest.fixture(params=["digits", "synthetic", "folder", "listed", "packed"])
def source(request, kept):
    return {
        "digits": "digits",
        "synthetic": "synthetic:4x4x3,classes=3,examples=40",
        "folder": f"folder:{kept / 'folder'}",
        "listed": f"folder:{kept / 'listed'}",
        "packed": f"records:{kept / 'packed'}",
    }[request.param]


def test_the_same_examples_have_the_same_fingerprint(source):
    assert of(source) == of(source)
    assert of(source, "train[:50%]") == of(source, "train[:50%]")
    n = len(catalog.load(source, "train"))
    assert of(source, f"train[:{n}]") == of(source)
    assert len(of(source)) == 16
    assert int(of(source), 16) >= 0


def test_every_part_has_a_fingerprint_of_its_own(source):
    parts = ["train", "train[:10]", "train[:11]", "train[1:11]", "train[-10:]"]
    parts += ["train[:10]+train[-10:]", "train[-10:]+train[:10]", "train[:10]+train[:10]"]
    assert len({of(source, part) for part in parts}) == len(parts)


def test_a_part_of_splits_joined_is_known_by_what_it_holds():
    digits = lambda split: catalog.load("digits", split)
    both = Concatenation([digits("train[:5]"), digits("test"), digits("train[-5:]")])
    expected = Concatenation([digits("train[3:5]"), digits("test[:7]")])
    assert both.fingerprint(3, 12) == fingerprint(expected)
    assert both.fingerprint(3, 12) != both.fingerprint(3, 13)
    assert both.fingerprint(0, 5) == digest(of("digits", "train[:5]"))


def test_fingerprints_are_those_that_runs_were_begun_with():
    """Other values would keep every run from going on that was begun before the change."""
    assert of("digits") == "e39ad58234d5a126"
    assert of("synthetic:4x4x3,classes=3,examples=40", "train[:50%]") == "ee3e871782b49262"
    listing = image_files.arrange([(0, ["ant/1.png", "ant/2.png"]), (1, ["bee/1.png"])])
    assert fingerprint(listing.select("all", "/x", ("ant", "bee"))) == "182c3fcc91020e9a"


def test_a_digest_is_blake2_of_kinds_sizes_and_contents():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    content = b"|u1(1,)a" + b"<i4(2, 3)" + array.tobytes()
    expected = hashlib.blake2b(content, digest_size=8).hexdigest()
    assert digest("a", array) == expected == "d55de62be5000c7e"


# ---- arrays ------------------------------------------------------------------------------


def test_arrays_are_known_by_their_content():
    images, labels = np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    print_of = lambda x, y: ArraySource(x, y, ("a", "b"), "mine").fingerprint(0, 4)
    first = print_of(images, labels)
    assert print_of(images, labels.astype(np.int32)) == first
    assert print_of(images, labels[::-1]) != first
    other = images.copy()
    other[3, 1, 1] = 1
    assert print_of(other, labels) != first
    assert print_of(images.reshape(4, 4, 1), labels) != first


def test_synthetic_examples_depend_on_all_but_their_number():
    name = "synthetic:4x4x3,classes=3"
    assert of(f"{name},examples=40", "train[:10]") == of(f"{name},examples=10")
    others = [f"{name},examples=11", "synthetic:4x4x3,classes=4,examples=10"]
    others += ["synthetic:4x5x3,classes=3,examples=10"]
    found = [of(other) for other in others] + [of(f"{name},examples=10", "test")]
    assert len({*found, of(f"{name},examples=10")}) == 5


def test_texts_and_arrays_do_not_run_into_each_other():
    found = {
        digest(),
        digest(""),
        digest("ab"),
        digest("a", "b"),
        digest("b", "a"),
        digest(np.arange(4)),
        digest(np.arange(4).reshape(2, 2)),
        digest(np.arange(4).reshape(2, 2).T),
        digest(np.arange(4, dtype=np.int32)),
        digest(np.arange(2), np.arange(2, 4)),
    }
    assert len(found) == 10


# ---- folders -----------------------------------------------------------------------------


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept / "folder", tmp_path / "folder")


def add(root):
    touch(root, "train/ant/new.png")


def remove(root):
    (root / "train/ant/3.png").unlink()


def rename(root):
    (root / "train/ant/3.png").rename(root / "train/ant/three.png")


def move_to_another_class(root):
    (root / "train/ant/3.png").rename(root / "train/bee/33.png")


def rename_a_class(root):
    (root / "train/bee").rename(root / "train/cat")


@pytest.mark.parametrize("change", [add, remove, rename, move_to_another_class, rename_a_class])
def test_a_changed_folder_has_another_fingerprint(folder, change):
    train, test = (of(f"folder:{folder}", split) for split in ("train", "test"))
    change(folder)
    assert of(f"folder:{folder}") != train
    assert of(f"folder:{folder}", "test") == test


def test_a_folder_may_be_moved_copied_and_touched(folder, kept, tmp_path, monkeypatch):
    first = of(f"folder:{folder}")
    assert first == of(f"folder:{kept / 'folder'}")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    moved = folder.rename(tmp_path / "elsewhere")
    assert of(f"folder:{moved}") == first
    monkeypatch.chdir(tmp_path)
    assert of("folder:elsewhere") == first
    (tmp_path / "link").symlink_to(moved)
    assert of("folder:link") == first


def test_a_part_without_the_new_file_stays_what_it_was(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("a", "b") for i in range(30)))
    before = {n: of(f"folder:{tmp_path}", f"all[:{n}]") for n in range(1, 61)}
    touch(tmp_path, "a/new.png")
    source = catalog.load(f"folder:{tmp_path}", "all")
    [at] = [i for i in range(61) if source[i]["name"].endswith("new.png")]
    assert 0 < at < 60
    for n, printed in before.items():
        assert (of(f"folder:{tmp_path}", f"all[:{n}]") == printed) == (n <= at)


def test_both_sides_of_an_automatic_split_are_told_apart(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("a", "b") for i in range(30)))
    found = {split: of(f"folder:{tmp_path}", split) for split in image_files.SPLITS}
    assert len(set(found.values())) == 3


def test_what_is_remembered_of_a_folder_changes_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vit_jax.data.sources.folder.REMEMBERED_FROM", 1)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1, 1))
    found = {of(f"folder:{folder}") for _ in range(3)}
    assert len(list((tmp_path / "cache/folders").iterdir())) == 1
    monkeypatch.setattr("vit_jax.data.sources.folder.REMEMBERED_FROM", 10_000)
    shutil.rmtree(tmp_path / "cache")
    assert found == {of(f"folder:{folder}")}


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [*rows, ("new.png", "ant")],
        lambda rows: rows[1:],
        lambda rows: [("renamed.png", "bee"), *rows[1:]],
        lambda rows: [(file, "bee" if label == "ant" else "ant") for file, label in rows],
    ],
    ids=["added", "removed", "renamed", "relabelled"],
)
def test_a_changed_list_of_labels_has_another_fingerprint(kept, tmp_path, change):
    write_labels(tmp_path, change(LABELS))
    changed = [of(f"folder:{root}", "all") for root in (tmp_path, kept / "listed")]
    assert changed[0] != changed[1]


def test_one_label_is_enough_and_the_order_of_lines_is_nothing(kept, tmp_path):
    before = of(f"folder:{kept / 'listed'}", "all")
    write_labels(tmp_path / "same", LABELS[::-1])
    assert of(f"folder:{tmp_path / 'same'}", "all") == before
    assert LABELS[7] == ("7.png", "ant")
    write_labels(tmp_path / "other", [*LABELS[:7], ("7.png", "bee"), *LABELS[8:]])
    assert of(f"folder:{tmp_path / 'other'}", "all") != before


def test_paths_taken_out_are_those_at_the_rows():
    names = ["a", "", "ccc", "dd", "e\udcff", "ffff"]
    paths = image_files.Paths.of(names)
    for rows in ([], [0], [5], [0, 1, 2], [1, 3, 5], [4, 5, 0, 1], [2, 2, 1], [5, 4, 3]):
        taken = paths.take(np.array(rows, np.int64))
        assert list(taken) == [names[i] for i in rows]
        assert taken.ends.tolist() == image_files.Paths.of(taken).ends.tolist()


def test_a_split_without_examples_has_a_fingerprint_too(tmp_path):
    touch(tmp_path, "a/0.png", "b/0.png")
    assert len(catalog.load(f"folder:{tmp_path}", "test")) == 0
    assert of(f"folder:{tmp_path}", "test") != of(f"folder:{tmp_path}", "train")


def test_a_hundred_thousand_files_are_told_apart():
    """Each of three single differences among 100,000 files shows."""
    names = [f"n{i % 100:08}/n{i % 100:08}_{i}.JPEG" for i in range(100_000)]
    labels, rows = np.arange(100_000, dtype=np.int32) % 100, np.arange(100_000)
    classes = tuple(map(str, range(100)))
    source = image_files.FileSource("/x", image_files.Paths.of(names), rows, labels, classes)
    swapped = rows.copy()
    swapped[[70_000, 70_001]] = rows[[70_001, 70_000]]
    renamed = [*names[:70_000], names[70_000].lower(), *names[70_001:]]
    relabelled = labels.copy()
    relabelled[70_000] = 1
    others = [
        image_files.FileSource("/x", source.files, swapped, labels, classes),
        image_files.FileSource("/x", image_files.Paths.of(renamed), rows, labels, classes),
        image_files.FileSource("/x", source.files, rows, relabelled, classes),
    ]
    assert len({fingerprint(x) for x in (source, *others)}) == 4
    again = image_files.FileSource("/y/z", image_files.Paths.of(names), rows, labels, classes)
    assert fingerprint(again) == fingerprint(source)


# ---- packed ------------------------------------------------------------------------------


@pytest.fixture
def packed(kept, tmp_path):
    return shutil.copytree(kept / "packed", tmp_path / "packed")


def pack(source, output, how=HOW):
    packing.prepare(source, output, {"train": "train"}, how, None)
    return of(f"records:{output}")


def test_packed_data_may_be_moved_and_packed_again(kept, packed, tmp_path):
    first = of(f"records:{packed}")
    assert first == of(f"records:{kept / 'packed'}")
    assert pack("synthetic:4x4x3,classes=3,examples=40", tmp_path / "again") == first
    fewer = HOW._replace(shards=1)
    assert pack("synthetic:4x4x3,classes=3,examples=40", tmp_path / "one", fewer) == first


@pytest.mark.parametrize(
    "source",
    [
        "synthetic:4x4x3,classes=3,examples=41",
        "synthetic:4x4x3,classes=4,examples=40",
        "synthetic:5x4x3,classes=3,examples=40",
    ],
    ids=["added", "relabelled", "resized"],
)
def test_other_data_when_packed_have_another_fingerprint(packed, tmp_path, source):
    assert pack(source, tmp_path / "other") != of(f"records:{packed}")


def test_where_packed_pictures_came_from_is_nothing_but_each_of_them_counts(tmp_path):
    for i, name in enumerate(["ant", "bee"]):
        (tmp_path / "first/train" / name).mkdir(parents=True)
        Image.new("L", (2, 2), i).save(tmp_path / "first/train" / name / f"{i}.png")
    first = pack(f"folder:{tmp_path / 'first'}", tmp_path / "packed")
    moved = (tmp_path / "first").rename(tmp_path / "elsewhere")
    assert pack(f"folder:{moved}", tmp_path / "again") == first
    Image.new("L", (2, 2), 7).save(moved / "train/bee/1.png")
    assert pack(f"folder:{moved}", tmp_path / "other") != first


def test_images_and_labels_are_digested_while_they_are_packed(tmp_path):
    examples = [records.Packed(b"xy", 1, "a"), None, records.Packed(b"z", 0, "b")]
    written = records.write_split(tmp_path, "train", examples, 3, 2)
    assert written["digest"] == hashlib.blake2b(b"1 2 xy0 1 z", digest_size=8).hexdigest()


def test_the_labels_of_packed_data_count(packed):
    before = of(f"records:{packed}")
    labels = np.load(packed / "train-labels.npy")
    labels[[0, -1]] = (labels[[0, -1]] + 1) % 3
    np.save(packed / "train-labels.npy", labels)
    assert of(f"records:{packed}") != before


def test_data_packed_without_a_digest_are_known_by_their_files(packed):
    path, last = packed / records.INFO, "train-00002-of-00003.array_record"
    info = json.loads(path.read_text())
    del info["splits"]["train"]["digest"]
    path.write_text(json.dumps(info))
    before = of(f"records:{packed}")
    assert of(f"records:{packed}") == before
    with (packed / last).open("ab") as file:
        file.write(bytes(64))
    info["splits"]["train"]["shards"][last]["bytes"] += 64
    path.write_text(json.dumps(info))
    assert of(f"records:{packed}") != before


# ---- prepared by TensorFlow Datasets -----------------------------------------------------


def prepare_tiny(root, examples=37):
    """The data set of test_tfds, with so many examples in `train`; in `root/data`."""
    root.mkdir(exist_ok=True)
    builder = BUILDER.replace("_generate_examples(37)", f"_generate_examples({examples})")
    (root / "tiny.py").write_text(builder)
    build = "import tiny; tiny.Tiny(data_dir='data', file_format='array_record')"
    command = [sys.executable, "-c", build + ".download_and_prepare()"]
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    return root / "data"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_tiny(tmp_path_factory.mktemp("tfds"))


def test_a_prepared_set_may_be_moved_and_prepared_again(prepared, tmp_path):
    tiny = lambda data_dir, split="train": of("tfds:tiny", split, str(data_dir))
    moved = shutil.copytree(prepared, tmp_path / "moved")
    assert tiny(moved) == tiny(prepared) == of(f"tfds:{moved}/tiny/fine")
    parts = ["train", "test", "train[:30]", "train[1:31]", "train[:30]+test"]
    assert len({tiny(moved, part) for part in parts}) == len(parts)
    assert tiny(moved, "train[:37]") == tiny(moved)
    assert tiny(prepare_tiny(tmp_path / "again")) == tiny(moved)
    more = prepare_tiny(tmp_path / "more", examples=38)
    assert tiny(more) != tiny(moved)
    assert tiny(more, "test") == tiny(moved, "test")


def test_another_version_of_a_prepared_set_has_another_fingerprint(prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    before = of("tfds:tiny", "train", str(data))
    path = data / "tiny/fine/1.0.0/dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "1.0.1"}))
    path.parent.rename(path.parent.with_name("1.0.1"))
    assert of("tfds:tiny", "train", str(data)) != before


# ---- Hugging Face ------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    library = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("huggingface")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", cache)
    library.disable_progress_bars()
    return library


def save(datasets, folder, sizes, labels, names=None):
    """Images of so many bytes, which nobody decodes."""
    names = names or [f"{i}.png" for i in range(len(sizes))]
    images = [{"bytes": bytes(n), "path": path} for n, path in zip(sizes, names, strict=True)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    table = datasets.Dataset.from_dict(
        {"image": images, "label": labels}, features=datasets.Features(kinds)
    )
    table.save_to_disk(str(folder))
    return f"hf:{folder}"


def test_a_hugging_face_set_is_known_by_names_sizes_and_labels(datasets, tmp_path, monkeypatch):
    sizes, labels = list(range(10, 30)), [0, 1] * 10
    names = [f"{i}.png" for i in range(20)]
    first = of(save(datasets, tmp_path / "first", sizes, labels))
    changed = [
        ([*sizes, 30], [*labels, 0], [*names, "20.png"]),  # added
        (sizes[:-1], labels[:-1], names[:-1]),  # removed
        (sizes, labels, ["x.png", *names[1:]]),  # renamed
        (sizes, [1, 1, *labels[2:]], names),  # relabelled
        ([11, *sizes[1:]], labels, names),  # drawn over
        (sizes[::-1], labels, names),
        (sizes, labels, [*names[2:], *names[:2]]),  # two others first
    ]
    found = {first}
    for i, (n, y, path) in enumerate(changed):
        found.add(of(save(datasets, tmp_path / str(i), n, y, path)))
    name = f"hf:{tmp_path / 'first'}"
    parts = ["train[:10]", "train[1:11]", "train[:10]+train[:10]", "train[:11]"]
    found |= {of(name, part) for part in parts}
    assert len(found) == 1 + len(changed) + len(parts)
    inside = [f"/some/where/{path}" for path in names]
    assert of(save(datasets, tmp_path / "inside", sizes, labels, inside)) == first
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    assert of(f"hf:{moved}", "train[:20]") == first
    monkeypatch.setattr("vit_jax.data.sources.huggingface._ROWS_AT_ONCE", 7)
    assert of(f"hf:{moved}") == of(f"hf:{moved}", "train[:20]")


def test_a_folder_that_hugging_face_reads_may_be_moved_and_touched(datasets, tmp_path):
    for i, name in enumerate(["ant", "bee"]):
        folder = tmp_path / "first/train" / name
        folder.mkdir(parents=True)
        Image.new("L", (2, 2), i).save(folder / f"{i}.png")
    first = of(f"hf:{tmp_path / 'first'}")
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    assert of(f"hf:{moved}") == first
    (moved / "train/ant/0.png").rename(moved / "train/ant/2.png")
    assert of(f"hf:{moved}") != first
