"""Several real processes on one machine, joined by gloo, are one run."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.commands import ROOT, TINY, environment
from tests.test_train import assert_same_run, final_state, metrics
from vit_jax.command_line import process_flags
from vit_jax.distributed import processes
from vit_jax.system.errors import UserError

STEPS = 24
SHORT = [
    f"--config.total_steps={STEPS}",
    "--config.checkpoint_every_steps=4",
    "--config.eval_every_steps=12",
]
BOUND = 30  # seconds within which the others must have ended


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def as_started(devices=1):
    """How each process is started."""
    pipe = subprocess.PIPE
    own = environment(devices, optimized=False)
    return {"cwd": ROOT, "env": own, "text": True, "stdout": pipe, "stderr": pipe}


def start(workdir, count, *flags, devices=1, of=None, door="train", code=None):
    """Starts the first `count` processes of a run, of `of` if that are more.

    With `code`, they run that instead of the command `door`.
    """
    program = ["-c", code] if code else ["-m", f"vit_jax.{door}"]
    command = [sys.executable, *program]
    if door == "train":
        command += [f"--config={TINY}", *SHORT]
    command += [f"--workdir={workdir}", *flags]
    if (of or count) > 1:
        command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={of or count}"]
    started = []
    for i in range(count):
        own = [f"--process_id={i}"] if (of or count) > 1 else []
        started.append(subprocess.Popen([*command, *own], **as_started(devices)))
    return started


def finish(started, timeout=240):
    """`(exit code, stdout, stderr)` of each; nobody is left behind."""
    try:
        ended = []
        for process in started:
            out, error = process.communicate(timeout=timeout)
            ended.append((process.returncode, out, error))
        return ended
    finally:
        for process in started:
            process.kill()


def run(workdir, count, *flags, **options):
    ended = finish(start(workdir, count, *flags, **options))
    assert [code for code, _, _ in ended] == [0] * count, ended
    return ended


def wait_for_step(workdir, step, started):
    while len(read := metrics(workdir)) < step and all(p.poll() is None for p in started):
        time.sleep(0.02)
    return len(read)


def assert_close_run(workdir, reference):
    """The same but for rounding: sums are made in another order."""
    for found, expected in zip(metrics(workdir), metrics(reference), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (name, expected)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3)
    found, expected = final_state(workdir), final_state(reference)
    jax.tree.map(close, found.ema, expected.ema)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An undisturbed run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two")
    ended = run(workdir, 2, devices=2)
    return workdir, ended


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same in one process with four devices."""
    workdir = tmp_path_factory.mktemp("one")
    run(workdir, 1, devices=4)
    return workdir


def test_two_processes_give_what_one_gives(one, two):
    workdir, ended = two
    assert_close_run(workdir, one)
    assert ended[0][1].count(" of 360 examples") == 1
    assert f"step {STEPS}/{STEPS}" in ended[0][1]
    assert f"{STEPS} steps of 32 on 4 cpu device(s), from the beginning" in ended[0][1]
    assert not any(word in ended[1][1] for word in ("step", "accuracy", "model"))


def test_evaluation_is_exact_across_processes(two):
    workdir, _ = two
    first, second = run(workdir, 2, "--batch_size=64", door="evaluate")
    [evaluated] = map(json.loads, (workdir / "evaluations.jsonl").read_text().splitlines())
    logged = metrics(workdir)[-1]
    assert evaluated["count"] == 360
    assert evaluated["accuracy"] == logged["eval/accuracy"]
    assert evaluated["loss"] == pytest.approx(logged["eval/loss"], rel=1e-5)
    assert f"accuracy {evaluated['accuracy']:.4f}" in first[1]
    assert "accuracy" not in second[1]


@pytest.mark.slow
def test_four_processes_give_what_one_gives(one, tmp_path):
    run(tmp_path, 4)
    assert_close_run(tmp_path, one)


@pytest.mark.parametrize(
    ("said", "news"),
    [
        (b"", ""),
        (b"alive\nalive\n", ""),
        (b"alive\nali", ""),
        (b"alive\nsaid process 1 on b: no space le", ""),
        (
            b"alive\nsaid process 1 on b: no space left\nalive\n",
            "said process 1 on b: no space left",
        ),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_whatever_a_dead_process_said_last_its_name_is_told(monkeypatch, said, news, reset):
    ends = []
    monkeypatch.setattr(processes, "_end", ends.append)
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    theirs.sendall(said)
    if reset:  # as the system does for a process that is killed with something left to read
        ours.sendall(b"unread")
        time.sleep(0.1)
    theirs.close()
    watch = object.__new__(processes._Watch)
    watch._index, watch._names = 0, ["process 0 on a", "process 1 on b"]
    watch._leaving, watch._speaking = threading.Event(), threading.Lock()
    watch._connections = {1: ours}
    watch._listen(1, ours)
    ours.close()
    listener.close()
    expected = "process 1 on b: no space left" if news else "process 1 on b has died"
    assert ends[0].startswith(expected)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 10))]
)
def test_when_one_is_killed_the_others_end_and_the_restart_resumes(two, tmp_path, seed):
    rng = random.Random(seed)
    started = start(tmp_path, 2, devices=2)
    wait_for_step(tmp_path, rng.randint(1, STEPS - 8), started)
    time.sleep(rng.random() / 5)
    dead = rng.randrange(2)
    killed = time.monotonic()
    started[dead].kill()
    ended = finish(started, timeout=BOUND)
    assert time.monotonic() - killed < BOUND
    code, _, error = ended[1 - dead]
    assert ended[dead][0] == -signal.SIGKILL
    # JAX itself aborts at once when it is process 0 that died, where its service was.
    assert code == 1 or (dead == 0 and code == -signal.SIGABRT)
    assert f"process {dead} on " in error or (dead == 0 and "leader" in error), error
    ended = run(tmp_path, 2, devices=2)
    assert "resumed at step" in ended[0][1] or "from the beginning" in ended[0][1]
    assert_same_run(tmp_path, two[0])


@pytest.mark.slow
def test_a_notice_to_one_saves_everywhere_at_one_step_and_other_meshes_go_on(one, tmp_path):
    """Begun by 4 processes with 2 devices each and fsdp, finished by one on one device."""
    started = start(tmp_path, 4, "--config.mesh.fsdp=4", devices=2)
    seen = wait_for_step(tmp_path, 6, started)
    started[2].send_signal(signal.SIGTERM)
    ended = finish(started)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert "mesh: data 2, fsdp 4, tensor 1" in ended[0][1]
    assert "stopped by a signal, state saved" in ended[0][1]
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert seen <= saved < STEPS
    assert metrics(tmp_path)[-1]["step"] == saved
    ended = run(tmp_path, 1)
    assert f"resumed at step {saved}" in ended[0][1]
    assert_close_run(tmp_path, one)


@pytest.mark.slow
def test_from_one_device_to_four_processes(one, tmp_path):
    started = start(tmp_path, 1)
    wait_for_step(tmp_path, 6, started)
    started[0].send_signal(signal.SIGTERM)
    assert finish(started)[0][0] == 0
    ended = run(tmp_path, 4, "--config.mesh.fsdp=4", devices=2)
    assert "resumed at step" in ended[0][1]
    assert_close_run(tmp_path, one)


# --- Bad news -----------------------------------------------------------------------------


def test_nobody_waits_for_ever_for_the_others_to_start(tmp_path):
    [(code, _, error)] = finish(start(tmp_path, 1, "--process_timeout=3", of=2), timeout=60)
    assert code == 1
    assert "process 0 waited 3 s for all of 2 processes at localhost:" in error
    assert "Traceback" not in error


def test_a_mistake_of_all_is_one_sentence_each(tmp_path):
    flags = ["--config.mesh.fsdp=3"]
    for i, (code, _, error) in enumerate(finish(start(tmp_path, 2, *flags), timeout=90)):
        assert code == 1
        assert "Traceback" not in error
        assert f"error: process {i}: config.mesh is data=-1, fsdp=3" in error or (
            f"process {1 - i} on " in error
        )


def test_two_processes_with_one_number_are_told_and_so_is_who_waits(tmp_path):
    """Two are number 0: one has the port, the other waits in vain for number 1."""
    started = start(tmp_path, 1, "--process_timeout=15", of=2)
    started.append(subprocess.Popen(started[0].args, **as_started()))
    for code, _, error in (ended := finish(started, timeout=90)):
        assert code == 1, ended
        [line] = [line for line in error.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in error
        assert "another process has --process_id=0 too" in line or "waited 15 s for all" in line
    assert sum("another process has --process_id=0" in error for _, _, error in ended) == 1


@pytest.mark.slow
def test_one_that_is_stopped_ends_the_others(tmp_path):
    """As a process does that is frozen, or has no network: the connection stays, silent."""
    code = (
        "import sys; from vit_jax import train; from vit_jax.command_line import cli\n"
        "from vit_jax.distributed import processes\n"
        "processes._SILENCE, processes._BEAT = 6.0, 1.0\n"
        "cli.run(train.main, train.define_flags)"
    )
    started = start(tmp_path, 2, "--config.total_steps=100000", code=code)
    wait_for_step(tmp_path, 2, started)
    started[1].send_signal(signal.SIGSTOP)
    try:
        _, error = started[0].communicate(timeout=BOUND)
    finally:
        for process in started:
            process.kill()
        started[1].communicate()
    assert started[0].returncode == 1, error
    assert error.splitlines()[-1].startswith("error: process 1 on ")
    assert "has said nothing for 6 s: it was stopped" in error
    assert "Traceback" not in error


def test_flags_that_make_no_sense(tmp_path):
    from absl import flags

    process_flags.define_flags()
    try:
        cases = {
            ("--coordinator=localhost:1",): "2 of them are missing",
            ("--coordinator=here", "--num_processes=2", "--process_id=0"): "HOST:PORT",
            ("--coordinator=a:1", "--num_processes=2", "--process_id=2"): "from 0 to 1",
        }
        for arguments, message in cases.items():
            flags.FLAGS(["test", *arguments])
            with pytest.raises(UserError, match=message):
                process_flags.place_from_flags()
            flags.FLAGS.unparse_flags()
            for name in ("coordinator", "num_processes", "process_id"):
                flags.FLAGS[name].unparse()
    finally:
        for name in ("coordinator", "num_processes", "process_id", "process_timeout"):
            delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("variables", "together"),
    [
        ({}, False),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # within sbatch or salloc, not within srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
    ids=str,
)
def test_launchers_are_recognised(monkeypatch, variables, together):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.launched_together() == together


def test_chips_without_their_library_are_no_tpu_vm(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "accel0"]))
    assert processes.on_tpu_vm()
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert not processes.on_tpu_vm()


def test_two_processes_are_one_run_under_the_launcher_of_open_mpi(tmp_path):
    """What `mpirun` sets for each process is all that they need."""
    environment = dict(os.environ, XLA_FLAGS="", OMPI_COMM_WORLD_SIZE="2")
    environment["OMPI_MCA_orte_hnp_uri"] = "1531576320.0;tcp://127.0.0.1:40000"
    code = (
        "import sys; from absl import flags; from vit_jax.command_line import process_flags\n"
        "process_flags.define_flags(); flags.FLAGS(sys.argv)\n"
        "import jax\n"
        "with process_flags.together(): print(jax.process_index(), jax.process_count())"
    )
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                    env={**environment, "OMPI_COMM_WORLD_RANK": str(i),
                         "OMPI_COMM_WORLD_LOCAL_RANK": str(i)},
                )
            )
            for i in range(2)
        ]  # fmt: skip
        ended = [process.communicate(timeout=90)[0] for process in started]
    # Gloo has something to say before.
    assert [out.splitlines()[-1] for out in ended] == ["0 2", "1 2"]
