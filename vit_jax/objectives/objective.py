"""What is learned: the seam between a training step and everything that defines a loss.

An objective has a network and, perhaps, parameters of its own:
`{"model": ..., "objective": ...}`. Whoever only wants the network asks for the first. In each
update the step computes

    loss(params, carried, batch, key) -> Result       for every micro-batch, differentiated
    ... optimiser, then the average of the weights ...
    after_update(extra, statistics) -> extra          once, for the whole batch

and in an evaluation `evaluate(params, carried, batch) -> metrics`. Metrics and statistics are
sums that add up over micro-batches, devices and processes, so that averages are exact.
"""

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax

from vit_jax.data.on_device import Batch as Batch  # for objectives, too
from vit_jax.data.pipeline import Views
from vit_jax.models.flops import train_flops
from vit_jax.models.model import Model
from vit_jax.models.model import Params as ModelParams

Params = dict[str, Any]  # {"model": parameters of the network, "objective": of the objective}
Extra = dict[str, jax.Array]  # what an objective carries from update to update
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # {name: (sum, count)}
Statistics = dict[str, jax.Array]  # {name: sum}
FOREVER = 2**31 - 1  # steps


class Carried(NamedTuple):
    """What a loss reads and is not differentiated by.

    Attributes:
      teacher: averaged `Params`, where the objective has a `teacher_decay`; else {}.
      frozen: parameters of another network, {} if there is none. They are an argument of the
        compiled step, so that they are not part of the program, and are not saved.
      extra: small arrays that the objective keeps, such as a centre or a queue.
      step: int32, the number of updates made so far.
    """

    teacher: Any
    frozen: Any
    extra: Extra
    step: jax.Array


class Result(NamedTuple):
    """Of the examples of one (micro-)batch.

    Attributes:
      loss: float32 scalar, whose gradient is taken.
      metrics: {name: (sum, count)} to be reported.
      statistics: {name: sum} for `after_update`.
    """

    loss: jax.Array
    metrics: Metrics
    statistics: Statistics


class Group(NamedTuple):
    """How parameters whose path fits `pattern` are trained; the first group that fits decides.

    Attributes:
      pattern: a regular expression for the end of a path such as
        `model/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel`, from any `/` on.
      lr: times the learning rate; a tuple has one factor for each layer of a scanned encoder,
        whose arrays have a leading axis of layers (layer-wise decay).
      decay: times the weight decay.
      frozen_until: no update is made before so many are done; `FOREVER`: never. Until then the
        gradient counts as zero, also in the norm that clipping looks at.
    """

    pattern: str
    lr: float | tuple[float, ...] = 1.0
    decay: float = 1.0
    frozen_until: int = 0


class Objective(abc.ABC):
    """What every objective has; subclasses are frozen dataclasses that change what they need.

    Attributes:
      model: the network that is trained.
      best: the metric that the best checkpoint has most of; with a minus sign, least of.
      views: {name: Views}: so many images more of each example (multi-crop). A batch then has
        `name` (B, n, h, w, C) float32, normalised like `image`.
      teacher_decay: `step -> decay` of the average of the weights that `Carried.teacher` is and
        that is evaluated and kept as the best; None: there is no teacher.
      groups: how parameters differ in learning rate, weight decay or being frozen.
      frozen: parameters of another network, None if there is none; see `Carried`.
    """

    model: Model
    best: ClassVar[str] = "eval/accuracy"
    views: Mapping[str, Views] = MappingProxyType({})
    teacher_decay: Callable[[jax.Array], jax.Array] | None = None
    groups: tuple[Group, ...] = ()
    frozen: Any = None

    @property
    def flops(self) -> int:
        """Analytic FLOPs of training on one example; see models/flops.py."""
        return train_flops(self.model.config)

    def init(self, key: jax.Array) -> tuple[Params, Extra]:
        """The first parameters, and what is carried along at the beginning."""
        return only_model(self.model.init(key)), {}

    @abc.abstractmethod
    def loss(self, params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Result:
        """The loss of a batch in training; `key` is another one for every micro-batch."""

    @abc.abstractmethod
    def evaluate(self, params: Params, carried: Carried, batch: Batch) -> Metrics:
        """Metrics of a batch, without randomness: the same for an example in any batch.

        `mask` (B,) in the batch is 0 for padding, which no metric counts. {}: there is nothing
        to measure but what probes of the representation show.
        """

    def after_update(self, extra: Extra, statistics: Statistics) -> Extra:
        """What is carried to the next update; `statistics` are summed over the whole batch."""
        return extra


def only_model(params: ModelParams) -> Params:
    """Parameters of a network alone, as an objective without any of its own has them."""
    return {"model": params, "objective": {}}
