"""One update: a pure function of state and data."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vit_jax.data.on_device import Batch, Prepare
from vit_jax.training.optimizer import Schedule


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and all that a checkpoint needs.

    There is no random key here: every key is derived from the seed and `step`.
    """

    step: jax.Array  # int32, number of updates made
    params: Any
    opt_state: Any
    ema: Any  # averaged params, or {} when off
    extra: Any  # what the objective carries along

    @property
    def eval_params(self) -> Any:
        """The averaged weights when they are kept, else the weights."""
        return self.ema or self.params


def init_state(
    objective: Any, optimizer: optax.GradientTransformation, seed: int, ema: bool
) -> TrainState:
    params, extra = objective.init(jax.random.fold_in(jax.random.key(seed), 0))
    # A copy, since the first update donates `params`: the two must not share buffers.
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.int32(0), params, optimizer.init(params), average, extra)


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B/count, ...), interleaved so that no example changes device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def make_train_step(
    objective: Any,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    prepare: Prepare,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    `metrics` holds scalars: `train/NAME` of the objective (averages over the batch), `lr`,
    and `grad_norm` before clipping. With `accumulation` the batch is worked through in so
    many parts, each with its own random key; gradients and metrics are those of the whole.
    """

    def gradients(params: Any, extra: Any, batch: Batch, key: jax.Array) -> Any:
        prepare_key, loss_key = jax.random.split(key)
        batch = prepare(batch, prepare_key)
        grad = jax.value_and_grad(objective.loss, has_aux=True)
        (_, (metrics, extra)), grads = grad(params, extra, batch, loss_key, True)
        return grads, metrics, extra

    def accumulated(params: Any, extra: Any, batch: Batch, key: jax.Array) -> Any:
        def body(carry: Any, part: Any) -> Any:
            grads, metrics, extra = carry
            index, micro_batch = part
            new = gradients(params, extra, micro_batch, jax.random.fold_in(key, index))
            total = jax.tree.map(jnp.add, (grads, metrics), new[:2])
            return (*total, new[2]), None

        parts = split_micro_batches(batch, accumulation)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, extra, first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[:2])
        carry, _ = jax.lax.scan(body, (*zeros, extra), (jnp.arange(accumulation), parts))
        grads, metrics, extra = carry
        return jax.tree.map(lambda g: g / accumulation, grads), metrics, extra

    compute = accumulated if accumulation > 1 else gradients

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        # Stream 0 is initialisation, so updates draw from 1 on.
        key = jax.random.fold_in(jax.random.key(seed), state.step + 1)
        grads, sums, extra = compute(state.params, state.extra, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        metrics = {f"train/{name}": total / count for name, (total, count) in sums.items()}
        metrics |= {"lr": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, ema, extra), metrics

    return step
