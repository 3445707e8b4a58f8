"""Memory traffic of a training step on unattached TPUs: `python -m benchmarks.tpu_step`.

Compiles the step of `vit_jax.train` ahead of time (pip install -e '.[tpu]') for the same slice,
mesh, batch, recomputation and optimiser with two implementations of the network, both a loop
over layers: ours, and that of Google's vision_transformer and big_vision, from Flax's own
layers. Prints of each what a device moves to and from HBM, the memory that it needs, what it
exchanges, the roofline of `vit_jax.plan`, and the ratio of the two; then the largest parts of
our traffic. Nothing is executed: times are estimates, bytes and memory are those of the
compiled program.

  --topology=v5e:4x4,v6e:4x4   slices
  --models=B/16,L/16           networks of configs/vit_i1k.py, at 224 pixels, without dropout
  --formulations=vit_jax       only these
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks import report
from vit_jax.command_line import cli
from vit_jax.system.errors import UserError

# Examples a device, by model and the kind of chip.
BATCHES = {
    "B/16": {"v5e": 64, "v6e": 64, "v4": 64, "v5p": 128},
    "L/16": {"v5e": 32, "v6e": 64, "v4": 64, "v5p": 128},
    "H/14": {"v5e": 16, "v6e": 32, "v4": 32, "v5p": 64},
    "g/14": {"v5e": 16, "v6e": 32, "v4": 32, "v5p": 64},
}

CLASSES, EXAMPLES = 1000, 1_281_167  # ImageNet-1k


class Formulation(NamedTuple):
    """An implementation of the network, and its settings in the configuration."""

    build: Callable[[], Callable[[Any], Any]]
    fields: dict[str, Any]


def _ours() -> Callable[[Any], Any]:
    from vit_jax.models import registry

    return registry.build


def _flax() -> Callable[[Any], Any]:
    from benchmarks.jax_contestants import flax_layers

    return flax_layers


FORMULATIONS = {
    "vit_jax": Formulation(_ours, {"unroll": 1}),
    "vit_jax, no loop": Formulation(_ours, {"unroll": None}),  # for as many as by default
    "vit_jax, pallas": Formulation(_ours, {"unroll": 1, "attention": "pallas"}),
    "Flax layers": Formulation(_flax, {}),
    "Flax layers, no loop": Formulation(_flax, {"scan": False}),
}


def configuration(model: str, formulation: str) -> Any:
    """`configs/vit_i1k.py:MODEL`, without dropout and the pre-training head."""
    from configs.vit_i1k import get_config

    config = get_config(model)
    fields = {"dropout": 0.0, "representation_size": None, "remat": "dots", "scan": True}
    config.model.update({**fields, **FORMULATIONS[formulation].fields})
    return config


def measure(model: str, target: Any, formulation: str, per_device: int) -> dict[str, Any]:
    """One row: what the compiled step needs.

    Raises:
      UserError: the compiler refuses the step for another reason than memory.
    """
    from vit_jax.distributed import sharding
    from vit_jax.planning.step import make_plan

    config = configuration(model, formulation)
    shares = sharding.shares(sharding.make_mesh(config.mesh, target.devices))
    build = FORMULATIONS[formulation].build()
    began = time.perf_counter()
    plan = make_plan(config, target, CLASSES, EXAMPLES, per_device * shares, build)
    estimate = plan.estimate and dataclasses.asdict(plan.estimate)
    return {
        "model": model,
        "topology": target.name,
        "formulation": formulation,
        "mesh": plan.mesh,
        "per_device_batch": per_device,
        "refusal": plan.refusal,
        "traffic": plan.traffic,
        "memory": plan.used,
        "sent": sum(c.sent for c in plan.collectives),
        "collectives": [dataclasses.asdict(each) for each in plan.collectives],
        "estimate": estimate,
        "movers": [mover._asdict() for mover in plan.movers],
        "seconds": time.perf_counter() - began,
    }


# --- Tables -------------------------------------------------------------------------------

MARK = "<!-- tpu_step -->"  # in a page, before and after the table
HEAD = (
    *("model", "slice", "batch a device", "formulation", "GB moved", "of Flax layers'"),
    *("GiB needed", "of Flax layers'", "GiB sent", "products, ms", "HBM, ms", "MFU at most"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each row, with ratios to "Flax layers" of the same model and slice."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for row in rows:
        place = lambda r: (r["model"], r["topology"], r["per_device_batch"])
        theirs = [
            r for r in rows if place(r) == place(row) and r["formulation"] == "Flax layers"
        ]
        lines.append("| " + " | ".join(_cells(row, theirs[0] if theirs else None)) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any], theirs: dict[str, Any] | None) -> list[str]:
    first = [row["model"], row["topology"], str(row["per_device_batch"]), row["formulation"]]
    if row["traffic"] is None:
        why = "refused" if row["refusal"] else "not known"
        return [*first, why, "", f"{(row['memory'] or 0) / 2**30:.2f}", *[""] * 5]

    def share(field: str) -> str:
        if theirs is None or not theirs[field]:
            return ""
        return f"{row[field] / theirs[field]:.2f}"

    estimate = row["estimate"]
    return [
        *first,
        f"{row['traffic'] / 1e9:.1f}",
        share("traffic"),
        f"{row['memory'] / 2**30:.2f}",
        share("memory"),
        f"{row['sent'] / 2**30:.2f}",
        f"{1e3 * estimate['compute']:.0f}",
        f"{1e3 * estimate['memory']:.0f}",
        f"{100 * estimate['mfu'][1]:.0f}%",
    ]


def movers(row: dict[str, Any]) -> str:
    """The memory traffic of a row, by part of the network."""
    lines = [f"{row['model']} on {row['topology']}, {row['formulation']}:"]
    for mover in row["movers"]:
        what = " ".join((mover["phase"], mover["part"], mover["operation"], mover["largest"]))
        lines.append(f"  {mover['bytes'] / 1e9:6.2f} GB  {what}")
    return "\n".join(lines)


# --- The command --------------------------------------------------------------------------


def define_flags() -> None:
    flags.DEFINE_list("topology", ["v5e:4x4", "v6e:4x4"], "Slices of TPUs.")
    flags.DEFINE_list("models", list(BATCHES), "Networks of configs/vit_i1k.py.")
    flags.DEFINE_multi_enum(
        "formulations",
        ["vit_jax", "Flax layers"],
        list(FORMULATIONS),
        "Ways to write the network; may be repeated.",
    )
    flags.DEFINE_string("output", "docs/planning/tpu_step.json", "The JSON file to write.")
    flags.DEFINE_string("page", None, "A page of Markdown to put the table into.")


def check(models: list[str], topologies: list[str]) -> None:
    """Raises UserError for names that BATCHES does not have."""
    for model in models:
        if model not in BATCHES:
            raise UserError(f"--models has {model!r}: use some of {', '.join(BATCHES)}")
    for name in topologies:
        if (kind := name.partition(":")[0]) not in BATCHES["B/16"]:
            raise UserError(
                f"--topology has {name!r}, whose chip {kind!r} is not known here: use slices "
                f"of {', '.join(BATCHES['B/16'])}"
            )


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    check(given.models, given.topology)
    from benchmarks import conditions
    from benchmarks.measure import save
    from vit_jax.planning.target import topology

    rows: list[dict[str, Any]] = []
    targets = [topology(name) for name in given.topology]
    found = conditions.look(conditions.limit_threads(None))
    record = {"benchmark": "tpu_step", "conditions": found, "results": rows}
    for name, target in zip(given.topology, targets, strict=True):
        for model in given.models:
            for formulation in given.formulations:
                size = BATCHES[model][name.partition(":")[0]]
                print(f"compiling {model} for {name}, {formulation} ...", file=sys.stderr)
                rows.append(measure(model, target, formulation, size))
                save(Path(given.output), record)
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    print("\n".join(movers(row) for row in rows if row["movers"]))
    if given.page:
        report.fill(Path(given.page), table(rows), MARK)


if __name__ == "__main__":
    cli.run(main, define_flags)
