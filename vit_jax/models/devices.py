"""What a network knows of the devices that it is traced for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")  # axes of the mesh over which examples are divided
HEAD_AXIS = "tensor"  # the axis over which heads of attention are

Axes = tuple[str, ...]  # what each axis of an array counts: examples, heads, or else
TOKENS = ("examples", "tokens", "heads", "width")  # of queries, keys and values


def sees_mesh() -> bool:
    """Whether the network is being traced for a mesh (`training/sharding.seeing`)."""
    return set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the mesh in sight, else where JAX computes by default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def split_by_example(x: jax.Array) -> jax.Array:
    """Pins (B, ...) activations to be divided by examples and by nothing else.

    Only while a function is traced that sees a mesh; else `x` itself.
    """
    if not sees_mesh():
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def on_each_device(
    function: Callable[..., Any], arrays: Sequence[tuple[Any, Axes]], results: Sequence[Axes]
) -> Any:
    """`function(*arrays)` on the examples and heads of attention that each device has.

    XLA cannot divide a loop over examples, nor a kernel that is not its own; `shard_map` can.

    Args:
      function: of arrays and to arrays that lie on one device.
      arrays: each with its axes; those that count `examples` and `heads` are divided.
      results: the axes of each result.

    Returns:
      A tuple of results.
    """
    given = tuple(axes for _, axes in arrays)
    if not sees_mesh():
        return function(*(x for x, _ in arrays))
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    heads = next(x.shape[axes.index("heads")] for x, axes in arrays if "heads" in axes)
    of_heads = HEAD_AXIS if heads % sizes.get(HEAD_AXIS, 1) == 0 else None
    over = {"examples": BATCH_AXES, "heads": of_heads}
    spec = lambda axes: PartitionSpec(*(over.get(axis) for axis in axes))
    return jax.shard_map(
        function,
        in_specs=tuple(map(spec, given)),
        out_specs=tuple(map(spec, results)),
        check_vma=False,  # a Pallas kernel does not say over which axes its result varies
    )(*(x for x, _ in arrays))
