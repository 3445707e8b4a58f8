"""Names decide which class is which, positions only where names say nothing."""

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.sources import catalog, classes
from vit_jax.data.sources.classes import Mismatch, as_classes, match
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.system.errors import UserError


def outputs(model, data, published=True):
    return match(tuple(model), tuple(data), "the data", published).outputs


@pytest.mark.parametrize("published", [True, False])
def test_equal_sets_of_names_are_matched_by_name(published):
    assert outputs(["dog", "emu", "cat"], ["cat", "dog", "emu"], published) == (2, 0, 1)
    numbers = list(map(str, range(12)))
    assert outputs(numbers, sorted(numbers), published) == (0, 1, 10, 11, *range(2, 10))
    assert match(("a", "b"), ("a", "b"), "", published).note == ""
    assert "in another order: matched by name" in match(("b", "a"), ("a", "b"), "x", True).note


def test_spelling_is_not_held_against_a_name():
    model = ("Golden Retriever", "n02123045 tabby, tabby cat", "tench, Tinca tinca", "LABEL_3")
    data = ("tinca-tinca", "golden_retriever", "n02123045", "003")
    assert outputs(model, data) == (2, 0, 1, 3)
    assert "4 of 4 classes are spelled otherwise" in match(model, data, "x", True).note
    # An exact name comes before another spelling, a whole name before a synonym.
    assert outputs(["cat", "Cat"], ["Cat", "cat"]) == (1, 0)
    assert outputs(["maillot, tank suit", "maillot"], ["maillot", "tank suit"]) == (1, 0)


def test_a_part_of_the_classes_is_matched_by_name():
    model = tuple(f"kind {i}" for i in range(50))
    data = ("kind 41", "kind 7", "kind 30")
    found = match(model, data, "folder:x", True)
    assert found.outputs == (41, 7, 30)
    assert "folder:x has 3 of the model's 50 classes, matched by name" in found.note
    assert outputs(model, data, published=False) == (41, 7, 30)
    # Numbers in place of names are no names: ten digits are not ten classes of ImageNet.
    with pytest.raises(Mismatch, match="--classes"):
        outputs(map(str, range(1000)), map(str, range(10)))
    assert outputs(map(str, range(5)), ("4", "2"), published=False) == (4, 2)


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_folders_mean_the_output_of_their_number(first):
    data = sorted(str(i) for i in range(first, first + 12))
    names = [f"flower {chr(97 + i)}" for i in range(12)]
    found = match(tuple(names), tuple(data), "x", True)
    assert found.outputs == tuple(int(name) - first for name in data)
    assert f"are numbers, from {first}" in found.note


def test_position_counts_only_where_names_say_nothing():
    found = match(("tench", "goldfish"), ("n01440764", "n01443537"), "x", True)
    assert found.outputs == (0, 1)
    assert "their order is taken to be the same" in found.note
    # Those that can be matched stand where they should, so the others do, too.
    assert outputs(["cat", "canine", "emu"], ["cat", "dog", "emu"]) == (0, 1, 2)
    with pytest.raises(Mismatch, match="'cat' has another position there"):
        outputs(["canine", "cat", "emu"], ["cat", "dog", "emu"])
    with pytest.raises(Mismatch, match="evaluate on data with the same classes"):
        outputs(["tench", "goldfish"], ["n1", "n2"], published=False)
    with pytest.raises(Mismatch, match=r"\('fox' is none of them\)"):
        outputs(["cat", "dog", "emu"], ["cat", "fox"])
    with pytest.raises(Mismatch, match="'Cat' and 'cat', which are both 'cat' in the model"):
        outputs(["cat", "dog"], ["Cat", "cat"])


def test_a_list_says_which_output_is_which_class(tmp_path):
    model, data = ("a", "b", "7", "c"), ("x", "y")
    assert classes.chosen("c,0", model, data).outputs == (3, 0)
    assert classes.chosen("7,1", model, data).outputs == (2, 1)  # a name before a number
    (tmp_path / "list.txt").write_text("b\n\nc\n")
    assert classes.chosen(str(tmp_path / "list.txt"), model, data).outputs == (1, 3)
    for given, said in [
        ("a", "has 1 entries, but the data have 2 classes"),
        ("a,9", "'9', which is none of the model's outputs"),
        ("a,0", "'0' for two classes"),
        (" , ", "holds no names"),
    ]:
        with pytest.raises(UserError, match=said):
            classes.chosen(given, model, data)


# ---- the labels of a source --------------------------------------------------------------


def array_source(names, labels):
    pixels = np.arange(len(labels) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    return ArraySource(pixels, np.array(labels), tuple(names), "made")


def test_labels_follow_the_names():
    source = array_source("abc", [0, 1, 2, 1])
    moved = as_classes(source, ("c", "x", "a", "b"))
    assert [moved[i]["label"] for i in range(4)] == [2, 3, 0, 3]
    assert moved.fingerprint(0, 4) == array_source("cxab", [2, 3, 0, 3]).fingerprint(0, 4)
    assert as_classes(source, ("a", "b")) is None
    assert as_classes(source, source.class_names) is source


def test_parts_and_sums_of_sources_follow_too(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (2, 2), i).save(tmp_path / name / f"{i}.png")
    source = catalog.load(f"folder:{tmp_path}", "all[1:]+all[:2]")
    moved = as_classes(source, ("dog", "cat"))
    names = lambda source: [source.class_names[source[i]["label"]] for i in range(7)]
    assert moved.class_names == ("dog", "cat")
    assert names(moved) == names(source)
    assert {"cat", "dog"} == set(names(source))


def test_sources_that_keep_labels_with_images_are_wrapped():
    class Bare:
        class_names = ("a", "b")

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"image": None, "label": (1, -1)[i], "name": str(i)}

        def fingerprint(self, start, stop):
            return f"{start}:{stop}"

    moved = as_classes(Bare(), ("b", "a"))
    assert [moved[i]["label"] for i in range(2)] == [0, -1]
    assert moved.fingerprint(0, 2) == "0:2"


def test_numbers_of_thousands_of_digits_are_names():
    assert classes.numbers(["9" * 5000]) is None
    with pytest.raises(UserError, match="which is none of the model's outputs"):
        classes.chosen(f"{'9' * 5000},b", ("a", "b"), ("x", "y"))


def test_an_endless_file_of_names_is_refused(tmp_path):
    with (tmp_path / "names.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than"):
        classes.read_names("classes", str(tmp_path / "names.txt"))
