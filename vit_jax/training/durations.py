"""How long a run is and how often it does what, in steps."""

from typing import NamedTuple

from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.system.errors import UserError


class Durations(NamedTuple):
    """The durations of a run, in steps. An interval of 0 means only at the end."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    few_shot_every: int | None  # None: never

    def due(self, step: int, every: int) -> bool:
        return step == self.total or (every > 0 and step % every == 0)


def make_plan(config: ConfigDict, examples: int) -> Durations:
    """Resolves the durations of `config`; `examples` is the size of an epoch."""
    steps = lambda node, name: configuration.steps(node, name, examples, config.batch_size)
    few_shot = steps(config.few_shot, "every") if config.few_shot.shots else None
    total, log, evaluation, checkpoint = (
        steps(config, name) for name in ("total", "log_every", "eval_every", "checkpoint_every")
    )
    plan = Durations(total, log, evaluation, checkpoint, few_shot)
    if plan.total < 1:
        raise UserError(no_steps(config, examples))
    if few_shot and (not plan.eval_every or few_shot % plan.eval_every):
        raise UserError(
            f"few_shot.every is {few_shot} steps, which is no multiple of eval_every, "
            f"{plan.eval_every}: make it one, for it is a part of the evaluation"
        )
    return plan


def no_steps(config: ConfigDict, examples: int) -> str:
    """Why the length of training comes to 0 steps, and what to change."""
    given = {unit: config[f"total_{unit}"] for unit in configuration.UNITS}
    [(unit, amount)] = [(unit, x) for unit, x in given.items() if x is not None]
    if not amount or unit == "steps":
        return "the length of training is 0 steps: set e.g. config.total_epochs=90"
    seen = amount * (examples if unit == "epochs" else 1)
    return (
        f"the length of training is 0 steps, because total_{unit}={amount:g} of the "
        f"{examples:,} images in {config.data.train_split!r} is less than half a batch of "
        f"batch_size={config.batch_size:,}: set batch_size to at most {max(int(seen), 1):,}, "
        f"or train longer"
    )
