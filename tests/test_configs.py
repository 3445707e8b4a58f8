"""Every shipped configuration is instantiated and trained for two steps, shrunken."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax import train as trainer
from vit_jax.models.variants import decode_variant

CONFIGS = Path(__file__).parent.parent / "configs"
ARGUMENTS = {
    "digits_finetune": ["pretrain", "finetune", "scratch"],
    "vit_i1k": ["B/16", "L/32"],
    "vit_i21k": ["B/32", "L/16,epochs=30"],
    "vit_s16_i1k": ["90", "300"],
}
CASES = [
    (path.stem, argument, None)
    for path in sorted(CONFIGS.glob("*.py"))
    for argument in ARGUMENTS.get(path.stem, [None])
] + [("digits", None, "sgd")]


def load(name, argument=None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def shrink(config):
    """The same recipe on four patches of random pixels, with a narrow model."""
    patch = decode_variant(config.model.variant)[1]
    config.image_size = (2 * patch, 2 * patch)
    config.batch_size = config.eval_batch_size = 8
    margin = 5 if "crop" in config.data.train_transform else 0
    shape = f"{2 * patch + margin}x{2 * patch + 2 * margin}x{config.data.channels}"
    config.data.source = f"synthetic:{shape},classes=7,examples=32"
    config.data.train_split, config.data.eval_split = "train", "test"
    config.data.threads = 2
    config.model.update({"depth": 2, "width": 32, "mlp_dim": 48, "num_heads": 2})
    if config.model.representation_size:
        config.model.representation_size = 32
    configuration.set_duration(config, "total", steps=2)
    configuration.set_duration(config.optimizer, "warmup", steps=1)
    return config


@pytest.fixture(scope="module")
def read():
    """Names of the fields that the runs below read; filled as they run."""
    return set()


@pytest.mark.parametrize(("name", "argument", "optimizer"), CASES)
def test_each_configuration_trains(name, argument, optimizer, read, tmp_path, monkeypatch):
    config = shrink(load(name, argument))
    config.optimizer.name = optimizer or config.optimizer.name
    if argument == "finetune":
        config.init_from = str(tmp_path / "before")
        trainer.train(shrink(load(name, "pretrain")), tmp_path / "before")
    record_reads(config, read, monkeypatch)
    result = trainer.train(config, tmp_path / "run")
    assert np.isfinite(result["eval/loss"])
    assert result["eval/count"] == 32


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
    trainer.build(config)
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
