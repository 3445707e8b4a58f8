"""Every shipped configuration is instantiated and trained for two steps, shrunken."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.interop import tiny_models
from vit_jax import config as configuration
from vit_jax.interop import timm
from vit_jax.models import registry
from vit_jax.models.variants import decode_variant
from vit_jax.system.errors import UserError
from vit_jax.training import grid, run, trainer

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
    "augreg": ["b16,cifar100"],
    "digits_finetune": ["pretrain", "finetune", "scratch"],
    "finetune": ["l16,imagenet"],
    "vit_i1k": ["B/16", "L/32"],
    "vit_i21k": ["B/32", "L/16,epochs=30"],
    "vit_s16_i1k": ["90", "300"],
}
CASES = [
    (path.stem, argument, {})
    for path in sorted(CONFIGS.glob("*.py"))
    for argument in ARGUMENTS.get(path.stem, [None])
]
# What no file uses yet.
NO_SHAPE = {f"model.{name}": None for name in ("depth", "width", "mlp_dim", "num_heads")} | {
    "model.pool": "cls",
    "model.posemb": "learned",
    "model.stochastic_depth": 0.0,
}
CASES += [
    ("digits", None, {"optimizer.name": "sgd"}),
    (
        "digits",
        None,
        {
            "objective.name": "masked_patches",
            "data.mixup": 0.0,
            "few_shot.shots": (1,),
            "eval_every_epochs": None,
            "eval_every_steps": 2.0,
            "few_shot.every_epochs": None,
            "few_shot.every_steps": 2.0,
        },
    ),
    (
        "digits",
        None,
        NO_SHAPE | {"model.variant": "R26x1", "model.resnet": (1,), "model.resnet_width": 1},
    ),
    (
        "digits",
        None,
        NO_SHAPE | {"model.variant": "Mixer-S/2", "model.depth": 1, "model.tokens_mlp_dim": 4},
    ),
]


def load(name, argument=None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def shrink(config):
    """The same recipe on four patches of random pixels, with a narrow model."""
    taken = config.model.variant is None  # from `tiny_weights`
    patch = 8 if taken else decode_variant(config.model.variant)[1]
    config.image_size = (2 * patch, 2 * patch)
    config.batch_size = config.eval_batch_size = 8
    margin = 5 if "crop" in config.data.train_transform else 0
    shape = f"{2 * patch + margin}x{2 * patch + 2 * margin}x{config.data.channels}"
    config.data.source = f"synthetic:{shape},classes=7,examples=32"
    config.data.train_split, config.data.eval_split = "train", "test"
    config.data.threads = 2
    if not taken:
        config.model.update({"depth": 2, "width": 32, "mlp_dim": 48, "num_heads": 2})
    if config.model.representation_size:
        config.model.representation_size = 32
    configuration.set_duration(config, "total", steps=2)
    configuration.set_duration(config.optimizer, "warmup", steps=1)
    return config


def tiny_weights(path):
    """A file of somebody else's weights for patches of 8 pixels."""
    timm.write(path, *tiny_models.model(pool="gap", gelu="erf"))
    return str(path)


@pytest.fixture(scope="module")
def read():
    """Names of the fields that the runs below read; filled as they run."""
    return set()


@pytest.mark.parametrize(("name", "argument", "changes"), CASES)
def test_each_configuration_trains(name, argument, changes, read, tmp_path, monkeypatch):
    config = shrink(load(name, argument))
    config.update_from_flattened_dict(changes)
    if argument == "finetune":
        config.init_from = str(tmp_path / "before")
        trainer.train(shrink(load(name, "pretrain")), tmp_path / "before")
    if config.model.variant is None:
        config.init_from = tiny_weights(tmp_path / "weights.safetensors")
    record_reads(config, read, monkeypatch)
    result = trainer.train(config, tmp_path / "run")
    assert np.isfinite(result["eval/loss"])
    assert result["eval/count"] == 32
    if config.sweep.lr:
        config.sweep.update({"train_split": "all", "test_split": "other"})  # synthetic has any
        grid.check_splits(config)
        assert len(grid.settings(config)) in (3, 6)


def record_reads(config, read, monkeypatch):
    """Makes every look at a field of `config` leave its dotted name in `read`."""
    stored = configuration.to_dict(config)  # which looks at all of them
    monkeypatch.setattr(configuration, "to_dict", lambda _: stored)
    paths = {id(config): ""}
    original = ConfigDict.__getitem__

    def getitem(self, key):
        value = original(self, key)
        if id(self) in paths:
            path = f"{paths[id(self)]}{key}"
            if isinstance(value, ConfigDict):
                paths[id(value)] = f"{path}."
            else:
                read.add(path)
        return value

    monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
    original_copy, copies = ConfigDict.copy_and_resolve_references, []

    def copy(self, *arguments, **options):
        """A copy is looked at in the place of what it is a copy of."""
        copied = original_copy(self, *arguments, **options)
        if id(self) in paths:
            paths[id(copied)] = paths[id(self)]
            copies.append(copied)  # or another object could come to have its id
        return copied

    monkeypatch.setattr(ConfigDict, "copy_and_resolve_references", copy)


@pytest.mark.parametrize("variant", ["R26x1", "Mixer-S/16"])
def test_networks_without_a_configuration_file_have_fields_too(variant, read, monkeypatch):
    config = configuration.get_config()
    config.model.variant = variant
    record_reads(config, read, monkeypatch)
    registry.build_model(config, 7)


def test_every_field_is_read_by_something(read):
    """Runs after the tests above; a field that nothing reads has no place in the house."""
    assert read, "run the whole file"
    assert set(configuration.flatten(configuration.get_config().to_dict())) - read == set()


def test_a_field_that_nothing_reads_is_found(tmp_path, monkeypatch):
    config = shrink(load("digits"))
    with config.unlocked():
        config.model.nobody = 3
    read = set()
    record_reads(config, read, monkeypatch)
    run.build(config)
    assert "model.nobody" not in read
    assert "model.depth" in read


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_each_opens_with_command_cost_and_expected_number(path):
    docstring = path.read_text().split('"""')[1]
    assert f"python -m vit_jax.train --config=configs/{path.name}" in docstring
    assert "Cost" in docstring
    assert "xpected" in docstring


def test_the_paper_rows():
    i1k, i21k, simple = load("vit_i1k"), load("vit_i21k"), load("vit_s16_i1k")
    assert (i1k.optimizer.lr, i1k.optimizer.weight_decay, i1k.model.dropout) == (3e-3, 0.3, 0.1)
    assert (i1k.optimizer.schedule, i1k.total_epochs) == ("cosine", 300)
    assert (i21k.optimizer.lr, i21k.optimizer.weight_decay) == (1e-3, 0.03)
    assert (i21k.optimizer.schedule, i21k.total_epochs) == ("linear", 90)
    assert load("vit_i21k", "L/16,epochs=30").total_epochs == 30
    assert i1k.batch_size == i21k.batch_size == 4096
    # The paper's 90 epochs of all 1,281,167 images in batches of 1024.
    assert configuration.steps(simple, "total", 1_281_167, simple.batch_size) == 112_603
    # Their RandAugment, which at magnitude 10 inverts images in Solarize.
    assert simple.data.train_transform.endswith("|randaugment(2, 10, quirks=True)")


# --- Fine-tuning --------------------------------------------------------------------------


def total(config):
    """Steps of training and of warm-up."""
    return config.total_steps, config.optimizer.warmup_steps


@pytest.mark.parametrize(
    ("data", "splits", "length", "rates"),
    [
        (
            "cifar10",
            ("train[:98%]", "train[98%:]", "train", "test"),
            (10_000, 500),
            (0.001, 0.003, 0.01, 0.03),
        ),
        (
            "cifar100",
            ("train[:98%]", "train[98%:]", "train", "test"),
            (10_000, 500),
            (0.001, 0.003, 0.01, 0.03),
        ),
        (
            "pets",
            ("train[:90%]", "train[90%:]", "train", "test"),
            (500, 100),
            (0.001, 0.003, 0.01, 0.03),
        ),
        (
            "oxford_flowers102",
            ("train[:90%]", "train[90%:]", "train", "test"),
            (500, 100),
            (0.001, 0.003, 0.01, 0.03),
        ),
        (
            "imagenet",
            ("train[:99%]", "train[99%:]", "train", "validation"),
            (20_000, 500),
            (0.003, 0.01, 0.03),
        ),
    ],
)
def test_the_rows_of_table_4(data, splits, length, rates):
    config = load("finetune", f"b16,{data}")
    found = config.data.train_split, config.data.eval_split
    assert (*found, config.sweep.train_split, config.sweep.test_split) == splits
    assert total(config) == length
    assert tuple(config.sweep.lr) == rates
    assert config.optimizer.lr in rates
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.9)
    assert (config.optimizer.clip_norm, config.optimizer.weight_decay) == (1.0, 0.0)
    assert (config.optimizer.schedule, config.batch_size) == ("cosine", 512)
    assert config.optimizer.moment_dtype == "bfloat16"
    assert config.image_size == (384, 384)
    assert config.ema_decay == (0.9999 if data == "imagenet" else 0.0)


@pytest.mark.parametrize(
    ("argument", "weights", "size", "dropout"),
    [
        ("ti16,cifar10", "augreg:Ti_16", 384, 0.0),
        ("b32,imagenet", "google:ViT-B_32", 384, 0.0),
        ("l16,cifar10", "google:ViT-L_16", 384, 0.1),
        ("l16,imagenet", "google:ViT-L_16", 512, 0.1),
        ("h14,pets", "google:ViT-H_14", 27 * 14, 0.1),
        ("h14,imagenet2012", "google:ViT-H_14", 37 * 14, 0.1),
        ("h14,imagenet,res=224", "google:ViT-H_14", 224, 0.1),
        ("hf:owner/name,tfds:food101", "hf:owner/name", 384, 0.0),
        ("runs/pretrain,digits", "runs/pretrain", 16, 0.0),
        ("augreg:B_16,folder:a,b/c,res=448", "augreg:B_16", 448, 0.0),
    ],
)
def test_the_weights_and_sizes_of_finetune(argument, weights, size, dropout):
    config = load("finetune", argument)
    assert config.init_from == weights
    assert config.model.variant is None
    assert config.image_size == (size, size)
    assert config.model.dropout == dropout
    source = argument.split(",", 1)[1].split(",res=")[0]
    names = {"imagenet": "imagenet2012", "pets": "oxford_iiit_pet"}
    source = names.get(source, source)
    own = source == "digits" or ":" in source
    assert config.data.source == (source if own else f"tfds:{source}")


@pytest.mark.parametrize(
    ("data", "rates", "lengths"),
    [
        ("imagenet", (0.01, 0.03), ((20_000, 500),)),
        ("pets", (0.001, 0.003, 0.01), ((500, 100), (2500, 200))),
        ("cifar100", (0.001, 0.003, 0.01), ((2500, 200), (10_000, 500))),
        ("resisc45", (0.001, 0.003, 0.01), ((2500, 200), (10_000, 500))),
    ],
)
def test_the_grid_of_augreg(data, rates, lengths):
    config = load("augreg", f"r26s32,{data}")
    assert config.init_from == "augreg:R26_S_32"
    found = {(setting.lr, setting.steps) for setting in grid.settings(config)}
    assert found == {(rate, length) for rate in rates for length in lengths}
    assert total(config) == lengths[0]
    assert (config.model.dropout, config.batch_size) == (0.0, 512)
    assert config.image_size == (384, 384)
    assert load("augreg", f"b16,{data},res=224").image_size == (224, 224)


@pytest.mark.parametrize("name", ["finetune", "augreg"])
def test_arguments_that_say_nothing_are_refused_in_a_sentence(name):
    for argument in ("b16", ",cifar100", "b16,"):
        with pytest.raises(UserError, match="is not understood: write MODEL,DATA"):
            load(name, argument)
    with pytest.raises(UserError, match="has no data 'cifar11': use one of "):
        load(name, "b16,cifar11")
