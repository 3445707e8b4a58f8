"""The commands as a person runs them: output, files, one-sentence errors, exit codes."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tests.campaign import runs
from tests.commands import TINY, assert_one_sentence, call, names_of_flags, run
from vit_jax.training.logging import read_metrics


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    return shutil.copytree(tiny_run[0], tmp_path_factory.mktemp("digits") / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of ten pictures, dark and bright, of different sizes and formats."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, level in [("bright", 200), ("dark", 40)]:
        (root / name).mkdir()
        for i in range(10):
            pixels = rng.integers(level - 30, level + 30, (20 + i, 30, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


# --- evaluate -----------------------------------------------------------------------------


def test_evaluate_needs_only_the_work_directory_and_agrees_with_training(workdir):
    result = run("evaluate", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    last = [r for r in read_metrics(workdir / "metrics.jsonl") if "eval/loss" in r][-1]
    accuracy, count = last["eval/accuracy"], last["eval/count"]
    assert result.stdout.startswith(f"accuracy {accuracy:.4f}  ")
    assert f"count {count}  (digits test, step 24)" in result.stdout
    saved = read_metrics(workdir / "evaluations.jsonl")[-1]
    assert saved["accuracy"] == accuracy
    assert saved["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert (saved["step"], saved["data"], saved["split"]) == (24, "digits", "test")


def test_evaluate_what_may_only_be_read_says_so_and_writes_nothing(workdir, tmp_path):
    own = shutil.copytree(workdir, tmp_path / "run")
    (own / "evaluations.jsonl").unlink(missing_ok=True)
    before = runs.may_only_read(own)
    if before is None:
        pytest.skip("there is no `setpriv` to give up the rights of root")
    times = {path: path.stat().st_mtime_ns for path in (own, *own.rglob("*"))}
    result = run("evaluate", f"--workdir={own}", before=before)
    found = {path: path.stat().st_mtime_ns for path in (own, *own.rglob("*"))}
    runs.may_write(own)  # so that pytest can remove it
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("accuracy ")
    assert result.stderr == (
        f"note: {own}/evaluations.jsonl cannot be written (Permission denied)\n"
    )
    assert found == times


def test_evaluate_another_split_checkpoint_and_batch_size(workdir):
    result = call(
        "evaluate", f"--workdir={workdir}", "--split=train[:77]", "--batch_size=16", "--step=20"
    )
    assert result.returncode == 0, result.stderr
    assert "count 77  (digits train[:77], step 20)" in result.stdout


# --- predict ------------------------------------------------------------------------------


def test_predict_prints_and_saves_the_classes(workdir, pictures, tmp_path):
    output = tmp_path / "out.jsonl"
    result = run("predict", f"--workdir={workdir}", "--topk=3", f"--output={output}", pictures)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 20
    assert lines[0].startswith(f"{pictures / 'bright' / '0.png'}: ")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [len(r["predictions"]) for r in records] == [3] * 20
    first = records[0]["predictions"]
    assert {p["class"] for p in first} <= set("0123456789")
    assert sorted((p["probability"] for p in first), reverse=True) == [
        p["probability"] for p in first
    ]
    shown = f"{first[0]['class']} {100 * first[0]['probability']:.2f}%"
    assert shown in lines[0]


def test_predict_reports_and_skips_what_it_cannot_read(workdir, pictures, tmp_path):
    for i in (1, 3):
        shutil.copy(pictures / "dark" / f"{i}.jpg", tmp_path)
    broken = tmp_path / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    result = call("predict", f"--workdir={workdir}", tmp_path)
    assert_one_sentence(result, "1 of 2 images could not be read")
    assert str(broken) in result.stderr
    assert len(result.stdout.splitlines()) == 1


# --- embed --------------------------------------------------------------------------------


def test_embed_writes_one_unit_vector_a_row_in_every_format(workdir, pictures, tmp_path):
    for ending in ("npz", "npy", "parquet"):
        output = tmp_path / f"out.{ending}"
        result = call(
            "embed", f"--workdir={workdir}", f"--output={output}", "--batch_size=8", pictures
        )
        assert result.returncode == 0, result.stderr
        assert f"20 vectors of width 32 in {output}" in result.stdout
    packed = np.load(tmp_path / "out.npz", allow_pickle=False)
    vectors, names = packed["embeddings"], list(packed["names"])
    assert (vectors.shape, vectors.dtype) == ((20, 32), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert names == sorted(str(p) for p in pictures.rglob("*.*"))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), vectors)
    assert (tmp_path / "out.names.txt").read_text().splitlines() == names
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["name"].to_pylist() == names
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), vectors)
    # Alone in its batch or among others, an image has the same vector.
    one = tmp_path / "one.npy"
    call("embed", f"--workdir={workdir}", f"--output={one}", "--batch_size=8", names[13])
    np.testing.assert_allclose(np.load(one), vectors[13:14], atol=1e-6)
    assert not list(tmp_path.glob("*.part*"))


def test_embed_leaves_out_what_it_cannot_read(workdir, pictures, tmp_path):
    folder = shutil.copytree(pictures / "dark", tmp_path / "dark")
    broken = folder / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    output = tmp_path / "out.npy"
    result = run("embed", f"--workdir={workdir}", f"--output={output}", folder)
    assert_one_sentence(result, "1 of 10 images could not be read")
    assert str(broken) in result.stderr
    assert np.load(output).shape == (9, 32)
    names = (tmp_path / "out.names.txt").read_text().splitlines()
    assert len(names) == 9
    assert str(broken) not in names


# --- train on a folder of one's own images ------------------------------------------------


def test_own_images_from_folder_to_prediction(pictures, tmp_path):
    fields = {
        "data.source": f"folder:{pictures}",
        "data.channels": 3,
        "data.train_transform": "random_resized_crop|flip",
        "batch_size": 8,
        "data.mixup": 0.0,
        "model.dropout": 0.0,
        "optimizer.lr": 0.01,
        "total_steps": 30,
        "ema_decay": 0.0,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    result = run("train", f"--config={TINY}", f"--workdir={tmp_path}", *overrides)
    assert result.returncode == 0, result.stderr
    assert "2 classes" in result.stdout
    result = call("predict", f"--workdir={tmp_path}", "--topk=1", pictures)
    hits = [
        line.split(": ")[0].split("/")[-2] in line.split(": ")[1]
        for line in result.stdout.splitlines()
    ]
    assert np.mean(hits) > 0.9


def test_a_truncated_image_stops_training_with_its_name(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "pictures")
    broken = root / "dark" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    result = call(
        "train",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.source=folder:{root}",
        "--config.data.train_transform=resize",
    )
    assert_one_sentence(result, str(broken))


# --- One-sentence errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--workdir is missing"]),
        (["--workdir=setup.py/run", f"--config={TINY}"], ["setup.py/run cannot be made"]),
        (["--workdir=X", "--config=nowhere.py"], ["--config=nowhere.py", "check the path"]),
        (["--config.model.variant=Q/4"], ["model.variant is 'Q/4'", "the sizes are mu, Ti"]),
        (["--config.model.dpeth=3"], ['Did you mean "depth"']),
        (["--config.image_size=(9, 8)"], ["image_size is (9, 8)", "use multiples of 4"]),
        (["--config.data.source=folder:nowhere"], ["nowhere"]),
        (["--config.data.source=tfds:nothing"], ["tfds:nothing", "tfds build"]),
        (["--config.data.source=clouds"], ["clouds", "digits"]),
        (["--config.data.eval_split=tests"], ["tests", "train"]),
        (["--config.data.train_transform=flop"], ["flop", "flip"]),
        (["--config.optimizer.name=lion"], ["optimizer.name is 'lion'", "adam, sgd"]),
        (["--config.total_steps=1", "--config.total_epochs=1"], ["total_epochs", "set one"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_train_errors(arguments, parts, tmp_path):
    if not any(a.startswith("--workdir") for a in arguments) and arguments:
        arguments = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", *arguments]
    assert_one_sentence((call if arguments else run)("train", *arguments), *parts)


def test_an_empty_class_folder_is_named(pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "pictures")
    (root / "empty").mkdir()
    overrides = [f"--config.data.source=folder:{root}", f"--workdir={tmp_path / 'run'}"]
    assert_one_sentence(call("train", f"--config={TINY}", *overrides), str(root / "empty"))


def test_the_work_directory_of_another_model_is_refused(workdir):
    result = call("train", f"--config={TINY}", f"--workdir={workdir}", "--config.model.depth=3")
    assert_one_sentence(result, str(workdir), "model.depth=2, not 3")


@pytest.mark.parametrize(
    ("door", "arguments", "parts"),
    [
        ("evaluate", ["--workdir=nowhere"], ["there is no work directory nowhere"]),
        ("evaluate", ["--workdir=tests"], ["tests has no checkpoints/ folder"]),
        ("evaluate", ["--workdir=W", "--step=7"], ["has no checkpoint '7': it holds 20, 24"]),
        ("evaluate", ["--workdir=W", "--data=folder:P"], ["[bright, dark] (2)", "(10)"]),
        ("predict", ["--workdir=W"], ["no image was given"]),
        ("embed", ["--workdir=W", "--output=x.csv", "P"], [".npz, .npy, .parquet"]),
        ("predict", ["--workdir=W", "nowhere.jpg"], ["no file or folder nowhere.jpg"]),
        ("predict", ["--workdir=W", "colabs"], ["colabs holds no images"]),
    ],
)
def test_errors_of_other_doors(door, arguments, parts, workdir, pictures):
    places = {
        "--workdir=W": f"--workdir={workdir}",
        "--data=folder:P": f"--data=folder:{pictures}",
        "P": str(pictures),
    }
    arguments = [places.get(a, a) for a in arguments]
    if "--data" in " ".join(arguments):
        arguments.append("--split=val")
    assert_one_sentence(call(door, *arguments), *parts)


@pytest.mark.parametrize(
    ("door", "flags"),
    [
        ("train", ["--config", "--workdir"]),
        ("sweep", ["--config", "--workdir"]),
        ("evaluate", ["--workdir", "--checkpoint", "--few_shot", "--knn", "--linear_probe"]),
        ("predict", ["--workdir", "--checkpoint", "--step", "--topk", "--output"]),
        ("embed", ["--workdir", "--checkpoint", "--output", "--batch_size"]),
        ("convert", ["--format", "--image_size", "--resize", "--num_classes", "--dtype"]),
        ("visualize", ["--workdir", "--checkpoint", "--output", "--rollout", "--topk"]),
    ],
)
def test_help_names_every_flag(door, flags):
    assert {f"--{name}" for name in names_of_flags(door)} >= set(flags)


def test_help_shows_flags():
    shown = run("train", "--help").stdout.replace("--[no]", "--")
    for name in names_of_flags("train"):
        assert f"--{name}" in shown


def test_importing_needs_neither_tensorflow_nor_torch():
    code = """
import sys, vit_jax.sweep, vit_jax.predict, vit_jax.evaluate, vit_jax.visualize
print([m for m in ("tensorflow", "torch", "tensorflow_datasets") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr
