import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import decode
from vit_jax.data.sources import catalog, huggingface
from vit_jax.system.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("huggingface")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def png(grey):
    file = io.BytesIO()
    Image.new("L", (5, 4), grey).save(file, "PNG")
    return file.getvalue()


def table(n, label, first=0, **columns):
    """Image i has the grey of its position; labels go 0, 1, 2, 0, ... or are given, too."""
    greys = range(first, first + n)
    values = {"image": [{"bytes": png(g), "path": f"{g}.png"} for g in greys]}
    features = {"image": datasets.Image()}
    columns["label"] = label if isinstance(label, tuple) else ([g % 3 for g in greys], label)
    for name, (column, feature) in columns.items():
        values[name], features[name] = column, feature
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def both():
    label = datasets.ClassLabel(names=NAMES)
    return datasets.DatasetDict({"test": table(5, label, 100), "train": table(37, label)})


def greys(source):
    return [np.asarray(decode.decode(source[i], 3))[0, 0, 0] for i in range(len(source))]


def check(source, first, n):
    assert greys(source) == list(range(first, first + n))
    assert [source[i]["label"] for i in range(n)] == [g % 3 for g in range(first, first + n)]
    np.testing.assert_array_equal(source.labels, [g % 3 for g in range(first, first + n)])


def message(name, split="train"):
    with pytest.raises(UserError) as caught:
        catalog.load(f"hf:{name}", split)
    return str(caught.value)


def test_a_folder_saved_to_disk(both, tmp_path):
    both.save_to_disk(str(tmp_path / "both"))
    name = f"hf:{tmp_path / 'both'}"
    check(catalog.load(name, "train"), 0, 37)
    check(catalog.load(name, "val"), 100, 5)
    assert catalog.load(name, "train").class_names == tuple(NAMES)
    assert catalog.split_names(name) == ("train", "test")
    assert catalog.load(name, "test")[2]["name"] == f"{name} test[2] (102.png)"
    assert catalog.load(name, "test")[2]["image"] == png(102)
    both["train"].save_to_disk(str(tmp_path / "one"))
    check(catalog.load(f"hf:{tmp_path / 'one'}", "train"), 0, 37)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_files_of_parquet_and_arrow(both, tmp_path, ending):
    for split, part in both.items():
        path = tmp_path / "files" / f"{split}-00000-of-00001.{ending}"
        path.parent.mkdir(exist_ok=True)
        if ending == "parquet":
            part.to_parquet(str(path))
        else:
            part.save_to_disk(str(tmp_path / split))
            (written,) = (tmp_path / split).glob("*.arrow")
            written.rename(path)
    check(catalog.load(f"hf:{tmp_path / 'files'}", "train"), 0, 37)
    check(catalog.load(f"hf:{tmp_path / 'files'}", "test"), 100, 5)
    check(catalog.load(f"hf:{path.parent}/train-00000-of-00001.{ending}", "train"), 0, 37)


def test_an_imagefolder(tmp_path):
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(len(name)))
    ours = catalog.load(f"folder:{tmp_path}", "test")
    theirs = catalog.load(f"hf:{tmp_path}", "test")
    assert theirs.class_names == ours.class_names
    ours, theirs = ([source[i] for i in range(3)] for source in (ours, theirs))
    assert sorted((e["image"], e["label"]) for e in ours) == [
        (e["image"], e["label"]) for e in theirs
    ]


@pytest.mark.parametrize(
    "split", ["train[:33%]", "train[-3:]", "train[10:20]", "train[50%:]+test"]
)
def test_splits_are_written_as_for_every_source(both, tmp_path, split):
    both.save_to_disk(str(tmp_path))
    whole = {"train": list(range(37)), "test": list(range(100, 105))}
    expected = {
        "train[:33%]": whole["train"][:12],
        "train[-3:]": whole["train"][-3:],
        "train[10:20]": whole["train"][10:20],
        "train[50%:]+test": whole["train"][18:] + whole["test"],
    }
    assert greys(catalog.load(f"hf:{tmp_path}", split)) == expected[split]


@pytest.mark.parametrize("kind", ["int64", "uint8", "string", "large_string"])
def test_a_column_called_label_will_do(tmp_path, kind):
    column = [["x", "aa", "m"][i % 3] if "string" in kind else i % 3 for i in range(7)]
    data = table(
        7, label=(column, datasets.Value(kind)), other=([1] * 7, datasets.Value("int8"))
    )
    data.save_to_disk(str(tmp_path))
    source = catalog.load(f"hf:{tmp_path}", "train")
    names = ("aa", "m", "x") if "string" in kind else ("0", "1", "2")
    assert source.class_names == names
    labels = [2, 0, 1] if "string" in kind else [0, 1, 2]
    assert [source[i]["label"] for i in range(7)] == [labels[i % 3] for i in range(7)]
    assert source.labels.tolist() == [labels[i % 3] for i in range(7)]


def test_a_class_label_comes_before_a_column_of_that_name(tmp_path):
    fine = ([i % 2 for i in range(4)], datasets.ClassLabel(names=["x", "y"]))
    table(4, (["q"] * 4, datasets.Value("string")), fine=fine).save_to_disk(str(tmp_path))
    assert catalog.load(f"hf:{tmp_path}", "train").class_names == ("x", "y")


def test_columns_are_found_by_their_kind(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    data = datasets.Dataset.from_dict(
        {"id": [7, 8], "breed": [1, 0], "img": [{"bytes": png(3), "path": None}] * 2},
        features=datasets.Features(
            {"id": datasets.Value("int32"), "breed": label, "img": datasets.Image()}
        ),
    )
    data.save_to_disk(str(tmp_path))
    source = catalog.load(f"hf:{tmp_path}", "train")
    assert source[0] == {"image": png(3), "label": 1, "name": f"hf:{tmp_path} train[0]"}


def many(tmp_path, n=6, **columns):
    """Writes columns, of which each is (values, feature); returns the source."""
    values = {key: column for key, (column, _) in columns.items()}
    features = datasets.Features({key: feature for key, (_, feature) in columns.items()})
    data = datasets.Dataset.from_dict(values, features=features)
    data.save_to_disk(str(tmp_path))
    return f"hf:{tmp_path}"


def pictures(first, n=6):
    return ([{"bytes": png(first + i), "path": None} for i in range(n)], datasets.Image())


def classes(names, every):
    return ([i % every for i in range(6)], datasets.ClassLabel(names=names))


def test_columns_by_convention_come_before_others(tmp_path):
    name = many(
        tmp_path,
        mask=pictures(100),
        image=pictures(0),
        gender=classes(["m", "f"], 2),
        fine_label=classes(list("xyz"), 3),
        label=classes(list("uvw"), 3),
    )
    source = catalog.load(name, "train")
    assert (source.image_key, source.label_key) == ("image", "label")
    assert source.class_names == ("u", "v", "w")
    assert greys(source) == list(range(6))
    chosen = catalog.load(f"{name},image=mask,label=gender", "train[1:]")
    assert chosen.class_names == ("m", "f")
    assert greys(chosen) == list(range(101, 106))
    assert [chosen[i]["label"] for i in range(5)] == [1, 0, 1, 0, 1]
    with pytest.raises(UserError, match="has no images in its column 'gender'; choose another"):
        catalog.load(f"{name},image=gender", "train")
    with pytest.raises(
        UserError, match="no column 'age'; give label=NAME with one of mask, im"
    ):
        catalog.load(f"{name},label=age", "train")


def test_a_choice_that_is_left_open_is_refused(tmp_path):
    kinds = {"breed": classes(["a", "b"], 2), "coat": classes(["s", "l"], 2)}
    name = many(tmp_path / "labels", image=pictures(0), **kinds)
    with pytest.raises(UserError) as caught:
        catalog.load(name, "train")
    assert str(caught.value) == (
        f"{name} has several columns that can be the label: breed, coat; choose one, as in "
        f"{name},label=breed."
    )
    name = many(tmp_path / "images", left=pictures(0), right=pictures(9), **kinds)
    with pytest.raises(UserError, match=r"the image: left, right; choose .*,image=left\."):
        catalog.load(f"{name},label=coat", "train")
    assert greys(catalog.load(f"{name},label=coat,image=right", "train")) == list(range(9, 15))


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_images_stored_as_bytes_in_parquet(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = [png(i) for i in range(5)]
    if kind == "struct":
        encoded = [{"bytes": x, "path": f"{i}.png"} for i, x in enumerate(encoded)]
    table = pa.table(
        {"id": [str(i) for i in range(5)], "jpg": encoded, "label": [0, 1, 2, 1, 0]}
    )
    pq.write_table(table, tmp_path / "train.parquet")
    for source in (
        catalog.load(f"hf:{tmp_path}/train.parquet", "train"),
        catalog.load(f"hf:{tmp_path}", "train"),
    ):
        assert greys(source) == list(range(5))
        assert source.labels.tolist() == [0, 1, 2, 1, 0]
        assert len(source.fingerprint(0, 5)) == 16


@pytest.mark.parametrize(
    ("column", "kind", "names", "labels"),
    [
        ([True, False, None], "bool", ("False", "True"), [1, 0, -1]),
        ([2.0, 0.0, 1.0], "float32", ("0", "1", "2"), [2, 0, 1]),
        ([2.0, 0.0, 1.0], "float64", ("0", "1", "2"), [2, 0, 1]),
    ],
)
def test_booleans_and_whole_floats_are_labels(tmp_path, column, kind, names, labels):
    table(3, (column, datasets.Value(kind))).save_to_disk(str(tmp_path))
    source = huggingface.open_huggingface(str(tmp_path), "train")
    assert source.class_names == names
    assert [source[i]["label"] for i in range(3)] == source.labels.tolist() == labels


def test_other_floats_are_no_classes(tmp_path):
    table(2, ([0.5, 1.0], datasets.Value("float32"))).save_to_disk(str(tmp_path))
    assert "has label 0.5 in its column 'label', which is no class" in message(tmp_path)


def test_each_split_may_number_the_same_classes_in_its_own_way(tmp_path):
    one, other = (datasets.ClassLabel(names=names) for names in (["a", "b", "c"], ["c", "a"]))
    data = datasets.DatasetDict(
        train=table(3, ([0, 1, 2], one)), test=table(4, ([0, 1, -1, 0], other), first=100)
    )
    data.save_to_disk(str(tmp_path))
    source = huggingface.open_huggingface(str(tmp_path), "test")
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [source[i]["label"] for i in range(4)] == [2, 0, -1, 2]


@pytest.mark.parametrize("held_out", ["Val", "Validation", "TEST"])
def test_an_imagefolder_of_splits_in_capitals(tmp_path, held_out):
    for split, first in (("Train", 0), (held_out, 100)):
        for i, name in enumerate(NAMES):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(first + i))
    source = catalog.load(f"hf:{tmp_path}", "train")
    assert (greys(source), source.class_names) == ([0, 1, 2], tuple(NAMES))
    assert greys(catalog.load(f"hf:{tmp_path}", "val")) == [100, 101, 102]


@pytest.mark.parametrize("asked", ["val", "dev", "Validation", "valid"])
def test_splits_go_by_many_names(both, tmp_path, asked):
    data = datasets.DatasetDict(training=both["train"], valid=both["test"], extra=both["test"])
    data.save_to_disk(str(tmp_path))
    assert catalog.load(f"hf:{tmp_path}", "train").name == f"hf:{tmp_path} training"
    assert catalog.load(f"hf:{tmp_path}", asked).name == f"hf:{tmp_path} valid"
    assert "no split 'tset'; it has training, extra, valid" in message(tmp_path, "tset")


def test_sources_can_be_pickled_and_indexed_from_the_end(both, tmp_path):
    both.save_to_disk(str(tmp_path))
    source = catalog.load(f"hf:{tmp_path}", "train")
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3]
    assert source[-1] == source[36]
    with pytest.raises(IndexError):
        source[37]


@pytest.mark.parametrize(("column", "label"), [([0, -1], -1), ([0, None], -1)])
def test_missing_labels_are_found_when_the_set_is_opened(tmp_path, column, label):
    feature = datasets.ClassLabel(names=["a", "b"])
    table(2, (column, feature)).save_to_disk(str(tmp_path))
    said = message(tmp_path)
    assert f"train[1] (1.png) has label {label}, but the classes are numbered 0 to 1" in said


def test_an_image_that_is_missing_is_a_bad_one(tmp_path):
    label = datasets.ClassLabel(names=NAMES)
    data = table(2, label).remove_columns("image").add_column("image", [None, None])
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path))
    with pytest.raises(decode.BadImage, match=r"train\[1\] is empty"):
        decode.decode(catalog.load(f"hf:{tmp_path}", "train")[1], 3)


def test_errors_name_the_set_and_the_remedy(both, tmp_path, monkeypatch):
    both.save_to_disk(str(tmp_path / "both"))
    assert "both has no split 'dev'; it has train, test" in message(tmp_path / "both", "dev")
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "bare"))
    said = message(tmp_path / "bare")
    assert "has columns a and needs an Image and a ClassLabel (or a column `label`" in said
    assert "/nowhere is a path that does not exist; check it" in message(tmp_path / "nowhere")
    (tmp_path / "x.zip").write_text("")
    assert "in no format that is read here; give one that ends in .parquet" in message(
        tmp_path / "x.zip"
    )
    (tmp_path / "empty").mkdir()
    assert "empty cannot be loaded (" in message(tmp_path / "empty")
    for name in ("", "a b", "a/b/c"):
        assert f"hf:{name} is not a data set name; write it like hf:cifar100@" in message(name)


def test_what_the_hub_says_is_passed_on(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        raise ValueError("BuilderConfig 'x' not found.\n  Available: ['fine', 'coarse']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert message("owner/name@x") == (
        "hf:owner/name@x cannot be loaded (BuilderConfig 'x' not found. Available: ['fine', "
        "'coarse'])."
    )
    message("beans")
    assert asked == [("owner/name", "x"), ("beans", None)]


def test_without_the_library_the_remedy_is_one_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message("beans") == (
        "hf:beans needs the library `datasets`; install it with `pip install 'vit_jax[hf]'`."
    )
