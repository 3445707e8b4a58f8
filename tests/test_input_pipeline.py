"""The benchmark of input pipelines measures what it says; no test here asserts a time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_contestants, input_pipeline, peers, processes, report
from benchmarks.input_contestants import EVALUATION, RANDAUGMENT, TRAINING, TRANSFORMS
from vit_jax.data.transforms import resize
from vit_jax.system.errors import UserError

ROOT = Path(__file__).parents[1]
PHOTOS, SMALL = input_pipeline.IMAGES
closes_no_files = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    input_pipeline.make_images(PHOTOS.quick(), folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "data"
    input_pipeline.make_images(SMALL.quick(), folder)
    return folder


def looked_at(path):
    with Image.open(path) as image:
        return image.format, image.size, image.mode


def states(group):
    """The state of each process of a group (T: stopped) that is still alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(fields[0])
    return found


def batch_of(builder, folder, transform, size, count=8):
    batches = input_contestants.BUILDERS[builder](
        folder=str(folder), transform=transform, size=size, batch_size=count, workers=0
    )
    found = next(batches)
    batches.close()
    return found


# --- The images --------------------------------------------------------------------------


def test_photos_are_like_those_of_imagenet(photos):
    paths = sorted(photos.glob("*/*"))
    assert len(paths) == 8
    assert set(map(looked_at, paths)) == {("JPEG", (500, 375), "RGB")}
    assert 70_000 < np.mean([path.stat().st_size for path in paths]) < 140_000
    assert len({path.read_bytes() for path in paths}) == 8


def test_small_images_are_like_those_of_cifar(small):
    assert set(map(looked_at, small.glob("*/*"))) == {("PNG", (32, 32), "RGB")}


# --- The contestants do the same ----------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ours_are_pixels_of_the_images(photos, transform):
    found = batch_of("ours", photos, transform, 224)
    assert (found.shape, found.dtype) == ((8, 224, 224, 3), np.uint8)
    assert found.std() > 20
    sharp = np.abs(np.diff(found.astype(float), axis=2)).mean()
    assert sharp > 1


@pytest.mark.parity
@closes_no_files
@pytest.mark.parametrize(("kind", "size"), [("photos", 224), ("small", 32)])
@pytest.mark.parametrize("engine", ["cykooz", "PIL"])
def test_evaluation_gives_the_pixels_of_timm(kind, size, engine, request, monkeypatch):
    pytest.importorskip("torch")
    if engine == "PIL":
        monkeypatch.setattr(resize, "cykooz_resizer", None)
    folder = request.getfixturevalue(kind)
    ours = batch_of("ours", folder, EVALUATION, size)
    theirs = batch_of("timm", folder, EVALUATION, size).transpose(0, 2, 3, 1)
    # A folder has an order of its own, so let the pixels decide.
    by_pixels = lambda images: sorted(images, key=lambda image: image.tobytes())
    if engine == "PIL" or kind == "small":  # small images are not resized
        np.testing.assert_array_equal(by_pixels(ours), by_pixels(theirs))
        return
    for image in ours.astype(int):
        off = min((np.abs(image - other) for other in theirs), key=np.mean)
        assert off.max() <= 2
        assert (off > 0).mean() < 0.006


@pytest.mark.parity
@closes_no_files
@pytest.mark.parametrize("transform", [TRAINING, RANDAUGMENT])
def test_training_draws_from_what_timm_draws_from(photos, transform):
    """Sharpness shows the scale of the crops and the filter that resizes them."""
    pytest.importorskip("torch")

    def look(images):
        images = images.astype(float)
        return np.array([images.mean(), np.abs(np.diff(images, axis=2)).mean()])

    ours = batch_of("ours", photos, transform, 64, 128)
    theirs = batch_of("timm", photos, transform, 64, 128).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(look(ours), look(theirs), rtol=0.12)


def test_an_endless_source_begins_again():
    source = input_contestants.Endless(["a", "b", "c"])
    assert [source[i] for i in (0, 2, 3, 10**8)] == ["a", "c", "a", "b"]
    assert len(source) > 10**8


def test_only_contestants_that_are_here(monkeypatch):
    monkeypatch.setattr(
        input_pipeline.importlib.util, "find_spec", lambda name: name != "tensorflow"
    )
    assert "tf.data" not in input_pipeline.choose(None)
    assert list(input_pipeline.choose(["timm, 1 worker"])) == ["timm, 1 worker"]
    with pytest.raises(UserError, match=r"--contestants has 'tf.data', which is not here"):
        input_pipeline.choose(["tf.data"])
    found = input_pipeline.prepared(input_pipeline.CONTESTANTS, Path("x"), RANDAUGMENT)
    assert "tf.data" not in found  # it has no such operation
    assert found["timm, 1 worker"].options == {
        "workers": 1, "folder": "x", "transform": RANDAUGMENT
    }  # fmt: skip


# --- Turns -------------------------------------------------------------------------------


@needs_proc
def test_cpu_seconds_are_those_of_the_group():
    spin = "import os, time; os.setpgid(0, 0)\nwhile time.process_time() < 0.3: pass\nprint()\n"
    script = spin + "input()"
    done = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with done:
        done.stdout.readline()
        found = input_pipeline.cpu_seconds(done.pid)
        done.communicate(b"\n")
    assert 0.25 < found < 0.5
    assert input_pipeline.cpu_seconds(done.pid) == 0  # it is gone


@needs_proc
def test_a_contestant_sleeps_between_turns_with_its_workers(small):
    contestant = input_pipeline.prepared(
        {"x": input_pipeline.CONTESTANTS["vit_jax, 1 worker"]}, small, TRAINING
    )["x"]
    sleeper = input_pipeline.Sleeper(
        contestant, input_pipeline.task_of(SMALL.quick(), True), threads=2
    )
    try:
        turn = sleeper.turn(4)
        assert turn.seconds > 0
        assert turn.cpu_seconds > 0
        group = sleeper._process.pid
        assert len(states(group)) >= 2  # it and its worker
        assert set(states(group)) == {"T"}
        before = input_pipeline.cpu_seconds(group)
        time.sleep(0.1)
        assert input_pipeline.cpu_seconds(group) == before
        assert sleeper.turn(2).seconds > 0  # and wakes up again
        sleeper.end()
    finally:
        sleeper.close()
    deadline = time.monotonic() + 10  # those that were killed take a moment
    while states(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states(group) == []


@needs_proc
def test_one_that_fails_does_not_stop_the_others(small):
    task = input_pipeline.task_of(SMALL.quick(), True)
    ours = input_pipeline.CONTESTANTS["vit_jax, threads"]
    here = input_pipeline.prepared({"here": ours}, small, TRAINING)
    gone = input_pipeline.prepared({"gone": ours}, small / "none", TRAINING)
    turns, failed = input_pipeline.take_turns(here | gone, task, 2, rounds=2, sample=0.01)
    assert len(turns["here"]) == 2
    assert turns["gone"] == []
    assert list(failed) == ["gone"]
    assert "none" in failed["gone"]


# --- Rows and report ---------------------------------------------------------------------


def turns_of(*pairs):
    return [input_pipeline.Turn(*pair) for pair in pairs]


def example_rows():
    turns = {
        "vit_jax, threads": turns_of((1.0, 2.0), (2.0, 4.0)),
        "timm, no worker": turns_of((4.0, 4.0), (8.0, 8.0)),
        "timm, 2 workers": turns_of((3.0, 5.0), (6.0, 10.0)),
        "tf.data": [],
    }
    about = {"images": "PNG", "transform": "train"}
    return input_pipeline.rows(about, 8, turns, {"tf.data": "no memory"})


def test_ratios_are_against_the_fastest_of_timm_within_rounds():
    ours, alone, two, lost = example_rows()
    # By the clock two workers are faster, by what they cost one process is.
    assert ours["ratio"]["median"] == 3.0
    assert ours["core_ratio"]["median"] == 2.0
    assert alone["ratio"]["median"] == 0.75
    assert two["core_ratio"]["median"] == pytest.approx(0.8)
    assert ours["images_per_second"] == pytest.approx(8 / 1.5)
    assert ours["images_per_core_second"] == pytest.approx(8 / 3)
    assert lost == {
        "images": "PNG", "transform": "train", "batch_size": 8, "contestant": "tf.data",
        "failed": "no memory",
    }  # fmt: skip


def test_without_timm_there_is_no_ratio():
    [row] = input_pipeline.rows({}, 8, {"vit_jax, threads": turns_of((1.0, 2.0))}, {})
    assert "ratio" not in row
    assert row["images_per_second"] == 8


def test_the_report_shows_it():
    record = {"benchmark": "input_pipeline", "results": example_rows()}
    figure = report.plot(record)
    assert figure.axes[0].get_title() == "PNG, train, batch 8"
    assert len(figure.axes[0].patches) == 3
    [lead] = report.leads(record["results"])
    assert (lead["ours"], lead["theirs"]) == ("vit_jax, threads", "timm, 2 workers")
    assert lead["lead"]["median"] == 3.0
    assert (lead["images"], lead["transform"]) == ("PNG", "train")


@needs_proc
def test_the_door_from_flags_to_json(tmp_path):
    output = tmp_path / "found.json"
    door = ["benchmarks.input_pipeline", "--quick", f"--output={output}", "--transforms=eval"]
    command = [sys.executable, "-m", *door, "--contestants=vit_jax, threads"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert [row["images"] for row in record["results"]] == [PHOTOS.name, SMALL.name]
    assert all(row["images_per_core_second"] > 0 for row in record["results"])
    assert {"grain", "pillow"} <= record["conditions"]["versions"].keys()
    assert report.section(record).count("vit_jax, threads") == 2


def test_transforms_that_do_not_exist():
    assert input_pipeline.choose_transforms(None) == TRANSFORMS
    assert input_pipeline.choose_transforms([EVALUATION]) == (EVALUATION,)
    with pytest.raises(UserError, match="--transforms has 'x': use some of train; train, Rand"):
        input_pipeline.choose_transforms(["x"])


def test_contestants_are_named_so_that_the_report_knows_whose_they_are():
    for name, found in input_pipeline.CONTESTANTS.items():
        assert name.startswith(peers.OURS) == (found.builder == "ours")
        assert name.startswith(peers.REFERENCE) == (found.builder == "timm")
        assert found.builder in input_contestants.BUILDERS
    assert issubclass(input_pipeline.Sleeper, processes.Process)
