"""The devices to compile for: TPUs that need not be attached, or those of this machine."""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from vit_jax.planning.chips import CHIPS, Chip, edges
from vit_jax.system.errors import UserError

# libtpu looks for the machine that it runs on. With these settings it sends no queries, writes
# no log and leaves its lock to processes that really use a TPU.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: for people.
      devices: all of them.
      chip: what each can do, None where that is not known here.
      shape: chips along each axis of the interconnect; () where there is none known.
      memory: bytes that a device has for programs, None where it does not say.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    shape: tuple[int, ...]
    memory: int | None


def topology(name: str) -> Target:
    """TPUs that are not attached, such as `v5e:4x4`; from now on JAX runs on the CPU.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"--topology={name} needs the compiler for TPUs, libtpu, which is not installed: "
            f"pip install 'vit_jax[tpu]'"
        )
    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    # Otherwise the two cores of a v4 chip are separate devices.
    options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        devices: list[Any] = topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:  # whatever libtpu calls it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--topology={name} cannot be compiled for ({reason[0][:200]}): write a kind and a "
            f"shape, such as v5e:4x4, v6e:16x16, v4:4x4x4 or v5p:4x4x4"
        ) from error
    chip = CHIPS.get(devices[0].device_kind)
    memory = int(chip.memory) if chip else None
    return Target(name, devices, chip, edges(devices), memory)


def attached() -> Target:
    """The devices of this machine."""
    devices = jax.devices()
    kind = devices[0].device_kind
    statistics = devices[0].memory_stats() or {}  # None on CPU
    chip = CHIPS.get(kind)
    shape = edges(devices) if chip else ()
    name = f"{len(devices)} {kind} device(s) of this machine"
    return Target(name, devices, chip, shape, statistics.get("bytes_limit"))
