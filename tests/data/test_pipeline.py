import io
import itertools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import pipeline
from vit_jax.data.pipeline import eval_batches, train_batches
from vit_jax.data.sources import catalog
from vit_jax.data.sources.in_memory import ArraySource
from vit_jax.data.transforms import language
from vit_jax.data.transforms.language import parse_transform
from vit_jax.system.errors import UserError

NOISE = "synthetic:20x24x3,classes=10,examples="
AUGMENT = parse_transform("inception_crop|flip|randaugment(2, 10)", (12, 8))
RESIZE = parse_transform("resize", (12, 8))
IDENTITY = parse_transform("", (1, 1))


class Numbers(ArraySource):
    """Example i is one pixel of value i, so that batches show what they hold."""

    def __init__(self, n, classes=10):
        values = np.arange(n)
        pixels = values.astype(np.uint8).reshape(n, 1, 1)
        super().__init__(pixels, values % classes, tuple(map(str, range(classes))), "numbers")


def train(source, steps, transform=AUGMENT, channels=3, batch_size=8, seed=3, **options):
    options |= {"channels": channels, "batch_size": batch_size, "seed": seed}
    with train_batches(source, transform=transform, **options) as batches:
        return list(itertools.islice(batches, steps))


def evaluate(source, transform=IDENTITY, channels=1, batch_size=8, **options):
    options |= {"channels": channels, "batch_size": batch_size}
    with eval_batches(source, transform=transform, **options) as batches:
        return list(batches)


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def joined(parts):
    """The batches of several processes as one."""
    return [
        {key: np.concatenate([b[key] for b in same_step]) for key in same_step[0]}
        for same_step in zip(*parts, strict=True)
    ]


def numbers(batches):
    return [int(x) for batch in batches for x in batch["image"].ravel()]


@pytest.fixture(scope="module")
def noise():
    return catalog.load(NOISE + "37", "train")


@pytest.fixture(scope="module")
def reference(noise):
    """Seven batches of 8 from 37 examples: the border of an epoch lies inside the fifth."""
    return train(noise, 7)


def test_batches_have_the_shapes_and_types_promised(reference):
    for batch in reference:
        assert batch["image"].shape == (8, 12, 8, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        assert batch["label"].shape == (8,)
        assert type(batch["image"]) is np.ndarray


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_matter(noise, reference, threads, monkeypatch):
    monkeypatch.setattr(pipeline, "_useful", lambda threads, local: threads)
    assert_same(train(noise, 7, threads=threads), reference)


def spin(seconds):
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


@pytest.mark.parametrize(
    ("work", "wait", "expected"),
    [(0.0, 0.0, {1}), (0.0, 0.01, {16}), (0.004, 0.0, {3, 4, 5}), (0.004, 0.02, {16})],
)
def test_threads_are_as_many_as_are_of_use(work, wait, expected, monkeypatch):
    """One for small images, one a core for large ones, and all of them on a slow disk."""

    class Slow(Numbers):
        def __getitem__(self, i):
            spin(work)
            if wait:
                time.sleep(wait)
            return super().__getitem__(i)

    local = pipeline._Local(Slow(5), pipeline._Share(4, (0,), 1), 1)
    monkeypatch.setattr(pipeline, "_cores", lambda: 3)
    # Other work on the machine makes examples wait as a disk does: look for a quiet moment.
    assert min(pipeline._useful(16, local) for _ in range(20)) in expected


def test_how_long_an_image_takes_is_found_out_without_errors():
    class Gone(Numbers):
        def __getitem__(self, i):
            raise UserError("gone")

    with (
        train_batches(Gone(5), transform=IDENTITY, channels=1, batch_size=4, seed=0) as batches,
        pytest.raises(UserError, match="gone"),
    ):
        next(batches)


def test_the_draws_of_an_example_are_those_of_its_place():
    """Published results depend on these numbers, which are numpy's and Grain's together."""

    def draw(image, rng, target):
        return Image.new("L", (1, 1), int(rng.integers(256)))

    transform = language.Transform("draw", (1, 1), (draw,))
    seen = numbers(train(Numbers(5), 2, transform, 1, batch_size=4, seed=7))
    seed = np.random.SeedSequence([7, 3]).generate_state(1)[0]
    expected = []
    for place in range(8):
        bits = np.random.Philox(seed)
        state = bits.state
        state["state"]["counter"][:] = 0, 0, 0, place
        bits.state = state
        expected.append(int(np.random.Generator(bits).integers(256)))
    assert seen == expected


def test_threads_take_pieces_that_make_up_a_batch(noise):
    found = {each: pipeline._piece_size(*each) for each in
             [(8, 16), (8, 0), (8, 3), (256, 16), (1024, 4), (37, 2), (30, 4)]}  # fmt: skip
    assert found == {
        (8, 16): 1, (8, 0): 8, (8, 3): 2, (256, 16): 16, (1024, 4): 32, (37, 2): 1, (30, 4): 6
    }  # fmt: skip
    one, pieces = (train(noise, 3, batch_size=12, threads=threads) for threads in (12, 2))
    assert_same(one, pieces)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_matter(noise, reference, workers):
    assert_same(train(noise, 7, workers=workers), reference)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(noise, reference, processes):
    parts = [train(noise, 7, parts=(i,), part_count=processes) for i in range(processes)]
    assert_same(joined(parts), reference)


def test_workers_and_processes_together_do_not_matter(noise, reference):
    parts = [train(noise, 7, parts=(i,), part_count=2, workers=2) for i in range(2)]
    assert_same(joined(parts), reference)


@pytest.mark.parametrize("first_step", [1, 3, 6])
def test_resuming_is_exact(noise, reference, first_step):
    assert_same(train(noise, 7 - first_step, first_step=first_step), reference[first_step:])


def test_resuming_with_other_workers_and_processes_is_exact(noise, reference):
    parts = [
        train(noise, 3, first_step=4, parts=(i,), part_count=2, workers=i) for i in range(2)
    ]
    assert_same(joined(parts), reference[4:])


def test_resuming_far_away_is_quick_and_reads_nothing_before(noise):
    reads = []

    class Watched(Numbers):
        def __getitem__(self, i):
            reads.append(i)
            return super().__getitem__(i)

    start = time.monotonic()
    train(Watched(50), 1, IDENTITY, 1, first_step=10_000_000, prefetch=1, threads=1)
    assert time.monotonic() - start < 10
    assert len(reads) <= 24


def test_every_epoch_holds_every_example_once_in_an_order_of_its_own():
    seen = numbers(train(Numbers(30), 9, IDENTITY, 1, batch_size=10))
    epochs = [tuple(seen[i : i + 30]) for i in range(0, 90, 30)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
        assert epoch != tuple(range(30))
    assert len(set(epochs)) == 3


def test_batches_run_across_epochs_and_lose_nothing():
    seen = numbers(train(Numbers(30), 30, IDENTITY, 1, batch_size=7))
    assert [seen.count(i) for i in range(30)] == [7] * 30  # 210 in all


def test_labels_stay_with_their_images():
    for batch in train(Numbers(30), 5, IDENTITY, 1):
        np.testing.assert_array_equal(batch["image"].ravel() % 10, batch["label"])


def test_a_data_set_smaller_than_a_batch_is_repeated():
    (batch,) = train(Numbers(3), 1, IDENTITY, 1, batch_size=9)
    assert sorted(batch["image"].ravel()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_seeds_change_order_and_augmentation(noise):
    one, other = (train(noise, 1, seed=seed)[0] for seed in (0, 1))
    assert (one["label"] != other["label"]).any()
    single = catalog.load(NOISE + "1", "train")
    one, other = (train(single, 1, seed=seed)[0]["image"] for seed in (0, 1))
    assert (one != other).any()
    assert (one[0] != one[1]).any()  # each time an example comes it is augmented anew


# ---- repeated augmentation ---------------------------------------------------------------


def test_a_batch_holds_one_copy_of_each_image_then_another():
    once = numbers(train(Numbers(30), 4, IDENTITY, 1, batch_size=4))
    batches = train(Numbers(30), 4, IDENTITY, 1, batch_size=12, repeats=3)
    for step, batch in enumerate(batches):
        images = once[4 * step : 4 * step + 4]  # the same order, only slower
        assert numbers([batch]) == images * 3
        np.testing.assert_array_equal(batch["image"].ravel() % 10, batch["label"])


def test_as_many_epochs_as_copies_show_every_image_as_often():
    seen = numbers(train(Numbers(30), 9, IDENTITY, 1, batch_size=10, repeats=3))
    assert [seen.count(i) for i in range(30)] == [3] * 30
    for i in range(3):
        assert len(set(seen[30 * i : 30 * i + 30])) in (10, 11, 12)  # an epoch of n examples


def test_copies_that_do_not_fit_go_to_the_next_batch():
    # Images in the order 0, 1, 2, ... and three of each: by hand for batches of 4.
    shares = [pipeline._Share(4, (i,), 2, repeats=3) for i in range(2)]
    rows = [[share.position(i) // 3 for share in shares for i in (2 * s, 2 * s + 1)]
            for s in range(3)]  # fmt: skip
    assert rows == [[0, 1, 0, 0], [2, 1, 2, 1], [3, 3, 2, 3]]


def test_every_copy_is_augmented_anew():
    single = catalog.load(NOISE + "1", "train")
    (batch,) = train(single, 1, parse_transform("inception_crop", (12, 8)), repeats=4)
    assert len({image.tobytes() for image in batch["image"]}) == 8


@pytest.fixture(scope="module")
def repeated(noise):
    """Three copies do not fit batches of 8."""
    return train(noise, 5, repeats=3)


@pytest.mark.parametrize("options", [{"threads": 0}, {"workers": 2}])
def test_copies_are_the_same_after_a_resume_with_any_workers(noise, repeated, options):
    assert_same(train(noise, 3, first_step=2, repeats=3, **options), repeated[2:])


def test_two_processes_share_the_copies_with_any_workers(noise, repeated):
    parts = [train(noise, 5, repeats=3, parts=(i,), part_count=2, workers=i) for i in range(2)]
    assert_same(joined(parts), repeated)


def test_four_processes_share_the_copies(noise, repeated):
    parts = [train(noise, 5, repeats=3, parts=(i,), part_count=4) for i in range(4)]
    assert_same(joined(parts), repeated)


@pytest.mark.parametrize("repeats", [0, -1])
def test_repeats_below_one_are_explained(noise, repeats):
    with pytest.raises(UserError, match=f"repeats is {repeats}: use 1 to take each image once"):
        train(noise, 1, repeats=repeats)


# ---- evaluation --------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 37])
def test_evaluation_counts_every_example_once(n, processes):
    source = Numbers(n)
    parts = [evaluate(source, parts=(i,), part_count=processes) for i in range(processes)]
    assert {len(part) for part in parts} == {-(-n // 8)}
    assert {b["image"].shape for part in parts for b in part} == {(8 // processes, 1, 1, 1)}
    whole = {
        k: np.concatenate([b[k] for b in joined(parts)]) for k in ("image", "label", "mask")
    }
    assert whole["mask"].dtype == np.float32
    assert set(whole["mask"]) <= {0, 1}
    real = whole["mask"] == 1
    np.testing.assert_array_equal(whole["image"].ravel()[real], np.arange(n))
    np.testing.assert_array_equal(whole["label"][real], np.arange(n) % 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_with_workers_is_the_same(noise, workers):
    assert_same(evaluate(noise, RESIZE, 3, workers=workers), evaluate(noise, RESIZE, 3))


def test_an_evaluation_can_be_left_early(noise):
    for workers in (0, 1):
        batches = eval_batches(
            noise, transform=RESIZE, channels=3, batch_size=4, workers=workers
        )
        next(batches)
        batches.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_are_as_asked(channels):
    (batch,) = train(catalog.load("digits", "train"), 1, RESIZE, channels)
    assert batch["image"].shape == (8, 12, 8, channels)


@pytest.fixture
def broken_folder(tmp_path, photo):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            photo.save(tmp_path / name / f"{i}.jpg")
    broken = tmp_path / "b" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:1500])
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("run", [train, evaluate])
def test_a_truncated_image_is_named(broken_folder, workers, run):
    source = catalog.load(f"folder:{broken_folder}", "all")
    arguments = (source, 9, AUGMENT) if run is train else (source, RESIZE, 3)
    with pytest.raises(UserError) as caught:
        run(*arguments, batch_size=4, workers=workers)
    assert f"image {broken_folder}/b/1.jpg cannot be decoded (" in str(caught.value)
    assert str(caught.value).endswith("repair or remove it.")


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_named(label):
    source = Numbers(5)
    source.labels[2] = label
    with pytest.raises(
        UserError, match=rf"numbers\[2\] has label {label}, but the classes are"
    ):
        evaluate(source)
    with pytest.raises(
        UserError, match=rf"numbers\[2\] has label {label}, but the classes are"
    ):
        train(source, 1, IDENTITY, 1)


@pytest.mark.parametrize("run", [lambda s, **o: train(s, 1, **o), evaluate])
def test_sizes_that_do_not_fit_are_explained(run):
    with pytest.raises(UserError, match="batch size 8 cannot be divided into 3 equal part"):
        run(Numbers(5), part_count=3)
    with pytest.raises(UserError, match="batch size 0 cannot"):
        run(Numbers(5), batch_size=0)
    with pytest.raises(UserError, match="the data source holds no examples"):
        run(Numbers(0))


def test_a_negative_seed_is_explained():
    with pytest.raises(UserError, match="seed -1 is out of range"):
        train(Numbers(5), 1, seed=-1)


def test_random_transforms_are_refused_in_evaluation(noise):
    with pytest.raises(UserError, match="inception_crop is random"):
        evaluate(noise, AUGMENT, 3)


def test_images_of_many_sizes_and_modes_make_one_batch(tmp_path):
    (tmp_path / "a").mkdir()
    for i, mode in enumerate(["RGB", "L", "1", "P", "CMYK"]):
        Image.new(mode, (5 + i, 9 - i)).save(tmp_path / "a" / f"{i}.tif")
    source = catalog.load(f"folder:{tmp_path}", "all")
    (batch,) = evaluate(source, RESIZE, 3)
    assert batch["mask"].sum() == 5


SCRIPT = """
from vit_jax.data import pipeline
from vit_jax.data.sources import catalog
from vit_jax.data.transforms import language

if __name__ == "__main__":
    kept = []
    for workers in (0, 1):
        batches = pipeline.train_batches(
            catalog.load("synthetic:64x64x3", "train"), channels=3, batch_size=64, seed=0,
            transform=language.parse_transform("resize", (64, 64)), workers=workers)
        kept += [batches, next(batches), next(batches)]
        if {close}:
            batches.close()
    print(kept[2]["image"].sum() == kept[5]["image"].sum())
"""


@pytest.mark.parametrize("close", [True, False])
def test_nothing_is_left_behind_and_nothing_said(tmp_path, close):
    """No leaked shared memory, no warning, no traceback at exit, closed or not."""
    (tmp_path / "script.py").write_text(SCRIPT.format(close=close))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shared = lambda: set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    before = shared()
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    left = {name for name in shared() - before if "psm" in name}
    until = time.monotonic() + 60
    while left & shared() and time.monotonic() < until:
        time.sleep(0.1)  # some may be those of a test that runs beside this one
    assert not left & shared()


MEMORY_SCRIPT = """
import multiprocessing
import re
import sys
from pathlib import Path
from vit_jax.data import pipeline
from vit_jax.data.sources import catalog
from vit_jax.data.transforms import language

def resident():
    processes = ["self", *(child.pid for child in multiprocessing.active_children())]
    status = [Path(f"/proc/{each}/status").read_text() for each in processes]
    return sum(1024 * int(re.search(r"VmRSS:\\s+(\\d+)", text)[1]) for text in status)

if __name__ == "__main__":
    source = catalog.load("folder:" + sys.argv[1], "all")
    transform = language.parse_transform("inception_crop|flip", (64, 64))
    with pipeline.train_batches(
        source, transform=transform, channels=3, batch_size=50, seed=0, threads=4,
        workers=int(sys.argv[2]),
    ) as batches:
        after = []
        for epoch in range(3):
            for _ in range(len(source) // 50):
                next(batches)
            after.append(resident())
        assert len(multiprocessing.active_children()) == int(sys.argv[2])
    print(*after)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads memory from /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_stays_flat_over_epochs(tmp_path, photo, workers):
    """In a process of its own: what others left free would hide what is kept."""
    n = 1000
    (tmp_path / "images" / "a").mkdir(parents=True)
    small = io.BytesIO()
    photo.resize((64, 64)).save(small, "PNG")
    for i in range(n):
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(small.getvalue())
    (tmp_path / "script.py").write_text(MEMORY_SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", "images", str(workers)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, _, third = map(int, done.stdout.split())
    kept = 2 * n * 64 * 64 * 3  # bytes, had two epochs' images been kept
    assert third - first < kept / 2


@pytest.fixture
def salted_folder(tmp_path, photo):
    """26 good images and 4 bad ones."""
    (tmp_path / "a").mkdir()
    for i in range(26):
        photo.rotate(i).save(tmp_path / "a" / f"{i}.png")
    for i, content in enumerate([b"", b"no image", bytes(100), b"\xff\xd8\xff"]):
        (tmp_path / "a" / f"bad{i}.jpg").write_bytes(content)
    return catalog.load(f"folder:{tmp_path}", "all")


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"threads": 0}])
def test_bad_images_are_left_out_the_same_way_by_any_number_of_workers(
    salted_folder, options, capfd
):
    expected = train(salted_folder, 9, max_bad=0.2)
    told = capfd.readouterr().err
    assert all(f"bad{i}.jpg" in told for i in range(4))
    assert_same(train(salted_folder, 9, max_bad=0.2, **options), expected)
    parts = [
        train(salted_folder, 9, max_bad=0.2, parts=(i,), part_count=2, **options)
        for i in range(2)
    ]
    assert_same(joined(parts), expected)
    assert_same(train(salted_folder, 4, first_step=5, max_bad=0.2, **options), expected[5:])


def test_a_limit_turns_too_many_bad_images_into_an_error(salted_folder):
    assert len(train(salted_folder, 9, max_bad=4 / 30)) == 9
    with pytest.raises(UserError, match="of 30 images at least 4 cannot be used, and 3 are"):
        train(salted_folder, 9, max_bad=3 / 30)
    with pytest.raises(UserError, match=r"bad\d\.jpg"):
        train(salted_folder, 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_masks_bad_images(salted_folder, workers):
    batches = evaluate(salted_folder, RESIZE, 3, workers=workers, max_bad=0.2)
    assert sum(int(b["mask"].sum()) for b in batches) == 26
    assert {frozenset(b) for b in batches} == {frozenset({"image", "label", "mask"})}
    names = [salted_folder[i]["name"] for i in range(30)]
    masks = np.concatenate([b["mask"] for b in batches])[:30]
    assert [("bad" not in name.split("/")[-1]) for name in names] == list(masks == 1)
