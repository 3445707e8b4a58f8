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

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.campaign import bit_flips, inputs, kills, servers

Outcome = tuple[str, str]  # what was done, and what came of it
# A member makes `trials` trials in a folder of its own. Another one is added here.
Member = Callable[[Path, int, int], list[Outcome]]


def flips(room: Path, trials: int, seed: int) -> list[Outcome]:
    with tempfile.TemporaryDirectory(dir=room) as own:
        done = bit_flips.run(Path(own), trials, seed, ("flip",))
    return [(f"{trial.file}: {trial.damage}", trial.outcome) for trial in done]


def other_damage(room: Path, trials: int, seed: int) -> list[Outcome]:
    kinds = ("zero", "scramble", "truncate", "remove")
    with tempfile.TemporaryDirectory(dir=room) as own:
        done = bit_flips.run(Path(own), trials, seed, kinds)
    return [(f"{trial.file}: {trial.damage}", trial.outcome) for trial in done]


MEMBERS: dict[str, tuple[Member, int]] = {  # and how many trials a turn
    "flipped bits": (flips, 50),
    "zeroed, random, cut and missing": (other_damage, 48),
    "kills": (kills.run, 2),
    "hostile inputs": (inputs.run, 1000),
    "hostile servers": (servers.run, 100),
}


def turns(room: Path, seed: int, only: str) -> Iterator[tuple[str, list[Outcome]]]:
    """The members take turns, for ever, each turn with a seed of its own."""
    turn = 0
    while True:
        for name, (member, trials) in MEMBERS.items():
            if only in name:
                own = room / name.replace(" ", "_").replace(",", "")
                own.mkdir(exist_ok=True)
                yield name, member(own, trials, 1000 * seed + turn)
        turn += 1


def table(done: dict[str, list[Outcome]]) -> str:
    """How often each outcome came of the trials of each member, as Markdown."""
    lines = ["| trials of | made | outcomes | wrong |", "|---|---:|---|---:|"]
    for name, outcomes in done.items():
        counts = collections.Counter(outcome.partition(":")[0] for _, outcome in outcomes)
        wrong = counts.pop("wrong", 0)
        told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items()))
        lines.append(f"| {name} | {len(outcomes)} | {told} | {wrong} |")
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
        for name, outcomes in turns(Path(room), given.seed, given.only):
            done[name] += outcomes
            for what, outcome in outcomes:
                if outcome.startswith("wrong"):
                    print(f"{name}: {what}: {outcome}", flush=True)
            if time.monotonic() > end:
                break
    command = f"python -m tests.campaign --hours={given.hours:g} --seed={given.seed}"
    command += f" --only={given.only!r}" * bool(given.only)
    report = f"{datetime.date.today()}, `{command}`\n\n{table(done)}\n"
    print(report)
    if given.output:
        given.output.write_text(report)
    if any(outcome.startswith("wrong") for all_of in done.values() for _, outcome in all_of):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
