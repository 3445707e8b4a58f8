"""Labels meet outputs by name: evaluation of heads, training and resuming."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.evaluation.accuracy import evaluate_trained, head_fits
from vit_jax.models import registry
from vit_jax.system.errors import UserError
from vit_jax.training import program, run, trainer

NAMES = ("dog", "emu", "cat")  # of the model's outputs, which are no alphabet


def shades(names, per_class=6, seed=0):
    """Grey images, whose level is that of their class in NAMES."""
    rng = np.random.default_rng(seed)
    levels = {name: 40 + 80 * i for i, name in enumerate(NAMES)}
    labels = np.arange(per_class * len(names)) % len(names)
    images = np.stack([np.full((8, 8), levels[names[k]]) for k in labels])
    noise = rng.integers(-9, 9, images.shape)
    return ArraySource((images + noise).astype(np.uint8), labels, tuple(names), "s")


def model_of_shades(family):
    """A network whose head is solved on the features, so that its names are right."""
    config = tiny()
    config.model.dropout = config.model.stochastic_depth = 0.0
    model = registry.build_model(config, 3)
    params = jax.jit(model.init)(jax.random.key(0))
    source = shades(NAMES)
    images = source.images[..., None] / np.float32(127.5) - 1
    features = np.asarray(jax.jit(model.apply)(params, images)[1]["pre_logits"])
    x = np.c_[features, np.ones(len(features))].astype(np.float64)
    target = 10 * np.eye(3)[source.labels]
    solved = np.linalg.solve(x.T @ x + 1e-4 * np.eye(x.shape[1]), x.T @ target)
    params["head"] = {"kernel": np.float32(solved[:-1]), "bias": np.float32(solved[-1])}
    return trained.Trained(config, NAMES, model, params, step=0, family=family)


@pytest.fixture(scope="module", params=["vit_jax", "hf_vit"])
def model(request):
    return model_of_shades(request.param)


def accuracy(model, source, **given):
    fits = head_fits(model, source.class_names, "shades", False, **given)
    return evaluate_trained(model, source, 8, sharding.make_mesh(), fits)


@pytest.mark.parametrize(
    "names", [NAMES, ("cat", "dog", "emu"), ("emu", "cat", "dog"), ("cat", "emu"), ("dog",)]
)
def test_every_order_and_part_of_the_classes_is_evaluated_by_name(model, names):
    found = accuracy(model, shades(names))
    assert (found["accuracy"], found["count"]) == (1.0, 6 * len(names))
    # The loss, too: over the outputs that the data have, in their order.
    columns = [NAMES.index(name) for name in names]
    images = shades(names).images[..., None] / np.float32(127.5) - 1
    logits = np.asarray(model.model.apply(model.params, images)[0], np.float64)[:, columns]
    logits -= logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(logits)), shades(names).labels]
    expected = (np.log(np.exp(logits).sum(axis=1)) - right).mean()
    assert found["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_list_comes_before_names(model):
    renamed = dataclasses.replace(shades(("cat", "dog")), class_names=("x", "y"))
    assert accuracy(model, renamed, given="2,dog")["accuracy"] == 1.0
    with pytest.raises(UserError, match="--classes"):
        accuracy(model, renamed)


# ---- training, and going on ---------------------------------------------------------------


def write_folders(root, names, n=8):
    """Folders whose classes are listed in classes.txt in the order of `names`."""
    rows = []
    for name in sorted(names):
        for i, pixels in enumerate(shades((name,), n).images):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            rows.append(f"{name}/{i}.png,{name},{'test' if i < 2 else 'train'}")
    (root / "labels.csv").write_text("file,label,split\n" + "\n".join(rows) + "\n")
    (root / "classes.txt").write_text("\n".join(names) + "\n")


def config_of(root, steps):
    config = tiny(batch_size=8, eval_batch_size=8, ema_decay=0.0)
    config.model.depth = 1
    config.data.mixup = 0.0
    config.data.source = f"folder:{root}"
    configuration.set_duration(config, "total", steps=steps)
    return config


def test_classes_in_another_order_are_numbered_as_the_run_began(tmp_path):
    write_folders(tmp_path, NAMES)
    config = config_of(tmp_path, 4)
    first = run.build(config)
    assert first.card["class_names"] == list(NAMES)
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    again = run.build(config, NAMES)
    assert again.card == first.card  # fingerprints of the data, too
    np.testing.assert_array_equal(again.source.labels, first.source.labels)
    assert run.build(config).card["class_names"] == ["cat", "dog", "emu"]


@pytest.mark.slow
def test_a_run_goes_on_when_its_classes_are_listed_in_another_order(tmp_path):
    write_folders(tmp_path / "data", NAMES)
    config = config_of(tmp_path / "data", 4)
    whole = trainer.train(config, tmp_path / "whole")

    class Stop:
        requested = False

        def reached(self, step):
            self.requested |= step == 2
            return self.requested

    trainer.train(config, tmp_path / "run", stop=Stop())
    (tmp_path / "data" / "classes.txt").write_text("cat\ndog\nemu\n")
    assert trainer.train(config, tmp_path / "run") == whole
    model = trained.load(tmp_path / "run", "last", sharding.make_mesh())
    assert model.class_names == NAMES
    again = trained.load(tmp_path / "whole", "last", sharding.make_mesh())
    for one, other in zip(*map(jax.tree.leaves, (model.params, again.params)), strict=True):
        np.testing.assert_array_equal(one, other)
    # Other classes are refused as before.
    labels = tmp_path / "data" / "labels.csv"
    labels.write_text(labels.read_text().replace(",emu,", ",elk,"))
    (tmp_path / "data" / "classes.txt").write_text("dog\nelk\ncat\n")
    with pytest.raises(UserError, match="different: elk, emu"):
        trainer.train(config, tmp_path / "run")


# ---- found before the first step -----------------------------------------------------------


def test_zero_steps_say_why(tmp_path):
    config = tiny(batch_size=4096)
    configuration.set_duration(config, "total", epochs=1)
    with pytest.raises(
        UserError, match=r"total_epochs=1 of the 1,437 images .* batch_size to at most 1,437"
    ):
        run.build(config)


def test_an_empty_split_is_found_before_training(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")  # a single one is to train on
    config = tiny()
    config.data.source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=f"split 'test' of folder:{tmp_path} holds no images"):
        run.build(config)


def test_a_batch_larger_than_the_data_set_is_told_of(capsys):
    config = tiny(batch_size=4096)
    run.build(config)
    said = capsys.readouterr().err
    assert "note: batch_size is 4,096 and 'train' has 1,437 images: every batch" in said
    config = tiny()
    config.data.eval_split = "test[:1]"
    run.build(config)
    assert "note: 'test[:1]' has 1 image to evaluate on" in capsys.readouterr().err


def test_what_cannot_be_decoded_or_cut_is_found_before_the_model_is_built(monkeypatch):
    def build(**fields):
        config = tiny()
        config.data.update(fields)
        run.build(config)

    monkeypatch.setattr(
        program, "build_learning", lambda *_: pytest.fail("the model is built already")
    )
    with pytest.raises(UserError, match="flip is random and cannot be part of an evaluation"):
        build(eval_transform="flip")
    with pytest.raises(UserError, match="leaves an image of 4 x 4 where 8 x 8 is needed"):
        build(train_transform="resize(size=4)")
    monkeypatch.undo()
    with pytest.raises(UserError, match="value range 'imagenet'"):
        build(value_range="imagenet")


def test_a_head_that_knows_nothing_is_told_of():
    model = model_of_shades("google")
    assert inference.head_note(model) == ""
    model.params["head"] = jax.tree.map(np.zeros_like, model.params["head"])
    assert "the model's head is all zeros" in inference.head_note(model)
