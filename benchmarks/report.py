"""Tables and plots of what was measured: `python -m benchmarks.report FILE.json ...`.

Prints tables in Markdown and draws FILE.png beside each file. With --page=FILE.md the tables
replace the text of that page between the two lines `<!-- measured -->`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.measure import Row, speed_ratio
from benchmarks.peers import OURS
from vit_jax.analysis.plots import BLUE, GREY, WIDTH, png
from vit_jax.command_line import cli
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

MIB = 2**20
MARK = "<!-- measured -->"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _seconds(value: float) -> str:
    return f"{value:.1f}"


def _mebibytes(value: float) -> str:
    return f"{value / MIB:.0f}"


# Field of a row: heading, and how a cell is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("model", str),
    "images": ("images", str),
    "transform": ("transform", str),
    "axis": ("what grows", str),
    "value": ("to", str),
    "batch_size": ("batch", str),
    "dtype": ("precision", str),
    "contestant": ("contestant", str),
    "ours": ("our fastest", str),
    "theirs": ("their fastest", str),
    "lead": ("our speed / theirs", _spread),
    "milliseconds": ("ms", _three_digits),
    "images_per_second": ("images/s", _three_digits),
    "images_per_core_second": ("images/s per core", _three_digits),
    "ratio": ("speed / timm's", _spread),
    "core_ratio": ("per core / timm's", _spread),
    "ratio_float32": ("speed / timm's in float32", _spread),
    "of_peak": ("of the product's FLOP/s", lambda value: f"{value:.0%}"),
    "import": ("import, s", _seconds),
    "init": ("initialise, s", _seconds),
    "trace": ("trace, s", _seconds),
    "compile": ("compile, s", _seconds),
    "first_step": ("first step, s", _seconds),
    "total": ("all until it is done, s", _seconds),
    "program_bytes": ("XLA's plan, MiB", _mebibytes),
    "peak_bytes": ("peak memory, MiB", _mebibytes),
    "memory_ratio": ("peak / timm's", lambda value: f"{value:.2f}"),
    "page_faults": ("page faults a step", lambda value: f"{value:.0f}"),
    "time exponent": ("exponent of time", lambda value: f"{value:.2f}"),
    "memory exponent": ("of XLA's plan", lambda value: f"{value:.2f}"),
    "work exponent": ("of counted work", lambda value: f"{value:.2f}"),
    "failed": ("failed", str),
}
_GROUP = ("model", "images", "transform", "batch_size", "dtype")
_WHO = ("model", "batch_size", "dtype", "contestant")
_SPEED = ("images_per_second", "ratio", "ratio_float32", "of_peak")
# The columns and the plot of each benchmark.
SHOWN = {
    "inference": (*_WHO, *_SPEED, "failed"),
    "train_step": (*_WHO, *_SPEED, "peak_bytes", "memory_ratio", "page_faults", "failed"),
    "compile_time": (
        *_WHO, "import", "init", "trace", "compile", "first_step", "total", "failed",
    ),
    "memory": (*_WHO, "program_bytes", "peak_bytes", "memory_ratio", "failed"),
    "input_pipeline": (
        "images", "transform", "batch_size", "contestant",
        "images_per_second", "ratio", "images_per_core_second", "core_ratio", "failed",
    ),
    "scaling": ("axis", "value", "dtype", "milliseconds", "program_bytes", "failed"),
}  # fmt: skip
PLOTTED: dict[str, tuple[str, Callable[[Row], dict[str, float] | None]]] = {
    "inference": ("speed / timm's (median and quartiles)", lambda row: row.get("ratio")),
    "train_step": ("speed / timm's (median and quartiles)", lambda row: row.get("ratio")),
    "compile_time": (
        "seconds until the first update is done",
        lambda row: {"median": row["total"]},
    ),
    "memory": ("peak memory, MiB", lambda row: {"median": row["peak_bytes"] / MIB}),
    "input_pipeline": (
        "speed per core / timm's (median and quartiles)",
        lambda row: row.get("core_ratio"),
    ),
}


def table(rows: list[Row], shown: tuple[str, ...] = tuple(COLUMNS)) -> str:
    """Markdown; of the columns of `shown` those that any row has."""
    used = [name for name in shown if any(name in row for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[name][0] for name in used) + " |"]
    lines.append("|" + "---|" * len(used))
    for found in rows:
        cells = [COLUMNS[name][1](found[name]) if name in found else "" for name in used]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def groups(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows that can be compared: those of each network, batch size and precision.

    Keys are pairs of a field and its value.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple((name, row[name]) for name in _GROUP if name in row)
        found.setdefault(key, []).append(row)
    return found


def leads(rows: list[Row]) -> list[Row]:
    """Our fastest against the fastest of all others, for each group that has both."""
    found = []
    for key, inside in groups([row for row in rows if "failed" not in row]).items():
        fastest = sorted(inside, key=lambda row: row["milliseconds"])
        ours = [row for row in fastest if row["contestant"].startswith(OURS)]
        theirs = [row for row in fastest if not row["contestant"].startswith(OURS)]
        if ours and theirs:
            lead = speed_ratio(ours[0]["seconds"], theirs[0]["seconds"])._asdict()
            names = {"ours": ours[0]["contestant"], "theirs": theirs[0]["contestant"]}
            found.append(dict(key) | names | {"lead": lead})
    return found


def conditions(found: dict[str, Any]) -> str:
    """One paragraph: date, machine, versions and load."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    before, after = (
        "/".join(f"{load:.1f}" for load in found[name])
        for name in ("load_before", "load_after")
    )
    return (
        f"{found['date']} (UTC); {found['device']} ({found['backend']}), {found['threads']} "
        f"threads; Python {found['python']}, {versions}; load averages over 1, 5 and 15 "
        f"minutes {before} before and {after} after."
    )


def section(record: dict[str, Any]) -> str:
    """One benchmark in Markdown."""
    benchmark, rows = record["benchmark"], record["results"]
    parts = [f"## {benchmark}", conditions(record["conditions"])]
    if benchmark in ("inference", "train_step", "input_pipeline") and (found := leads(rows)):
        parts.append(table(found))
    parts.append(table(rows, SHOWN[benchmark]))
    if record.get("fits"):
        parts.append(table(record["fits"]))
    return "\n\n".join(parts)


def plot(record: dict[str, Any]) -> Figure:
    """Bars, one panel for each group; for `scaling` lines, one panel for each axis."""
    rows = [row for row in record["results"] if "failed" not in row]
    if record["benchmark"] == "scaling":
        return _lines(rows)
    label, value = PLOTTED[record["benchmark"]]
    panels = groups([row for row in rows if value(row) is not None])
    tallest = max(map(len, panels.values()), default=1)
    figure, cells = _grid(len(panels), 0.25 * tallest + 0.7)
    for axes, (key, inside) in zip(cells, panels.items(), strict=False):
        title = ", ".join(
            f"batch {value}" if name == "batch_size" else value for name, value in key
        )
        # Long titles would leave the picture, because they are centred on the axes.
        axes.set_title(title, fontsize=min(9, 9 * 38 / len(title)))
        _bars(axes, [row["contestant"] for row in inside], [value(row) or {} for row in inside])
        if "ratio" in inside[0] and label.startswith("speed"):
            axes.axvline(1.0, color="black", linewidth=0.8)
    figure.supxlabel(label, fontsize=9)
    return figure


def _grid(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in two columns, each `height` inches; unused ones stay empty."""
    across = max(1, min(panels, 2))
    down = max(1, -(-panels // across))
    figure = Figure((WIDTH, down * height + 0.3), layout="constrained")
    cells = list(figure.subplots(down, across, squeeze=False).ravel())
    for axes in cells[panels:]:
        axes.set_axis_off()
    return figure, cells


def _bars(axes: Axes, names: list[str], values: list[dict[str, float]]) -> None:
    middle = [value["median"] for value in values]
    spread = [
        [value["median"] - value.get("low", value["median"]) for value in values],
        [value.get("high", value["median"]) - value["median"] for value in values],
    ]
    colours = [BLUE if name.startswith(OURS) else GREY for name in names]
    axes.barh(names, middle, color=colours, xerr=spread, ecolor="black")
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def _lines(rows: list[Row]) -> Figure:
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, cells = _grid(len(names), 2.2)
    for axes, name in zip(cells, names, strict=False):
        for dtype, colour in (("float32", BLUE), ("bfloat16", GREY)):
            inside = [row for row in rows if (row["axis"], row["dtype"]) == (name, dtype)]
            x, y = ([row[field] for row in inside] for field in ("value", "milliseconds"))
            axes.loglog(x, y, "o-", color=colour, label=dtype, markersize=3)
            axes.set_xticks(x, map(str, x))
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(name, fontsize=9)
        axes.set_ylabel("ms", fontsize=9)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def read(path: Path) -> dict[str, Any]:
    """A file that a benchmark wrote.

    Raises:
      UserError: it does not exist, or is another kind of file.
    """
    try:
        record = json.loads(path.read_text())
        SHOWN[record["benchmark"]], record["conditions"]["date"], record["results"][0]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not what a benchmark wrote: pass a file of its --output"
        ) from error
    return record


def fill(page: Path, text: str, mark: str = MARK) -> None:
    """Puts `text` between the two `mark`s of a page.

    Raises:
      UserError: the page cannot be read, or has not two marks.
    """
    try:
        parts = page.read_text().split(mark)
    except OSError as error:
        raise UserError(f"--page={page} cannot be read: {error.strerror}") from error
    if len(parts) != 3:
        raise UserError(
            f"--page={page} holds {mark} {len(parts) - 1} times: write it on two lines, "
            f"between which the tables shall stand"
        )
    with replacing(page) as part:
        part.write_text(f"{parts[0]}{mark}\n\n{text}\n\n{mark}{parts[2]}")


def main(positional: list[str]) -> None:
    if not positional:
        raise UserError("no file was given: pass the JSON files of benchmarks")
    records = {path: read(path) for path in map(Path, positional)}
    text = "\n\n".join(map(section, records.values()))
    print(text)
    for path, record in records.items():
        with replacing(path.with_suffix(".png")) as part:
            part.write_bytes(png(plot(record)))
    if flags.FLAGS.page:
        fill(Path(flags.FLAGS.page), text)


def define_flags() -> None:
    flags.DEFINE_string("page", None, "A page of Markdown to put the tables into.")


if __name__ == "__main__":
    cli.run(main, define_flags)
