import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.tiny_config import tiny
from vit_jax.system import lock
from vit_jax.system.errors import UserError
from vit_jax.training import grid, trainer


def test_a_second_run_is_told_who_is_there_and_touches_nothing(tmp_path):
    with lock.alone_in(tmp_path):
        with pytest.raises(UserError) as caught:
            trainer.train(tiny(), tmp_path)
        assert f"process {os.getpid()} on {socket.gethostname()}, begun 2" in str(caught.value)
        config = tiny()
        config.sweep.lr = (1e-3,)
        with pytest.raises(UserError, match="another run is in"):
            grid.sweep(config, tmp_path)
        with lock.alone_in(tmp_path, first=False):  # another process of the same run
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_nobodys(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vit_jax.system import lock\n"
        "with lock.alone_in(Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        with (
            pytest.raises(UserError, match=f"process {holder.pid} on "),
            lock.alone_in(tmp_path),
        ):
            pass
        holder.kill()
    assert (tmp_path / "run.lock").exists()
    with lock.alone_in(tmp_path):
        pass


def test_who_has_just_taken_the_lock_is_named_when_it_has_written_its_name(tmp_path):
    path = tmp_path / "run.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        name = {"host": "here", "process": 7, "began": "now"}
        later = threading.Timer(0.3, lambda: (file.write(json.dumps(name)), file.flush()))
        later.start()
        with pytest.raises(UserError, match="process 7 on here"), lock.alone_in(tmp_path):
            pass
        later.join()


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.lock")
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"run\.lock"), lock.alone_in(tmp_path):
        pass
    assert time.monotonic() - begin < 5


def test_a_removed_work_directory_is_noticed(tmp_path):
    with lock.alone_in(tmp_path / "run") as directory:
        directory.check()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="was removed or replaced under the run"):
            directory.check()


def test_what_fails_in_a_removed_work_directory_is_its_removal(tmp_path):
    workdir = tmp_path / "run"

    def fail(remove):
        with lock.alone_in(workdir):
            if remove:
                shutil.rmtree(workdir)
            raise ValueError("a library misses its folder")

    with pytest.raises(ValueError, match="a library"):
        fail(remove=False)
    with pytest.raises(UserError, match="was removed or replaced"):
        fail(remove=True)


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.alone_in(tmp_path):
        pass
    assert "has no locks (Function not implemented)" in capsys.readouterr().err
