"""Runs the digits versions of configs/paper and draws what they show.

  python docs/paper/run_digits.py --runs=runs/paper
  python docs/paper/run_digits.py --runs=runs/paper --only=table8,figure9 --seeds=0,1

Every run is a work directory below --runs, named after its configuration: one that is finished
is kept, one that is not goes on, and experiments with a run in common share it. The numbers go
to docs/paper/digits.json, a figure for each experiment beside it and the tables of
configs/paper/README.md, with the seeds that are finished by then; all of it is about an hour of
one CPU core.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parents[2]))  # the root of the repository, for `configs`

from configs.paper import figure3, figure4, figure5, figure8, figure9, masked_patches, table8
from vit_jax import config as configuration
from vit_jax.analysis import plots
from vit_jax.command_line import cli
from vit_jax.models import registry
from vit_jax.training import trainer

HERE = Path(__file__).parent
README = HERE.parents[1] / "configs/paper/README.md"
MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (table8, figure9, figure8, figure3, figure4, figure5, masked_patches)
}

# Okabe and Ito's colours without their yellow, which is too light for a line.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#888888",
)
MARKERS = "osD^vPX*"


BASE = "base"  # label of a setting that is a point of every line


class Setting(NamedTuple):
    """One row of an experiment: what is trained, and where its figure has it.

    Attributes:
      argument: of the configuration file, without `,digits`.
      label: of its line in the figure; in figures against `x` several settings share one.
      x: where on the horizontal axis; None: in a figure of curves.
      begins_with: argument of the run whose weights it begins with, if any.
    """

    argument: str
    label: str
    x: float | None = None
    begins_with: str | None = None


def _scaling() -> Iterator[Setting]:
    """Figure 8: each dimension from the base, x being its factor; of patches, of their rows."""
    values = {
        "depth": {1: 0.5, 4: 2},
        "width": {32: 0.5, 128: 2},
        "mlp": {64: 0.5, 256: 2},
        "patch": {8: 0.5, 2: 2},
    }
    for name, factors in values.items():
        label = {"mlp": "MLP width", "patch": "patches a side"}.get(name, name)
        for value, factor in factors.items():
            yield Setting(f"{name}={value}", label, factor)
    yield Setting("base", BASE, 1.0)


EXPERIMENTS: dict[str, list[Setting]] = {
    "figure4": [
        Setting(f"{variant},{percent}%", variant, round(percent * 14.37))
        for percent in (10, 30, 100)
        for variant in ("B/32", "L/32", "R50x1")
    ],
    "figure9": [
        Setting(f"{head},lr={rate}", f"{head}, lr {rate}")
        for head in ("cls_mlp", "cls_linear", "gap_linear")
        for rate in ("2e-3", "7.5e-4")
    ],
    "table8": [
        Setting("none", "none"),
        Setting("1d,stem", "1-D, stem"),
        Setting("1d,layers", "1-D, each layer"),
        Setting("1d,shared", "1-D, shared"),
        Setting("2d,stem", "2-D, stem"),
        Setting("2d,layers", "2-D, each layer"),
        Setting("2d,shared", "2-D, shared"),
        Setting("relative", "relative"),
    ],
    "masked_patches": [
        *(Setting(target, target) for target in masked_patches.TARGETS),
        Setting("scratch", "from scratch"),
        *(
            Setting("finetune", f"after {target}", begins_with=target)
            for target in masked_patches.TARGETS
        ),
    ],
    "figure3": [
        Setting("B/32", "none"),
        Setting("B/32,weight_decay=0.1", "weight decay 0.1"),
        Setting("B/32,weight_decay=1", "weight decay 1"),
        Setting("B/32,dropout=0.1", "dropout 0.1"),
        Setting("B/32,label_smoothing=0.1", "label smoothing 0.1"),
    ],
    "figure5": [
        Setting(variant, variant, -1.0)  # the cost, which is computed
        for variant in ("B/32", "L/32", "R50+B/32", "R50x1", "R101x1")
    ],
    "figure8": list(_scaling()),
}
X_AXIS = {
    "figure4": "training images (logarithmic)",
    "figure5": "training cost, GFLOPs (logarithmic)",
    "figure8": "factor from the base (logarithmic)",
}

# --- Run ----------------------------------------------------------------------------------


def configure(name: str, setting: Setting, seed: int, runs: Path) -> ConfigDict:
    config: ConfigDict = MODULES[name].get_config(f"{setting.argument},digits")
    config.seed = seed
    if setting.begins_with:
        before = configure(name, Setting(setting.begins_with, ""), seed, runs)
        config.init_from = str(workdir(before, runs))
    return config


def workdir(config: ConfigDict, runs: Path) -> Path:
    """The directory of a run, named after what its configuration changes.

    So equal configurations have the same one, also after a field was added to all of them.
    """
    fields, defaults = (
        configuration.flatten(configuration.to_dict(each))
        for each in (config, configuration.get_config())
    )
    changed = {name: value for name, value in fields.items() if value != defaults[name]}
    text = json.dumps(changed, sort_keys=True)
    return runs / hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluations(config: ConfigDict, runs: Path) -> list[dict[str, Any]]:
    """What a finished run measured, in order of steps; nothing of one that is not finished."""
    try:
        lines = (workdir(config, runs) / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    records = [record for record in map(json.loads, lines) if "eval/loss" in record]
    finished = records and records[-1]["step"] == config.total_steps
    return records if finished else []


def run(config: ConfigDict, runs: Path) -> None:
    """Trains, unless that is done already; a signal ends everything."""
    if evaluations(config, runs):
        return
    if not trainer.train(config, workdir(config, runs)):
        sys.exit("stopped by a signal: run the same command to continue")
    jax.clear_caches()  # the next run has another program


def gigaflops(config: ConfigDict) -> int:
    """Of a training: three times the forward pass, as XLA counts it before optimising."""
    model = registry.build_model(config, num_classes=10)
    image = jax.ShapeDtypeStruct((1, *config.image_size, config.data.channels), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0))
    cost = jax.jit(model.apply).lower(params, image).cost_analysis()
    return round(3 * cost["flops"] * config.total_steps * config.batch_size / 1e9)


# --- Collect ------------------------------------------------------------------------------


def collect(name: str, seeds: list[int], runs: Path) -> dict[str, Any]:
    """The measurements of an experiment: {label and argument: seeds, steps, curves}."""
    found: dict[str, Any] = {}
    for setting in EXPERIMENTS[name]:
        configs = {seed: configure(name, setting, seed, runs) for seed in seeds}
        curves = {seed: evaluations(config, runs) for seed, config in configs.items()}
        curves = {seed: curve for seed, curve in curves.items() if curve}
        if not curves:
            continue
        measure = "accuracy" if setting.argument not in masked_patches.TARGETS else "loss"
        x = setting.x if setting.x != -1.0 else gigaflops(configs[seeds[0]])
        found[key(setting)] = {
            "label": setting.label,
            "x": x,
            "measure": measure,
            "seeds": list(curves),
            "steps": [record["step"] for record in next(iter(curves.values()))],
            "curves": [
                [round(record[f"eval/{measure}"], 4) for record in curve]
                for curve in curves.values()
            ],
        }
    return found


def key(setting: Setting) -> str:
    """`finetune after mean_colour`, or the argument where that says it all."""
    return setting.argument + f" after {setting.begins_with}" * bool(setting.begins_with)


# --- Draw ---------------------------------------------------------------------------------


def draw(name: str, rows: dict[str, Any]) -> Figure:
    figure = Figure((plots.WIDTH, 3.4), layout="constrained")
    rows = {key: row for key, row in rows.items() if row["measure"] == "accuracy"}
    if name in X_AXIS:
        axes = figure.add_subplot()
        against_x(axes, rows)
        axes.set_xlabel(X_AXIS[name])
        axes.set_ylabel("accuracy on the test images (%)")
    else:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        curves(left, rows)
        ends(right, rows)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 5 if name in X_AXIS else 3
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def curves(axes: Axes, rows: dict[str, Any]) -> None:
    """Accuracy against step: the mean of the seeds."""
    for i, row in enumerate(rows.values()):
        mean = 100 * np.mean(row["curves"], axis=0)
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "linewidth": 1.2}
        axes.plot(row["steps"], mean, label=row["label"], **style)
    axes.set(xlabel="step", ylabel="accuracy on the test images (%)")
    axes.grid(alpha=0.3)


def ends(axes: Axes, rows: dict[str, Any]) -> None:
    """The last accuracy of each seed, and a bar at their mean."""
    for i, row in enumerate(rows.values()):
        last = 100 * np.array(row["curves"])[:, -1]
        style = {"color": COLOURS[i], "marker": MARKERS[i], "alpha": 0.7, "linewidths": 0}
        axes.scatter(last, [i] * len(last), 18, **style)
        axes.plot([last.mean()] * 2, [i - 0.35, i + 0.35], color=COLOURS[i], linewidth=2)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("each seed at the end (%)")
    axes.grid(alpha=0.3, axis="x")


def against_x(axes: Axes, rows: dict[str, Any]) -> None:
    """The last accuracy against `x`, a line for each label: mean, and from least to most."""
    labels = [
        label for label in dict.fromkeys(row["label"] for row in rows.values()) if label != BASE
    ]
    for i, label in enumerate(labels):
        mine = [row for row in rows.values() if row["label"] in (label, BASE)]
        mine = sorted(mine, key=lambda row: row["x"])
        last = [100 * np.array(row["curves"])[:, -1] for row in mine]
        mean = np.array([each.mean() for each in last])
        spread = [
            mean - [each.min() for each in last],
            np.array([each.max() for each in last]) - mean,
        ]
        apart = 1.015 ** (i - (len(labels) - 1) / 2) if len(mine) > 1 else 1  # or they overlap
        x = np.array([row["x"] for row in mine]) * apart
        style = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5, "capsize": 2}
        axes.errorbar(x, mean, spread, label=label, linewidth=1.2, **style)
    axes.set_xscale("log")
    ticks = sorted({row["x"] for row in rows.values()})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# --- Tables -------------------------------------------------------------------------------


def table(rows: dict[str, Any]) -> str:
    """Markdown: the last evaluation of each setting, with the seeds that are finished."""
    lines = ["| argument | at the end, mean | each seed |", "|---|---|---|"]
    for name, row in rows.items():
        last = [curve[-1] for curve in row["curves"]]
        show = "{:.3f}".format if row["measure"] == "loss" else "{:.1%}".format
        mean = f"{show(np.mean(last))} ({row['measure']})"
        lines.append(f"| `{name}` | {mean} | {', '.join(map(show, last))} |")
    return "\n".join(lines)


def update_tables(text: str, results: dict[str, Any]) -> str:
    """Puts each table between its marks, `<!-- NAME -->` and `<!-- end -->`."""
    for name, rows in results.items():
        mark = f"<!-- {name} -->\n"
        start = text.index(mark) + len(mark)
        text = text[:start] + table(rows) + "\n" + text[text.index("<!-- end -->", start) :]
    return text


# --- The command line ---------------------------------------------------------------------


def define_flags() -> None:
    flags.DEFINE_string("runs", None, "Where the work directories are kept.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds: everything with one, then the next.")
    flags.DEFINE_list("only", list(EXPERIMENTS), "Experiments to run.")
    flags.DEFINE_bool("draw_only", False, "Run nothing: what is finished is drawn.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    runs = Path(cli.required("runs"))
    seeds = [int(seed) for seed in flags.FLAGS.seeds]
    for seed in [] if flags.FLAGS.draw_only else seeds:
        for name in flags.FLAGS.only:
            for setting in EXPERIMENTS[name]:
                print(f"--- {name}: {key(setting)}, seed {seed}", flush=True)
                run(configure(name, setting, seed, runs), runs)
    results = {name: collect(name, seeds, runs) for name in EXPERIMENTS}
    for name, rows in results.items():
        if rows:
            (HERE / f"{name}.png").write_bytes(plots.png(draw(name, rows)))
    (HERE / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(update_tables(README.read_text(), results))


if __name__ == "__main__":
    cli.run(main, define_flags)
