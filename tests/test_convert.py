"""Work directory -> every format -> the same predictions; sizes, heads, refusals."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests.commands import assert_one_sentence, call, run
from tests.tiny_config import tiny
from vit_jax import convert
from vit_jax.checkpoints import trained
from vit_jax.distributed import sharding
from vit_jax.models.resize_positions import resize_embedding
from vit_jax.system.errors import UserError
from vit_jax.training import trainer

MESH = sharding.make_mesh()


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run[0], tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 255, (8, 8), np.uint8)  # of the model's size: no resizing
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def predictions(tmp_path, pictures, *model):
    output = tmp_path / "predictions.jsonl"
    result = call("predict", *model, "--topk=10", f"--output={output}", pictures)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return [{p["class"]: p["probability"] for p in r["predictions"]} for r in records]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("model.npz", []),
        ("model.safetensors", []),
        ("folder", ["--format=hf"]),
        ("export", ["--format=vit_jax"]),
    ],
)
def test_every_format_predicts_the_same(workdir, pictures, tmp_path, name, flags):
    destination = tmp_path / name
    result = (run if name == "model.npz" else call)("convert", workdir, destination, *flags)
    assert result.returncode == 0, result.stderr
    for line in ("family     vit_jax", "images     8x8x1, 2x2 patches of 4", "classes    10"):
        assert line in result.stdout
    expected = predictions(tmp_path, pictures, f"--workdir={workdir}")
    found = predictions(tmp_path, pictures, f"--checkpoint={destination}")
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_another_size_and_head(workdir, tmp_path):
    destination = tmp_path / "large.npz"
    result = call("convert", workdir, destination, "--image_size=16x24", "--num_classes=3")
    assert result.returncode == 0, result.stderr
    assert "changed    position embeddings from 2x2 to 4x6 patches (corner)" in result.stdout
    assert "changed    head: zero-initialised, 3 classes" in result.stdout
    with np.load(destination) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    model = trained.load(workdir, "last", MESH)
    positions = model.params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(
        found["Transformer/posembed_input/pos_embedding"],
        resize_embedding(np.asarray(positions), (2, 2), (4, 6)),
    )
    assert found["head/kernel"].shape == (32, 3)
    assert not found["head/kernel"].any()


@pytest.mark.parametrize(("form", "name"), [("hf", "larger"), ("vit_jax", "own")])
def test_a_crop_keeps_its_share_at_another_size(tmp_path, form, name):
    """The evaluation transform grows with the image, so that predict works at the new size."""
    config = tiny(total_steps=3.0)
    config.data.eval_transform = "resize_shorter(10, method='bicubic')|center_crop"
    trainer.train(config, tmp_path / "run")
    flags = ["--image_size=16", f"--format={form}"]
    result = call("convert", tmp_path / "run", tmp_path / name, *flags)
    assert result.returncode == 0, result.stderr
    transform = "resize_shorter(20, method='bicubic')|center_crop"
    assert f"changed    evaluation transform: {transform}" in result.stdout
    again = trained.load_any(str(tmp_path / name), "last", MESH)
    assert again.config.data.eval_transform == transform
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(tmp_path / "picture.png")
    result = call("predict", f"--checkpoint={tmp_path / name}", tmp_path / "picture.png")
    assert result.returncode == 0, result.stderr


def test_half_precision_halves_the_file(workdir, tmp_path):
    sizes = []
    for dtype in ("float32", "bfloat16"):
        destination = tmp_path / f"{dtype}.safetensors"
        result = call("convert", workdir, destination, f"--dtype={dtype}")
        assert result.returncode == 0, result.stderr
        sizes.append(destination.stat().st_size)
    assert 0.45 < sizes[1] / sizes[0] < 0.6


def test_an_export_opens_as_it_was_and_fine_tunes(workdir, tmp_path):
    model = trained.load(workdir, "last", MESH)
    trained.export(model, tmp_path / "export")
    again = trained.load_any(str(tmp_path / "export"), "last", MESH)
    assert again.class_names == model.class_names
    assert again.model.config == model.model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    config = tiny(total_steps=2.0, init_from=str(tmp_path / "export"))
    assert trainer.train(config, tmp_path / "run")["eval/count"] == 360


def test_a_damaged_export_is_refused_by_every_door(workdir, tmp_path):
    """One flipped bit in each kilobyte of the weights, of which there are more than one."""
    trained.export(trained.load(workdir, "last", MESH), tmp_path / "export")
    files = [p for p in (tmp_path / "export" / "best").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    for at in range(512, len(data), 1024):
        data[at] ^= 1
    largest.write_bytes(data)
    name = str(tmp_path / "export")
    for which in ("last", "best"):
        with pytest.raises(UserError, match=r"best/\d+ is damaged \(.*\): pass --step"):
            trained.load_any(name, which, MESH)
    with pytest.raises(UserError, match="is damaged"):
        trainer.train(tiny(init_from=name), tmp_path / "run")
    assert_one_sentence(call("evaluate", f"--workdir={name}", "--verify"), "1 of 1 checkpoints")


def test_nothing_is_overwritten_without_force(workdir, tmp_path):
    destination = tmp_path / "model.npz"
    destination.write_text("precious")
    assert_one_sentence(call("convert", workdir, destination), str(destination), "--force")
    assert destination.read_text() == "precious"
    assert call("convert", workdir, destination, "--force").returncode == 0
    assert destination.stat().st_size > 1000


def test_a_failed_conversion_leaves_nothing_behind(workdir, tmp_path):
    config = tiny(total_steps=2.0)
    config.model.registers = 2
    trainer.train(config, tmp_path / "run")
    destination = tmp_path / "out" / "model.npz"
    assert_one_sentence(call("convert", tmp_path / "run", destination), "registers")
    assert not destination.exists()
    assert list(destination.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["W"], ["pass SOURCE and DESTINATION"]),
        (["W", "D"], ["names no format", "--format=hf"]),
        (["W", "D.npz", "--format=onnx"], ["--format=onnx", "npz, hf, timm, vit_jax"]),
        (["W", "D.npz", "--image_size=big"], ["--image_size=big", "224x448"]),
        (["W", "D.npz", "--image_size=10"], ["image_size is (10, 10)", "multiples of 4"]),
        (["W", "D.npz", "--image_size=16", "--resize=x"], ["no way 'x' to resize", "corner"]),
        (["W", "D.npz", "--num_classes=-1"], ["--num_classes=-1"]),
        (["nowhere.npz", "D.npz"], ["nowhere.npz"]),
        (["setup.py", "D.npz"], ["setup.py"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_errors(workdir, tmp_path, arguments, parts):
    places = {"W": workdir, "D": tmp_path / "D", "D.npz": tmp_path / "D.npz"}
    result = call("convert", *(places.get(a, a) for a in arguments))
    assert_one_sentence(result, *parts)
    assert list(tmp_path.iterdir()) == []


def test_sizes():
    assert convert.parse_size("384") == (384, 384)
    assert convert.parse_size("224x448") == (224, 448)
    with pytest.raises(UserError):
        convert.parse_size("1x2x3")


def test_a_model_without_a_head_does_not_predict(workdir, pictures, tmp_path):
    destination = tmp_path / "export"
    assert (
        call("convert", workdir, destination, "--format=vit_jax", "--num_classes=0").returncode
        == 0
    )
    result = call("predict", f"--checkpoint={destination}", pictures)
    assert_one_sentence(result, "no head to predict with")
    vectors = tmp_path / "vectors.npy"
    result = call("embed", f"--checkpoint={destination}", f"--output={vectors}", pictures)
    assert result.returncode == 0, result.stderr
    assert np.load(vectors).shape == (5, 32)
    shutil.rmtree(destination)
