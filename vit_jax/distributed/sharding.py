"""Where arrays are: one mesh of devices, over which one table shards batches and weights.

The mesh has three axes. Over `data` and `fsdp` every device gets its own examples. Over `fsdp`
the weights are divided, too, with all that the optimiser keeps for them (fully sharded data
parallelism: ZeRO-3, arXiv 1910.02054): each layer is gathered when it is needed. Over `tensor`
the layers themselves are divided, attention by heads and the MLP by hidden units
(arXiv 1909.08053). `RULES` says how.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vit_jax.models.devices import BATCH_AXES
from vit_jax.system.errors import UserError

AXES = ("data", "fsdp", "tensor")


class Rule(NamedTuple):
    """How arrays are divided whose path ends in `pattern`, a regular expression.

    `axes` names the mesh axis for each of the last axes of the array. What comes before, such
    as the layer axis of a scanned encoder, stays whole. Where a mesh axis does not divide the
    axis it is named for, `tensor` divides nothing, since heads must stay together, and `fsdp`
    the last of the others that it can.
    """

    pattern: str
    axes: tuple[str | None, ...]


# The first that fits decides. Optimiser and averaged weights repeat the paths of the weights,
# so they follow. D width, k heads, d width of a head, M hidden width, K classes.
RULES = (
    Rule("(query|key|value)/kernel", ("fsdp", "tensor", None)),  # (D, k, d)
    Rule("(query|key|value)/bias", ("tensor", None)),  # (k, d)
    Rule(".*Attention_[0-9]+/out/kernel", ("tensor", None, "fsdp")),  # (k, d, D)
    Rule("(Dense_0|gate)/kernel", ("fsdp", "tensor")),  # (D, M)
    Rule("(Dense_0|gate)/bias", ("tensor",)),
    Rule("Dense_1/kernel", ("tensor", "fsdp")),  # (M, D)
    Rule("head(_dist)?/kernel", ("fsdp", "tensor")),  # (D, K)
    Rule("head(_dist)?/bias", ("tensor",)),
    Rule("kernel", ("fsdp",)),  # patch embedding (P, P, C, D), convolutions, pre_logits
    Rule(".*", ()),  # norms, other biases, tokens, positions, counters: small
)


# --- The mesh -----------------------------------------------------------------------------


def make_mesh(
    shape: ConfigDict | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `devices`, or of those of every process, with the axes `AXES`.

    Args:
      shape: a `config.mesh`; None: all devices along `data`.
      devices: in the order in which JAX lists them where None.

    Raises:
      UserError: the shape does not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [-1, 1, 1] if shape is None else [shape[axis] for axis in AXES]
    if sizes[1] is None:
        sizes[1] = _width(sizes, devices)
    # Not jax.make_mesh's default, AxisType.Explicit: there the layout of every
    # result must be given, where here XLA decides.
    return jax.make_mesh(
        fill(sizes, len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


# On TPUs weights are sharded over this many devices by default. A
# device then updates its part of them only, which is a quarter of what a small batch moves to
# and from HBM. Over more devices each part is smaller, and the same is sent.
FSDP_OF_TPUS = 16


def _width(sizes: Sequence[int | None], devices: Sequence[jax.Device]) -> int:
    """The `fsdp` of a configuration that leaves it open."""
    data, _, tensor = sizes
    if devices[0].platform != "tpu" or data != -1 or not tensor or len(devices) % tensor:
        return 1
    return math.gcd(len(devices) // tensor, FSDP_OF_TPUS)


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Options with which XLA compiles a step for the devices of `mesh`.

    By default XLA for TPUs sends weights around a ring while it multiplies with what has
    arrived ("windowed einsum"). Every turn of the ring reads all activations again: a step of
    B/16 on 16 v5e that share the weights, with 64 examples each, moved 216 GB to and from HBM,
    where gathering first moves 20.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}  # larger than any product


def fill(sizes: Sequence[int], devices: int) -> tuple[int, ...]:
    """Replaces the one -1 by what makes the product `devices`.

    Raises:
      UserError: that cannot be.
    """
    said = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or list(sizes).count(-1) > 1:
        raise UserError(
            f"config.mesh is {said}: use numbers of devices from 1, and -1 once for the rest"
        )
    known = math.prod(size for size in sizes if size != -1)
    if devices % known or (-1 not in sizes and devices != known):
        raise UserError(
            f"config.mesh is {said}, which does not fit {devices} device(s): the product of "
            f"the sizes must be {devices}, and -1 stands for the rest"
        )
    return tuple(devices // known if size == -1 else size for size in sizes)


def shares(mesh: Mesh) -> int:
    """How many devices have examples of their own."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples."""
    parts = shares(mesh) * accumulation
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"{field} is {batch_size}, which {shares(mesh)} devices x {accumulation} "
            f"micro-batches do not divide: use a multiple of {parts}"
        )


# --- Shardings ----------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices that have examples of their own."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rule_for(path: str) -> Rule:
    """The first rule of the table that fits."""
    return next(rule for rule in RULES if re.fullmatch(f"(.*/)?({rule.pattern})", path))


def partition(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the array of that path and shape is divided."""
    axes = rule_for(path).axes
    if len(axes) > len(shape):
        return PartitionSpec()
    sizes = shape[len(shape) - len(axes) :]
    divides = lambda axis, i: sizes[i] % mesh.shape[axis] == 0
    kept: list[str | None] = [None] * len(axes)
    left = [axis for axis in axes if axis and mesh.shape[axis] > 1]
    for i, axis in enumerate(axes):
        if axis and axis in left and divides(axis, i):
            kept[i] = axis
            left.remove(axis)
    free = [i for i in range(len(axes)) if kept[i] is None and divides("fsdp", i)]
    if "fsdp" in left and free:
        kept[free[-1]] = "fsdp"
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *kept)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state, or of weights alone, as a tree like `tree`."""

    def one(path: Any, x: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_params(params: Any, mesh: Mesh) -> Any:
    """Weights that every process has whole in its memory, divided by the rules."""

    def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    params = jax.device_get(params)
    return jax.tree.map(put, params, shardings(params, mesh))


def gather(params: Any, mesh: Mesh) -> Any:
    """The same arrays whole, in the memory of every process."""
    return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(mesh))(params))


@functools.cache  # called for every batch
def batch_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Which parts of a batch the devices of this process need, and of how many equal ones.

    Where `tensor` spans processes, several of them need the same part.
    """
    count = shares(mesh)
    places = split_batch(mesh).addressable_devices_indices_map((count,))
    return tuple(sorted({place[0].start or 0 for place in places.values() if place})), count


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's parts of a batch to its devices, as parts of one global array."""
    sharding = split_batch(mesh)
    parts, count = batch_parts(mesh)

    def put(x: np.ndarray) -> jax.Array:
        rows = len(x) // len(parts)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start = index[0].start if index else 0
            first = parts.index((start or 0) // rows) * rows
            return x[first : first + rows]

        return jax.make_array_from_callback((rows * count, *x.shape[1:]), sharding, part)

    return {name: put(value) for name, value in batch.items()}


def seeing(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be jitted, with a mesh that the network sees when it is traced.

    There it pins its activations (`devices.split_by_example`). By default XLA may shard them
    like the weights instead, and exchange activations where it should gather weights.
    """

    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


# --- Printed at the start of a run ---------------------------------------------------------


def bytes_per_device(tree: Any, mesh: Mesh) -> int:
    """Of the arrays of `tree`, divided by the rules."""
    return sum(_bytes(path, x, mesh)[1] for path, x in _leaves(tree))


def table(tree: Any, mesh: Mesh) -> str:
    """A line for each way in which arrays of `tree` are divided, with their bytes."""
    rows: dict[tuple[str, str], list[int]] = {}
    for path, x in _leaves(tree):
        spec = partition(path, x.shape, mesh)
        how = ", ".join("whole" if axis is None else axis for axis in spec)
        split = any(axis is not None for axis in spec)
        key = (rule_for(path).pattern, how) if split else ("everything else", "nothing")
        counted = rows.setdefault(key, [0, 0, 0])
        for i, amount in enumerate((1, *_bytes(path, x, mesh))):
            counted[i] += amount
    rows = {key: rows[key] for key in sorted(rows, key=lambda key: -rows[key][1])}
    rows["in all", ""] = [sum(column) for column in zip(*rows.values(), strict=True)]
    line = "{:<30} {:<28} {:>7} {:>12} {:>15}".format
    lines = [line("arrays named", "divided over", "arrays", "bytes", "bytes a device")]
    lines += [
        line(*key, f"{number:,}", readable(whole), readable(part))
        for key, (number, whole, part) in rows.items()
    ]
    return "\n".join(lines)


def readable(size: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    power = min(3, max(1, int(math.log2(max(size, 1)) // 10)))
    return f"{size / 2 ** (10 * power):.1f} {'KMG'[power - 1]}iB"


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(path_name(path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _bytes(path: str, x: Any, mesh: Mesh) -> tuple[int, int]:
    """Of the whole array, and of the part that one device holds."""
    part = NamedSharding(mesh, partition(path, x.shape, mesh)).shard_shape(x.shape)
    return math.prod(x.shape) * x.dtype.itemsize, math.prod(part) * x.dtype.itemsize
