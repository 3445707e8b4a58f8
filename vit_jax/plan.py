"""Plans a training run before there is a device: memory, FLOPs, communication and time.

  python -m vit_jax.plan --config=configs/vit_i1k.py:L/16 --topology=v5e:4x4
  python -m vit_jax.plan --config=configs/vit_i21k.py:G/14 --topology=v5e:16x16 \
    --config.mesh.data=2 --config.mesh.fsdp=128 --per_device_batch=8 --output=plan.json

Compiles the training step of `vit_jax.train` ahead of time for TPUs that are not attached, on
any computer (pip install 'vit_jax[tpu]'), and prints its parameters, the memory that each
device needs, the FLOPs of a step, the bytes that devices exchange, and an estimate of the time
of a step. Without --topology it does so for the devices of this machine.

  --per_device_batch=N  examples in a step for each device that has some of its own; else
                        they are what config.batch_size makes them
  --search              the largest batch that fits, for every way to recompute, or for those
                        that --policy names

Opens no data: the numbers of classes and of examples are those known of a few data sets, else
those of ImageNet-1k; --num_classes and --examples set others. Exit code: 0 if the step fits
into the memory, 1 if it does not.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from vit_jax.command_line import cli
from vit_jax.distributed import sharding
from vit_jax.models import registry
from vit_jax.planning import page
from vit_jax.planning.data_sets import data_of
from vit_jax.planning.search import POLICIES, best, search
from vit_jax.planning.step import Plan, make_plan
from vit_jax.planning.target import attached, topology
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration: FILE.py[:ARGUMENT].")
    flags.DEFINE_string("topology", None, "TPUs to compile for, such as v5e:4x4, v4:4x4x4.")
    flags.DEFINE_integer(
        "per_device_batch", None, "Examples a device in a step.", lower_bound=1
    )
    flags.DEFINE_integer("num_classes", None, "Classes of the data.", lower_bound=1)
    flags.DEFINE_integer("examples", None, "Examples in an epoch.", lower_bound=1)
    flags.DEFINE_bool("search", False, "Find the largest batch for every way to recompute.")
    flags.DEFINE_multi_enum(
        "policy", None, POLICIES, "With --search, only this way to recompute; may be repeated."
    )
    flags.DEFINE_string("output", None, "A JSON file for everything that is found.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    config, _ = cli.config_from_flag()
    options = flags.FLAGS.flag_values_dict()
    target = topology(options["topology"]) if options["topology"] else attached()
    config = registry.with_computation_chosen(config)
    num_classes, examples, note = data_of(
        config.data.source, options["num_classes"], options["examples"]
    )
    if note:
        print(note, file=sys.stderr)
    mesh_shares = sharding.shares(sharding.make_mesh(config.mesh, target.devices))
    print(
        f"compiling {config.model.variant} for {target.name}: each program takes from half a "
        f"minute to several minutes on two cores",
        file=sys.stderr,
        flush=True,
    )

    def attempt(remat: str, per_device: int) -> Plan:
        changed = config.copy_and_resolve_references()
        changed.model.remat = remat
        batch_size = per_device * mesh_shares
        plan = make_plan(changed, target, num_classes, examples, batch_size)
        print(page.attempt_line(plan), file=sys.stderr, flush=True)
        return plan

    if options["search"]:
        if target.memory is None:
            raise UserError(
                f"--search needs devices whose memory is known, which {target.name} do not "
                f"tell: name some with --topology"
            )
        found = search(attempt, options["policy"] or POLICIES)
        print(page.search_table(found))
        fitting = [plan for tried in found.values() if (plan := best(tried))]
        _write(options["output"], {k: [page.to_json(p) for p in v] for k, v in found.items()})
        if not fitting:
            cli.fail(f"no batch of {config.model.variant} fits on {target.name}")
        return
    size = config.batch_size
    if options["per_device_batch"]:
        size = options["per_device_batch"] * mesh_shares
    plan = make_plan(config, target, num_classes, examples, size)
    print(page.describe(plan))
    _write(options["output"], page.to_json(plan))
    if not plan.fits:
        sys.exit(1)


def _write(output: str | None, values: dict[str, Any]) -> None:
    if output:
        with replacing(Path(output)) as part:
            part.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, define_flags)
