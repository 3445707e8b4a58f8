"""From the first step to the last: update, report, save, evaluate."""

import contextlib

import jax

from vit_jax.checkpoints.directory import Checkpoints
from vit_jax.checkpoints.metadata import Card
from vit_jax.distributed import processes, sharding
from vit_jax.distributed.signals import StopSignal
from vit_jax.evaluation.averages import evaluate
from vit_jax.objectives.objective import Objective
from vit_jax.system.lock import WorkDirectory
from vit_jax.training.logging import MetricWriter
from vit_jax.training.reporting import Metrics, Profiler, Reporter, matmul_peak
from vit_jax.training.run import Run
from vit_jax.training.step import TrainState, carried_of


def evaluate_state(run: Run, state: TrainState, stop: StopSignal) -> Metrics | None:
    """Metrics over the whole evaluation split, or None if a signal came first."""
    batches = run.eval_reading.eval_batches(run.eval_source, run.eval_batch_size)
    carried = carried_of(state, run.learning.objective, run.learning.frozen)
    with contextlib.closing(batches):
        averages = evaluate(
            lambda batch: run.learning.eval_step(state.eval_params, carried, batch),
            (sharding.put_batch(batch, run.mesh) for batch in batches),
            lambda: stop.requested,
        )
    if averages is None:
        return None
    metrics = {f"eval/{name}": value for name, value in averages.items()}
    every = run.plan.few_shot_every
    if every is not None and run.plan.due(int(state.step), every):
        metrics |= run.few_shot(state.eval_params["model"])
    return metrics


def score_of(objective: Objective, metrics: Metrics) -> float | None:
    """What the best checkpoint has most of; None where this evaluation did not measure it."""
    name = objective.best.removeprefix("-")
    if name not in metrics:
        return None
    return -metrics[name] if objective.best.startswith("-") else metrics[name]


def recorded_evaluation(log: MetricWriter) -> Metrics | None:
    """The evaluation that the log holds for the step that it goes on from, if any."""
    record = log.evaluation()
    return record and {name: value for name, value in record.items() if name != "step"}


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
    batch_size, objective, frozen = (
        run.train_reading.batch_size,
        run.learning.objective,
        run.learning.frozen,
    )
    # All devices of one processor share its cores.
    devices = jax.process_count() if jax.default_backend() == "cpu" else run.mesh.size
    peak = devices * matmul_peak(objective.model.config.dtype)
    reporter = Reporter(log, due, batch_size, batch_size * objective.flops, peak, workdir)

    def keep_if_best(step: int, metrics: Metrics) -> None:
        score = score_of(objective, metrics)
        if score is not None:
            card: Card = {**run.card, "metrics": metrics}
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

    batches = run.train_reading.train_batches(run.source, first_step)
    traced = run.profile if processes.is_first() else None
    profiler = Profiler(traced, plan.total, workdir / "profile")
    with contextlib.closing(batches), contextlib.ExitStack() as stack:
        stack.callback(profiler.stop)
        for step in range(first_step + 1, plan.total + 1):
            with reporter.waiting():
                batch = next(batches)
            profiler.before(step)
            on_device = sharding.put_batch(batch, run.mesh)
            state, metrics = run.learning.train_step(state, on_device, frozen)
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
