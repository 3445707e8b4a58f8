"""What devices run for a configuration: the first state, an update, an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.data.on_device import prepare_for_eval, prepare_for_training
from vit_jax.distributed import sharding
from vit_jax.evaluation.averages import make_eval_step
from vit_jax.models import registry
from vit_jax.models.registry import Builder
from vit_jax.objectives.objective import Objective
from vit_jax.objectives.registry import build_objective
from vit_jax.system.errors import UserError
from vit_jax.training.groups import Groups
from vit_jax.training.optimizer import build_schedule, make_optimizer
from vit_jax.training.step import TrainState, init_state, make_train_step


class Learning(NamedTuple):
    """What is learned and how, compiled when it is first called; no data yet.

    Attributes:
      objective: what is learned, with its network.
      abstract_state: shapes and dtypes of the state.
      shardings: where each array of it lives.
      init: makes the first state, each device its own part: nobody ever holds the whole.
      frozen: `objective.frozen`, on the devices; None if there is none.
      train_step: `(state, batch, frozen=None) -> (state, metrics)`, in the memory of the old
        state.
      eval_step: `(params, carried, batch) -> {name: (sum, count)}`.
    """

    objective: Objective
    abstract_state: TrainState
    shardings: TrainState
    init: Callable[[], TrainState]
    frozen: Any
    train_step: Any
    eval_step: Any


def build_learning(
    config: ConfigDict,
    mesh: Mesh,
    num_classes: int,
    examples: int,
    build: Builder = registry.build,
    objective: Objective | None = None,
) -> Learning:
    """The computation of a configuration on a mesh, whose devices need not be there.

    Args:
      config: with `model.scan` and `model.remat` decided.
      mesh: of `distributed.sharding.make_mesh`.
      num_classes: of the data.
      examples: in an epoch.
      build: makes the network.
      objective: of `config`, where it is built already.

    Raises:
      UserError: a field does not fit the rest.
    """
    objective = objective or build_objective(config, num_classes, build)
    schedule = build_schedule(config, examples)
    check_teacher(objective, config.ema_decay)
    groups = Groups(objective.groups)
    optimizer = make_optimizer(config.optimizer, schedule, groups)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        prepare_for_training(config, num_classes, tuple(objective.views)),
        seed=config.seed,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
    )
    eval_step = make_eval_step(objective, prepare_for_eval(config))
    init = lambda: init_state(objective, optimizer, config.seed, bool(config.ema_decay))
    state, everywhere = jax.eval_shape(init), sharding.replicated(mesh)
    groups.check(state.params)
    where = sharding.shardings(state, mesh)
    seeing = lambda function: sharding.seeing(mesh, function)
    return Learning(
        objective=objective,
        abstract_state=state,
        shardings=where,
        init=jax.jit(init, out_shardings=where),
        frozen=sharding.put_params(objective.frozen, mesh) if objective.frozen else None,
        train_step=jax.jit(
            seeing(step),
            donate_argnums=0,
            out_shardings=(where, everywhere),
            compiler_options=sharding.compiler_options(mesh),
        ),
        eval_step=jax.jit(seeing(eval_step), out_shardings=everywhere),
    )


def check_teacher(objective: Objective, ema_decay: float) -> None:
    """Refuses two averages of the weights. Raises UserError."""
    if objective.teacher_decay and ema_decay:
        raise UserError(
            f"ema_decay is {ema_decay}, but this objective has a teacher, which is an average "
            f"of the weights with a decay of its own: set ema_decay=0"
        )
