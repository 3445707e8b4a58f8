"""Worker processes end with their parent, and nothing stays in shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import multiprocessing, sys, time
from vit_jax.data import pipeline
from vit_jax.data.sources import catalog
from vit_jax.data.transforms import language
if __name__ == "__main__":
    source = catalog.load("synthetic:32x32x3,classes=10,examples=64", "train")
    reading = dict(transform=language.parse_transform("", (32, 32)), channels=3, batch_size=8)
    batches = pipeline.train_batches(source, seed=0, workers=2, **reading)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
    batches.close()
    for _ in pipeline.eval_batches(source, workers=1, **reading):
        pass
"""
SHARED = Path("/dev/shm")


def start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CODE)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        start_new_session=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    return process, [int(pid) for pid in process.stdout.readline().split()]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared memory is no folder here")
@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGKILL, False),
        pytest.param(signal.SIGHUP, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, True, marks=pytest.mark.slow),
    ],
)
def test_workers_end_with_their_parent_and_leave_no_memory(tmp_path, number, group):
    before = set(SHARED.glob("psm_*"))
    process, workers = start(tmp_path)
    assert len(workers) == 2
    (os.killpg if group else os.kill)(process.pid, number)
    process.communicate(timeout=30)
    assert wait_until(lambda: all(map(is_gone, workers)))
    assert wait_until(lambda: set(SHARED.glob("psm_*")) <= before)


def test_a_normal_end_says_nothing(tmp_path):
    process, _ = start(tmp_path)
    _, errors = process.communicate("", timeout=180)
    assert process.returncode == 0
    assert "resource_tracker" not in errors
    assert "Traceback" not in errors
