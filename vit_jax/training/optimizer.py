"""Learning-rate schedules and optimisers, with each meaning of "weight decay" named."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.system.errors import UserError
from vit_jax.training.groups import NO_GROUPS, Groups

Schedule = Callable[[Any], jax.Array]
SCHEDULES = ("cosine", "linear", "rsqrt", "constant")
DECAYS = ("times_lr", "times_schedule", "l2")


def make_schedule(
    name: str,
    base: float,
    total: int,
    warmup: int = 0,
    cooldown: int = 0,
    timescale: int = 10_000,
    linear_end: float = 1e-5,
) -> Schedule:
    """Returns the learning rate of update 0, 1, ... `total - 1`.

    Every schedule is multiplied by min(1, step / warmup), and decays over what comes *after*
    the warm-up. So update 0 has rate 0, as in the code that trained the published models.

      cosine    base (1 + cos(pi p)) / 2          p = (step - warmup) / (total - warmup)
      linear    end + (base - end) (1 - p)        end = linear_end
      rsqrt     base / sqrt(1 + (step - warmup) / timescale)
      constant  base

    With `cooldown`, the last so many steps fall linearly to 0 (for rsqrt and constant).

    Raises:
      UserError: the name is unknown, or warm-up and cool-down do not fit into `total`.
    """
    if name not in SCHEDULES:
        raise UserError(f"optimizer.schedule is {name!r}: use one of {', '.join(SCHEDULES)}")
    if warmup + cooldown > total:
        raise UserError(
            f"optimizer.warmup is {warmup} steps and optimizer.cooldown {cooldown}, but "
            f"training is only {total} long: shorten them or train longer"
        )
    if cooldown and name in ("cosine", "linear"):
        raise UserError(
            f"optimizer.cooldown is {cooldown} steps, but the {name} schedule already ends "
            f"low: set optimizer.cooldown_steps=0, or use rsqrt or constant"
        )

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = jnp.maximum(step - warmup, 0.0)
        progress = jnp.clip(after / max(total - warmup, 1), 0.0, 1.0)
        rate = {
            "cosine": lambda: base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": lambda: linear_end + (base - linear_end) * (1.0 - progress),
            "rsqrt": lambda: base / jnp.sqrt(1.0 + after / timescale),
            "constant": lambda: jnp.full_like(step, base),
        }[name]()
        if warmup:
            rate *= jnp.minimum(1.0, step / warmup)
        if cooldown:
            rate *= jnp.minimum(1.0, (total - step) / cooldown)
        return rate

    return schedule


def kernels_only(params: Any) -> Any:
    """True for arrays named `kernel`: biases, norms, embeddings and tokens do not decay."""
    name = lambda path: getattr(path[-1], "key", None)
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path) == "kernel", params)


def _direction(config: Any) -> optax.GradientTransformation:
    """The step that the optimiser takes, before learning rate and sign."""
    if config.moment_dtype not in ("float32", "bfloat16"):
        raise UserError(
            f"optimizer.moment_dtype is {config.moment_dtype!r}: use float32 or bfloat16"
        )
    if config.name == "adam":
        return optax.scale_by_adam(
            config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype
        )
    if config.name == "sgd":
        return optax.trace(config.momentum, accumulator_dtype=config.moment_dtype)
    raise UserError(f"optimizer.name is {config.name!r}: use one of adam, sgd")


def decay_weights(weight_decay: float, groups: Groups) -> optax.GradientTransformation:
    """Adds w p to the update of a kernel p, times the factor of its group."""
    if not groups:
        return optax.add_decayed_weights(weight_decay, kernels_only)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def one(u: jax.Array, p: jax.Array, kernel: bool, factor: float) -> jax.Array:
            return u + weight_decay * factor * p if kernel and factor else u

        factors = groups.decays(params)
        return jax.tree.map(one, updates, params, kernels_only(params), factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(
    config: Any, schedule: Schedule, groups: Groups = NO_GROUPS
) -> optax.GradientTransformation:
    """Builds the optimiser of a `config.optimizer`.

    Gradients are clipped to a global norm first. Weight decay w applies to kernels only, and
    `config.decay` says what it means for a parameter p at learning rate lr(t). Of `groups` only
    the factors of the decay matter here; the step applies the others.

      times_lr        p -= lr(t) (direction + w p)                 AdamW; "wd" of AugReg
      times_schedule  p -= lr(t) direction + lr(t)/lr_peak w p     big_vision: w = 1e-4 there
                                                                   is 0.1 of AdamW at 1e-3
      l2              the gradient gets + w p before the optimiser sees it

    Raises:
      UserError: an unknown name, with the field that holds it.
    """
    if config.decay not in DECAYS:
        raise UserError(f"optimizer.decay is {config.decay!r}: use one of {', '.join(DECAYS)}")
    if config.lr <= 0:
        raise UserError(f"optimizer.lr is {config.lr}: it must be positive")
    decay = decay_weights(config.weight_decay, groups)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    direction = _direction(config)
    descend = optax.scale_by_learning_rate(schedule)
    if config.decay == "l2":
        return optax.chain(clip, decay, direction, descend)
    if config.decay == "times_lr":
        return optax.chain(clip, direction, decay, descend)
    relative = optax.scale_by_learning_rate(lambda step: schedule(step) / config.lr)
    return optax.chain(clip, direction, optax.scale(config.lr), decay, relative)


def build_schedule(config: ConfigDict, examples: int) -> Schedule:
    """The learning rate of each update; `examples` is the size of an epoch."""
    optimizer = config.optimizer
    duration = lambda node, name: configuration.steps(node, name, examples, config.batch_size)
    return make_schedule(
        optimizer.schedule,
        optimizer.lr,
        total=duration(config, "total"),
        warmup=duration(optimizer, "warmup"),
        cooldown=duration(optimizer, "cooldown"),
        timescale=duration(optimizer, "timescale"),
        linear_end=optimizer.linear_end,
    )
