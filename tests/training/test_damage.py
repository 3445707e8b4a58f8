"""What is damaged is noticed and set aside; what merely cannot be read now stays."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.campaign.bit_flips import CARD, NEW, OLD, equal, forget_digests, make, state, target
from vit_jax.checkpoints import digests, orbax_io, verify
from vit_jax.checkpoints.damage import system_trouble
from vit_jax.checkpoints.digests import Damaged
from vit_jax.checkpoints.directory import Checkpoints, first_intact, load_card, load_params
from vit_jax.system.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    make(tmp_path_factory.mktemp("pristine"))
    return tmp_path_factory.getbasetemp() / "pristine0"


@pytest.fixture
def workdir(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "run")


def flip(path, count=1):
    """Flips so many bits of a file, spread over it; one: in the middle."""
    data = bytearray(path.read_bytes())
    for i in range(count):
        data[len(data) * (2 * i + 1) // (2 * count)] ^= 4
    path.write_bytes(data)


def largest(folder):
    """The file of a checkpoint that holds the data of its largest arrays."""
    files = [p for p in (folder / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def params_of(workdir, which):
    return first_intact(workdir, which, lambda path: load_params(path, target().params))


def resume(workdir):
    with Checkpoints(workdir, 2) as checkpoints:
        return checkpoints.restore(target())


def files_of(workdir):
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


# --- Damage -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.bool_])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5, 7)])
def test_the_digest_of_an_array_is_zlibs_of_its_bytes(shape, dtype):
    x = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)
    expected = f"{zlib.crc32(x.tobytes()):08x}"
    assert digests.of_array(x) == expected
    assert digests.of_array(x.T) == f"{zlib.crc32(x.T.tobytes()):08x}"


def test_a_flipped_bit_in_array_data_costs_training_the_newest_state(workdir, capsys):
    checkpoint = workdir / "checkpoints" / str(NEW)
    flip(largest(checkpoint))
    assert equal(resume(workdir), state(OLD))
    reason = (workdir / "unreadable" / f"{NEW}-0" / "reason.txt").read_text().strip()
    assert "differs from what was saved" in reason or "cannot be decoded" in reason
    assert f"checkpoint {checkpoint} is damaged ({reason}); moved" in capsys.readouterr().err


def test_other_commands_use_the_state_before_a_damaged_one_and_change_nothing(workdir, capsys):
    # Every file of data: which of them holds the averaged weights differs from save to save.
    for path in (workdir / "checkpoints" / str(NEW) / "state").rglob("d/*"):
        flip(path, count=100)
    before = files_of(workdir)
    assert equal(params_of(workdir, "last"), state(OLD).ema)
    warning = capsys.readouterr().err
    assert f"checkpoint {workdir}/checkpoints/{NEW} is damaged" in warning
    assert f"the one before it, {workdir}/checkpoints/{OLD}, is used" in warning
    with pytest.raises(UserError, match=rf"{NEW} is damaged \(.*\): pass --step with another"):
        params_of(workdir, str(NEW))
    assert files_of(workdir) == before


def test_damaged_best_weights_are_refused_and_training_chooses_others(workdir, capsys):
    flip(largest(workdir / "best" / str(OLD)))
    with pytest.raises(UserError, match=r"best/10 is damaged .*: pass --step with another"):
        params_of(workdir, "best")
    with Checkpoints(workdir, 2) as checkpoints:
        assert equal(checkpoints.restore(target()), state(NEW))
        assert (workdir / "unreadable" / f"best-{OLD}-0").is_dir()
        checkpoints.save_if_best(NEW, state(NEW).params, CARD, 0.1)
    assert "evaluations from here on choose a new one" in capsys.readouterr().err
    assert equal(params_of(workdir, "best"), state(NEW).params)


@pytest.mark.parametrize("digested", [True, False], ids=["with digests", "without"])
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("card/metadata", lambda text: text.replace('"class_names"', '"class_nomes"')),
        ("card/metadata", lambda text: "{"),
        ("card/metadata", lambda text: "[" * 200_000),
        ("card/metadata", None),
        ("state/_METADATA", lambda text: text.replace("kernel", "kernol")),
        ("state/_METADATA", lambda text: text.replace('"key_type": 2', '"key_type": 6')),
        ("state/_METADATA", lambda text: "null"),
        ("state/_METADATA", None),
        ("state/manifest.ocdbt", None),
    ],
)
def test_damaged_metadata_is_damage(workdir, part, change, digested):
    """Each time the state before is used, and never is there another exception."""
    checkpoint = workdir / "checkpoints" / str(NEW)
    if not digested:
        forget_digests(checkpoint)
    path = checkpoint / part
    if change is None:
        path.unlink()
    else:
        text = change(path.read_text())
        assert text != path.read_text()
        path.write_text(text)
    with pytest.raises(Damaged):
        load_params(checkpoint, target().params)
    with pytest.raises(Damaged):
        orbax_io.verify(checkpoint)
    assert equal(resume(workdir), state(OLD))


@pytest.mark.parametrize("change", ["flip", "remove", "remove all"])
def test_the_digests_are_protected_too(workdir, change):
    folder = workdir / "checkpoints" / str(NEW) / "digests"
    if change == "flip":
        path = folder / "process_0"
        path.write_text(path.read_text().replace('"bfloat16"', '"bfloat17"', 1))
    elif change == "remove":
        (folder / "process_0").unlink()
    else:
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"20 is damaged \(digests/.*(differs|missing)"):
        load_card(workdir, str(NEW))
    assert equal(resume(workdir), state(OLD))


def test_a_damaged_card_of_the_best_does_not_block_a_run(workdir):
    (workdir / "best" / str(OLD) / "card" / "metadata").unlink()
    for _ in range(2):
        assert equal(resume(workdir), state(NEW))
    with pytest.raises(UserError, match="has no checkpoint 'best': it holds none"):
        params_of(workdir, "best")


def test_without_digests_it_opens_with_a_note(workdir, capsys):
    for name in (f"checkpoints/{NEW}", f"best/{OLD}"):
        forget_digests(workdir / name)
    assert equal(resume(workdir), state(NEW))
    note = capsys.readouterr().err
    assert note == (
        f"note: {workdir}/checkpoints/{NEW} was saved by a version without digests, so damage "
        f"to it may go unnoticed\n"
    )
    assert equal(params_of(workdir, "best"), state(OLD).params)


def test_other_arrays_than_the_model_has_are_no_damage(workdir):
    kernel = target().params["kernel"].update(shape=(64, 48))
    other = target().replace(params={**target().params, "kernel": kernel})
    with Checkpoints(workdir, 2) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(other)
    assert "holds params/kernel with shape (48, 64), where shape (64, 48) is asked" in str(
        caught.value
    )
    assert not (workdir / "unreadable").exists()


def test_what_is_stored_in_another_precision_is_checked_before_it_is_converted(workdir):
    wanted = jax.tree.map(lambda x: x.update(dtype=jnp.float32), target().params)
    found = load_params(workdir / "checkpoints" / str(NEW), wanted)
    expected = jax.tree.map(lambda x: x.astype(jnp.float32), state(NEW).ema)
    assert equal(found, expected)


# --- Trouble of the system ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (MemoryError(), "not enough memory"),
        (
            ValueError("NOT_FOUND: Failed to open \"x\" [os_error_code='24']"),
            "Too many open files",
        ),
    ],
    ids=["disk", "permission", "memory", "TensorStore"],
)
def test_an_error_of_the_system_leaves_everything_where_it_is(
    workdir, monkeypatch, error, said
):
    def fail(*_):
        try:
            raise error
        except type(error):
            raise Exception("an array could not be read")  # noqa: B904 - as Orbax does

    monkeypatch.setattr(orbax_io, "_read", fail)
    before = files_of(workdir)
    for use in (resume, lambda workdir: params_of(workdir, "last")):
        with pytest.raises(
            UserError, match=f"20 cannot be read now .*{said}.*left where it is"
        ):
            use(workdir)
    assert files_of(workdir) == before
    monkeypatch.undo()
    assert equal(resume(workdir), state(NEW))


def test_a_file_that_may_not_be_read_is_no_damage(workdir):
    """Whatever TensorStore makes of it: here, that nothing is there."""
    path = largest(workdir / "checkpoints" / str(NEW))
    shutil.move(path, workdir / "elsewhere")
    path.symlink_to(path.name)  # to itself, which not even root can open
    with pytest.raises(UserError, match="cannot be read now"):
        resume(workdir)
    path.unlink()
    shutil.move(workdir / "elsewhere", path)
    assert equal(resume(workdir), state(NEW))


def test_too_many_open_files_are_no_damage(workdir):
    """For real: Orbax and TensorStore say so in different words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpoints(workdir, 2) as checkpoints:
        next_one = os.dup(0)
        os.close(next_one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 1, hard))
        try:
            with pytest.raises(UserError, match=r"Too many open files"):
                checkpoints.restore(target())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert equal(checkpoints.restore(target()), state(NEW))
    assert not (workdir / "unreadable").exists()


def test_what_is_found_missing_is_no_trouble_of_the_system():
    assert not system_trouble(FileNotFoundError(errno.ENOENT, "No such file"))
    assert not system_trouble(ValueError("NOT_FOUND: [OS error 2: ENOENT No such file]"))
    assert not system_trouble(ValueError("NOT_FOUND: no chunk [os_error_code='2']"))
    assert not system_trouble(ValueError("Error decoding chunk: zstd"))


# --- By shard -----------------------------------------------------------------------------


def place(x, axes, spec):
    mesh = jax.make_mesh(
        axes, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: axes[0] * axes[1]],
    )  # fmt: skip
    return jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )


LAYOUTS = [
    ((1, 1), ()),
    ((4, 2), ("a", "b")),
    ((4, 2), ("b",)),
    ((2, 4), (None, "b")),
    ((8, 1), (("a", "b"),)),
]


@pytest.mark.parametrize("saved_as", LAYOUTS)
@pytest.mark.parametrize("read_as", LAYOUTS)
def test_parts_saved_on_one_mesh_are_checked_on_any_other(tmp_path, saved_as, read_as):
    x = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    (tmp_path / "digests").mkdir()
    digests.write(
        tmp_path / "digests", digests.copy_to_host({"x": place(x, *saved_as)}), {"step": 1}
    )
    saved = digests.read(tmp_path)
    assert saved.card == digests.of_json({"step": 1})
    assert len(saved.arrays["x"].parts) == len(
        {str(i) for i in place(x, *saved_as).sharding.devices_indices_map(x.shape).values()}
    )
    digests.check_arrays({"x": place(x, *read_as)}, saved)
    digests.check_arrays({"x": x}, saved)
    for at in [(0, 0), (7, 3), (15, 7)]:
        other = x.copy()
        other.view(np.uint32)[at] ^= 1
        with pytest.raises(Damaged, match="x differs from what was saved"):
            digests.check_arrays({"x": place(other, *read_as)}, saved)


def test_parts_of_a_process_that_tells_nothing_are_missed(tmp_path):
    x = place(np.ones((16, 8), np.float32), (4, 2), ("a", "b"))
    copied = digests.copy_to_host({"x": x})
    shape, dtype, parts = copied["x"]
    (tmp_path / "digests").mkdir()
    digests.write(tmp_path / "digests", {"x": (shape, dtype, parts[1:])}, {})
    with pytest.raises(Damaged, match="no digests of parts of x"):
        digests.read(tmp_path)


# --- By several processes -----------------------------------------------------------------


def together(workdir, action, mesh, count=2, devices=2, fail=""):
    """What each of `count` processes prints that save or restore on a mesh of all devices."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    environment = dict(
        os.environ, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}"
    )
    command = [sys.executable, "-m", "tests.training.checkpoint_process", str(workdir), action]
    started = [
        subprocess.Popen(
            [*command, mesh, str(port), str(count), str(i), fail],
            cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * count, said
    return [out.strip().splitlines()[-1] for out, _ in said if action == "restore"]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    together(workdir, "save", "1,4,1")
    return workdir


def damage_the_part_of(process, workdir):
    folder = workdir / "checkpoints" / "2" / "state" / f"ocdbt.process_{process}" / "d"
    flip(max(folder.iterdir(), key=lambda path: path.stat().st_size))


def test_damage_to_what_one_of_two_processes_reads_is_known_to_both(saved_by_two, tmp_path):
    """On another mesh, whose parts are cut across by those that were saved."""
    workdir = shutil.copytree(saved_by_two, tmp_path / "run")
    damage_the_part_of(1, workdir)
    assert together(workdir, "restore", "1,2,2") == ["step 1 equal"] * 2
    assert (workdir / "unreadable" / "2-0" / "reason.txt").read_text().strip()


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [None, 0, 1])
@pytest.mark.parametrize(
    "places",
    [("1,4,1", 2, 2), ("4,1,1", 2, 2), ("1,2,1", 2, 1), ("2,1,4", 2, 4), ("1,1,1", 1, 1)],
    ids=str,
)
def test_any_number_of_processes_checks_what_two_have_saved(
    saved_by_two, tmp_path, damaged, places
):
    workdir = shutil.copytree(saved_by_two, tmp_path / "run")
    if damaged is not None:
        damage_the_part_of(damaged, workdir)
    step = 2 if damaged is None else 1
    assert together(workdir, "restore", *places) == [f"step {step} equal"] * places[1]


@pytest.mark.slow
def test_an_error_of_the_system_in_one_process_stops_both(saved_by_two, tmp_path):
    workdir = shutil.copytree(saved_by_two, tmp_path / "run")
    before = files_of(workdir)
    for sentence in together(workdir, "restore", "1,4,1", fail="1"):
        assert "cannot be read now (Input/output error): it may be intact" in sentence
    assert files_of(workdir) == before


# --- --verify -----------------------------------------------------------------------------


def test_verify_says_of_each_checkpoint_what_it_is_and_changes_nothing(workdir, capsys):
    verify.verify_workdir(workdir)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "checkpoints/10  intact", "checkpoints/20  intact", "best/10  intact",
    ]  # fmt: skip
    assert "18 arrays, 57.3 KiB" in lines[0]
    flip(largest(workdir / "checkpoints" / str(NEW)))
    forget_digests(workdir / "best" / str(OLD))
    before = files_of(workdir)
    with pytest.raises(UserError, match=r"1 of 3 checkpoints in .* \(checkpoints/20\)"):
        verify.verify_workdir(workdir)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("checkpoints/20  damaged: ")
    assert lines[2].startswith("best/10  readable, but was saved by a version without digests")
    assert files_of(workdir) == before


def test_verify_of_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no checkpoints: pass the --workdir"):
        verify.verify_workdir(tmp_path)


@pytest.mark.parametrize(
    "place", ["card/metadata", "digests/process_0", "state/manifest.ocdbt"]
)
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_what_was_never_saved_is_damage_and_nobody_waits_for_it(workdir, place, kind):
    """TensorStore would wait for the pipe, and end the process for want of memory."""
    path = workdir / f"best/{OLD}" / place
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(Damaged, match=r"no regular file|1,099,511,627,776 bytes"):
        orbax_io.verify(workdir / f"best/{OLD}")
    with pytest.raises(UserError, match="is damaged"):
        params_of(workdir, "best")
