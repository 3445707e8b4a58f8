"""What a person says about weights whose file does not: one set of flags in every command."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from tests.interop import tiny_models
from tests.tiny_config import tiny
from vit_jax import config as configuration
from vit_jax import convert, embed, evaluate, predict, sweep, train, visualize
from vit_jax.checkpoints import formats, trained
from vit_jax.checkpoints.change import change_channels, resize
from vit_jax.command_line import weight_flags
from vit_jax.evaluation import predictions
from vit_jax.interop import google, timm, weight_files
from vit_jax.interop.stated import Stated
from vit_jax.system.errors import UserError
from vit_jax.training import begin, trainer

ROOT = Path(__file__).parent.parent / "vit_jax"
OPENERS = {  # the commands that open weights
    "train": train.define_flags,
    "sweep": sweep.define_flags,
    "evaluate": evaluate.define_flags,
    "predict": predict.define_flags,
    "embed": embed.define_flags,
    "visualize": visualize.define_flags,
    "convert": convert.define_flags,
}
NAMES = ("source_image_size", "num_heads", "family", "pool", "weights")


@pytest.fixture
def no_flags():
    """Flags of one command at a time, as in a process of its own."""
    own = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - own:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize("command", OPENERS)
def test_every_command_that_opens_weights_has_all_of_them(command, no_flags):
    OPENERS[command]()
    assert set(NAMES) <= set(flags.FLAGS)


def test_the_commands_that_open_weights_are_those():
    opening = r"(model|weight|training)_flags\.define_flags|load_any"
    found = {path.stem for path in ROOT.glob("*.py") if re.search(opening, path.read_text())}
    assert found == OPENERS.keys()


# --- Remedies exist -----------------------------------------------------------------------


def texts(path):
    """The strings of a module that a person may read, docstrings among them."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [n.value if isinstance(n, ast.Constant) else "{}" for n in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def defined_flags():
    """Names of all flags that a module defines, by its path."""
    pattern = r"DEFINE_\w+\(\s*\"(\w+)\""
    return {path: set(re.findall(pattern, path.read_text())) for path in ROOT.rglob("*.py")}


ELSEWHERE = {"help", "helpfull", "helpshort", "verbosity"}  # of absl
ELSEWHERE |= {"file_format", "manual_dir"}  # of `tfds build`


def test_every_flag_in_a_message_exists():
    known = defined_flags()
    all_flags = set().union(*known.values()) | ELSEWHERE
    wrong, found = [], 0
    for path in ROOT.rglob("*.py"):
        for text in texts(path):
            for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", text):
                found += 1
                if name not in all_flags:
                    wrong.append(f"{path.name}: --{name}")
    assert found > 50
    assert wrong == []


def test_flags_named_below_the_commands_are_in_every_command_that_opens_weights():
    """`interop` and `trained` cannot know which command they speak in."""
    for path in set((ROOT / "interop").rglob("*.py")) - {ROOT / "interop/checkpoints_page.py"}:
        for text in texts(path):
            for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", text):
                own = path.name == "channels.py" and name == "config"  # that of training
                assert own or name in NAMES, f"{path.name}: --{name}"


def test_every_field_in_a_message_exists():
    fields = configuration.flatten(configuration.to_dict(configuration.get_config()))
    nodes = {name.partition(".")[0] for name in fields if "." in name}
    for name in list(fields):  # durations are named without their unit, too
        fields[name.removesuffix("_steps")] = None
    pattern = rf"(?<![\w./])(?:config\.)?(({'|'.join(nodes)})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w(/])"
    wrong, found = [], 0
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        raised = [n for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc is not None]
        for node in raised:
            for part in ast.walk(node):
                if not isinstance(part, ast.Constant) or not isinstance(part.value, str):
                    continue
                for name, _ in re.findall(pattern, part.value):
                    found += 1
                    if name.rstrip("_") not in fields and not name.endswith("."):
                        wrong.append(f"{path.name}: {name}")
    assert found > 20
    assert [w for w in wrong if not w.endswith((".py", ".npz", ".safetensors"))] == []


# --- What they do -------------------------------------------------------------------------


def save(path, **changes):
    """A bare state dict: only arrays."""
    cfg, params = tiny_models.model(gelu="erf", **changes)
    weight_files.write_safetensors(path, timm.state_dict(cfg, params))
    return cfg, params


def test_a_rectangle_and_heads_are_said(tmp_path):
    cfg, params = save(tmp_path / "w", image_size=(16, 64))  # 2 x 8 patches, as many as 4 x 4
    square = trained.load_any(str(tmp_path / "w"), "last", None, Stated(num_heads=3))
    assert square.model.config.grid == (4, 4)
    assert any("--source_image_size=HEIGHTxWIDTH sets another" in n for n in square.notes)
    said = Stated(image_size=(16, 64), num_heads=3)
    found = trained.load_any(str(tmp_path / "w"), "last", None, said)
    assert found.model.config == cfg
    assert not any("shape of its" in note for note in found.notes)
    tiny_models.same(found.params, params)


def test_a_family_and_a_pooling_are_said(tmp_path):
    save(tmp_path / "w", pool="gap", class_token=True)
    said = Stated(num_heads=3, family="dino", pool="gap")
    found = trained.load_any(str(tmp_path / "w"), "last", None, said)
    assert (found.family, found.config.data.value_range) == ("dino", "imagenet")
    assert (found.model.config.pool, found.model.config.has_class_token) == ("gap", True)
    assert not any("for sure" in note for note in found.notes)
    with pytest.raises(UserError, match="pools by 'map'"):
        trained.load_any(str(tmp_path / "w"), "last", None, said._replace(pool="map"))
    for name in ("family", "pool", "weights"):
        with pytest.raises(UserError, match=f"--{name}=x: use one of"):
            trained.load_any(str(tmp_path / "w"), "last", None, Stated(**{name: "x"}))


def test_of_googles_files_too(tmp_path):
    cfg, params = tiny_models.model()
    google.write(tmp_path / "w.npz", cfg, params)
    said = Stated(family="big_vision", pool="gap")
    found = trained.load_any(str(tmp_path / "w.npz"), "last", None, said)
    assert found.family == "big_vision"
    assert "rounding='floor'" in found.config.data.eval_transform
    assert (found.model.config.pool, found.model.config.class_token) == ("gap", True)


def test_an_npz_that_we_write_says_a_rectangle_that_would_be_taken_for_a_square(tmp_path):
    cfg, params = tiny_models.model(image_size=(16, 64))
    google.write(tmp_path / "w.npz", cfg, params)
    found = trained.load_any(str(tmp_path / "w.npz"), "last", None)
    assert found.model.config.grid == (2, 8)
    with np.load(tmp_path / "w.npz") as arrays:  # which is nothing to others
        assert arrays["embedding/kernel"].shape == (8, 8, 3, 24)


def test_our_own_say_it_themselves(tmp_path):
    with pytest.raises(UserError, match="--num_heads describes weights of other projects"):
        Stated(num_heads=3).check_unused("runs/x")
    Stated().check_unused("runs/x")
    with pytest.raises(UserError, match="--source_image_size=0x4 does not read as a size"):
        weight_flags.parse_size("source_image_size", "0x4")


def finetune(weights, **fields):
    config = tiny(init_from=str(weights), image_size=(16, 64), ema_decay=0.0)
    configuration.set_duration(config, "total", steps=3)
    config.data.source = "synthetic:16x64x3,classes=3,examples=64"
    config.data.train_transform = ""
    config.model.variant, config.model.depth = None, None
    config.update_from_flattened_dict(fields)
    return config


def test_training_is_told_as_well(tmp_path):
    save(tmp_path / "w", image_size=(16, 64))
    said = Stated(image_size=(16, 64), num_heads=3)
    config, before = begin.resolve(finetune(tmp_path / "w"), tmp_path, (), said)
    assert (before.model.config.grid, config.model.num_heads) == ((2, 8), 3)
    with pytest.raises(UserError, match="give it with --num_heads=N"):
        trainer.train(finetune(tmp_path / "w"), tmp_path / "run")
    result = trainer.train(finetune(tmp_path / "w"), tmp_path / "run", said=said)
    assert result["eval/count"] == 64


def test_what_is_said_and_is_not_so_is_refused(tmp_path):
    cfg, params = tiny_models.model()
    google.write(tmp_path / "w.npz", cfg, params)
    for said, reason in (
        (Stated(num_heads=4), "--num_heads=4 is wrong: .* has num_heads 3"),
        (Stated(weights="ema"), "one set of weights: leave out --weights=ema"),
        (Stated(image_size=(16, 32)), "not an image of 16 x 32"),
        (Stated(pool="map"), "MAPHead_0|is missing"),
    ):
        with pytest.raises(UserError, match=reason):
            trained.load_any(str(tmp_path / "w.npz"), "last", None, said)


@pytest.mark.parametrize("form", ["hf", "vit_jax"])
def test_convert_keeps_the_published_size(tmp_path, form):
    """Of images smaller than the positions: both sizes in a folder, one in our own."""
    from vit_jax.interop import huggingface

    cfg, params = tiny_models.model(image_size=(64, 64))
    transform = "resize_shorter(36, method='bicubic')|center_crop"
    huggingface.write(tmp_path / "a", cfg, params, None, "imagenet", transform, (32, 24))
    model = trained.load_any(str(tmp_path / "a"), "last", None, as_stored=True)
    assert (model.model.config.grid, model.input_size) == ((8, 8), (32, 24))
    assert "64x64x3, 8x8 patches of 8, prepared at 32x24" in formats.describe(model)
    if form == "vit_jax":
        model, changes = resize(model, model.input_size, model.resize)
        assert "from 8x8 to 4x3 patches" in changes[-1]
        assert model.config.data.eval_transform == transform
    formats.write(model, tmp_path / "b", form, "float32")
    again = trained.load_any(str(tmp_path / "b"), "last", None)
    assert again.model.config.image_size == tuple(again.config.image_size) == (32, 24)
    assert again.config.data.eval_transform == transform
    direct = trained.load_any(str(tmp_path / "a"), "last", None)
    jax.tree.map(np.testing.assert_array_equal, again.params, direct.params)
    larger, changes = resize(
        trained.load_any(str(tmp_path / "a"), "last", None, as_stored=True), (64, 48), "corner"
    )
    assert larger.config.data.eval_transform == transform.replace("36", "72")


def test_our_safetensors_say_how_images_are_prepared(tmp_path, capsys):
    """What a state dict cannot say is in its header, for us."""
    from vit_jax.interop import huggingface

    cfg, params = tiny_models.model(image_size=(64, 64), gelu="erf")
    transform, names = "resize(method='bicubic', size=(40, 36))|center_crop", tuple("abcde")
    numbers = "mean=0.1,0.2,0.3 std=0.4,0.5,0.6"
    huggingface.write(tmp_path / "a", cfg, params, names, numbers, transform, (32, 24))
    model = trained.load_any(str(tmp_path / "a"), "last", None, as_stored=True)
    formats.write(model, tmp_path / "w.safetensors", "timm", "float32")
    found = trained.load_any(str(tmp_path / "w.safetensors"), "last", None)
    expected = trained.load_any(str(tmp_path / "a"), "last", None)
    assert found.class_names == names
    assert (found.family, found.resize) == ("huggingface", "bicubic")
    for field in ("value_range", "eval_transform"):
        assert found.config.data[field] == expected.config.data[field]
    assert found.model.config == expected.model.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert not any("assumed" in note for note in found.notes)
    told = trained.load_any(str(tmp_path / "w.safetensors"), "last", None, Stated(family="mae"))
    assert (told.family, told.config.data.value_range) == ("mae", "imagenet")
    timm.write(tmp_path / "x", cfg, params, {"class_names": ("a", "b")})
    with pytest.raises(UserError, match="header that does not fit its 5 outputs"):
        trained.load_any(str(tmp_path / "x"), "last", None)
    for wrong in ({"family": "mine"}, {"value_range": 3}, {"input_size": [1]}):
        timm.write(tmp_path / "x", cfg, params, wrong)
        with pytest.raises(UserError, match="header that vit_jax did not write"):
            trained.load_any(str(tmp_path / "x"), "last", None)


# --- Channels -----------------------------------------------------------------------------


def test_channels_are_adapted_where_they_are_asked_for(tmp_path, capsys):
    save(tmp_path / "w")
    said = Stated(num_heads=3, family="deit")
    config = finetune(tmp_path / "w", **{"data.channels": 1})
    config.data.source = "synthetic:16x64x1,classes=3,examples=64"
    trainer.train(config, tmp_path / "run", ["data.channels"], said=said)
    output = capsys.readouterr()
    assert "embedding: from 3 to 1 channels (kernel summed, as timm does)" in output.out
    assert "was trained with" not in output.err
    stored = (tmp_path / "run/config.json").read_text()
    assert '"value_range": "mean=0.449 std=0.226"' in stored


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_that_nobody_asked_for_are_refused_before_anything_is_built(
    tmp_path, channels
):
    save(tmp_path / "w", channels=channels)
    config = finetune(tmp_path / "w", **{"model.variant": "mu/8"})
    config.data.channels = 3  # the default
    config.data.source = "folder:nowhere"  # which would be opened first
    with pytest.raises(UserError) as error:
        trainer.train(config, tmp_path / "run", said=Stated(num_heads=3))
    message = str(error.value)
    assert f"of {channels} channels, and data.channels is 3" in message
    assert f"--config.data.channels={channels}" in message


def test_convert_adapts_channels(tmp_path):
    save(tmp_path / "w")
    model = trained.load_any(str(tmp_path / "w"), "last", None, Stated(num_heads=3))
    grey, change = change_channels(model, 1)
    assert grey.model.config.channels == 1
    assert "kernel summed" in change
    kernel = np.asarray(model.params["embedding"]["kernel"]).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(grey.params["embedding"]["kernel"], kernel, rtol=1e-6)
    with pytest.raises(UserError, match="--channels=0"):
        change_channels(model, 0)


# --- Several classes ----------------------------------------------------------------------


def test_several_classes_have_a_threshold(tmp_path):
    cfg, params = tiny_models.model(num_classes=3, gelu="erf")
    params["head"]["kernel"][:] = 0
    params["head"]["bias"][:] = [2.0, -3.0, 0.5]
    from vit_jax.distributed import sharding
    from vit_jax.interop import huggingface

    huggingface.write(tmp_path / "hf", cfg, params, ("a", "b", "c"), multi_label=True)
    mesh = sharding.make_mesh()
    model = trained.load_any(str(tmp_path / "hf"), "last", mesh)
    assert model.multi_label
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "p.png")
    for threshold, expected in ((0.5, ["a", "c"]), (0.8, ["a"]), (0.9, [])):
        [result] = predictions.predict(model, [str(tmp_path / "p.png")], 3, 8, mesh, threshold)
        assert [name for name, _ in result.classes] == expected
        for name, probability in result.classes:
            logit = {"a": 2.0, "c": 0.5}[name]
            assert probability == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    trained.export(model, tmp_path / "export")
    again = trained.load_any(str(tmp_path / "export"), "last", mesh)
    assert again.multi_label
    assert again.config.objective.loss == "sigmoid"
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
