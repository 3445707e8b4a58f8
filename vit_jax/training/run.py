"""What a configuration names, built and checked before anything large is done."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

import vit_jax
from vit_jax import config as configuration
from vit_jax.checkpoints import digests, older
from vit_jax.checkpoints.metadata import Card, DataCard
from vit_jax.data import reading
from vit_jax.data.reading import Reading, TrainReading
from vit_jax.data.sources.source import Source, fingerprint
from vit_jax.distributed import sharding
from vit_jax.evaluation.few_shot import build_few_shot
from vit_jax.models import registry
from vit_jax.models.model import Params, count_parameters
from vit_jax.objectives.registry import build_objective
from vit_jax.system.errors import UserError
from vit_jax.training import program, run_data
from vit_jax.training.durations import Durations, make_plan
from vit_jax.training.reporting import Metrics, parse_profile
from vit_jax.training.step import TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything about a run that does not change from step to step, checked.

    Attributes:
      config: what was asked for, as cards and `config.json` record it.
      mesh: all devices.
      source, eval_source: what is trained and evaluated on.
      train_reading, eval_reading: how their images are read.
      eval_batch_size: examples of all devices together.
      plan: how long, and how often what is done.
      learning: what the devices compute.
      few_shot: accuracy of a probe, by `few_shot/N`.
      profile: the first and the last step to trace, or None.
      card: what every checkpoint says of the run.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    source: Source
    eval_source: Source
    train_reading: TrainReading
    eval_reading: Reading
    eval_batch_size: int
    plan: Durations
    learning: program.Learning
    few_shot: Callable[[Params], Metrics]
    profile: tuple[int, int] | None
    card: Card


def build(config: ConfigDict, classes: tuple[str, ...] = ()) -> Run:
    """Opens the data and compiles nothing yet; every wrong field is found here.

    The outputs of the model are the classes of the training data, in the order of `classes` if
    these are the same.
    """
    profile = parse_profile(config.profile)
    config = registry.with_computation_chosen(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    source, eval_source = run_data.open_sources(config, classes)
    num_classes = len(source.class_names)
    objective = build_objective(config, num_classes)
    train_reading = reading.train_reading(config, mesh, objective.views)
    eval_reading = reading.eval_reading(config, mesh)
    plan = make_plan(config, len(source))
    check_best(objective.best, config)
    run_data.check_early(config, (source, train_reading), (eval_source, eval_reading))
    learning = program.build_learning(
        config, mesh, num_classes, len(source), objective=objective
    )
    return Run(
        config=config,
        mesh=mesh,
        source=source,
        eval_source=eval_source,
        plan=plan,
        learning=learning,
        few_shot=build_few_shot(config, objective.model, source, eval_source, mesh),
        train_reading=train_reading,
        eval_batch_size=config.eval_batch_size,
        profile=profile,
        eval_reading=eval_reading,
        card={
            "config": configuration.to_dict(config),
            "class_names": list(source.class_names)
            if objective.model.config.num_classes
            else [],
            "data": {
                "train": describe_data(config, config.data.train_split, source),
                "eval": describe_data(config, config.data.eval_split, eval_source),
            },
            "frozen": digests.of_tree(objective.frozen) if objective.frozen else None,
            "vit_jax": vit_jax.__version__,
            "layout": older.LAYOUT,
            "averaged": bool(learning.abstract_state.ema),
        },
    )


def check_best(best: str, config: ConfigDict) -> None:
    """Refuses to choose the best checkpoint by a probe that is not made. Raises UserError."""
    shots = tuple(config.few_shot.shots)
    name = best.removeprefix("-")
    if name.startswith("few_shot/") and name not in {f"few_shot/{n}" for n in shots}:
        number = name.removeprefix("few_shot/")
        raise UserError(
            f"the best checkpoint of objective.name={config.objective.name!r} is that with the "
            f"highest {name}, but few_shot.shots is {shots}: set few_shot.shots=({number},)"
        )


def describe_data(config: ConfigDict, split: str, source: Source) -> DataCard:
    """What a card says of a split, to tell later whether it is still the same."""
    return {
        "source": config.data.source,
        "split": split,
        "examples": len(source),
        "fingerprint": fingerprint(source),
    }


def describe(run: Run, state: TrainState, workdir: Path) -> str:
    """What is about to happen, in a few lines."""
    config, plan, step = run.config, run.plan, int(state.step)
    data = run.card["data"]
    model = f"{config.model.variant} at {config.image_size[0]}x{config.image_size[1]}"
    begun = "from the beginning" if step == 0 else f"resumed at step {step}"
    if step >= plan.total:
        begun = "already complete"
    return (
        f"model {model}, {count_parameters(state.params):,} parameters, "
        f"{len(run.card['class_names'])} classes\n"
        f"data {config.data.source}: {len(run.source):,} to train on "
        f"({data['train']['fingerprint']}), {len(run.eval_source):,} to evaluate "
        f"({data['eval']['fingerprint']})\n"
        f"{plan.total:,} steps of {config.batch_size:,} on {run.mesh.size} "
        f"{run.mesh.devices.flat[0].device_kind} device(s), {begun}; everything in {workdir}"
        f"{divided(run)}"
    )


def divided(run: Run) -> str:
    """How the state lives on the devices, where it is not whole on each."""
    if run.mesh.shape["fsdp"] == run.mesh.shape["tensor"] == 1:
        return ""
    sizes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    return f"\nmesh: {sizes}\n{sharding.table(run.learning.abstract_state, run.mesh)}"
