import dataclasses

import jax
import numpy as np
import pytest

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.interop.transfer import adapt
from vit_jax.models import vit
from vit_jax.models.resize_positions import resize_embedding
from vit_jax.system.errors import UserError
from vit_jax.training import begin, trainer
from vit_jax.training.logging import read_metrics
from vit_jax.training.run import build as build_run

OLD = vit.ViTConfig(
    (8, 8), 1, 4, 2, 8, 16, 2, num_classes=5, representation_size=6, head_bias_init=-3.0
)
NEW = dataclasses.replace(OLD, image_size=(12, 8), num_classes=3, representation_size=None)


def build(cfg, seed=0):
    model = vit.build(cfg)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    random = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
    return model, jax.tree.map(random, shapes)


def fresh(cfg):
    return vit.build(cfg).init(jax.random.key(0))


@pytest.mark.parametrize("scan_old", [False, True])
@pytest.mark.parametrize("scan_new", [False, True])
def test_the_encoder_is_taken_over_and_the_head_is_new(scan_old, scan_new):
    old, new = (dataclasses.replace(c, scan=s) for c, s in ((OLD, scan_old), (NEW, scan_new)))
    _, params = build(old)
    found, notes = adapt(params, old, fresh(new), new)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, fresh(new))
    found = vit.unstack_layers(found) if scan_new else found
    params = vit.unstack_layers(params) if scan_old else params
    for i in range(2):
        block = f"encoderblock_{i}"
        before, after = params["Transformer"][block], found["Transformer"][block]
        jax.tree.map(np.testing.assert_array_equal, before, after)
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(
        found["Transformer"]["posembed_input"]["pos_embedding"],
        resize_embedding(positions, (2, 2), (3, 2)),
    )
    assert not found["head"]["kernel"].any()
    assert notes == [
        "head: new, zero-initialised",
        "position embeddings: 2x2 to 3x2 (corner)",
        "pre_logits: dropped with the old head",
    ]


def test_pre_logits_stay_where_the_new_model_has_the_same():
    _, params = build(OLD)
    same = dataclasses.replace(NEW, representation_size=6)
    found, _ = adapt(params, OLD, fresh(same), same)
    np.testing.assert_array_equal(found["pre_logits"]["kernel"], params["pre_logits"]["kernel"])
    wider = dataclasses.replace(NEW, representation_size=7)
    found, notes = adapt(params, OLD, fresh(wider), wider)
    assert found["pre_logits"]["kernel"].shape == (8, 7)
    assert "pre_logits: new" in notes


def test_the_same_image_gives_the_same_representation_at_the_same_size():
    model, params = build(OLD)
    new = dataclasses.replace(OLD, num_classes=2, representation_size=None)
    found, _ = adapt(params, OLD, fresh(new), new)
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 1)).astype(np.float32)
    before, after = model.apply(params, x)[1], vit.build(new).apply(found, x)[1]
    np.testing.assert_array_equal(before["pooled"], after["pooled"])
    np.testing.assert_array_equal(after["logits"], -3.0)


def test_all_that_does_not_fit_is_in_one_sentence():
    other = dataclasses.replace(OLD, depth=3, mlp_dim=20, pool="gap")
    _, params = build(OLD)
    with pytest.raises(UserError) as error:
        adapt(params, OLD, fresh(other), other)
    message = str(error.value)
    assert "cls is left over" in message
    assert "encoderblock_0/MlpBlock_0/Dense_0/bias has shape (16,), not (20,)" in message
    assert "encoderblock_2/LayerNorm_1/scale is missing" in message
    assert "set config.model" in message
    assert "\n" not in message


def test_fine_tuning_begins_where_pre_training_ended(tmp_path, capsys):
    config = tiny(total_steps=4.0, ema_decay=0.0)
    config.model.representation_size = 16
    configuration.set_duration(config, "checkpoint_every", steps=4)
    trainer.train(config, tmp_path / "before")

    config = tiny(total_steps=6.0, init_from=str(tmp_path / "before"))
    config.image_size = (16, 16)
    config.data.train_transform = "resize|shift(2)"
    config.optimizer.name = "sgd"
    trainer.train(config, tmp_path / "after")
    said = capsys.readouterr().out
    assert f"begins with {tmp_path / 'before'} (vit_jax)" in said
    assert "position embeddings: 2x2 to 4x4 (corner)" in said
    first = read_metrics(tmp_path / "after" / "metrics.jsonl")[0]
    assert first["train/loss"] == pytest.approx(np.log(10), rel=1e-5)  # the head is zero

    run = build_run(config)
    state = run.learning.init()
    before = trained.load_any(config.init_from, "last", run.mesh)
    begun = begin.take_over(state, run, before)
    for tree in (begun.params, begun.ema):
        begun_kernel, fresh_kernel = (
            params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"][1]
            for params in (tree["model"], state.params["model"])
        )
        assert abs(begun_kernel - fresh_kernel).max() > 1e-4
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        trainer.train(config, tmp_path / "again")
