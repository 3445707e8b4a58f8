"""Trains a model: `python -m vit_jax.train --config=FILE[:ARGUMENT] --workdir=DIR`.

Any field can be set on the command line, `--config.optimizer.lr=3e-4`; all are listed, with
their meaning, in vit_jax/config.py. Running the same command again continues where the work
directory stands: the end is bit for bit that of a run never stopped. SIGTERM, SIGHUP and Ctrl-C
save and exit with code 0. On several machines, start the same command on each (docs/running).

The work directory holds `metrics.jsonl` (one JSON object a line), `tensorboard/`,
`checkpoints/` (the last states), `best/` (the weights of the best evaluation) and
`config.json`.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

import vit_jax
from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.checkpoints.directory import Checkpoints, abstract
from vit_jax.checkpoints.orbax_io import Card
from vit_jax.checkpoints.trained import Trained
from vit_jax.command_line import cli
from vit_jax.data import pipeline, value_ranges
from vit_jax.data.sources.source import Source, fingerprint
from vit_jax.distributed import processes, sharding
from vit_jax.distributed.processes import StopSignal
from vit_jax.evaluation.averages import evaluate
from vit_jax.interop import channels, stated
from vit_jax.interop.stated import Stated
from vit_jax.interop.transfer import adapt
from vit_jax.models.flops import train_flops
from vit_jax.models.model import count_parameters
from vit_jax.system import bounded, cache
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError, about
from vit_jax.system.lock import WorkDirectory, alone_in
from vit_jax.training import experiment, run_data
from vit_jax.training.logging import MetricWriter
from vit_jax.training.reporting import Metrics, Profiler, Reporter, matmul_peak, parse_profile
from vit_jax.training.step import TrainState

# --- Plan: how long, how often ------------------------------------------------------------


class Plan(NamedTuple):
    """The durations of a run, in steps. An interval of 0 means only at the end."""

    total: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    few_shot_every: int | None  # None: never

    def due(self, step: int, every: int) -> bool:
        return step == self.total or (every > 0 and step % every == 0)


def make_plan(config: ConfigDict, examples: int) -> Plan:
    """Resolves the durations of `config`; `examples` is the size of an epoch."""
    steps = lambda node, name: configuration.steps(node, name, examples, config.batch_size)
    few_shot = steps(config.few_shot, "every") if config.few_shot.shots else None
    total, log, evaluation, checkpoint = (
        steps(config, name) for name in ("total", "log_every", "eval_every", "checkpoint_every")
    )
    plan = Plan(total, log, evaluation, checkpoint, few_shot)
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


# --- Resolve: what the weights to begin with decide ---------------------------------------


def resolve(
    config: ConfigDict,
    workdir: Path,
    overridden: Collection[str],
    said: Stated = stated.NOTHING,
) -> tuple[ConfigDict, Trained | None]:
    """Fills in the model of a configuration that leaves it to `init_from`.

    Args:
      config: stays as it is.
      workdir: where a run may have begun already.
      overridden: fields set on the command line, which stay.
      said: about the weights.

    Returns:
      The complete configuration, and the weights if they had to be opened for it: a work
      directory with a checkpoint knows its model, and needs them no more.

    Raises:
      UserError: the weights cannot be found, fetched or read.
    """
    if config.model.variant is not None or not config.init_from:
        return config, None
    config = config.copy_and_resolve_references()
    if (known := model_of_workdir(workdir, config.init_from)) is not None:
        configuration.take_model(config, known, overridden)
        return config, None
    before = trained.load_any(config.init_from, "last", None, said, as_stored=True)
    configuration.take_model(config, before.config, overridden)
    if config.data.channels != before.config.data.channels:
        fitting = value_ranges.for_channels(config.data.value_range, config.data.channels)
        if "data.value_range" not in overridden:
            config.data.value_range = fitting
    return config, before


def weights_to_begin_with(config: ConfigDict, workdir: Path, said: Stated) -> Trained | None:
    """The weights of `config.init_from`, None where none are needed.

    Raises:
      UserError: they cannot be found, fetched or read.
    """
    if not config.init_from or has_checkpoints(workdir):
        return None
    return trained.load_any(config.init_from, "last", None, said, as_stored=True)


def has_checkpoints(workdir: Path) -> bool:
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def model_of_workdir(workdir: Path, init_from: str) -> ConfigDict | None:
    """The configuration that checkpoints in `workdir` were begun with from `init_from`."""
    if not has_checkpoints(workdir):
        return None  # what the run will begin with is read anew
    try:
        stored = configuration.from_dict(
            bounded.parse_json(bounded.read(workdir / "config.json"))
        )
    except (OSError, ValueError):
        return None
    return stored if stored.init_from == init_from else None


# --- Build: what the configuration names, nothing large yet -------------------------------


class Run(NamedTuple):
    """Everything about a run that does not change from step to step."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    source: Source
    eval_source: Source
    plan: Plan
    learning: experiment.Learning
    few_shot: Callable[[Any], Metrics]
    train_reading: dict[str, Any]
    eval_reading: dict[str, Any]
    card: Card


def build(config: ConfigDict, classes: tuple[str, ...] = ()) -> Run:
    """Opens the data and compiles nothing yet; every wrong field is found here.

    The outputs of the model are the classes of the training data, in the order of `classes` if
    these are the same.
    """
    parse_profile(config.profile)
    config = experiment.with_computation_chosen(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch_size("batch_size", config.batch_size, mesh, config.accumulation)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, mesh)
    source, eval_source = run_data.open_sources(config, classes)
    num_classes = len(source.class_names)
    train_reading = experiment.train_pipeline(config, mesh)
    eval_reading = experiment.eval_pipeline(config, mesh)
    plan = make_plan(config, len(source))
    experiment.build_objective(config, num_classes)  # a wrong field is told before an image
    run_data.check_early(config, (source, train_reading), (eval_source, eval_reading))
    learning = experiment.build_learning(config, mesh, num_classes, len(source))
    model = learning.objective.model
    return Run(
        config=config,
        mesh=mesh,
        source=source,
        eval_source=eval_source,
        plan=plan,
        learning=learning,
        few_shot=experiment.build_few_shot(config, model, source, eval_source, mesh),
        train_reading=train_reading,
        eval_reading=eval_reading,
        card={
            "config": configuration.to_dict(config),
            "class_names": list(experiment.class_names(config, source.class_names)),
            "data": {
                "train": describe_data(config, config.data.train_split, source),
                "eval": describe_data(config, config.data.eval_split, eval_source),
            },
            "vit_jax": vit_jax.__version__,
        },
    )


def describe_data(config: ConfigDict, split: str, source: Source) -> dict[str, Any]:
    """What a card says of a split, to tell later whether it is still the same."""
    return {
        "source": config.data.source,
        "split": split,
        "examples": len(source),
        "fingerprint": fingerprint(source),
    }


# --- Begin: the work directory's state, or a fresh one ------------------------------------


def begin(
    run: Run,
    checkpoints: Checkpoints,
    workdir: Path,
    before: Trained | None = None,
    said: Stated = stated.NOTHING,
    begin_anew: bool = False,
) -> TrainState:
    """Returns the newest intact state, or a first one, divided over the mesh.

    `before` are the weights of `config.init_from`, if they are open already, and `said` is
    what their file leaves open. `begin_anew` is for where there were states and all of them
    are damaged.

    Raises:
      UserError: the work directory belongs to a run with another configuration or other
        data, none of its states is intact, or the weights to begin with do not fit.
    """
    if stored := checkpoints.card():
        configuration.check_resumable(stored["config"], run.config, workdir)
        check_classes(stored["class_names"], run.card["class_names"], workdir)
        if "data" in stored:  # not in cards written before there were fingerprints
            check_data(stored["data"], run.card["data"], workdir)
    target = abstract(run.learning.abstract_state, run.learning.shardings)
    state = checkpoints.restore(target, begin_anew)
    if state is None:
        # Each device makes its own part: nobody ever holds the whole.
        state = run.learning.init()
        if run.config.init_from:
            name = run.config.init_from
            before = before or trained.load_any(name, "last", None, said, as_stored=True)
            state = take_over(state, run, before)
    if processes.is_first():
        write_config(run.card["config"], workdir / "config.json")
    return state


def write_config(config: dict[str, Any], path: Path) -> None:
    """Writes a configuration where it differs from the one that is there. Raises UserError."""
    text = json.dumps(config, indent=2) + "\n"
    try:
        same = bounded.read_text(path) == text
    except (OSError, ValueError):
        same = False
    if not same:
        with replacing(path) as part:
            part.write_text(text)


def check_classes(stored: list[str], found: list[str], workdir: Path) -> None:
    """Refuses to go on where an output of the model would come to mean another class.

    Raises:
      UserError: the data set has other classes than the run began with.
    """
    if stored != found:
        different = sorted(set(stored) ^ set(found)) or ["their order"]
        raise UserError(
            f"{workdir} was begun with {len(stored)} classes and the data have {len(found)} "
            f"now; different: {', '.join(different[:5])}. Restore the data, or choose another "
            f"--workdir"
        )


def check_data(stored: dict[str, Any], found: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with other examples to train on than the run began with.

    Each batch is drawn by position, so one image more or less would change all that come. The
    evaluation split changes no weight, and may be chosen anew: there a note is enough, since
    scores are compared, to keep the best, across the change.

    Raises:
      UserError: the training split holds other examples, in another order or with other labels.
    """
    if different := changed(stored["train"], found["train"]):
        raise UserError(
            f"{workdir} was trained on {different}: its batches would be others. Restore the "
            f"data, or choose another --workdir"
        )
    different = changed(stored["eval"], found["eval"])
    if different and processes.is_first():
        print(
            f"note: {workdir} was evaluated on {different}: scores from here on do not compare "
            f"with those before, yet best/ is chosen among all",
            file=sys.stderr,
        )


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different about the examples of a split, or nothing."""
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    others = ", with other names, labels or order" * (before["examples"] == now["examples"])
    return (
        f"{before['examples']:,} examples in {before['split']!r} of {before['source']}, and "
        f"there are {now['examples']:,} in {now['split']!r} now{others}"
    )


def take_over(state: TrainState, run: Run, before: Trained) -> TrainState:
    """Puts the trained weights of `config.init_from` in place of the initial ones."""
    config, old, new = run.config, before.model.config, run.learning.objective.model.config
    fresh = sharding.gather(state.params, run.mesh)
    params, notes = adapt(before.params, old, fresh, new, config.init_resize or before.resize)
    if processes.is_first():
        print(f"begins with {config.init_from} ({before.family}); {'; '.join(notes)}")
        for note in (*before.notes, *mismatches(config, before.config)):
            print(f"note: {note}", file=sys.stderr)
    params = sharding.put_params(params, run.mesh)
    ema = jax.tree.map(jnp.copy, params) if state.ema else {}
    return dataclasses.replace(state, params=params, ema=ema)


def mismatches(config: ConfigDict, weights: ConfigDict) -> list[str]:
    """A sentence on numerics that differ from those of the weights: shapes do not show them."""
    wrong = []
    for path in ("model.gelu", "model.layer_norm_eps", "data.value_range"):
        node, _, name = path.partition(".")
        old, new = weights[node][name], config[node][name]
        if name == "value_range" and config.data.channels != weights.data.channels:
            old = value_ranges.for_channels(old, config.data.channels)
        if old != new:
            wrong.append(f"{path}={old!r} (here {new!r})")
    if not wrong:
        return []
    return [
        f"{config.init_from} was trained with {', '.join(wrong)}: set config to the same, "
        f"unless the difference is meant"
    ]


# --- Evaluate -----------------------------------------------------------------------------


def evaluate_state(run: Run, state: TrainState, stop: StopSignal) -> Metrics | None:
    """Metrics over the whole evaluation split, or None if a signal came first."""
    batches = pipeline.eval_batches(
        run.eval_source, batch_size=run.config.eval_batch_size, **run.eval_reading
    )
    with contextlib.closing(batches):
        averages = evaluate(
            lambda batch: run.learning.eval_step(state.eval_params, state.extra, batch),
            (sharding.put_batch(batch, run.mesh) for batch in batches),
            lambda: stop.requested,
        )
    if averages is None:
        return None
    metrics = {f"eval/{name}": value for name, value in averages.items()}
    every = run.plan.few_shot_every
    if every is not None and run.plan.due(int(state.step), every):
        metrics |= run.few_shot(state.eval_params)
    return metrics


def recorded_evaluation(log: MetricWriter) -> Metrics | None:
    """The evaluation that the log holds for the step that it goes on from, if any."""
    record = log.evaluation()
    return record and {name: value for name, value in record.items() if name != "step"}


# --- Train --------------------------------------------------------------------------------


def loop(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    directory: WorkDirectory,
    log: MetricWriter,
    stop: StopSignal,
) -> Metrics:
    """Steps from `state` to the end of the plan; returns the last evaluation.

    The order within a step is fixed: update, report, save, evaluate. A step is reported (and
    so known to be finite) before it is saved, and saved before the evaluation that a signal
    may cut short; whoever resumes owes that evaluation and makes it first.
    """
    plan, first_step, workdir = run.plan, int(state.step), directory.path
    due = lambda step: plan.due(step, plan.log_every)
    batch_size, cfg = run.config.batch_size, run.learning.objective.model.config
    # All devices of one processor share its cores.
    devices = jax.process_count() if jax.default_backend() == "cpu" else run.mesh.size
    peak = devices * matmul_peak(cfg.dtype)
    reporter = Reporter(log, due, batch_size, batch_size * train_flops(cfg), peak, workdir)

    def keep_if_best(step: int, metrics: Metrics) -> None:
        card = {**run.card, "metrics": metrics}
        score = run.learning.objective.score(
            {name.removeprefix("eval/"): x for name, x in metrics.items()}
        )
        checkpoints.save_if_best(step, state.eval_params, card, score)

    announced = False

    def save(step: int) -> None:
        nonlocal announced
        reporter.flush()
        if stop.requested and not announced:
            log.say(checkpoints.announcement(state))
            announced = True
        directory.check()
        log.sync()
        checkpoints.save(step, state, {**run.card, "last_record": log.last})

    def evaluate_now(step: int) -> Metrics | None:
        metrics = evaluate_state(run, state, stop)
        if metrics is not None:
            directory.check()
            log.write(step, metrics)
            keep_if_best(step, metrics)
        reporter.restart_clock()
        return metrics

    result = recorded_evaluation(log)
    if result is not None:
        keep_if_best(first_step, result)  # in case the run ended while that was being written
    elif first_step and plan.due(first_step, plan.eval_every):
        result = evaluate_now(first_step)
        if result is None:  # cut short once more: after another step nobody would make it
            return {}

    batches = pipeline.train_batches(run.source, first_step=first_step, **run.train_reading)
    traced = parse_profile(run.config.profile) if processes.is_first() else None
    profiler = Profiler(traced, plan.total, workdir / "profile")
    with contextlib.closing(batches), contextlib.ExitStack() as stack:
        stack.callback(profiler.stop)
        for step in range(first_step + 1, plan.total + 1):
            with reporter.waiting():
                batch = next(batches)
            profiler.before(step)
            state, metrics = run.learning.train_step(state, sharding.put_batch(batch, run.mesh))
            reporter.add(step, metrics)
            profiler.after(step, state)
            if stop.reached(step) or plan.due(step, plan.checkpoint_every):
                save(step)
            if plan.due(step, plan.eval_every) and not stop.requested:
                reporter.flush()
                result = evaluate_now(step)
            if stop.requested:  # perhaps only since the check above
                save(step)
                break
    return result or {}


def train(
    config: ConfigDict,
    workdir: Path,
    overridden: Collection[str] = (),
    stop: StopSignal | None = None,
    said: Stated = stated.NOTHING,
    begin_anew: bool = False,
) -> Metrics:
    """Trains to the end and returns the last evaluation, or {} when stopped by a signal.

    Args:
      config: stays as it is.
      workdir: what is there is continued.
      overridden: fields that the weights of `config.init_from` shall not decide.
      stop: where somebody else listens for signals already.
      said: about the weights of `config.init_from`, what their file leaves open.
      begin_anew: start at step 0 where every state that there was is damaged.

    Raises:
      UserError: for everything that the person who wrote `config` can mend.
      OSError: the system refuses something, such as room on a disk.
    """
    config, before = resolve(config, workdir, overridden, said)
    before = before or weights_to_begin_with(config, workdir, said)
    if before is not None:
        ours, theirs = config.data.channels, before.config.data.channels
        asked = ours != configuration.get_config().data.channels
        channels.check(config.init_from, ours, theirs, asked or "data.channels" in overridden)
    run = build(config, run_data.stored_classes(workdir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(about(workdir))
        directory = stack.enter_context(alone_in(workdir, processes.is_first()))
        stop = stop or stack.enter_context(StopSignal())
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
        state = begin(run, checkpoints, workdir, before, said, begin_anew)
        del before  # or the memory of its arrays would be held until the end
        first_step = int(state.step)
        saved = (checkpoints.card() or {}).get("last_record")
        log = stack.enter_context(MetricWriter(workdir, first_step, run.plan.total, saved))
        log.say(describe(run, state, workdir))
        result = loop(run, state, checkpoints, directory, log, stop)
        if stop.requested:
            log.say("stopped by a signal, state saved: run the same command to continue")
            return {}
    return result


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


# --- The door -----------------------------------------------------------------------------


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration: FILE.py[:ARGUMENT].")
    flags.DEFINE_string("workdir", None, "Where results go; what is there is continued.")
    flags.DEFINE_bool(
        "begin_anew", False, "Start at step 0 where every state that there was is damaged."
    )
    stated.define_flags()  # about the weights of config.init_from
    flags.adopt_module_key_flags(stated)


def define_all_flags() -> None:
    define_flags()
    processes.define_flags()
    flags.adopt_module_key_flags(processes)  # so that --help shows them


def from_flags() -> tuple[ConfigDict, Path, list[str]]:
    """The configuration, the work directory, and the fields set on the command line.

    Raises:
      UserError: a flag is missing, or the file cannot be read.
    """
    workdir = Path(cli.required("workdir"))
    config, overridden = cli.config_from_flag()
    return config, workdir, overridden


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    arguments = from_flags()
    with processes.together():
        cache.keep_compiled_programs()
        result = train(*arguments, said=stated.from_flags(), begin_anew=flags.FLAGS.begin_anew)
    if result and processes.is_first():
        name = next(x for x in ("accuracy", "mAP", "loss") if f"eval/{x}" in result)
        print(f"{name} {result[f'eval/{name}']:.4f} of {result['eval/count']} examples")


if __name__ == "__main__":
    cli.run(main, define_all_flags)
