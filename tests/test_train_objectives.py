"""Objectives other than classification, and probes, inside the trainer."""

import numpy as np
import pytest

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.data.on_device import prepare_for_eval
from vit_jax.distributed import sharding
from vit_jax.evaluation import features, few_shot
from vit_jax.system.errors import UserError
from vit_jax.training import trainer
from vit_jax.training.logging import read_metrics
from vit_jax.training.run import build


def masked(**changes):
    config = tiny(**changes)
    config.objective.name = "masked_patches"
    config.data.mixup = 0.0
    config.model.representation_size = None
    return config


def test_masked_patches_train_and_are_fine_tuned_from(tmp_path):
    result = trainer.train(masked(total_steps=4.0), tmp_path / "before")
    assert result["eval/count"] == 360
    assert 0 < result["eval/loss"] < 2 * np.log(8)  # of 8 classes: the digits are grey
    model = trained.load(tmp_path / "before", "best", sharding.make_mesh())
    assert not model.params.keys() & {"model", "objective", "mask", "head"}
    assert model.class_names == ()
    config = tiny(total_steps=3.0, init_from=str(tmp_path / "before"))
    assert trainer.train(config, tmp_path / "after")["eval/accuracy"] > 0


@pytest.mark.parametrize("before", ["masked_patches", "classification"])
def test_masked_patches_begin_with_the_weights_of_any_run(tmp_path, before, capsys):
    config = masked(total_steps=2.0) if before == "masked_patches" else tiny(total_steps=2.0)
    trainer.train(config, tmp_path / "before")
    config = masked(total_steps=2.0, init_from=str(tmp_path / "before"))
    assert np.isfinite(trainer.train(config, tmp_path / "after")["eval/loss"])
    assert f"begins with {tmp_path / 'before'}" in capsys.readouterr().out


def test_the_best_weights_are_those_of_the_least_loss(tmp_path):
    config = masked(total_steps=6.0)
    configuration.set_duration(config, "eval_every", steps=2)
    trainer.train(config, tmp_path)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval/loss" in r]
    best = min(records, key=lambda record: record["eval/loss"])
    assert trained.load(tmp_path, "best", sharding.make_mesh()).step == best["step"]


@pytest.mark.parametrize("form", ["google", "timm"])
def test_mixup_and_cutmix_train(tmp_path, form):
    config = tiny(total_steps=3.0)
    config.data.update({"mixup": 0.8, "cutmix": 1.0, "mix_form": form, "binary_targets": True})
    config.objective.loss = "sigmoid"
    result = trainer.train(config, tmp_path)
    assert np.isfinite(result["eval/loss"])


def with_few_shot(every=2, **changes):
    config = tiny(**changes)
    config.few_shot.shots = (1, 3)
    configuration.set_duration(config, "eval_every", steps=2)
    configuration.set_duration(config.few_shot, "every", steps=every)
    return config


def test_few_shot_accuracy_is_logged_with_the_evaluation(tmp_path):
    config = with_few_shot(every=4, total_steps=6.0)
    trainer.train(config, tmp_path)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval/loss" in r]
    assert [r["step"] for r in records if "few_shot/1" in r] == [4, 6]

    # The last is what the probe says of the saved weights.
    run = build(config)
    model = trained.load(tmp_path, "last", run.mesh)
    assert run.few_shot(model.params) == pytest.approx(
        {name: records[-1][name] for name in ("few_shot/1", "few_shot/3")}
    )


def test_few_shot_in_training_is_the_doors_few_shot(tmp_path):
    """Fitted by hand to the images that the seeds choose."""
    config = with_few_shot(total_steps=2.0)
    run = build(config)
    params = run.learning.init().params["model"]
    found = run.few_shot(params)
    source, test = run.source, run.eval_source
    model = run.learning.objective.model
    step = features.make_feature_step(model, prepare_for_eval(config), run.mesh)

    def features_of(source):
        batches = run.eval_reading.eval_batches(source, 120)
        put = (sharding.put_batch(batch, run.mesh) for batch in batches)
        return features.extract(lambda batch: step(params, batch), put)

    everything = features_of(source)
    subsets = few_shot.choose_subsets(everything.labels, 10, (1, 3), few_shot.SEEDS)
    expected = few_shot.few_shot_accuracy(
        everything.take(subsets.indices), features_of(test), subsets, 10
    )
    for shots, accuracies in expected.items():
        assert found[f"few_shot/{shots}"] == pytest.approx(np.mean(accuracies))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.objective.update(name="mae"), r"objective\.name is 'mae'"),
        (lambda c: c.data.update(mixup=0.2), r"data\.mixup is 0\.2 and .* which mix labels"),
        (lambda c: c.objective.update(target="x"), r"objective\.target is 'x'"),
        (lambda c: c.model.update(variant="R26x1"), r"model\.depth is"),
        (
            lambda c: c.few_shot.update(shots=(5,), every_steps=3.0, every_epochs=None),
            r"few_shot\.every is 3 steps, which is no multiple of eval_every",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(change, message):
    config = masked(total_steps=6.0)
    configuration.set_duration(config, "eval_every", steps=2)
    change(config)
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize("variant", ["R26x1", "Mixer-S/4", "R50+S/16"])
def test_other_networks_train_evaluate_and_open_again(tmp_path, variant):
    config = tiny(total_steps=3.0)
    config.image_size = (16, 16) if "+" in variant else (8, 8)
    config.data.train_transform = config.data.eval_transform = "resize"
    shape = {"depth": 1, "width": 32, "mlp_dim": 16, "num_heads": 2}
    own = {
        "R26x1": dict.fromkeys(shape) | {"resnet": (1,)},
        "Mixer-S/4": {
            "depth": 1,
            "width": 16,
            "mlp_dim": 8,
            "tokens_mlp_dim": 8,
            "num_heads": None,
        },
        "R50+S/16": shape | {"resnet": (1,)},
    }[variant]
    plain = {
        "representation_size": None,
        "dropout": 0.0,
        "stochastic_depth": 0.0,
        "scan": False,
    }
    config.model.update({"variant": variant} | own | plain)
    result = trainer.train(config, tmp_path / "run")
    assert result["eval/count"] == 360
    model = trained.load(tmp_path / "run", "last", sharding.make_mesh())
    trained.export(model, tmp_path / "export")
    again = trained.load_any(str(tmp_path / "export"), "last", sharding.make_mesh())
    assert again.model.config == model.model.config
    config = config.copy_and_resolve_references()
    config.init_from = str(tmp_path / "export")
    assert trainer.train(config, tmp_path / "more")["eval/count"] == 360
