import itertools
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.decode import decode
from vit_jax.data.sources import catalog, folder
from vit_jax.data.sources import image_files as file_lists
from vit_jax.evaluation import inference
from vit_jax.system.errors import UserError

# Of the 120 files of `one_folder`, by the BLAKE2 hash of their relative paths.
GOLDEN_ORDER = ["dog/11.png", "cat/53.png", "dog/35.png", "cat/56.png"]


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / path)


def files(root, split):
    source = catalog.load(f"folder:{root}", split)
    return [source[i]["name"].removeprefix(f"{root}/") for i in range(len(source))]


@pytest.fixture
def one_folder(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(60)))
    return tmp_path


@pytest.fixture
def split_folders(tmp_path):
    touch(tmp_path, *(f"train/{name}/{i}.png" for name in ("b", "a", "c") for i in range(3)))
    touch(tmp_path, "test/b/0.png", "test/a/deep/er/1.png")
    return tmp_path


def test_one_folder_of_classes_is_split_by_hash(one_folder):
    train, test = files(one_folder, "train"), files(one_folder, "test")
    assert sorted(train + test) == sorted(files(one_folder, "all"))
    assert len(train) + len(test) == 120
    for name in ("cat", "dog"):
        held_out = sum(path.startswith(name) for path in test)
        assert 4 <= held_out <= 22  # binomial(60, 0.2), three deviations either way
    assert files(one_folder, "val") == files(one_folder, "validation") == test


def test_files_added_later_move_no_other(one_folder):
    train, test = files(one_folder, "train"), files(one_folder, "test")
    touch(
        one_folder, *(f"{name}/x{i}.png" for name in ("cat", "dog", "eel") for i in range(30))
    )
    assert set(train) < set(files(one_folder, "train"))
    assert set(test) < set(files(one_folder, "test"))


def test_the_order_mixes_classes_and_is_known_in_advance(one_folder):
    order = files(one_folder, "train")
    changes = sum(a[:3] != b[:3] for a, b in itertools.pairwise(order))
    assert changes > 25  # sorted by class there would be one
    # A golden order: it must outlive releases, because splits of splits hang on it.
    assert files(one_folder, "all")[:4] == GOLDEN_ORDER


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_small_class_lies_on_both_sides(tmp_path, n):
    names = [f"class{c}" for c in range(12)]
    touch(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(n)))
    for split in ("train", "test"):
        assert {path.split("/")[0] for path in files(tmp_path, split)} == set(names)


def test_a_single_image_is_for_training(tmp_path):
    touch(tmp_path, "a/0.png", "b/0.png", "b/1.png")
    assert "a/0.png" in files(tmp_path, "train")
    assert len(files(tmp_path, "test")) == 1


def test_split_folders_keep_their_splits(split_folders):
    train = catalog.load(f"folder:{split_folders}", "train")
    test = catalog.load(f"folder:{split_folders}", "test")
    assert train.class_names == test.class_names == ("a", "b", "c")
    found = {
        (test[i]["name"].removeprefix(f"{split_folders}/"), test[i]["label"]) for i in range(2)
    }
    assert found == {("test/a/deep/er/1.png", 0), ("test/b/0.png", 1)}
    assert len(train) == 9


@pytest.mark.parametrize("existing", ["val", "validation", "test"])
@pytest.mark.parametrize("asked", ["val", "validation", "test"])
def test_any_name_finds_the_only_held_out_folder(tmp_path, existing, asked):
    touch(tmp_path, "train/a/0.png", f"{existing}/a/1.png")
    assert files(tmp_path, asked) == [f"{existing}/a/1.png"]


def test_a_folder_to_evaluate_on_needs_no_training_split(tmp_path):
    touch(tmp_path, "val/a/0.png", "val/b/0.png")
    source = catalog.load(f"folder:{tmp_path}", "val")
    assert (len(source), source.class_names) == (2, ("a", "b"))


def test_every_extension_counts_and_hidden_files_do_not(tmp_path):
    names = ["0.jpg", "1.JPEG", "2.Png", "3.webp", "4.BMP", "5.gif", "6.tif"]
    touch(
        tmp_path,
        *(f"a/{name}" for name in names),
        "a/.hidden.jpg",
        "a/.cache/x.jpg",
        ".git/x.png",
    )
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("not a class")
    assert sorted(files(tmp_path, "all")) == [f"a/{name}" for name in names]


def test_paths_may_start_at_home(split_folders, monkeypatch):
    monkeypatch.setenv("HOME", str(split_folders.parent))
    assert len(catalog.load(f"folder:~/{split_folders.name}", "train")) == 9


def test_parts_of_splits_work_on_folders(one_folder):
    whole = files(one_folder, "train")
    assert files(one_folder, "train[:90%]") + files(one_folder, "train[90%:]") == whole


def test_folder_sources_can_be_pickled(one_folder):
    source = catalog.load(f"folder:{one_folder}", "train")
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_errors_name_the_folder_and_the_remedy(tmp_path, split_folders):
    def message(path, split="train"):
        with pytest.raises(UserError) as caught:
            catalog.load(f"folder:{path}", split)
        return str(caught.value)

    assert "nowhere' does not exist" in message(tmp_path / "nowhere")
    assert "give folder:PATH" in message("")
    assert "has no split 'val[" not in message(split_folders, "dev")
    assert "it has train, test" in message(split_folders, "dev")
    (tmp_path / "bare").mkdir()
    assert "bare' has no class folders" in message(tmp_path / "bare")
    touch(tmp_path, "flat/train/0.png")
    assert "flat/train' has no class folders" in message(tmp_path / "flat")
    touch(tmp_path, "some/a/0.png")
    (tmp_path / "some" / "b").mkdir()
    assert "some/b' holds no images (jpg" in message(tmp_path / "some")
    touch(split_folders, "test/zebra/0.png")
    assert "test/zebra' has no counterpart in" in message(split_folders, "test")
    assert "rename or remove it" in message(split_folders, "test")


# ---- odd folders -------------------------------------------------------------------------


def test_classes_that_differ_in_case_only_are_told_of(tmp_path, capsys):
    touch(tmp_path, "Cat/0.png", "cat/0.png", "dog/0.png")
    assert catalog.load(f"folder:{tmp_path}", "all").class_names == ("Cat", "cat", "dog")
    told = capsys.readouterr().err
    assert f"note: '{tmp_path}' has classes 'Cat' and 'cat', which differ in case only" in told
    assert "dog" not in told


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    touch(tmp_path, "a/0.png", "a/deep/1.png")
    (tmp_path / "a" / "deep" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "b").symlink_to(tmp_path / "a" / "deep")
    found = files(tmp_path, "all")
    assert {"a/0.png", "a/deep/1.png", "b/1.png"} <= set(found)
    assert len(found) < 10


def test_a_pipe_is_no_image(tmp_path):
    touch(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert files(tmp_path, "all") == ["a/0.png"]


def test_the_splits_of_a_folder_are_known(tmp_path, split_folders):
    assert catalog.split_names(f"folder:{split_folders}") == ("train", "test")
    touch(tmp_path, "flat/a/0.png")
    assert catalog.split_names(f"folder:{tmp_path}/flat") == ("train", "test")


def test_names_of_files_may_be_any_bytes(tmp_path):
    paths = ["ä/ö.png", "b/\udcff.png", "", "c/" + "x" * 300]
    packed = file_lists.Paths.of(paths)
    assert list(packed) == paths
    assert packed[1:3] == paths[1:3]
    assert (packed[-1], len(packed)) == (paths[-1], 4)
    assert list(file_lists.Paths.of([])) == []
    with pytest.raises(IndexError):
        packed[4]


# ---- splits, by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "held_out", "asked"),
    [
        ("Train", "Val", "val"),
        ("training", "validation", "val"),
        ("train", "valid", "validation"),
        ("TRAIN", "Dev", "valid"),
        ("Training", "testing", "test"),
        ("train", "EVAL", "dev"),
        ("train", "Test", "validation"),
    ],
)
def test_splits_go_by_many_names_in_any_case(tmp_path, training, held_out, asked):
    touch(tmp_path, f"{training}/b/0.png", f"{training}/a/1.png", f"{held_out}/b/2.png")
    assert sorted(files(tmp_path, "train")) == [f"{training}/a/1.png", f"{training}/b/0.png"]
    assert files(tmp_path, asked) == files(tmp_path, held_out) == [f"{held_out}/b/2.png"]
    assert catalog.load(f"folder:{tmp_path}", asked).class_names == ("a", "b")
    assert catalog.load(f"folder:{tmp_path}", asked)[0]["label"] == 1
    assert catalog.split_names(f"folder:{tmp_path}") == (training, held_out)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    touch(tmp_path, "Train/a/0.png", "valid/a/1.png", "Test/a/1.png", "notes/a/0.png")
    for asked in ("holdout", "all"):
        with pytest.raises(UserError, match=f"no split '{asked}'; it has Train, Test, valid"):
            catalog.load(f"folder:{tmp_path}", asked)
    touch(tmp_path / "two", "train/a/0.png", "val/a/0.png", "valid/a/0.png")
    with pytest.raises(UserError, match="it has train, val, valid"):  # which of the two?
        catalog.load(f"folder:{tmp_path}/two", "dev")


def test_a_class_may_be_called_train(tmp_path, capsys):
    touch(tmp_path, "train/0.png", "car/0.png", "plane/0.png")
    assert catalog.load(f"folder:{tmp_path}", "all").class_names == ("car", "plane", "train")
    touch(tmp_path, "set/train/a/0.png", "set/train/b/0.png", "set/extra/0.png")
    assert catalog.load(f"folder:{tmp_path}/set", "train").class_names == ("a", "b")
    assert "so the folders beside them are left out: 'extra'" in capsys.readouterr().err


def test_a_split_beside_the_class_folders_that_it_holds_is_refused(tmp_path):
    touch(tmp_path, "a/0.png", "b/0.png", "Test/a/1.png", "Test/b/1.png")
    with pytest.raises(UserError, match="Test' is named like a split and holds class folders"):
        catalog.load(f"folder:{tmp_path}", "train")


# ---- nested folders --------------------------------------------------------------------------


@pytest.fixture
def nested(tmp_path):
    for kind, names in {"bird": ("emu", "owl"), "fish": ("cod", "eel")}.items():
        touch(tmp_path, *(f"{kind}/{name}/{i}.png" for name in names for i in range(2)))
    return tmp_path


def test_outer_folders_are_the_classes_unless_inner_ones_are_asked_for(nested, capsys):
    assert catalog.load(f"folder:{nested}", "all").class_names == ("bird", "fish")
    assert f"('bird/emu', 'bird/owl', 'fish/cod', ...) give folder:{nested},classes=inner" in (
        capsys.readouterr().err
    )
    inner = catalog.load(f"folder:{nested},classes=inner", "all")
    assert inner.class_names == ("emu", "owl", "cod", "eel")
    for example in (inner[i] for i in range(len(inner))):
        assert example["name"].split("/")[-2] == inner.class_names[example["label"]]
    assert catalog.load(f"folder:{nested},classes=outer", "all").class_names == ("bird", "fish")


def test_inner_folders_of_one_name_keep_their_path(tmp_path):
    touch(tmp_path, "train/x/big/0.png", "train/y/big/0.png", "train/y/z/0.png")
    touch(tmp_path, "val/y/z/0.png")
    source = catalog.load(f"folder:{tmp_path},classes=inner", "val")
    assert source.class_names == ("x/big", "y/big", "y/z")
    assert source[0]["label"] == 2


def test_a_single_folder_around_the_classes_is_asked_about(tmp_path):
    touch(tmp_path, "pets/cat/0.png", "pets/dog/0.png")
    with pytest.raises(UserError) as caught:
        catalog.load(f"folder:{tmp_path}", "all")
    assert f"give folder:{tmp_path}/pets, else folder:{tmp_path},classes=outer" in str(
        caught.value
    )
    assert catalog.load(f"folder:{tmp_path},classes=outer", "all").class_names == ("pets",)
    assert catalog.load(f"folder:{tmp_path}/pets", "all").class_names == ("cat", "dog")


# ---- what counts as an image -----------------------------------------------------------------


def test_every_format_that_is_read_is_found_by_its_endings(tmp_path):
    readable = [".jfif", ".jpe", ".ppm", ".pgm", ".pnm", ".JP2"]
    readable += [".avif"] * ("AVIF" in Image.OPEN)
    touch(tmp_path, *(f"a/{i}.png" for i in range(len(readable))))
    for i, ending in enumerate(readable):
        form = {".jp2": "JPEG2000", ".avif": "AVIF"}.get(ending.lower(), "PPM")
        form = "JPEG" if ending.startswith(".j") and form == "PPM" else form
        (tmp_path / "a" / f"{i}.png").unlink()
        Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "a" / f"{i}{ending}", form)
    source = catalog.load(f"folder:{tmp_path}", "all")
    assert len(source) == len(readable)
    for i in range(len(source)):
        assert decode(source[i], 3).size == (8, 8)


def test_what_is_passed_over_is_counted_once(tmp_path, capsys):
    touch(tmp_path, "a/0.png", "b/1.png", "loose.png", "a/._0.png", "__MACOSX/a/0.png")
    for name in ("a/x.txt", "b/deep.TXT", "b/Thumbs.db", "a/none"):
        (tmp_path / name).write_text("")
    for _ in range(2):
        assert sorted(files(tmp_path, "all")) == ["a/0.png", "b/1.png"]
    said = capsys.readouterr().err
    assert said.count("passed over") == 1
    assert (
        f"note: 6 files in '{tmp_path}' passed over, as no images: 2 .txt, 1 .db, 1 hidden, "
        "1 in no class folder, 1 without an ending" in said
    )


def test_commands_that_take_folders_pass_over_the_same(tmp_path, capsys):
    touch(tmp_path, "a/0.png", "a/b.JPE", "a/._0.png", ".git/x.png", "@eaDir/0.png", "1.png")
    (tmp_path / "a" / "notes.txt").write_text("")
    found = inference.find_images([str(tmp_path)])
    assert found == [f"{tmp_path}/{name}" for name in ("1.png", "a/0.png", "a/b.JPE")]
    assert "passed over, as no images: 3 hidden, 1 .txt" in capsys.readouterr().err
    # What is given by name is meant.
    assert inference.find_images([f"{tmp_path}/a/._0.png"]) == [f"{tmp_path}/a/._0.png"]


# ---- the index on disk -------------------------------------------------------------------


@pytest.fixture
def cache(one_folder, monkeypatch, tmp_path_factory):
    """A cache that even small folders go to, and a folder that has not changed for a while."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VIT_JAX_CACHE", str(cache))
    monkeypatch.setattr(folder, "REMEMBERED_FROM", 1)
    for path in (one_folder, one_folder / "cat", one_folder / "dog"):
        os.utime(path, (time.time() - 60,) * 2)
    return cache / "folders"


def forbid_scan(monkeypatch):
    def scan(*arguments):
        raise AssertionError("the folder is scanned again")

    monkeypatch.setattr(folder, "_images", scan)


def test_a_second_start_reads_the_index(one_folder, cache, monkeypatch):
    before = {split: files(one_folder, split) for split in file_lists.SPLITS}
    labels = catalog.load(f"folder:{one_folder}", "all").labels
    assert len(list(cache.iterdir())) == 1
    forbid_scan(monkeypatch)
    assert {split: files(one_folder, split) for split in file_lists.SPLITS} == before
    again = catalog.load(f"folder:{one_folder}", "all")
    np.testing.assert_array_equal(again.labels, labels)
    assert again.class_names == ("cat", "dog")
    assert not [p for p in one_folder.rglob("*") if p.suffix not in ("", ".png")]


@pytest.mark.parametrize("change", ["add", "remove", "rename", "class", "move"])
def test_the_index_is_made_anew_when_a_folder_has_changed(one_folder, cache, change):
    before = files(one_folder, "all")
    if change == "add":
        touch(one_folder, "dog/new.png")
    elif change == "remove":
        (one_folder / "dog" / "3.png").unlink()
    elif change == "rename":
        (one_folder / "dog" / "3.png").rename(one_folder / "dog" / "new.png")
    elif change == "class":
        touch(one_folder, "eel/0.png")
    else:
        (one_folder / "dog" / "3.png").rename(one_folder / "cat" / "new.png")
    after = files(one_folder, "all")
    assert sorted(after) == sorted(
        p.relative_to(one_folder).as_posix() for p in one_folder.glob("*/*")
    )
    assert set(after) != set(before)


def test_a_folder_that_has_just_changed_is_not_remembered(one_folder, cache):
    touch(one_folder, "dog/new.png")
    files(one_folder, "all")
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_index_is_made_anew(one_folder, cache, damage):
    before = files(one_folder, "all")
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-300] if damage is None else damage)
    assert files(one_folder, "all") == before


def test_a_cache_that_cannot_be_written_does_not_matter(one_folder, cache, monkeypatch):
    cache.parent.rmdir()
    cache.parent.write_text("a file where the cache should be")
    assert len(files(one_folder, "all")) == 120


def test_a_small_folder_is_not_remembered(one_folder, cache, monkeypatch):
    monkeypatch.setattr(folder, "REMEMBERED_FROM", 121)
    files(one_folder, "all")
    assert not cache.exists()
