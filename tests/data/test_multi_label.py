"""Images with several labels: lists, texts and tables of 0 and 1, through every source."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import pipeline
from vit_jax.data.packing import Options, prepare
from vit_jax.data.sources import catalog, multi_label
from vit_jax.data.sources.classes import as_classes
from vit_jax.data.transforms.language import parse_transform
from vit_jax.system.errors import UserError

LABELS = [("cat",), ("dog", "cat"), (), ("emu",), ("dog", "emu", "cat")]
NAMES = ("cat", "dog", "emu")
HOT = np.array([[name in of for name in NAMES] for of in LABELS])


@pytest.fixture
def images(tmp_path):
    for i in range(5):
        Image.new("L", (2, 2), i).save(tmp_path / f"{i}.png")
    return tmp_path


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def table(root, form):
    """The labels in one of the forms; returns the source and what data.multi_label is."""
    if form == "columns":
        head, cell = "image,cat,dog,emu", [["0", "1"], ["0.0", "1.0"], ["False", "True"]]
        rows = [
            f"{i}.png," + ",".join(cell[i % 3][int(x)] for x in row)
            for i, row in enumerate(HOT)
        ]
        write(root / "t.csv", head, *rows)
        return f"folder:{root}/t.csv", "auto"
    if form == "json":
        rows = [{"file": f"{i}.png", "labels": list(of)} for i, of in enumerate(LABELS)]
        write(root / "t.jsonl", *map(json.dumps, rows))
        return f"folder:{root}/t.jsonl", "auto"
    between = {"auto ;": ";", "auto |": "|", "space": " ", "/": " / "}[form]
    rows = [f"{i}.png,{between.join(of)}" for i, of in enumerate(LABELS)]
    write(root / "t.csv", "image,tags", *rows)
    return f"folder:{root}/t.csv", form.split(" ")[0]


FORMS = ("columns", "json", "auto ;", "auto |", "space", "/")


@pytest.mark.parametrize("form", FORMS)
def test_labels_in_every_form(images, form):
    name, setting = table(images, form)
    source = catalog.load(name, "all", multi_label=setting)
    assert source.class_names == NAMES
    for i in range(5):
        example = source[i]
        row = int(example["name"].split("/")[-1][0])
        np.testing.assert_array_equal(example["label"], HOT[row])
    assert source.labels.shape == (5, 3)
    halves = [catalog.load(name, split, multi_label=setting) for split in ("train", "test")]
    assert sum(map(len, halves)) == 5
    assert source.fingerprint(0, 5) != source.with_classes(
        np.array([1, 0, 2]), NAMES
    ).fingerprint(0, 5)


def test_never_one_class_of_two_names(images):
    name, _ = table(images, "space")
    with pytest.raises(UserError, match="line 4 has tags '';"):
        catalog.load(name, "all")
    with pytest.raises(
        UserError, match=r"a list of labels in 'labels'; set data\.multi_label=auto"
    ):
        catalog.load(table(images, "json")[0], "all")


def test_numbers_and_a_list_of_classes(images):
    write(images / "t.csv", "image,label", "0.png,2;0", "1.png,3.0", "2.png,")
    source = catalog.load(f"folder:{images}/t.csv", "all", multi_label="auto")
    assert source.class_names == ("0", "1", "2", "3")
    found = {source[i]["name"][-5:]: np.flatnonzero(source[i]["label"]) for i in range(3)}
    assert {name: list(x) for name, x in found.items()} == {
        "0.png": [0, 2],
        "1.png": [3],
        "2.png": [],
    }
    write(images / "classes.txt", "a", "b", "c", "d", "e")
    source = catalog.load(f"folder:{images}/t.csv", "all", multi_label="auto")
    assert source.class_names == tuple("abcde")


def test_a_split_has_the_columns_of_the_training_table(images):
    write(images / "train.csv", "image,b,A", "0.png,1,0", "1.png,0,0")
    write(images / "val.csv", "image,A,b", "2.png,1,0")
    source = catalog.load(f"folder:{images}", "val", multi_label="auto")
    assert source.class_names == ("b", "A")  # columns stay in their order, as they are spelled
    assert source[0]["label"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("lines", "setting", "said"),
    [
        (
            ["image,a,age", "0.png,1,37"],
            "auto",
            "line 2 has age '37', where columns of 0 and 1",
        ),
        (["image,label", "0.png,", "1.png,"], "auto", "has no label at all"),
        (["image,a,b,label", "0.png,1,0,x"], None, None),
    ],
)
def test_tables_that_cannot_be_meant(images, lines, setting, said):
    write(images / "t.csv", *lines)
    if said is None:
        assert catalog.load(f"folder:{images}/t.csv", "all").class_names == ("x",)
        return
    with pytest.raises(UserError, match=said):
        catalog.load(f"folder:{images}/t.csv", "all", multi_label=setting)


def test_sources_of_one_label_are_told_apart(images):
    with pytest.raises(
        UserError, match=r"digits has one label, and data.multi_label is 'auto'"
    ):
        catalog.load("digits", "train", multi_label="auto")
    (images / "a").mkdir()
    Image.new("L", (2, 2)).save(images / "a" / "0.png")
    with pytest.raises(UserError, match="an image in a class folder has one class"):
        catalog.load(f"folder:{images}", "all", multi_label="auto")


def test_packed_and_in_batches(images, tmp_path):
    name, setting = table(images, "columns")
    how = Options(shards=2, threads=1)
    prepare(name, tmp_path / "packed", {"all": "all"}, how, None, setting)
    packed = catalog.load(f"records:{tmp_path}/packed", "all", multi_label="auto")
    source = catalog.load(name, "all", multi_label=setting)
    assert packed.class_names == NAMES
    for i in range(5):
        np.testing.assert_array_equal(packed[i]["label"], source[i]["label"])
    with pytest.raises(
        UserError, match=r"has several labels, and data\.multi_label is None; set"
    ):
        catalog.load(f"records:{tmp_path}/packed", "all")
    reading = {"transform": parse_transform("resize", (2, 2)), "channels": 1, "threads": 1}
    for each in (source, packed):
        [batch] = pipeline.eval_batches(each, batch_size=8, **reading)
        assert batch.keys() == {"image", "targets", "mask"}
        assert batch["targets"].dtype == np.float32
        grey = batch["image"][:5, 0, 0, 0]
        np.testing.assert_array_equal(batch["targets"][:5], HOT[grey])
        np.testing.assert_array_equal(batch["mask"], [1] * 5 + [0] * 3)
        with pipeline.train_batches(each, batch_size=4, seed=1, **reading) as batches:
            batch = next(batches)
        np.testing.assert_array_equal(batch["targets"], HOT[batch["image"][:, 0, 0, 0]])


def test_labels_follow_the_names_of_classes(images):
    name, setting = table(images, "json")
    source = catalog.load(name, "all", multi_label=setting)
    moved = as_classes(source, ("x", "emu", "cat", "dog"))
    for i in range(5):
        names = [moved.class_names[k] for k in np.flatnonzero(moved[i]["label"])]
        row = int(moved[i]["name"].split("/")[-1][0])
        assert set(names) == set(LABELS[row])


# ---- the formats of Hugging Face ---------------------------------------------------------


def png(grey):
    file = io.BytesIO()
    Image.new("L", (2, 2), grey).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["classes", "names", "numbers", "text"])
def test_columns_of_lists_and_texts(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    numbers = [[NAMES.index(x) for x in of] for of in LABELS]
    stored = {
        "classes": numbers,
        "names": list(map(list, LABELS)),
        "numbers": numbers,
        "text": list(map(" ".join, LABELS)),
    }[form]
    kind = {
        "classes": datasets.Sequence(datasets.ClassLabel(names=list(NAMES))),
        "names": datasets.Sequence(datasets.Value("string")),
        "numbers": datasets.Sequence(datasets.Value("int64")),
        "text": datasets.Value("string"),
    }[form]
    image = [{"bytes": png(i), "path": None} for i in range(5)]
    data = datasets.Dataset.from_dict(
        {
            "image": image,
            "labels": stored,
            "label": ["x"] * 5 if form != "text" else [0] * 5,
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "labels": kind,
                "label": datasets.Value("string" if form != "text" else "int8"),
            }
        ),
    )
    data.save_to_disk(str(tmp_path))
    name = f"hf:{tmp_path}" + (",label=labels" if form == "text" else "")
    setting = "space" if form == "text" else "auto"
    source = catalog.load(name, "train", multi_label=setting)
    assert source.class_names == (("0", "1", "2") if form == "numbers" else NAMES)
    np.testing.assert_array_equal(source.labels, HOT)
    for i in range(5):
        np.testing.assert_array_equal(source[i]["label"], HOT[i])
    assert len(source.fingerprint(0, 5)) == 16
    assert catalog.load(f"hf:{tmp_path}", "train").label_key == "label"
    if form != "text":
        with pytest.raises(UserError, match="a list of labels for each image in its column"):
            catalog.load(f"{name},label=labels", "train")
    else:
        with pytest.raises(
            UserError, match="has one number for each image in its column 'label'"
        ):
            catalog.load(f"hf:{tmp_path}", "train", multi_label="auto")


def test_what_stands_between_labels():
    between = lambda setting, *texts: multi_label.separator(setting, texts, "x")
    assert between("auto", "a|b, c", "d") == "|"
    assert between("auto", "a, b", "d") == ","
    assert between("auto", "a", "b") == ";"
    with pytest.raises(UserError, match="x has 'b c', which may be one label or several; set"):
        between("auto", "a", "b c")
    assert between("space", "a;b") is None
    assert between(" ", "a;b") is None
    assert multi_label.divide(" b  a b", None) == ("b", "a")
    assert multi_label.divide("a;; b ;", ";") == ("a", "b")
