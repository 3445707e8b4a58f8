"""Random trials of reliability for as long as wanted, and a table of what came of them.

python -m tests.campaign --hours=2 --seed=1 [--only=kills] [--output=FILE.md]

Deterministic from the seed, but for the clock: which trials are made, not at which instruction
a signal arrives. Ends with exit code 1 if anything was wrong.
"""

import argparse
import collections
import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.campaign import (
    bit_flips,
    file_systems,
    flatness,
    inputs,
    kills,
    servers,
    two_starts,
)
from tests.campaign.runs import Outcome


class Member(NamedTuple):
    """A kind of trials. Another one is added to `MEMBERS`.

    Attributes:
      run: makes so many trials, in a folder of its own, from a seed.
      trials: how many it makes before the next member has its turn.
      told: what the table says of their kills or starts, if it counts them.
    """

    run: Callable[[Path, int, int], list[Outcome]]
    trials: int
    told: str = ""


def flips(room: Path, trials: int, seed: int) -> list[Outcome]:
    with tempfile.TemporaryDirectory(dir=room) as own:
        done = bit_flips.run(Path(own), trials, seed, ("flip",))
    return [Outcome(f"{trial.file}: {trial.damage}", trial.outcome) for trial in done]


def other_damage(room: Path, trials: int, seed: int) -> list[Outcome]:
    kinds = ("zero", "scramble", "truncate", "remove")
    with tempfile.TemporaryDirectory(dir=room) as own:
        done = bit_flips.run(Path(own), trials, seed, kinds)
    return [Outcome(f"{trial.file}: {trial.damage}", trial.outcome) for trial in done]


MEMBERS = {
    "flipped bits": Member(flips, 50),
    "zeroed, random, cut and missing": Member(other_damage, 48),
    "kills": Member(kills.run, 6, ", runs killed {} times in all"),
    "two starts": Member(two_starts.run, 6, ", {} starts in all"),
    "file systems": Member(file_systems.run, len(file_systems.FAULTS)),
    "flatness": Member(flatness.run, 1),
    "hostile inputs": Member(inputs.run, 1000),
    "hostile servers": Member(servers.run, 100),
}


def turns(room: Path, seed: int, only: str) -> Iterator[tuple[str, list[Outcome]]]:
    """The members take turns, for ever, each turn with a seed of its own."""
    turn = 0
    while True:
        for name, member in MEMBERS.items():
            if only in name:
                own = room / name.replace(" ", "_").replace(",", "")
                own.mkdir(exist_ok=True)
                yield name, member.run(own, member.trials, 1000 * seed + turn)
        turn += 1


def table(done: dict[str, list[Outcome]]) -> str:
    """How often each outcome came of the trials of each member, as Markdown."""
    lines = ["| trials of | made | outcomes | wrong |", "|---|---:|---|---:|"]
    for name, outcomes in done.items():
        counts = collections.Counter(outcome.came.partition(":")[0] for outcome in outcomes)
        wrong = counts.pop("wrong", 0)
        told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items()))
        events = MEMBERS[name].told.format(sum(outcome.events for outcome in outcomes))
        lines.append(f"| {name}{events} | {len(outcomes)} | {told} | {wrong} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", default="", help="a part of a member's name")
    parser.add_argument("--output", type=Path, help="where the table goes, besides the screen")
    given = parser.parse_args()
    end, done = time.monotonic() + 3600 * given.hours, collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as room:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{room}/compiled")  # for them all
        for name, outcomes in turns(Path(room), given.seed, given.only):
            done[name] += outcomes
            for outcome in outcomes:
                if outcome.came.startswith(("wrong", "skipped")):
                    print(f"{name}: {outcome.what}: {outcome.came}", flush=True)
            if time.monotonic() > end:
                break
    command = f"python -m tests.campaign --hours={given.hours:g} --seed={given.seed}"
    command += f" --only={given.only!r}" * bool(given.only)
    report = f"{datetime.date.today()}, `{command}`\n\n{table(done)}\n"
    print(report)
    if given.output:
        given.output.write_text(report)
    if any(outcome.came.startswith("wrong") for each in done.values() for outcome in each):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
