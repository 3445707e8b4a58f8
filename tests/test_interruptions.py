"""What ends a run from outside: signals at awkward moments, a work directory that goes."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.campaign import runs
from vit_jax.checkpoints import orbax_io
from vit_jax.training.logging import read_metrics

LONG = "--config.total_steps=100000"
# Training whose saves take two seconds longer.
SLOW = """
import time
from vit_jax import train
from vit_jax.checkpoints import digests
from vit_jax.command_line import cli
write = digests.write
digests.write = lambda *given: (time.sleep(2), write(*given))
cli.run(train.main, train.define_flags)
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("room")


def wait_until(run, what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert run.alive(), run.error()
        assert time.monotonic() < end, run.out()
        time.sleep(0.005)


def step(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def imports(run):
    """Whether a process is importing what takes seconds: Python itself has started."""
    return "jaxlib" in Path(f"/proc/{run.process.pid}/maps").read_text()


@pytest.mark.parametrize("moment", ["imports", "compiles"])
def test_two_ctrl_c_at_the_start_print_no_traceback(room, tmp_path, moment):
    [run] = runs.start(room, tmp_path, LONG)
    wait_until(run, lambda: imports(run) if moment == "imports" else "model mu/4" in run.out())
    runs.kill([run], signal.SIGINT)
    time.sleep(0.05)
    runs.kill([run], signal.SIGINT)
    assert run.wait(60) == 130, run.error()
    assert run.error() == "interrupted\n"


def test_a_second_ctrl_c_during_the_save_prints_no_traceback(room, tmp_path):
    [run] = runs.start(room, tmp_path, LONG, program=("-c", SLOW))
    wait_until(run, lambda: step(tmp_path) >= 2)
    runs.kill([run], signal.SIGINT)
    wait_until(run, lambda: any((tmp_path / "checkpoints").glob("*tmp*")))
    wait_until(run, lambda: "saving" in run.out())
    runs.kill([run], signal.SIGINT)
    assert run.wait(60) == 130, run.error()
    assert run.error() == "interrupted\n"
    for found in orbax_io.steps(tmp_path / "checkpoints"):  # whole, or not there
        orbax_io.verify(tmp_path / "checkpoints" / str(found))


def test_a_closed_terminal_saves_and_ends_as_a_scheduler_does(room, tmp_path):
    [run] = runs.start(room, tmp_path, LONG)
    wait_until(run, lambda: step(tmp_path) >= 2)
    runs.kill([run], signal.SIGHUP)
    assert run.wait(60) == 0, run.error()
    assert "stopped by a signal, state saved" in run.out()
    assert "Traceback" not in run.error()
    saved = orbax_io.steps(tmp_path / "checkpoints")[0]
    assert saved == step(tmp_path)
    orbax_io.verify(tmp_path / "checkpoints" / str(saved))


@pytest.mark.parametrize("steps", [7, pytest.param(9, marks=pytest.mark.slow)])
def test_a_work_directory_that_is_removed_is_one_sentence(room, tmp_path, steps):
    workdir = tmp_path / "run"
    [run] = runs.start(room, workdir, LONG)
    wait_until(run, lambda: step(workdir) >= steps)
    while workdir.exists():  # what the run still writes makes that fail
        shutil.rmtree(workdir, ignore_errors=True)
    assert run.wait(60) == 1, run.out()
    assert runs.is_one_sentence(run.error()), run.error()
    assert f"the work directory {workdir} was removed or replaced under" in run.error()
    # A write that was under way may have made its folder again; more there is not.
    left = [path.name for path in workdir.glob("*/*")]
    assert all("tmp" in name for name in left), left
    assert not (workdir / "metrics.jsonl").exists()
