"""Learning, measuring and predicting several labels of an image."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.data import on_device
from vit_jax.data.sources import catalog
from vit_jax.distributed import sharding
from vit_jax.evaluation import accuracy, predictions, ranking
from vit_jax.system.errors import UserError
from vit_jax.training import grid, trainer
from vit_jax.training.run import build

NAMES = ("dark", "left", "top")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images that are dark or not, and have a bright edge on the left or on top or not."""
    root = tmp_path_factory.mktemp("labels")
    rng, rows = np.random.default_rng(0), ["image,labels,split"]
    for i in range(96):
        there = rng.random(3) < 0.4
        pixels = np.full((8, 8), 40 if there[0] else 150) + rng.integers(-20, 20, (8, 8))
        pixels[:, :3] += 90 * there[1]
        pixels[:3] += 90 * there[2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        labels = ";".join(name for name, x in zip(NAMES, there, strict=True) if x)
        rows.append(f"{i}.png,{labels},{'val' if i < 30 else 'train'}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def config_of(data, **fields):
    config = tiny(batch_size=32, eval_batch_size=16, ema_decay=0.0)
    config.model.depth = 1
    config.model.dropout = config.model.stochastic_depth = 0.0
    config.data.source, config.data.multi_label = f"folder:{data}", "auto"
    config.data.train_transform = "resize"
    config.data.eval_split = "val"
    config.data.mixup = 0.0
    config.objective.loss = "sigmoid"
    config.optimizer.lr = 0.01
    configuration.set_duration(config, "total", steps=40)
    configuration.set_duration(config, "eval_every", steps=20)
    configuration.set_duration(config, "checkpoint_every", steps=40)
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    metrics = trainer.train(config_of(data), workdir)
    return workdir, metrics


def logits_of(model, source):
    images = np.stack([np.asarray(Image.open(source[i]["image"])) for i in range(len(source))])
    logits, _ = jax.jit(model.model.apply)(
        model.params, images[..., None] / np.float32(127.5) - 1
    )
    return np.asarray(logits, np.float64)


def test_labels_are_learned_and_measured_over_all_examples(data, run):
    """30 examples in batches of 16: the second is padded, and average precision needs both."""
    workdir, metrics = run
    model = trained.load(workdir, "last", sharding.make_mesh())
    assert model.class_names == NAMES
    source = catalog.load(f"folder:{data}", "val", multi_label="auto")
    logits, there = logits_of(model, source), source.labels
    assert metrics["eval/count"] == 30
    expected = average_precision_score(there, logits, average="macro")
    assert metrics["eval/mAP"] == pytest.approx(expected, abs=1e-9)
    assert metrics["eval/mAP"] > 0.95
    exact = ((logits > 0) == there).all(axis=1).mean()
    assert metrics["eval/exact_match"] == pytest.approx(exact)
    losses = np.where(there, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).sum(axis=1)
    assert metrics["eval/loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert (workdir / "best").is_dir()


def test_evaluate_tells_every_class(data, run):
    model = trained.load(run[0], "last", sharding.make_mesh())
    source = catalog.load(f"folder:{data}", "val", multi_label="auto")
    kept = []
    fits = accuracy.head_fits(model, source.class_names, "x", False)
    found = accuracy.evaluate_trained(model, source, 8, sharding.make_mesh(), fits, kept.append)
    assert found["mAP"] == pytest.approx(run[1]["eval/mAP"])
    told = accuracy.describe_ranking(kept, NAMES, 0.3)
    logits, there = logits_of(model, source), source.labels
    for k, name in enumerate(NAMES):
        expected = average_precision_score(there[:, k], logits[:, k])
        assert told["average_precision"][name] == pytest.approx(expected, abs=1e-9)
        assert told["images"][name] == there[:, k].sum()
    said = 1 / (1 + np.exp(-logits)) >= 0.3
    assert told["precision"] == pytest.approx((said & there).sum() / said.sum())
    assert told["recall"] == pytest.approx((said & there).sum() / there.sum())
    table = accuracy.ranking_table(told, found["exact_match"]).splitlines()
    assert table[0].split() == ["class", "AP", "images"]
    assert table[1].split()[0] == "dark"
    assert table[-1].startswith("at threshold 0.3: precision ")
    # A part of the classes, in another order.
    hot = source.labels[:, [2, 0]]
    part = dataclasses.replace(source, labels=hot, class_names=("top", "dark"))
    fits = accuracy.head_fits(model, part.class_names, "x", False)
    found = accuracy.evaluate_trained(model, part, 8, sharding.make_mesh(), fits)
    expected = average_precision_score(hot, logits[:, [2, 0]], average="macro")
    assert found["mAP"] == pytest.approx(expected, abs=1e-9)


def test_predict_shows_all_labels_from_a_threshold_on(data, run):
    model = trained.load(run[0], "last", sharding.make_mesh())
    source = catalog.load(f"folder:{data}", "val[:8]", multi_label="auto")
    paths = [source[i]["image"] for i in range(8)]
    probabilities = 1 / (1 + np.exp(-logits_of(model, source)))
    found = list(
        predictions.predict(model, paths, 5, None, sharding.make_mesh(), threshold=0.5)
    )
    counts = set()
    for result, row in zip(found, probabilities, strict=True):
        expected = [k for k in np.argsort(-row) if row[k] >= 0.5]
        assert [name for name, _ in result.classes] == [NAMES[k] for k in expected]
        np.testing.assert_allclose([p for _, p in result.classes], row[expected], rtol=1e-4)
        counts.add(len(expected))
    assert len(counts) > 1  # none, one or several


def test_what_does_not_go_with_several_labels_is_refused(data):
    def build_with(**fields):
        config = config_of(data)
        for path, value in fields.items():
            node, name = path.split("__")
            config[node][name] = value
        build(config)

    with pytest.raises(
        UserError, match=r"objective\.loss is 'softmax': set objective\.loss=sig"
    ):
        build_with(objective__loss="softmax")
    with pytest.raises(UserError, match=r"label_smoothing is 0\.1: set objective\.label_smoo"):
        build_with(objective__label_smoothing=0.1)
    with pytest.raises(UserError, match=r"few_shot\.shots is .* needs one label of each"):
        build_with(few_shot__shots=(5,), few_shot__every_epochs=None, few_shot__every_steps=20)


def test_mixing_mixes_the_targets(data):
    config = config_of(data)
    config.data.mixup = 1.0
    prepare = on_device.prepare_for_training(config, 3)
    targets = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]], np.float32)
    batch = {"image": np.zeros((4, 8, 8, 1), np.uint8), "targets": targets}
    mixed = np.asarray(prepare(batch, jax.random.key(0))["targets"])

    rolled = np.roll(targets, 1, axis=0)
    share = (mixed - rolled)[targets != rolled] / (targets - rolled)[targets != rolled]
    np.testing.assert_allclose(share, share[0], rtol=1e-5)
    assert 0.5 <= share[0] <= 1


def test_a_sweep_compares_mean_average_precision():
    runs = {
        "a": {"metrics": {"eval/mAP": 0.5, "eval/loss": 1.0}},
        "b": {"metrics": {"eval/mAP": 0.7, "eval/loss": 2.0}},
        "c": {"failed": "no number"},
    }
    assert grid.choose(runs) == "b"
    assert grid.table(runs, "b").splitlines()[0].split() == ["run", "mAP", "loss"]


def test_rankings_are_only_kept_for_several_labels():
    assert accuracy.describe_ranking([], NAMES, 0.5) == {}
    nothing = ranking.Ranking(np.ones((2, 1), np.float32), np.zeros((2, 1), bool))
    told = accuracy.describe_ranking([nothing], ("x",), 0.5)
    assert told["average_precision"] == {"x": None}
    assert "x      -       0" in accuracy.ranking_table(told, 0.0)
