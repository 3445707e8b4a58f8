"""The probes of `python -m vit_jax.evaluate`, as a person runs them, and what they read."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.commands import assert_one_sentence, call, run
from tests.tiny_config import tiny
from vit_jax.checkpoints import trained
from vit_jax.data.sources import catalog
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.distributed import sharding
from vit_jax.evaluation import accuracy, features, few_shot, knn, probes
from vit_jax.models import registry
from vit_jax.system.errors import UserError


def untrained(num_classes):
    """A model that nothing has trained, of digits or without a head."""
    config = tiny()
    model = registry.build_model(config, num_classes)
    params = jax.jit(model.init)(jax.random.key(0))
    names = tuple(map(str, range(num_classes)))
    return trained.Trained(config, names, model, params, step=0)


def asked(**fields):
    none = {"shots": (), "seeds": (0, 1, 2), "l2": 1024.0, "neighbours": (), "linear": False}
    return probes.Probes(**{**none, **fields})


def probe(model, train, test, **fields):
    return probes.run_probes(model, train, test, asked(**fields), 64, sharding.make_mesh())


def digits(split, model):
    """The representation of each digit, without the pipeline."""
    source = catalog.load("digits", split)
    images = np.stack([source[i]["image"] for i in range(len(source))])[..., None]
    _, out = jax.jit(model.model.apply)(model.params, images / np.float32(127.5) - 1)
    labels = np.array([source[i]["label"] for i in range(len(source))])
    return features.Features(np.asarray(out["pre_logits"]), labels)


# --- The door -----------------------------------------------------------------------------


def test_probes_are_printed_and_saved_beside_the_accuracy(tmp_path):
    model = untrained(10)
    trained.export(model, tmp_path / "run")
    result = run(
        "evaluate",
        f"--workdir={tmp_path / 'run'}",
        "--step=best",
        "--few_shot=5,1",
        "--seeds=0,7",
        "--knn=20",
        "--linear_probe",
        "--batch_size=100",
    )
    assert result.returncode == 0, result.stderr
    train, test = digits("train", model), digits("test", model)
    subsets = few_shot.choose_subsets(train.labels, 10, (5, 1), (0, 7))
    few = few_shot.few_shot_accuracy(train.take(subsets.indices), test, subsets, 10)
    nearest = knn.knn_accuracy(train, test, 10, (20,))[20]
    lines = result.stdout.splitlines()
    assert lines[0].endswith("(digits test, step 0)")
    assert "fitted to train, measured on the 360 of test" in lines[1]
    rows = [line.split() for line in lines[2:]]
    mean = lambda shots: f"{np.mean(few[shots]):.4f}"
    assert rows[0] == ["accuracy", "seeds", "0,", "7"]
    assert rows[1] == ["5-shot", mean(5), *(f"{a:.4f}" for a in few[5])]
    assert rows[2] == ["1-shot", mean(1), *(f"{a:.4f}" for a in few[1])]
    assert rows[3] == ["20-NN", f"{nearest:.4f}"]
    assert rows[4][:2] == ["linear", "probe"]
    assert 0.5 < float(rows[4][2]) < 1.0
    plain, saved = map(
        json.loads, (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    )
    assert (plain["count"], "few_shot" in plain) == (360, False)
    linear = saved.pop("linear_probe")
    assert f"{linear['accuracy']:.4f}" == rows[4][2]
    assert saved == {
        "step": 0,
        "data": "digits",
        "split": "test",
        "train_split": "train",
        "count": 360,
        "seeds": [0, 7],
        "few_shot_l2": 1024.0,
        "few_shot": {"5": few[5], "1": few[1]},
        "knn": {"20": nearest},
    }


def test_a_model_without_a_head_is_probed_and_only_that(tmp_path):
    trained.export(untrained(0), tmp_path / "model")
    result = call(
        "evaluate",
        f"--checkpoint={tmp_path / 'model'}",
        "--few_shot=200",
        "--seeds=0",
        "--train_split=train[:1000]",
    )
    assert result.returncode == 0, result.stderr
    assert "the model has no head, so only the probes are run" in result.stderr
    assert "note: 10 of 10 classes have fewer than 200 training examples" in result.stderr
    assert result.stdout.startswith("frozen features of digits, step 0: fitted to train[:1000]")
    assert "loss" not in result.stdout


def test_numbers_that_cannot_be_used():
    result = call("evaluate", "--workdir=nowhere", "--few_shot=5,x")
    assert_one_sentence(result, "--few_shot is '5,x': use whole numbers, at least 1")


# --- What it rests on ---------------------------------------------------------------------


def test_the_head_is_evaluated_only_on_its_own_classes(capsys):
    model, names = untrained(3), ("0", "1", "2")
    assert accuracy.head_fits(model, names, "digits", probing=False)
    assert not accuracy.head_fits(model, ("a", "b", "c"), "letters", probing=True)
    assert "letters has the classes [a, b, c] (3)" in capsys.readouterr().err
    with pytest.raises(UserError, match="evaluate on data with the same classes"):
        accuracy.head_fits(model, ("a", "b", "c"), "letters", probing=False)
    with pytest.raises(UserError, match="the model has no head: probe its representation"):
        accuracy.head_fits(model._replace(class_names=()), names, "digits", probing=False)
    published = model._replace(family="google")
    assert accuracy.head_fits(published, ("a", "b", "c"), "letters", probing=False)
    assert "their order is taken to be the same" in capsys.readouterr().out


def test_few_shot_reads_only_the_images_it_draws():
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8), np.uint8)
    labels = np.arange(40) % 4
    drawn = few_shot.choose_subsets(labels, 4, (2,), (0, 1)).indices
    assert 8 <= len(drawn) <= 16

    class Images:
        """Encoded pictures, of which only the drawn ones can be read."""

        class_names = ("a", "b", "c", "d")

        def __len__(self):
            return 40

        def __getitem__(self, i):
            file = io.BytesIO()
            Image.fromarray(images[i]).save(file, "PNG")
            image = file.getvalue() if i in drawn else b"broken"
            return {"image": image, "label": int(labels[i]), "name": f"image {i}"}

    model, test = untrained(0), ArraySource(images, labels, tuple("abcd"), "test")
    results = probe(model, Images(), test, shots=(2,), seeds=(0, 1))
    whole = probe(model, test, test, shots=(2,), seeds=(0, 1), neighbours=(3,))
    assert results == {"few_shot": whole["few_shot"]}
    with pytest.raises(UserError, match="image "):
        probe(model, Images(), test, shots=(2,), neighbours=(3,))


def test_splits_of_different_classes_are_refused():
    test = catalog.load("synthetic:8x8x1,classes=3,examples=9", "test")
    with pytest.raises(
        UserError, match=r"\(10\), the test split \[0, 1, 2\] \(3\): use splits"
    ):
        probe(untrained(0), catalog.load("digits", "train"), test, shots=(1,))
