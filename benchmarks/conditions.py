"""The conditions of a measurement: machine, versions, load, date.

A separate process, `python -m benchmarks.conditions`, collects them: listing the devices
claims them, and a TPU serves one process only.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from vit_jax.system.errors import UserError

PACKAGES = (
    *("vit_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "torch", "timm", "transformers"),
    *("onnxruntime", "openvino"),
)


def limit_threads(count: int | None) -> int:
    """Keeps this process on `count` CPU cores, or leaves it on those it has; returns how many.

    The processes that it starts inherit that, and XLA makes as many threads as it has cores;
    torch's number of threads is set.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return count or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count is not None and count < len(cores):
        os.sched_setaffinity(0, cores[:count])
    return len(os.sched_getaffinity(0))


def look(threads: int) -> dict[str, Any]:
    """The conditions, with `load_before`: the load averages over 1, 5 and 15 minutes.

    Raises:
      UserError: no device can be used.
    """
    command = [sys.executable, "-m", "benchmarks.conditions"]
    root = Path(__file__).parents[1]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        raise UserError(f"jax finds no device that it can use ({reason}): check JAX_PLATFORMS")
    return json.loads(found.stdout) | {"threads": threads, "load_before": os.getloadavg()}


def collect() -> dict[str, Any]:
    """Claims the devices; the date is UTC."""
    import jax

    device = jax.devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "backend": jax.default_backend(),
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def processor() -> str:
    """The name of the CPU and its relevant features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)
    }
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    flags = [flag for flag in wanted if flag in found.get("flags", "").split()]
    return " ".join([found.get("model name", platform.machine()), *flags])


if __name__ == "__main__":
    print(json.dumps(collect()))
