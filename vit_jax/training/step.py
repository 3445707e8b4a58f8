"""One update: a pure function of state and data."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.data.on_device import Batch, Prepare
from vit_jax.objectives.objective import Carried, Extra, Objective, Params
from vit_jax.training.groups import Groups
from vit_jax.training.optimizer import Schedule


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and all that a checkpoint needs.

    There is no random key here: every key is derived from the seed and `step`.
    """

    step: jax.Array  # int32, number of updates made
    params: Params  # of the model and of the objective
    opt_state: Any
    ema: Params  # averaged params, or {} when off
    extra: Extra  # what the objective carries along

    @property
    def eval_params(self) -> Params:
        """The averaged weights when they are kept, else the weights."""
        return self.ema or self.params


def carried_of(state: TrainState, objective: Objective, frozen: Any) -> Carried:
    """What a loss reads of a state, beside the parameters that it is differentiated by."""
    teacher = state.ema if objective.teacher_decay else {}
    return Carried(teacher, frozen or {}, state.extra, state.step)


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int, ema: bool
) -> TrainState:
    """The first state; `ema`: an average of the weights is kept, as every teacher is."""
    params, extra = objective.init(jax.random.fold_in(jax.random.key(seed), 0))
    # A copy, since the first update donates `params`: the two must not share buffers.
    average = jax.tree.map(jnp.copy, params) if ema or objective.teacher_decay else {}
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, extra)


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B/count, ...), interleaved so that no example changes device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    prepare: Prepare,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `step(state, batch, frozen=None) -> (state, metrics)`, to be jitted.

    `metrics` holds scalars: `train/NAME` of the objective (averages over the batch), `lr`,
    and `grad_norm` before clipping. With `accumulation` the batch is worked through in so
    many parts, each with its own random key; gradients, metrics and statistics are those of
    the whole, and what the objective carries along moves once. `frozen` are the parameters
    `objective.frozen`, on the devices.
    """
    groups = Groups(objective.groups)

    def gradients(params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Any:
        """Gradients, metrics and statistics of a micro-batch."""
        prepare_key, loss_key = jax.random.split(key)
        batch = prepare(batch, prepare_key)

        def loss(params: Params) -> Any:
            result = objective.loss(params, carried, batch, loss_key)
            return result.loss, (result.metrics, result.statistics)

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, *sums

    def accumulated(params: Params, carried: Carried, batch: Batch, key: jax.Array) -> Any:
        def body(total: Any, part: Any) -> Any:
            index, micro_batch = part
            new = gradients(params, carried, micro_batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, new), None

        parts = split_micro_batches(batch, accumulation)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, carried, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(accumulation), parts))
        grads, metrics, statistics = total
        return jax.tree.map(lambda g: g / accumulation, grads), metrics, statistics

    compute = accumulated if accumulation > 1 else gradients

    def step(
        state: TrainState, batch: Batch, frozen: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # Stream 0 is initialisation, so updates draw from 1 on.
        key = jax.random.fold_in(jax.random.key(seed), state.step + 1)
        carried = carried_of(state, objective, frozen)
        grads, sums, statistics = compute(state.params, carried, batch, key)
        grads = groups.of_gradients(grads, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = groups.of_updates(updates, state.step)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if objective.teacher_decay:
            ema = optax.incremental_update(
                params, ema, 1.0 - objective.teacher_decay(state.step)
            )
        elif ema_decay:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
        extra = objective.after_update(state.extra, statistics)
        metrics = {f"train/{name}": total / count for name, (total, count) in sums.items()}
        metrics |= {"lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ema, extra), metrics

    return step
