import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.sources import catalog, multi_label
from vit_jax.system.errors import UserError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def rows(source):
    """(file, label) of every example, sorted."""
    examples = [source[i] for i in range(len(source))]
    return sorted((example["image"].split("/")[-1], example["label"]) for example in examples)


def message(path, split="train"):
    with pytest.raises(UserError) as caught:
        catalog.load(f"folder:{path}", split)
    return str(caught.value)


@pytest.fixture
def images(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(6)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("labels.csv", ["filename,label", "0.png,dog", "1.png,cat", "2.png,dog"]),
        ("labels.csv", ["Label , IMAGE,size", "dog,0.png,9", "cat,1.png,9", "dog,./2.png,8"]),
        ("labels.csv", ["\ufefffile_name,class", '0.png,"dog"', '"1.png", cat', "2.png,dog"]),
        ("labels.tsv", ["path\tclass_name", "0.png\tdog", "1.png\tcat", "2.png\tdog"]),
        ("metadata.csv", ["file_name,label", "0.png,dog", "1.png,cat", "2.png,dog"]),
        (
            "metadata.jsonl",
            [
                json.dumps({"file_name": f"{i}.png", "label": label, "boxes": [1, 2]})
                for i, label in enumerate(["dog", "cat", "dog"])
            ],
        ),
    ],
)
def test_files_of_labels_in_every_form(images, name, lines):
    write(images / name, *lines)
    source = catalog.load(f"folder:{images}", "all")
    assert rows(source) == [("0.png", 1), ("1.png", 0), ("2.png", 1)]
    assert source.class_names == ("cat", "dog")
    assert source.labels.dtype == np.int32
    assert rows(pickle.loads(pickle.dumps(source))) == rows(source)


def test_any_name_will_do_when_it_is_given(images):
    write(images / "ours.csv", "file,label", "0.png,a", "1.png,b", "2.png,a")
    write(images / "labels.csv", "this is not looked at")
    source = catalog.load(f"folder:{images}/ours.csv", "all")
    assert rows(source) == [("0.png", 0), ("1.png", 1), ("2.png", 0)]


def test_one_file_is_split_as_class_folders_are(tmp_path):
    paths = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(30)]
    touch(tmp_path, *(f"folders/{path}" for path in paths))
    write(tmp_path / "folders.csv", "file,label", *(f"folders/{p},{p[:3]}" for p in paths))
    write(tmp_path / "folders" / "x.csv", "file,label", *(f"{p},{p[:3]}" for p in paths))
    for split in ("train", "test", "train[:50%]", "all"):
        listed = catalog.load(f"folder:{tmp_path}/folders/x.csv", split)
        found = catalog.load(f"folder:{tmp_path}/folders", split)
        assert [listed[i] for i in range(len(listed))] == [found[i] for i in range(len(found))]
    assert catalog.split_names(f"folder:{tmp_path}/folders.csv") == ("train", "test")
    assert len(catalog.load(f"folder:{tmp_path}/folders.csv", "test")) in range(4, 22)


def test_a_column_may_say_which_split(images):
    lines = [
        f"{i}.png,{'ab'[i % 2]},{split}" for i, split in enumerate(["train"] * 3 + ["test"] * 2)
    ]
    write(images / "labels.csv", "file,label,split", *lines)
    assert catalog.split_names(f"folder:{images}") == ("train", "test")
    assert rows(catalog.load(f"folder:{images}", "train")) == [
        ("0.png", 0),
        ("1.png", 1),
        ("2.png", 0),
    ]
    assert rows(catalog.load(f"folder:{images}", "val")) == [("3.png", 1), ("4.png", 0)]
    write(images / "labels.csv", "file,label,split", "0.png,a,spare")
    assert "line 2 has split 'spare'; use one of train, training, val" in message(images)
    write(images / "labels.csv", "file,label,split", "0.png,a,Training", "1.png,a,dev")
    assert rows(catalog.load(f"folder:{images}", "validation")) == [("1.png", 0)]


@pytest.mark.parametrize("inside", ["", "train/"])
def test_splits_made_by_you(tmp_path, inside):
    touch(tmp_path, f"{inside}0.png", f"{inside}1.png", "eval/2.png")
    write(tmp_path / "train.csv", "file,label", "0.png,dog", "1.png,cat")
    write(tmp_path / "validation.csv", "file,label", "eval/2.png,dog")
    assert rows(catalog.load(f"folder:{tmp_path}", "train")) == [("0.png", 1), ("1.png", 0)]
    assert rows(catalog.load(f"folder:{tmp_path}", "val")) == [("2.png", 1)]
    assert catalog.split_names(f"folder:{tmp_path}") == ("train", "validation")
    assert "has no split 'spare'; it has train, validation" in message(tmp_path, "spare")


def test_the_layout_of_imagefolder(tmp_path):
    for split, label in (("train", "b"), ("test", "a")):
        touch(tmp_path, f"{split}/0.png", f"{split}/deep/1.png")
        lines = [
            json.dumps({"file_name": name, "label": label if name == "0.png" else "a"})
            for name in ("0.png", "deep/1.png")
        ]
        write(tmp_path / split / "metadata.jsonl", *lines)
    assert rows(catalog.load(f"folder:{tmp_path}", "train")) == [("0.png", 1), ("1.png", 0)]
    assert rows(catalog.load(f"folder:{tmp_path}", "test")) == [("0.png", 0), ("1.png", 0)]


def test_images_may_lie_anywhere(tmp_path, images):
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere / "labels.csv", "file,label", f"{images}/0.png,a", "../1.png,b")
    assert rows(catalog.load(f"folder:{elsewhere}", "all")) == [("0.png", 0), ("1.png", 1)]


def test_the_order_mixes_classes_and_ignores_that_of_the_lines(tmp_path):
    touch(tmp_path, *(f"{i}.png" for i in range(60)))
    lines = [f"{i}.png,{i // 30}" for i in range(60)]
    write(tmp_path / "a.csv", "file,label", *lines)
    write(tmp_path / "b.csv", "file,label", *reversed(lines))
    one, other = (catalog.load(f"folder:{tmp_path}/{x}.csv", "all") for x in "ab")
    assert [one[i] for i in range(60)] == [other[i] for i in range(60)]
    assert sum(a != b for a, b in itertools.pairwise(one.labels)) > 15


# --- numbers ------------------------------------------------------------------------------


def test_numbers_are_positions(images, capsys):
    write(images / "labels.csv", "file,label", "0.png,10", "1.png,2", "2.png,002", "3.png,0")
    source = catalog.load(f"folder:{images}", "all")
    assert rows(source) == [("0.png", 10), ("1.png", 2), ("2.png", 2), ("3.png", 0)]
    assert source.class_names == tuple(map(str, range(11)))
    assert (
        "has no image of 8 of the 11 classes, the first of them '1'" in capsys.readouterr().err
    )


def test_numbers_in_json_are_numbers(images):
    write(
        images / "labels.jsonl",
        '{"file": "0.png", "label": 1}',
        "",
        '{"file": "1.png", "label": 0}',
    )
    assert rows(catalog.load(f"folder:{images}", "all")) == [("0.png", 1), ("1.png", 0)]


@pytest.mark.parametrize("labels", [("dog", "cat", "dog"), ("1", "0", "1")])
def test_classes_txt_says_what_the_classes_are(images, labels, capsys):
    write(images / "classes.txt", "cat", "dog", "", "eel")
    write(images / "labels.csv", "file,label", *(f"{i}.png,{x}" for i, x in enumerate(labels)))
    source = catalog.load(f"folder:{images}", "all")
    assert source.class_names == ("cat", "dog", "eel")
    assert rows(source) == [("0.png", 1), ("1.png", 0), ("2.png", 1)]
    assert "no image of 1 of the 3 classes, the first of them 'eel'" in capsys.readouterr().err


def test_labels_of_digits_beside_words_are_words(images):
    write(images / "train.csv", "file,label", "0.png,7", "1.png,x")
    write(images / "val.csv", "file,label", "2.png,7")
    assert rows(catalog.load(f"folder:{images}", "val")) == [("2.png", 0)]


@pytest.mark.parametrize(
    ("lines", "classes", "part"),
    [
        (["0.png,0", "1.png,-1"], None, "line 3 has label -1; number the classes from 0"),
        (["0.png,0", "1.png,20240131"], None, "line 3 has label 20240131; number the classes"),
        (["0.png,0", "1.png,2"], ["a", "b"], "line 3 has label '2', which is none of the 2"),
        (["0.png,a", "1.png,c"], ["a", "b"], "line 3 has label 'c', which is none of the 2"),
        (["0.png,a", "1.png,"], None, "line 3 has label ''; give a name or a number"),
        (["0.png,a", "1.png"], None, "line 3 has label None; give a name or a number"),
        (["0.png,a"], ["a", "a"], "classes.txt' has the class 'a' twice; remove one"),
        (["0.png,a"], [""], "classes.txt' names no classes; write one name a line"),
    ],
)
def test_labels_out_of_range_are_found_before_an_image_is_read(images, lines, classes, part):
    write(images / "labels.csv", "file,label", *lines)
    if classes is not None:
        write(images / "classes.txt", *classes)
    assert part in message(images)


@pytest.mark.parametrize(("train", "val"), [("dog", "eel"), ("0", "1"), ("0", "x"), ("x", "0")])
def test_a_split_has_no_classes_of_its_own(images, train, val):
    write(images / "train.csv", "file,label", f"0.png,{train}")
    write(images / "val.csv", "file,label", f"1.png,{val}")
    assert f"val.csv' line 2 has label '{val}', which is none of the 1 classes" in message(
        images, "val"
    )


# --- tables as other people have them --------------------------------------------------------


def test_ids_without_an_ending_in_a_folder_beside_the_table(tmp_path):
    """Kaggle's layout: labels.csv with `id,breed`, and the images of both splits in folders."""
    touch(tmp_path, "train/0a1.jpg", "train/b.c.png", "train/7.jpeg", "test/zz.jpg")
    write(tmp_path / "labels.csv", "id,breed", "0a1,pug", "b.c,collie", "7,pug")
    source = catalog.load(f"folder:{tmp_path}", "all")
    assert rows(source) == [("0a1.jpg", 1), ("7.jpeg", 1), ("b.c.png", 0)]
    touch(tmp_path, "train/7.png")
    assert "names '7', and there are '7.jpeg' and '7.png'; add the ending" in message(tmp_path)


def test_names_with_backslashes_and_tables_in_capitals(tmp_path):
    touch(tmp_path, "cat/0.png", "dog/1.png")
    write(tmp_path / "Labels.CSV", "Image,Label", "cat\\0.png,x", ".\\dog\\1,y")
    source = catalog.load(f"folder:{tmp_path}", "all")
    assert rows(source) == [("0.png", 0), ("1.png", 1)]
    touch(tmp_path, "cat/a\\b.png")  # which is a name, too, where it exists
    write(tmp_path / "Labels.CSV", "Image,Label", "cat/a\\b.png,x")
    assert rows(catalog.load(f"folder:{tmp_path}", "all")) == [("a\\b.png", 0)]


def test_the_folder_of_a_split_is_found_by_its_name(tmp_path):
    touch(tmp_path, "train_images/1.png", "test_images/1.png")
    write(tmp_path / "train.csv", "image_id,label", "1,x")
    assert rows(catalog.load(f"folder:{tmp_path}", "train")) == [("1.png", 0)]
    (tmp_path / "train_images").rename(tmp_path / "other")
    assert "lies in each of 'other', 'test_images' beside it" in message(tmp_path)


@pytest.mark.parametrize(
    ("head", "line", "options"),
    [
        ("id,breed,size", "0,x,big", ",label=breed"),
        ("thumb,image,breed,label", "9.png,0.png,x,9", ",label=Breed"),
        ("label,mask,img", "x,1.png,0.png", ""),
        ("label,mask,img", "x,0.png,1.png", ",image=mask"),
        (",image,target", "17,0.png,x", ""),
        ("image,target,category", "0.png,9,x", ""),
    ],
)
def test_columns_by_convention_or_by_choice(images, head, line, options):
    write(images / "t.csv", head, line)
    source = catalog.load(f"folder:{images}/t.csv{options}", "all")
    assert (rows(source), source.class_names) == ([("0.png", 0)], ("x",))


def test_a_choice_that_is_left_open_is_refused(images):
    write(images / "t.csv", "image,kind,breed", "0.png,a,b")
    said = message(f"{images}/t.csv")
    assert "has columns image, kind, breed, none of which holds labels" in said
    assert f"or give folder:{images}/t.csv,label=NAME" in said
    assert "and no 'size'; give label=NAME with one of them" in message(
        f"{images}/t.csv,label=size"
    )
    assert "an option without a value, or one twice" in message(f"{images}/t.csv,label=")
    assert "has classes=deep: use outer or inner" in message(f"{images},classes=deep")
    assert "so that label=size has no meaning; give folder:" in message(f"{images},label=size")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["True", "False", "True"], ("False", "True")),
        (["1.0", "0.0", "1.0"], ("0", "1")),
        (["1.0", "0", "1"], ("0", "1")),
    ],
)
def test_booleans_and_whole_floats_are_labels(images, labels, names):
    write(images / "labels.csv", "file,label", *(f"{i}.png,{x}" for i, x in enumerate(labels)))
    values = [json.loads(x.lower()) for x in labels]
    lines = [json.dumps({"file": f"{i}.png", "label": x}) for i, x in enumerate(values)]
    write(images / "t.jsonl", *lines)
    for name in ("labels.csv", "t.jsonl"):
        source = catalog.load(f"folder:{images}/{name}", "all")
        assert source.class_names == names
        assert rows(source) == [("0.png", 1), ("1.png", 0), ("2.png", 1)]


def test_labels_that_look_like_something_else_are_told_of(images, capsys):
    write(images / "t.csv", "file,label", "0.png,cat", "1.png,dog", "2.png,cat dog")
    assert catalog.load(f"folder:{images}/t.csv", "all").class_names == (
        "cat",
        "cat dog",
        "dog",
    )
    said = capsys.readouterr().err
    assert "class 'cat dog': if these are several labels" in said
    assert "data.multi_label=space" in said
    write(images / "u.csv", "file,label", "0.png,1.5", "1.png,2.0")
    assert catalog.load(f"folder:{images}/u.csv", "all").class_names == ("1.5", "2.0")
    assert "labels such as 1.5, which are read as names" in capsys.readouterr().err
    write(images / "v.csv", "file,label", "0.png,big cat", "1.png,big dog")
    catalog.load(f"folder:{images}/v.csv", "all")
    assert "several" not in capsys.readouterr().err


def test_a_table_beside_class_folders_says_what_it_leaves_out(tmp_path, capsys):
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)))
    write(tmp_path / "labels.csv", "file,label", "cat/0.png,tom", "dog/1.png,rex")
    assert catalog.load(f"folder:{tmp_path}", "all").class_names == ("rex", "tom")
    said = capsys.readouterr().err
    assert "labels.csv' lists 2 images, and 8 others below" in said
    assert f"for that give folder:{tmp_path},classes=outer" in said
    by_folder = catalog.load(f"folder:{tmp_path},classes=outer", "all")
    assert (by_folder.class_names, len(by_folder)) == (("cat", "dog"), 10)


# --- errors -------------------------------------------------------------------------------


def test_missing_and_double_images_are_found_before_training(images):
    write(images / "labels.csv", "file,label", "0.png,a", "x.png,b", "11,b", "no/2.png,a")
    said = message(images)
    assert f"'{images}/labels.csv' line 3 names 'x.png', which does not exist below" in said
    assert "and 2 more are missing; correct the names (endings belong to them)" in said
    write(images / "labels.csv", "file,label", "0.png,a", "1.png,a", "./0.png,b")
    assert "line 4 lists './0.png' again, after line 2; keep one of the two" in message(images)


@pytest.mark.parametrize(
    ("name", "lines", "part"),
    [
        (
            "labels.csv",
            ["who,label", "0.png,a"],
            "has columns who, label, none of which holds ",
        ),
        ("labels.csv", ["who,label", "0.png,a"], "call one of them file_name or filename or"),
        (
            "labels.csv",
            ["file,kind,size", "0.png,a,1"],
            "none of which holds labels; call one of",
        ),
        ("labels.csv", ["file,label"], "labels.csv' lists no images; add a line for each"),
        ("labels.csv", [], "none of which holds image files"),
        ("labels.csv", ["file,label", ",a"], "line 2 has no 'file'; name an image"),
        ("labels.jsonl", ["{"], "line 1 is no JSON object; write {"),
        ("labels.jsonl", ["[]"], "line 1 is no JSON object; write {"),
        ("labels.jsonl", ['{"file": "0.png", "label": 1.5}'], "line 1 has label 1.5; give a"),
        ("labels.jsonl", ['{"file": 3, "label": 1}'], "line 1 has no 'file'; name an image"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(images, name, lines, part):
    write(images / name, *lines)
    said = message(images, "all")
    assert part in said
    assert f"{images}/{name}" in said


def test_two_files_that_contradict_are_refused(images):
    write(images / "labels.csv", "file,label", "0.png,a")
    write(images / "train.csv", "file,label", "0.png,b")
    assert "labels.csv' and " in message(images)
    assert "both list labels; take one away, or name the one to use" in message(images)
    (images / "labels.csv").unlink()
    write(images / "train.tsv", "file\tlabel", "0.png\tb")
    assert "train.csv' and " in message(images)


def test_bytes_that_are_no_text_are_explained(images):
    (images / "labels.csv").write_bytes(b"file,label\n\xff\xfe.png,a\n")
    assert "cannot be read ('utf-8' codec" in message(images)
    assert "lists no labels; give a folder, or a file that ends in .csv" in message(
        images / "0.png"
    )


def test_classes_are_not_so_many_that_memory_is_full(images, monkeypatch):
    monkeypatch.setattr(multi_label, "_MOST_BYTES", 1 << 20)
    several = [json.dumps({"image": f"{i}.png", "label": [999_999]}) for i in range(6)]
    write(images / "labels.jsonl", *several)
    with pytest.raises(UserError, match="6 images with 1,000,000 classes are too many"):
        catalog.load(f"folder:{images}", "train", multi_label="auto")
    one = [json.dumps({"image": f"{i}.png", "label": 10**6}) for i in range(6)]
    write(images / "labels.jsonl", *one)
    assert "line 1 has label 1000000; number the classes from 0" in message(images)
