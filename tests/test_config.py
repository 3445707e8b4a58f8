import json
import sys
import warnings

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax import config as configuration
from vit_jax.command_line import cli
from vit_jax.config import get_config, set_duration, steps
from vit_jax.system.errors import UserError


def test_a_misspelt_field_is_refused():
    config = get_config()
    with pytest.raises(AttributeError, match='Did you mean "depth" instead of "dpeth"'):
        config.model.dpeth = 3


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError):
        get_config().batch_size = "many"


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [("steps", 300, 300), ("epochs", 2.5, 25), ("examples", 640, 5), ("epochs", 0, 0)],
)
def test_durations_in_three_units(unit, value, expected):
    config = get_config()
    set_duration(config, "total", **{unit: value})
    assert steps(config, "total", examples=1280, batch_size=128) == expected


def test_exactly_one_unit_must_be_set():
    config = get_config()
    with pytest.raises(UserError, match=r"of total_steps, total_epochs .* 0 are set: set one"):
        steps(config, "total", 10, 1)
    config.total_steps = 1.0
    config.total_epochs = 1.0
    with pytest.raises(UserError, match="2 are set"):
        steps(config, "total", 10, 1)
    set_duration(config, "total", examples=-1)
    with pytest.raises(UserError, match=r"total_examples is -1\.0: it cannot be negative"):
        steps(config, "total", 10, 1)
    with pytest.raises(UserError, match="total has no unit hours"):
        set_duration(config, "total", hours=1)


def test_the_unit_on_the_command_line_replaces_the_one_in_the_file():
    config = get_config()
    set_duration(config, "total", epochs=90)
    config.total_steps = 10.0  # as an override sets it
    config.optimizer.warmup_epochs = 1.0
    overridden = ["total_steps", "optimizer.warmup_epochs", "optimizer.lr", "model.variant"]
    configuration.prefer_overrides(config, overridden)
    assert (config.total_steps, config.total_epochs) == (10.0, None)
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_epochs) == (None, 1.0)
    config.total_epochs = 2.0
    configuration.prefer_overrides(config, ["total_steps", "total_epochs"])
    with pytest.raises(UserError, match="2 are set"):  # both on the command line
        steps(config, "total", 10, 1)


def test_storing_and_loading_changes_nothing():
    config = get_config()
    config.model.representation_size = 768
    config.image_size = (28, 56)
    config.sweep.steps = ((500, 100), (2500, 200))
    set_duration(config, "total", epochs=3)
    stored = json.loads(json.dumps(configuration.to_dict(config)))
    again = configuration.from_dict(stored)
    assert again.to_dict() == config.to_dict()
    assert again.image_size == (28, 56)
    assert again.sweep.steps == ((500, 100), (2500, 200))


def test_a_stored_field_that_no_longer_exists_is_named():
    stored = configuration.to_dict(get_config())
    stored["model"]["convolutions"] = 3
    with pytest.raises(UserError, match=r"has a field model\.convolutions"):
        configuration.from_dict(stored)


def test_resuming_with_another_model_or_optimizer_is_refused_by_field():
    stored = configuration.to_dict(get_config())
    config = get_config()
    configuration.check_resumable(stored, config, "runs/x")
    config.eval_batch_size = 7  # how it is reported may change
    config.data.workers = 3
    config.sweep.lr = (0.1, 0.2)
    set_duration(config, "log_every", steps=1)
    configuration.check_resumable(stored, config, "runs/x")
    del stored["ema_decay"]  # as if the field had been added since
    configuration.check_resumable(stored, config, "runs/x")
    config.optimizer.b2 = 0.95
    message = r"runs/x was trained with optimizer\.b2=0\.999, not 0\.95: set it back"
    with pytest.raises(UserError, match=message):
        configuration.check_resumable(stored, config, "runs/x")


def test_operational_fields_exist():
    names = configuration.flatten(get_config().to_dict())
    for field in configuration.OPERATIONAL:
        assert any(name.startswith(field) for name in names), field


def test_every_default_stands_in_one_place():
    """`get_config` returns a fresh object: changing one changes no other."""
    get_config().model.variant = "L/32"
    assert get_config().model.variant == "B/16"
    assert isinstance(get_config(), ConfigDict)


def test_the_model_of_weights_is_taken_but_for_what_a_run_decides():
    config, weights = get_config(), get_config()
    default = weights.model.to_dict()
    changed = {
        name: {str: f"other {name}", int: 77, float: 0.77, bool: not value}.get(type(value), 7)
        for name, value in default.items()
        if value is not None
    }
    weights.model.update(changed | {"num_heads": 5, "representation_size": 9})
    weights.data.update({"channels": 1, "value_range": "imagenet", "threads": 99})
    configuration.take_model(config, weights, ["model.gelu", "data.channels"])
    of_the_run = {"dropout", "stochastic_depth", "dtype", "scan", "remat", "head_bias_init"}
    of_the_run |= {"representation_size", "attention"}
    for name, value in config.model.items():
        kept = name in of_the_run or name == "gelu"
        assert value == (default if kept else weights.model)[name], name
    assert config.model.num_heads == 5
    assert (config.data.channels, config.data.value_range) == (3, "imagenet")
    assert config.data.threads == 16


# --- The command line ---------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Parses `--config=FILE OVERRIDES` in a process of its own, as far as flags go."""
    holder = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", holder)

    def parse(body, *overrides):
        path = tmp_path / "config.py"
        path.write_text(
            "from vit_jax import config as base\n\n"
            "def get_config():\n    config = base.get_config()\n"
            f"    {body}\n    return config\n"
        )
        argv = ["train", f"--config={path}", *overrides]
        monkeypatch.setattr(sys, "argv", argv)
        config_flags.DEFINE_config_file("config", None, "Configuration.", flag_values=holder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of ml_collections' loader
            holder(argv)
        return cli.config_from_flag()

    return parse


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("model.variant", "Ti/4", "Ti/4"),
        ("model.pool", "gap", "gap"),
        ("data.channels", "1", 1),
        ("data.value_range", "mean=0.1 std=0.2", "mean=0.1 std=0.2"),
        ("optimizer.lr", "0.25", 0.25),
        ("objective.loss", "sigmoid", "sigmoid"),
        ("model.depth", "3", 3),
    ],
)
def test_a_field_that_the_file_leaves_none_can_be_set(command, field, text, value):
    config, overridden = command(f"config.{field} = None", f"--config.{field}={text}")
    node, _, name = field.partition(".")
    assert config[node][name] == value
    assert overridden == [field]


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("(32, 8)", (32, 8)), ("(7,)", (7, 7))]
)
def test_one_number_is_a_square(command, text, size):
    config, _ = command("pass", f"--config.image_size={text}")
    assert config.image_size == size


@pytest.mark.parametrize("text", ["(1, 2, 3)", "()", "(2.5, 3)"])
def test_what_is_no_image_size(command, text):
    with pytest.raises(UserError, match=r"image_size is .*write the edge of a square"):
        command("pass", f"--config.image_size={text}")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--config.lr=3", "--config.optimizer.lr?"),
        ("--config.model.channels=1", "--config.data.channels?"),
        ("--config.batchsize=1", "--config.batch_size?"),
        ("--config.batch_size=1", ""),
    ],
)
def test_a_field_in_another_place_is_found(given, meant):
    assert cli._meant(["train", given]).endswith(meant)


@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", "deep"), ("dropout", [1]), ("key_bias", "yes"), ("variant", 3), ("pool", {})],
)
def test_a_stored_value_that_a_field_cannot_have_is_named(field, value):
    stored = configuration.to_dict(get_config())
    stored["model"][field] = value
    with pytest.raises(UserError, match=rf"has model\.{field}=.*, which it cannot have"):
        configuration.from_dict(stored)
    with pytest.raises(UserError, match="has model=None"):
        configuration.from_dict(stored | {"model": None})
