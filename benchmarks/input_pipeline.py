"""The speed of reading images from files: `python -m benchmarks.input_pipeline`.

Makes JPEGs of about the size of ImageNet's and PNGs of CIFAR's in a temporary folder, and
measures every installed contestant in turns. Between its turns a contestant is stopped with all
its workers, so that it cannot work ahead, or while another is measured.
"""

import importlib.metadata
import importlib.util
import os
import signal
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from benchmarks import conditions
from benchmarks.input_contestants import EVALUATION, RANDAUGMENT, TRANSFORMS
from benchmarks.measure import Row, save, speed_ratio
from benchmarks.peers import OURS, REFERENCE, Contestant
from benchmarks.processes import Failed, Process
from benchmarks.report import SHOWN, table
from benchmarks.task import Task
from vit_jax.command_line import cli
from vit_jax.system.errors import UserError

_TIMM, _TENSORFLOW = ("torch", "torchvision", "timm"), ("tensorflow",)
CONTESTANTS = {
    found.name: found
    for found in (
        Contestant(f"{OURS}, threads", "input", "ours", {"workers": 0}),
        Contestant(f"{OURS}, 1 worker", "input", "ours", {"workers": 1}),
        Contestant(f"{OURS}, 2 workers", "input", "ours", {"workers": 2}),
        Contestant("timm, no worker", "input", "timm", {"workers": 0}, needs=_TIMM),
        Contestant("timm, 1 worker", "input", "timm", {"workers": 1}, needs=_TIMM),
        Contestant("timm, 2 workers", "input", "timm", {"workers": 2}, needs=_TIMM),
        Contestant("tf.data", "input", "tf_data", {"workers": 0}, needs=_TENSORFLOW),
    )
}
TICKS = os.sysconf("SC_CLK_TCK")  # of the clock of CPU times, in a second
MODULES = ("grain", "PIL", "torchvision", "tensorflow")


class Images(NamedTuple):
    """The files that are read, and the batches made of them."""

    name: str
    size: tuple[int, int]  # height, width of the files
    suffix: str
    count: int
    to: int  # height and width of the batches
    batch_size: int

    def quick(self) -> "Images":
        return self._replace(count=8, batch_size=4)


IMAGES = (
    Images("JPEG, 500 x 375, to 224", (375, 500), "jpg", 512, 224, 32),
    Images("PNG, 32 x 32", (32, 32), "png", 4096, 32, 256),
)


def make_images(images: Images, folder: Path) -> None:
    """Writes as many files, parts of two photographs; the JPEGs have 90 kB on average."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    height, width = images.size
    (folder / "photos").mkdir(parents=True)
    for i in range(images.count):
        photo = photos[i % 2]
        # Cropped so that the files differ, to the aspect ratio of the file.
        share = rng.uniform(0.8, 1.0)
        h = min(photo.height, photo.width * height / width) * share
        w = h * width / height
        top, left = rng.uniform(0, photo.height - h), rng.uniform(0, photo.width - w)
        box = (left, top, left + w, top + h)
        part = photo.resize((width, height), Image.Resampling.BICUBIC, box)
        part.save(folder / "photos" / f"{i:05d}.{images.suffix}", quality=97)


class Turn(NamedTuple):
    """Seconds of one batch in one turn."""

    seconds: float
    cpu_seconds: float  # of all cores together


class Sleeper(Process):
    """A contestant that is stopped, with all its workers, unless it has its turn."""

    def __init__(self, contestant: Contestant, task: Task, threads: int) -> None:
        super().__init__(contestant, task, threads)
        self._signal(signal.SIGSTOP)

    def turn(self, batches: int) -> Turn:
        """Raises Failed."""
        self._signal(signal.SIGCONT)
        before = cpu_seconds(self._process.pid)
        seconds = self.seconds(batches)
        used = cpu_seconds(self._process.pid) - before
        self._signal(signal.SIGSTOP)
        return Turn(seconds, max(used, 1 / TICKS) / batches)

    def batches_in(self, sample: float) -> int:
        """How many batches it makes in as many seconds, measured in turns of growing length.

        The first turns are too fast, because batches were made before they began.
        """
        batches = 2  # as many as two workers deliver at a time
        while (seconds := self.turn(batches).seconds) * batches < sample / 2:
            batches *= 2
        return max(1, round(sample / seconds))

    def end(self) -> dict[str, float]:
        self._signal(signal.SIGCONT)
        return super().end()

    def close(self) -> None:
        self._signal(signal.SIGKILL)  # its workers, too, and if it has left some behind
        super().close()

    def _signal(self, number: int) -> None:
        # It may have failed before it led a group, or at any time since.
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def cpu_seconds(group: int) -> float:
    """Seconds that all processes of a group have spent on any core so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, group, ...
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])  # in the program and in the system
    return ticks / TICKS


def take_turns(
    contestants: Mapping[str, Contestant], task: Task, threads: int, rounds: int, sample: float
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """The turns of each, about `sample` seconds long, and why some failed.

    As `processes.measure`, with sleep between the turns.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    sleepers: dict[str, Sleeper] = {}
    failed: dict[str, str] = {}
    batches: dict[str, int] = {}
    try:
        for name, contestant in contestants.items():
            try:
                sleepers[name] = Sleeper(contestant, task, threads)
                batches[name] = sleepers[name].batches_in(sample)
            except Failed as error:
                failed[name] = str(error)
        for number in range(rounds):
            order = list(contestants) if number % 2 == 0 else list(reversed(contestants))
            for name in order:
                if name in failed:
                    continue
                try:
                    turns[name].append(sleepers[name].turn(batches[name]))
                except Failed as error:
                    failed[name] = str(error)
        for name, sleeper in sleepers.items():
            if name not in failed:
                sleeper.end()
    finally:
        for sleeper in sleepers.values():
            sleeper.close()
    return turns, failed


def rows(
    about: Row, batch_size: int, turns: Mapping[str, list[Turn]], failed: Mapping[str, str]
) -> list[Row]:
    """A row for each; ratios are against the fastest of timm, each time within the round."""
    found = []
    done = {
        name: ([turn.seconds for turn in own], [turn.cpu_seconds for turn in own])
        for name, own in turns.items()
        if name not in failed
    }
    peers = [name for name in done if name.startswith(REFERENCE)]
    for name in turns:
        row: Row = {**about, "batch_size": batch_size, "contestant": name}
        if name in failed:
            found.append(row | {"failed": failed[name]})
            continue
        row |= {"seconds": done[name][0], "cpu_seconds": done[name][1]}
        wall, cpu = map(statistics.median, done[name])
        row |= {"milliseconds": 1000 * wall, "images_per_second": batch_size / wall}
        row["images_per_core_second"] = batch_size / cpu
        for i, field in enumerate(("ratio", "core_ratio")):
            if peers:
                best = min(peers, key=lambda peer, i=i: statistics.median(done[peer][i]))  # type: ignore[misc]
                row[field] = speed_ratio(done[name][i], done[best][i])._asdict()
        found.append(row)
    return found


def choose(names: list[str] | None) -> dict[str, Contestant]:
    """Those that a flag names, or all that are here.

    Raises:
      UserError: one of the names is not here.
    """
    here = {
        name: found
        for name, found in CONTESTANTS.items()
        if all(map(importlib.util.find_spec, found.needs))
    }
    for name in names or ():
        if name not in here:
            raise UserError(
                f"--contestants has {name!r}, which is not here: use some of "
                f"{'; '.join(here)}, or install the [bench] extra"
            )
    return {name: here[name] for name in names or here}


def choose_transforms(names: list[str] | None) -> tuple[str, ...]:
    """Those that a flag names, or all. Raises UserError for one that does not exist."""
    for name in names or ():
        if name not in TRANSFORMS:
            raise UserError(f"--transforms has {name!r}: use some of {'; '.join(TRANSFORMS)}")
    return tuple(names or TRANSFORMS)


def task_of(images: Images, training: bool) -> Task:
    """The part of a task that is about images; there is no network."""
    size = (images.to, images.to)
    return Task(size, 1, 0, 0, 0, 0, images.batch_size, "uint8", training, "cpu")


def prepared(
    contestants: Mapping[str, Contestant], folder: Path, transform: str
) -> dict[str, Contestant]:
    """Contestants that read `folder`, without those that do not have the transform."""
    about = {"folder": str(folder), "transform": transform}
    return {
        name: found._replace(options={**found.options, **about})
        for name, found in contestants.items()
        if not (found.builder == "tf_data" and transform == RANDAUGMENT)
    }


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    if not Path("/proc/self/stat").exists():
        raise UserError("this benchmark reads CPU times from /proc, so it needs Linux")
    given = flags.FLAGS
    chosen = choose(given.contestants)
    transforms = choose_transforms(given.transforms)
    threads = conditions.limit_threads(given.threads)
    looked = conditions.look(threads)
    installed = importlib.metadata.packages_distributions()
    for module in MODULES:
        for package in installed.get(module, ())[:1]:  # tensorflow may be tensorflow_cpu
            looked["versions"][package] = importlib.metadata.version(package)
    record: dict[str, Any] = {
        "benchmark": "input_pipeline", "conditions": looked, "results": []
    }  # fmt: skip
    rounds, sample = (1, 0.1) if given.quick else (given.rounds, given.sample)
    for images in IMAGES:
        images = images.quick() if given.quick else images
        with tempfile.TemporaryDirectory() as folder:
            make_images(images, Path(folder) / "data")
            for transform in transforms:
                turns, failed = take_turns(
                    prepared(chosen, Path(folder) / "data", transform),
                    task_of(images, transform != EVALUATION),
                    threads,
                    rounds,
                    sample,
                )
                about = {"images": images.name, "transform": transform}
                found = rows(about, images.batch_size, turns, failed)
                record["results"] += found
                save(Path(given.output), record)
                print(table(found, SHOWN["input_pipeline"]), flush=True)


def define_flags() -> None:
    flags.DEFINE_multi_string("contestants", None, "Only this one; may be repeated.")
    flags.DEFINE_multi_string("transforms", None, f"Only this one of: {'; '.join(TRANSFORMS)}.")
    flags.DEFINE_integer("rounds", 7, "How often each takes its turn.", lower_bound=1)
    flags.DEFINE_float("sample", 2.0, "Seconds of a turn.", lower_bound=0.0)
    flags.DEFINE_integer("threads", None, "CPU cores to use; default: all.", lower_bound=1)
    flags.DEFINE_bool("quick", False, "Only to see it work: few images, one short round.")
    flags.DEFINE_string("output", "benchmarks/results/input_pipeline.json", "The JSON file.")


if __name__ == "__main__":
    cli.run(main, define_flags)
