"""Where arrays live: one mesh over all devices, batches split over it, weights on each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh, `data`, over `devices`; without them, over those of every process."""
    devices = jax.devices() if devices is None else devices
    # Not jax.make_mesh's default, AxisType.Explicit: there every operation must be told how
    # its result is laid out, where here XLA decides.
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(field: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    parts = mesh.size * accumulation
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"{field} is {batch_size}, which {mesh.size} devices x {accumulation} "
            f"micro-batches do not divide: use a multiple of {parts}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's part of a batch to its devices, as part of one global array."""
    sharding = split_batch(mesh)

    def put(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x)

    return {name: put(value) for name, value in batch.items()}
