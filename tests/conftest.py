"""Every test runs on eight fake CPU devices, so that sharding is never a special case."""

import atexit
import fcntl
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Most of the time goes into compiling programs that run for a moment: without LLVM's
        # optimisations it is a third less.
        "--xla_backend_optimization_level=0",
        # The newer code generator, by MLIR, takes as long again.
        "--xla_cpu_use_fusion_emitters=false",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"

# The same small programs are compiled over and over, in processes of their own too. Workers of
# pytest-xdist share what the process that starts them has made.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="vit_jax_tests_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Files that take longest. `--dist=loadfile --no-loadscope-reorder` gives them out
# in this order: the last ones are short, and no worker waits long for another.
LONGEST_FIRST = (
    "test_train.py",
    "test_processes.py",
    "test_configs.py",
    "test_precision.py",
    "test_vit.py",
    "test_interop.py",
    "test_convert.py",
    "test_doors.py",
    "test_sweep.py",
    "test_pipeline.py",
    "test_paper_configs.py",
    "test_plan.py",
    "test_adapt.py",
    "test_sharding.py",
    "test_step.py",
    "test_train_objectives.py",
    "test_benchmarks.py",
    "test_damage.py",
    "test_evaluate_probes.py",
    "test_positions.py",
    "test_attention_kernels.py",
)

MAPS = Path("/proc/self/maps")  # of Linux
MOST_MAPS = 20_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(autouse=True, scope="module")
def few_programs_in_memory() -> Iterator[None]:
    """Forgets compiled programs when there are many.

    XLA maps memory for each of them. Linux refuses a process its 65,530th mapping, which ends
    it without a word, and a run of the tests with it.
    """
    yield
    if MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS:
        import jax  # only now, since what is set above must come first

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A finished run of `tests.tiny_config.tiny()`: its work directory and last metrics.

    Made once for all workers of pytest-xdist. Whoever changes anything in it copies it first.
    """
    from tests.tiny_config import tiny
    from vit_jax.training import trainer

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workdir, metrics = shared / "tiny_run", shared / "tiny_run.json"
    with (shared / "tiny_run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not metrics.exists():
            metrics.write_text(json.dumps(trainer.train(tiny(), workdir)))
    return workdir, json.loads(metrics.read_text())
