"""Every part of an objective at once: views, a teacher, a centre, a frozen network, groups."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax.checkpoints import orbax_io
from vit_jax.data.pipeline import Views
from vit_jax.data.transforms.language import parse_transform
from vit_jax.models import registry
from vit_jax.models.model import Model
from vit_jax.objectives import registry as objectives
from vit_jax.objectives.objective import FOREVER, Group, Objective, Result
from vit_jax.system.errors import UserError
from vit_jax.training import trainer
from vit_jax.training.groups import Groups
from vit_jax.training.logging import read_metrics
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.step import init_state, make_train_step

OUTPUTS = 6
GROUPS = (
    Group("Transformer/encoderblock/.*", lr=(0.25, 0.5)),
    Group("model/embedding/.*", frozen_until=FOREVER),
    Group("objective/head/kernel", decay=0.0, frozen_until=2),
)


@dataclasses.dataclass(frozen=True)
class Everything(Objective):
    """Self-distillation with a centre, beside a frozen network."""

    model: Model
    frozen: Any = None
    groups: tuple[Group, ...] = GROUPS
    best = "few_shot/1"

    @property
    def views(self):
        return {"local": Views(parse_transform("random_resized_crop", (4, 4)), 2)}

    def teacher_decay(self, step):
        return jnp.minimum(0.9, (1.0 + step) / (4.0 + step))

    def init(self, key):
        head = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (32, OUTPUTS))
        own = {"head": {"kernel": head}}
        extra = {"centre": jnp.zeros(OUTPUTS), "updates": jnp.int32(0)}
        return {"model": self.model.init(key), "objective": own}, extra

    def loss(self, params, carried, batch, key):
        temperature = 0.1 + 0.01 * carried.step
        images, local = batch["image"], batch["local"]
        assert local.shape[1:] == (2, 4, 4, 1)
        assert local.dtype == images.dtype == jnp.float32
        outputs = lambda model, params, images, **options: (
            model.apply(params["model"], images, **options)[1]["pooled"]
            @ params["objective"]["head"]["kernel"]
        )
        teacher = outputs(self.model, carried.teacher, images)
        targets = jax.nn.softmax((teacher - carried.extra["centre"]) / temperature)
        keys = jax.random.split(key, 3)
        student = [outputs(self.model, params, images, train=True, rngs={"dropout": keys[0]})]
        small = self.model.at((4, 4))
        for i in range(2):
            rngs = {"dropout": keys[1 + i]}
            student.append(outputs(small, params, local[:, i], train=True, rngs=rngs))
        losses = sum(optax.softmax_cross_entropy(x, targets) for x in student)
        beside = self.model.apply(carried.frozen, images)[1]["pooled"].mean()
        count = jnp.float32(len(images))
        metrics = {"loss": (losses.sum(), count), "beside": (beside * count, count)}
        return Result(losses.mean(), metrics, {"teacher": teacher.sum(axis=0), "count": count})

    def evaluate(self, params, carried, batch):
        return {}

    def after_update(self, extra, statistics):
        mean = statistics["teacher"] / statistics["count"]
        centre = 0.9 * extra["centre"] + 0.1 * mean
        return {"centre": centre, "updates": extra["updates"] + 1}


@functools.cache
def frozen(seed=7):
    network = registry.build_model(registry.with_computation_chosen(configured()), 0)
    return jax.device_get(network.init(jax.random.key(seed)))


def configured(**changes):
    config = tiny(ema_decay=0.0, **changes)
    config.objective.name = "everything"
    config.data.mixup = 0.0
    config.model.representation_size = None
    config.few_shot.shots = (1,)
    configuration.set_duration(config, "eval_every", steps=3)
    configuration.set_duration(config.few_shot, "every", steps=3)
    configuration.set_duration(config, "checkpoint_every", steps=3)
    configuration.set_duration(config, "total", steps=6)
    return config


@pytest.fixture
def registered(monkeypatch):
    def build(config, num_classes, builder):
        return Everything(registry.build_model(config, 0, builder), frozen())

    monkeypatch.setitem(objectives.OBJECTIVES, "everything", build)


class StopAt:
    """A signal that comes at a step."""

    def __init__(self, step):
        self.step, self.requested = step, False

    def reached(self, step):
        self.requested |= step == self.step
        return self.requested


def test_a_run_with_everything_is_resumed_bit_for_bit(registered, tmp_path, monkeypatch):
    result = trainer.train(configured(), tmp_path / "whole")
    assert result.keys() == {"few_shot/1"}
    assert trainer.train(configured(), tmp_path / "parts", stop=StopAt(4)) == {}
    assert trainer.train(configured(), tmp_path / "parts") == result
    whole, parts = (
        orbax_io._read_to_host(tmp_path / name / "checkpoints" / "6")
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(parts[name], x, err_msg=name)
    assert whole["extra/updates"] == 6
    assert np.abs(whole["extra/centre"]).max() > 0
    assert not any("frozen" in name for name in whole)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    scores = {r["step"]: r["few_shot/1"] for r in records if "few_shot/1" in r}
    best = max(scores, key=scores.get)
    assert [int(p.name) for p in (tmp_path / "whole" / "best").iterdir()] == [best]

    monkeypatch.setitem(
        objectives.OBJECTIVES, "everything",
        lambda config, classes, b: Everything(registry.build_model(config, 0, b), frozen(8)),
    )  # fmt: skip
    with pytest.raises(UserError, match="beside a frozen network with other weights"):
        trainer.train(configured(), tmp_path / "whole")


@functools.cache
def stepped(accumulation=1, steps=3, groups=GROUPS, **changes):
    """States after each of a few updates, and the objective; plain SGD, without dropout."""
    config = configured()
    config.model.update({"dropout": 0.0, "stochastic_depth": 0.0, "scan": True})
    config.optimizer.update(
        {"name": "sgd", "momentum": 0.0, "lr": 0.5, "clip_norm": 0.0, "weight_decay": 0.1}
        | changes
    )
    goal = Everything(registry.build_model(config, 0), frozen(), groups)
    schedule = lambda step: jnp.float32(0.5)
    optimizer = make_optimizer(config.optimizer, schedule, Groups(groups))
    step = jax.jit(
        make_train_step(
            goal, optimizer, schedule, lambda batch, key: batch, seed=0,
            accumulation=accumulation,
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = lambda *shape: jnp.asarray(rng.standard_normal((8, *shape)), jnp.float32)
    batch = {"image": images(8, 8, 1), "local": images(2, 4, 4, 1)}
    states = [init_state(goal, optimizer, 0, False)]
    for _ in range(steps):
        states.append(step(states[-1], batch, goal.frozen)[0])
    return [jax.device_get(state) for state in states], goal


def test_what_is_carried_moves_once_an_update_whatever_the_accumulation():
    (*_, whole), _ = stepped()
    (*_, parts), _ = stepped(accumulation=4)
    assert whole.extra["updates"] == parts.extra["updates"] == 3
    np.testing.assert_allclose(parts.extra["centre"], whole.extra["centre"], atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, atol=2e-6)
    jax.tree.map(close, parts.params, whole.params)


def test_the_teacher_is_an_average_with_the_decay_of_its_step():
    states, goal = stepped()
    expected = states[0].params
    for i, state in enumerate(states[1:]):
        decay = float(goal.teacher_decay(i))
        mix = lambda old, new, d=decay: d * np.float64(old) + (1 - d) * np.float64(new)
        expected = jax.tree.map(mix, expected, state.params)
        close = functools.partial(np.testing.assert_allclose, atol=1e-6)
        jax.tree.map(close, state.ema, expected)
    assert states[-1].eval_params is states[-1].ema


def test_groups_have_their_own_rates_decays_and_beginnings():
    grouped, _ = stepped(steps=3)
    plain, _ = stepped(steps=1, groups=())
    kernel = lambda state: state.params["model"]["Transformer"]["encoderblock"]["MlpBlock_0"][
        "Dense_0"
    ]["kernel"]
    moved = kernel(grouped[1]) - kernel(grouped[0])
    alone = kernel(plain[1]) - kernel(plain[0])
    assert np.abs(alone).min(axis=(1, 2)).max() >= 0
    assert np.abs(alone).max() > 1e-4
    for layer, factor in enumerate((0.25, 0.5)):
        np.testing.assert_allclose(moved[layer], factor * alone[layer], atol=1e-6)
    embedding = lambda state: state.params["model"]["embedding"]["kernel"]
    np.testing.assert_array_equal(embedding(grouped[3]), embedding(grouped[0]))
    assert np.abs(embedding(plain[1]) - embedding(plain[0])).max() > 1e-4
    head = lambda state: state.params["objective"]["head"]["kernel"]
    np.testing.assert_array_equal(head(grouped[2]), head(grouped[0]))
    assert np.abs(head(grouped[3]) - head(grouped[2])).max() > 1e-4


@pytest.mark.parametrize("decay", ["times_lr", "l2"])
def test_a_group_without_decay_has_none(decay):
    """The first update differs by learning rate x decay x weight, or by nothing."""
    groups = (Group("objective/.*", decay=0.0),)
    head = lambda states: states[1].params["objective"]["head"]["kernel"]
    cls = lambda states: states[1].params["model"]["embedding"]["kernel"]
    with_, _ = stepped(steps=1, groups=groups, decay=decay)
    without, _ = stepped(steps=1, groups=groups, decay=decay, weight_decay=0.0)
    np.testing.assert_array_equal(head(with_), head(without))
    before = with_[0].params["model"]["embedding"]["kernel"]
    np.testing.assert_allclose(cls(without) - cls(with_), 0.5 * 0.1 * before, atol=1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((Group("model/nothing/.*"),), r"'model/nothing/\.\*' fits no parameter"),
        ((Group(".*"), Group("cls")), r"'cls' fits no parameter that no group before it fits"),
        ((Group(".*/kernel", lr=(1.0,) * 3),), r"has 3 factors of the learning rate, but"),
    ],
)
def test_groups_that_fit_nothing_are_refused(groups, message):
    params, _ = Everything(registry.build_model(configured(), 0)).init(jax.random.key(0))
    with pytest.raises(UserError, match=message):
        Groups(groups).check(params)


def test_a_best_by_a_probe_that_is_not_made_is_refused(registered, tmp_path):
    config = configured()
    config.few_shot.shots = (5,)
    with pytest.raises(UserError, match=r"few_shot\.shots is \(5,\): set few_shot"):
        trainer.train(config, tmp_path)


def test_two_averages_of_the_weights_are_refused(registered, tmp_path):
    config = configured()
    config.ema_decay = 0.9
    with pytest.raises(UserError, match=r"ema_decay is 0\.9, but this objective has a teacher"):
        trainer.train(config, tmp_path)
