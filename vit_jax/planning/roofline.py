"""How long a step may take, from what it moves and computes and what a chip can do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vit_jax.planning.chips import Chip, interconnect
from vit_jax.planning.program import Collective

ASSUMPTIONS = (
    "compute: the FLOPs of matrix products, recomputation included, at the bfloat16 peak",
    "memory: each instruction of the compiled program reads its operands from HBM and writes "
    "its results there once, at the full bandwidth; those of loops as often as they run (XLA's "
    "own cost analysis counts the body of a loop once)",
    "exchange: around rings, at the full speed of the links; a group of all devices uses every "
    "axis of the interconnect, a smaller one a single axis, and an axis that is no closed ring "
    "half its links",
    "the shorter time is that of the longest of the three, as if they overlapped perfectly; "
    "the longer is their sum, as if nothing overlapped; kernels that reach neither peak, "
    "latencies and the input pipeline are left out, so that a real step may take longer still",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step needs at least for each thing, and what they make of it.

    Attributes:
      compute: of matrix products.
      memory: of traffic to HBM.
      collectives: of exchange between devices.
      shortest: if they overlap perfectly.
      longest: if nothing overlaps.
      mfu: (at `longest`, at `shortest`), the share of the peak that model FLOPs reach.
    """

    compute: float
    memory: float
    collectives: float
    shortest: float
    longest: float
    mfu: tuple[float, float]


def estimate(
    chip: Chip,
    slice_shape: Sequence[int],
    *,
    model_flops: float,
    executed_flops: float,
    traffic: float,
    collectives: Iterable[Collective],
) -> Roofline:
    """The roofline of one device.

    Args:
      chip: of which there are as many as `slice_shape` says.
      slice_shape: chips along each axis of the interconnect.
      model_flops: of a step and one device, without recomputation.
      executed_flops: the same with it.
      traffic: bytes that go to and from a device's main memory in a step.
      collectives: of a step.
    """
    compute, memory = executed_flops / chip.flops, traffic / chip.bandwidth
    exchange = sum(
        each.sent / interconnect(chip, tuple(slice_shape), each.devices) for each in collectives
    )
    shortest, longest = max(compute, memory, exchange), compute + memory + exchange
    mfu = lambda seconds: model_flops / chip.flops / seconds
    return Roofline(compute, memory, exchange, shortest, longest, (mfu(longest), mfu(shortest)))
