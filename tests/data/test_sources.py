import pickle

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vit_jax.data.sources import catalog
from vit_jax.data.sources.in_memory import ArraySource, SyntheticSource
from vit_jax.data.sources.source import Concatenation, known_labels
from vit_jax.data.sources.splits import pick_split
from vit_jax.system.errors import UserError


def labels(source):
    return [source[i]["label"] for i in range(len(source))]


def images(source):
    return np.stack([source[i]["image"] for i in range(len(source))])


def test_digits_are_split_in_two_without_loss():
    train, test = catalog.load("digits", "train"), catalog.load("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    both = np.concatenate([images(train), images(test)]).reshape(1797, 64)
    whole = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole))
    assert both.max() == 255


def test_digits_splits_are_stratified_and_repeatable():
    train, test = catalog.load("digits", "train"), catalog.load("digits", "test")
    share = np.bincount(labels(test)) / (np.bincount(labels(train)) + np.bincount(labels(test)))
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    assert labels(test) == labels(catalog.load("digits", "test"))
    assert labels(test) != sorted(labels(test))
    assert test.class_names == tuple("0123456789")


def test_a_digit_knows_its_name_and_its_label():
    source = catalog.load("digits", "train")
    data = load_digits()
    rows = {
        np.rint(x * 255 / 16).astype(np.uint8).tobytes(): y
        for x, y in zip(data.images, data.target, strict=True)
    }
    for i in range(0, 1437, 100):
        example = source[i]
        assert example["name"] == f"digits[{i}]"
        assert rows[example["image"].tobytes()] == example["label"]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:98%]", slice(0, 98)),
        ("train[10%:]", slice(10, None)),
        ("train[20:50]", slice(20, 50)),
        ("train[-10:]", slice(-10, None)),
        ("train[:-10%]", slice(0, -10)),
        ("train[ 5 : 50% ]", slice(5, 50)),
        ("train[-30:-10]", slice(-30, -10)),
        ("train[:]", slice(None)),
    ],
)
def test_a_part_of_a_split_is_a_slice(split, rows):
    whole = catalog.load("synthetic:2x2x3,examples=100", "train")
    part = catalog.load("synthetic:2x2x3,examples=100", split)
    np.testing.assert_array_equal(images(part), images(whole)[rows])
    assert part.class_names == whole.class_names


@pytest.mark.parametrize(
    ("percent", "index"), [(1, 0), (25, 2), (35, 4), (50, 5), (49, 5), (45, 4)]
)
def test_percentages_go_to_the_closest_example(percent, index):
    # Of ten examples: 2.5 and 4.5 go to the even neighbour, as in TensorFlow Datasets.
    rest = catalog.load("synthetic:1x1x1,examples=10", f"train[{percent}%:]")
    assert len(rest) == 10 - index


@pytest.mark.parametrize("n", [30, 77, 1001])
@pytest.mark.parametrize("percent", [10, 33, 98])
def test_complementary_percentages_share_nothing_and_lose_nothing(n, percent):
    name = f"synthetic:1x1x1,examples={n}"
    low, high = f"train[:{percent}%]", f"train[{percent}%:]"
    assert len(catalog.load(name, low)) + len(catalog.load(name, high)) == n


def test_splits_can_be_joined():
    both = catalog.load("digits", "train[:5]+test[-3:]")
    assert len(both) == 8
    expected = (
        labels(catalog.load("digits", "train"))[:5]
        + labels(catalog.load("digits", "test"))[-3:]
    )
    assert labels(both) == expected
    assert both[-1]["label"] == expected[-1]
    with pytest.raises(IndexError):
        both[8]


@pytest.mark.parametrize(
    "split", ["train[", "train[5]", "train[a:b]", "", "train[1:2:3]", "train+"]
)
def test_a_malformed_split_is_explained(split):
    with pytest.raises(UserError, match=r"not understood; write it like train, train\[:98%\]"):
        catalog.load("digits", split)


@pytest.mark.parametrize("split", ["train[:2000]", "train[-2000:]", "train[:101%]"])
def test_bounds_outside_the_split_are_an_error(split):
    with pytest.raises(UserError, match=r"reaches outside 'train', which has 1437 examples"):
        catalog.load("digits", split)


def test_an_empty_part_is_an_error():
    with pytest.raises(UserError, match=r"'train\[9:3\]' holds no examples"):
        catalog.load("digits", "train[9:3]")


def test_an_unknown_split_lists_those_that_exist():
    with pytest.raises(UserError, match="digits has no split 'dev'; it has train, test"):
        catalog.load("digits", "dev")


@pytest.mark.parametrize("split", ["val", "validation", "test"])
def test_names_of_the_only_held_out_split_are_synonyms(split):
    assert labels(catalog.load("digits", split)) == labels(catalog.load("digits", "test"))


def test_val_and_validation_are_one_name_even_beside_test():
    assert pick_split("val", ("train", "validation", "test"), "x") == "validation"
    assert pick_split("validation", ("train", "val", "test"), "x") == "val"
    with pytest.raises(UserError):
        pick_split("test", ("train", "val", "validation"), "x")


@pytest.mark.parametrize("source", ["digitz", "cifar10", "", "tfdss:mnist"])
def test_an_unknown_source_lists_the_kinds(source):
    with pytest.raises(UserError, match="use digits, folder:PATH, tfds:NAME, hf:NAME, records"):
        catalog.load(source, "train")


def test_a_near_miss_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'digits'"):
        catalog.load("digts", "train")


def test_synthetic_examples_are_a_pure_function_of_split_and_index():
    one, two = (
        catalog.load("synthetic:5x4x3,classes=7,examples=50", "train") for _ in range(2)
    )
    assert one[3]["image"].shape == (5, 4, 3)
    np.testing.assert_array_equal(one[49]["image"], two[49]["image"])
    assert labels(one) == labels(two)
    assert set(labels(one)) <= set(range(7))
    assert (images(one) != images(catalog.load("synthetic:5x4x3,examples=50", "test"))).any()
    assert len({bytes(image) for image in images(one)}) == 50


def test_synthetic_defaults_to_imagenet_sizes():
    source = catalog.load("synthetic", "train")
    assert (len(source), len(source.class_names)) == (1280, 1000)
    assert source[0]["image"].shape == (224, 224, 3)
    assert len(catalog.load("synthetic,examples=3", "train")) == 3


@pytest.mark.parametrize("argument", ["224", "8x8x0", "classes=0", "colour=red", "8x8"])
def test_a_malformed_synthetic_source_is_explained(argument):
    with pytest.raises(UserError, match="is not understood; write it like synthetic:224x224x3"):
        catalog.load(f"synthetic:{argument}", "train")


@pytest.mark.parametrize("source", ["digits", "synthetic:2x2x1"])
def test_sources_can_be_pickled(source):
    opened = catalog.load(source, "train[5:]+test[:3]")
    again = pickle.loads(pickle.dumps(opened))
    assert len(again) == len(opened)
    np.testing.assert_array_equal(again[-1]["image"], opened[-1]["image"])


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_the_splits_of_a_source_are_known(source):
    assert catalog.split_names(source) == ("train", "test")


def test_labels_are_known_where_no_image_is_read_for_them():
    whole = catalog.load("digits", "train")
    np.testing.assert_array_equal(known_labels(whole), labels(whole))
    part = catalog.load("digits", "train[7:19]+test[-3:]")
    np.testing.assert_array_equal(known_labels(part), labels(part))
    mixed = Concatenation([whole, catalog.load("synthetic,classes=10", "train")])
    assert known_labels(mixed) is None


class Unlabelled(SyntheticSource):
    """Knows its labels only with its images; the last one is wrong."""

    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": 3 if i == 999 else 0}


@pytest.mark.parametrize("split", ["train", "train[500:]", "train[:3]+train[-1:]"])
def test_labels_out_of_range_are_found_when_a_source_is_opened(monkeypatch, split):
    opened = {
        "known": ArraySource(
            np.zeros((1000, 1, 1), np.uint8), np.arange(1000) // 333, tuple("abc"), "known"
        ),
        "unknown": Unlabelled("train", (1, 1, 3), classes=3, examples=1000),
    }
    kind = catalog._Kind(lambda argument, split, data_dir: opened[argument], None)
    monkeypatch.setitem(catalog._KINDS, "mine", kind)
    name = {"known": r"known\[999\]", "unknown": r"synthetic train\[999\]"}
    for argument in opened:
        match = name[argument] + " has label 3, but the classes are numbered 0 to 2"
        with pytest.raises(UserError, match=match):
            catalog.load(f"mine:{argument}", split)
    assert len(catalog.load("mine:known", "train[:999]")) == 999
