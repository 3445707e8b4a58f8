"""Tries a grid of learning rates and lengths, then trains the best on all data."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.data import reading
from vit_jax.distributed.signals import StopSignal
from vit_jax.interop import stated
from vit_jax.interop.stated import Stated
from vit_jax.system import bounded
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError
from vit_jax.system.lock import alone_in
from vit_jax.training import trainer
from vit_jax.training.reporting import Diverged

# `config`: as given; `runs`: by name, what was tried and `metrics` or `failed`; `chosen`: a
# name; `final`: the chosen one, its splits and, when it is done, `metrics`.
Record = dict[str, Any]


class Setting(NamedTuple):
    """One point of the grid: a peak learning rate, and (total, warm-up) steps if swept."""

    lr: float
    steps: tuple[int, int] | None

    @property
    def name(self) -> str:
        """What its work directory is called, too."""
        length = "steps_{}-warmup_{}-".format(*self.steps) if self.steps else ""
        return f"{length}lr_{self.lr}"

    def apply(self, config: ConfigDict) -> ConfigDict:
        """A copy of `config` with these values."""
        config = config.copy_and_resolve_references()
        config.optimizer.lr = self.lr
        if self.steps:
            configuration.set_duration(config, "total", steps=self.steps[0])
            configuration.set_duration(config.optimizer, "warmup", steps=self.steps[1])
        return config


def settings(config: ConfigDict, overridden: Collection[str] = ()) -> list[Setting]:
    """Every combination of the values in `config.sweep`, each once.

    Args:
      config: as given.
      overridden: dotted names of the fields set on the command line.

    Raises:
      UserError: there are no values, one is not of its kind, or one is set elsewhere, too.
    """
    if config.objective.name != "classification":
        raise UserError(
            f"objective.name is {config.objective.name!r}, but a sweep compares accuracies: "
            f"use --config.objective.name=classification"
        )
    rates, lengths = tuple(config.sweep.lr), tuple(config.sweep.steps)
    if not rates and not lengths:
        raise UserError(
            "config.sweep has no values to try: set e.g. --config.sweep.lr='(0.001, 0.003, "
            "0.01)', or train once with python -m vit_jax.train"
        )
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
            raise UserError(f"config.sweep.lr has {rate!r}: every value must be positive")
    for pair in lengths:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_count, pair))):
            raise UserError(
                f"config.sweep.steps has {pair!r}: write pairs of total and warm-up steps, "
                f"such as '((500, 100), (2500, 200))'"
            )
    for path in overridden:
        node, _, unit = path.rpartition("_")
        length = node in ("total", "optimizer.warmup") and unit in configuration.UNITS
        if (lengths and length) or (rates and path == "optimizer.lr"):
            swept = "steps" if length else "lr"
            raise UserError(
                f"config.{path} is set, but config.sweep.{swept} has values for it: set "
                f"config.sweep.{swept} instead"
            )
    grid = [
        Setting(float(rate), pair)
        for pair in lengths or (None,)
        for rate in rates or (config.optimizer.lr,)
    ]
    return list(dict.fromkeys(grid))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def final_config(config: ConfigDict, setting: Setting) -> ConfigDict:
    """Trains on all of the training data, and looks at the test data once, at the end."""
    config = setting.apply(config)
    config.data.train_split = config.sweep.train_split
    config.data.eval_split = config.sweep.test_split
    configuration.set_duration(config, "eval_every", steps=0)
    return config


def check_splits(config: ConfigDict) -> None:
    """Finds before hours of training what would stop the final run after them.

    Raises:
      UserError: there is no test split, it is the one to choose by, or one cannot be opened.
    """
    data, sweep = config.data, config.sweep
    if not sweep.train_split:
        return
    if not sweep.test_split:
        raise UserError(
            f"config.sweep.train_split is {sweep.train_split!r}, but config.sweep.test_split "
            f"is not set: name the split that the final run is evaluated on"
        )
    if sweep.test_split == data.eval_split:
        raise UserError(
            f"config.data.eval_split and config.sweep.test_split are both "
            f"{sweep.test_split!r}: choose on a part of the training data, for example with "
            f"config.data.train_split='train[:90%]' and config.data.eval_split='train[90%:]'"
        )
    for split in (sweep.train_split, sweep.test_split):
        reading.open_source(config, split)


def read_record(config: ConfigDict, workdir: Path) -> Record:
    """What `workdir` holds of this sweep, or the beginning of one.

    Raises:
      UserError: it cannot be read, or belongs to a sweep that compares other things.
    """
    path = workdir / "sweep.json"
    fresh = {"config": configuration.to_dict(config), "runs": {}, "chosen": None, "final": None}
    if not path.exists():
        return fresh
    try:
        record = bounded.parse_json(bounded.read(path))
        stored = record["config"]
        split = stored["data"]["eval_split"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}): remove it; finished runs are kept"
        ) from error
    configuration.check_resumable(stored, config, workdir)
    if split != config.data.eval_split:
        raise UserError(
            f"{path} compares accuracies on data.eval_split={split!r}, not "
            f"{config.data.eval_split!r}: set it back, or choose another --workdir"
        )
    return fresh | record | {"config": fresh["config"]}


def write_record(record: Record, workdir: Path) -> None:
    """Writes `sweep.json`.

    Raises:
      UserError: it cannot be written.
    """
    with replacing(workdir / "sweep.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n")


def choose(runs: dict[str, Any]) -> str:
    """The name of the run with the highest accuracy, of equals the one with the lowest loss.

    Raises:
      UserError: all runs failed.
    """
    finished = {name: run["metrics"] for name, run in runs.items() if "metrics" in run}
    if not finished:
        raise UserError(f"all of {', '.join(runs)} failed: add lower values to config.sweep.lr")
    rank = lambda name: (score(finished[name]), -finished[name]["eval/loss"])
    return max(finished, key=rank)


def score_name(metrics: dict[str, Any]) -> str:
    """What runs are compared by: of images with several labels, mean average precision."""
    return "accuracy" if "eval/accuracy" in metrics else "mAP"


def score(metrics: dict[str, Any]) -> float:
    return float(metrics[f"eval/{score_name(metrics)}"])


def table(runs: dict[str, Any], chosen: str) -> str:
    """The runs, one a line."""
    width = max(map(len, runs))
    lines = [f"{'run':{width}}  {score_name(runs[chosen]['metrics']):>8}    loss"]
    for name, run in runs.items():
        metrics = run.get("metrics")
        numbers = "  failed       -"
        if metrics:
            numbers = f"{score(metrics):8.4f}{metrics['eval/loss']:8.4f}"
        lines.append(f"{name:{width}}  {numbers}{'  <- best' if name == chosen else ''}")
    return "\n".join(lines)


# Of Okabe and Ito, to be told apart by everybody; shapes say the same once more.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw(runs: dict[str, Any], chosen: str, title: str, path: Path) -> None:
    """Writes accuracy against learning rate, one curve for each length of training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.add_subplot()
    curves: dict[Any, list[Any]] = {}
    for run in runs.values():
        curves.setdefault(tuple(run["steps"] or ()), []).append(run)
    for i, (steps, members) in enumerate(curves.items()):
        points = sorted((r["lr"], score(r["metrics"])) for r in members if "metrics" in r)
        axes.plot(
            [rate for rate, _ in points],
            [accuracy for _, accuracy in points],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
            label=f"{steps[0]:,} steps" if steps else None,
        )
    best = runs[chosen]
    axes.plot(
        best["lr"], score(best["metrics"]), "o", markersize=14, fillstyle="none",
        color="black", label="chosen",
    )  # fmt: skip
    if failed := sorted({run["lr"] for run in runs.values() if "failed" in run}):
        bottom = axes.get_ylim()[0]
        axes.plot(failed, [bottom] * len(failed), "x", color="black", label="failed")
    rates = sorted({run["lr"] for run in runs.values()})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    held_out = f"held-out {score_name(best['metrics'])}"
    axes.set(xlabel="peak learning rate", ylabel=held_out, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as part:
        figure.savefig(part)


def sweep(
    config: ConfigDict,
    workdir: Path,
    overridden: Collection[str] = (),
    said: Stated = stated.NOTHING,
    begin_anew: bool = False,
) -> dict[str, Any] | None:
    """Runs all that is not done yet.

    Args:
      config: stays as it is.
      workdir: what is there is continued.
      overridden: dotted names of the fields set on the command line.
      said: about the weights of `config.init_from`.
      begin_anew: start a run at step 0 where every state that it had is damaged.

    Returns:
      What `sweep.json` holds at the end, or None when stopped by a signal.

    Raises:
      UserError: for everything that the person who wrote `config` can mend.
    """
    grid = settings(config, overridden)
    check_splits(config)
    how: dict[str, Any] = {"said": said} if said != stated.NOTHING else {}
    if begin_anew:
        how["begin_anew"] = True
    with alone_in(workdir), StopSignal() as stop:
        record = read_record(config, workdir)
        write_record(record, workdir)
        for number, setting in enumerate(grid, 1):
            if setting.name in record["runs"]:
                continue
            print(f"\nrun {number} of {len(grid)}: {setting.name}", flush=True)
            outcome = try_setting(config, setting, workdir, overridden, stop, how)
            if stop.requested:
                return None
            record["runs"][setting.name] = {"lr": setting.lr, "steps": setting.steps} | outcome
            write_record(record, workdir)
        # Values that were taken out of the grid since are not compared.
        runs = {setting.name: record["runs"][setting.name] for setting in grid}
        chosen = record["chosen"] = choose(runs)
        write_record(record, workdir)
        title = f"{config.init_from or config.model.variant} on {config.data.source}"
        draw(runs, chosen, title, workdir / "sweep.png")
        name = score_name(runs[chosen]["metrics"])
        print(f"\n{name} on {config.data.eval_split}:\n{table(runs, chosen)}", flush=True)
        if config.sweep.train_split:
            setting = next(setting for setting in grid if setting.name == chosen)
            train_final(config, setting, record, workdir, overridden, stop, how)
    return None if stop.requested else record


def try_setting(
    config: ConfigDict,
    setting: Setting,
    workdir: Path,
    overridden: Collection[str],
    stop: StopSignal,
    how: dict[str, Any],
) -> dict[str, Any]:
    """Trains one point of the grid: its `metrics`, or why it `failed`."""
    try:
        run = setting.apply(config)
        return {"metrics": trainer.train(run, workdir / setting.name, overridden, stop, **how)}
    except Diverged as error:
        print(f"{setting.name} failed: {error}")
        return {"failed": str(error)}


def train_final(
    config: ConfigDict,
    setting: Setting,
    record: Record,
    workdir: Path,
    overridden: Collection[str],
    stop: StopSignal,
    how: dict[str, Any],
) -> None:
    """Trains with the chosen values on all data, and puts the test result on record.

    Raises:
      UserError: `final` stems from another choice.
    """
    train_split, test_split = config.sweep.train_split, config.sweep.test_split
    plan = {"run": setting.name, "train_split": train_split, "test_split": test_split}
    before = record["final"]
    if before:
        changed = [name for name, value in plan.items() if before[name] != value]
        if not changed and "metrics" in before:
            return
        if changed and (workdir / "final").exists():
            name = changed[0]
            raise UserError(
                f"{workdir / 'final'} was made with {name} {before[name]!r}, not "
                f"{plan[name]!r}: move it away to make it anew"
            )
    record["final"] = plan
    write_record(record, workdir)
    print(f"\nfinal run: {setting.name} on {train_split}", flush=True)
    config = final_config(config, setting)
    metrics = trainer.train(config, workdir / "final", overridden, stop, **how)
    if metrics:
        record["final"] = plan | {"metrics": metrics}
        write_record(record, workdir)
