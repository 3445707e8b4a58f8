"""Public numbers of accelerators, for estimates.

Peaks and bandwidths are those of Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU
v6e" (docs.cloud.google.com/tpu/docs), read in November 2026; editions of the last three differ
by up to 3% in the bandwidth of the memory. A page gives the interconnect of a chip as a sum
over its links in both directions: 400 GB/s and 4 links for v5e are 50 GB/s a link and
direction. That of v4 is not on its page: 6 links of 50 GB/s are recalled from its paper
(arXiv 2304.01433), unverified. The memories are what libtpu 0.0.52 lets a program use,
of 32 (v4), 16, 95 and 32 GB on the pages.
"""

import math
from typing import Any, NamedTuple

GIB = 2.0**30


class Chip(NamedTuple):
    """One accelerator, as a program sees it."""

    name: str
    flops: float  # FLOP/s of bfloat16 matrix products, at the peak
    memory: float  # bytes of HBM that the compiler lets a program use
    bandwidth: float  # bytes/s of HBM
    link: float  # bytes/s of one link of the interconnect in one direction
    ring: int  # edges of a slice that are a multiple of it are closed to rings


# By what JAX calls the device.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 30.75 * GIB, 1200e9, 50e9, 4),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 819e9, 50e9, 16),
    "TPU v5": Chip("v5p", 459e12, 95.73 * GIB, 2765e9, 100e9, 4),
    "TPU v6 lite": Chip("v6e", 918e12, 31.24 * GIB, 1600e9, 100e9, 16),
}


def edges(devices: Any) -> tuple[int, ...]:
    """How many chips a slice has along each axis of the interconnect, axes of 1 left out."""
    coordinates = zip(*(device.coords for device in devices), strict=True)
    return tuple(edge for edge in (len(set(axis)) for axis in coordinates) if edge > 1)


def interconnect(chip: Chip, shape: tuple[int, ...], group: int) -> float:
    """Bytes/s that a device can send to the others of its group in a collective.

    A group of all devices uses every axis of the interconnect, a smaller one is taken to lie
    along one axis, the narrowest. An axis that is not closed to a ring passes half as much:
    its ends have one link.
    """
    axes = [chip.link * (2 if edge % chip.ring == 0 else 1) for edge in shape]
    if not axes:
        return chip.link
    return sum(axes) if group == math.prod(shape) else min(axes)
