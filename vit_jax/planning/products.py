"""The matrix products of a traced program, counted in its jaxpr.

Where `models/flops.py` counts from the shape of a network, this counts the operations of the
program, recomputation of the backward pass included, and as often as loops run.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def product_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of all matrix products and convolutions, over all devices together.

    A loop whose length is only known at run time counts once; a training step has none.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [product_flops(each) for each in _jaxprs(parameters)]
            total += _times(name, parameters) * (
                max(inner, default=0) if name == "cond" else sum(inner)
            )
    return total


def _times(name: str, parameters: dict[str, Any]) -> int:
    """How often the programs within an equation run, on all devices together."""
    if name == "scan":
        return int(parameters["length"])
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid)
    if name == "shard_map":  # written for one device
        axes = parameters["newly_manual_axes"]
        return math.prod(parameters["mesh"].shape[axis] for axis in axes)
    return 1


def _dot(equation: Any) -> int:
    """An addition and a multiplication for each term of each number of the result."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return int(2 * terms * math.prod(equation.outvars[0].aval.shape))


def _convolution(equation: Any) -> int:
    """As if every number of the result were a sum over the whole kernel.

    The zeros of padding count. Those that are put between the pixels, to take the gradient of
    a convolution with strides, do not: there are `lhs_dilation` times as many in the sums.
    """
    parameters = equation.params
    kernel, numbers = equation.invars[1].aval.shape, parameters["dimension_numbers"]
    terms = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    result = math.prod(equation.outvars[0].aval.shape)
    return int(2 * terms * result // math.prod(parameters["lhs_dilation"]))


def _jaxprs(value: Any) -> Iterator[Jaxpr]:
    """The programs within a program, found among the parameters of an equation."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, dict | tuple | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _jaxprs(each)
