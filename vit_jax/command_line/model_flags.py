"""Which model a command uses, and how its images are prepared."""

import sys
from pathlib import Path

from absl import flags
from jax.sharding import Mesh

from vit_jax.checkpoints.trained import (
    Trained,
    for_inference,
    load,
    load_any,
    with_preprocessing,
)
from vit_jax.command_line import weight_flags
from vit_jax.system.errors import UserError


def define_flags() -> None:
    """The flags by which every command selects its model."""
    flags.DEFINE_string("workdir", None, "Work directory of a training run.")
    flags.DEFINE_string(
        "checkpoint", None, "Instead: a file or folder of weights, or a name like augreg:B_16."
    )
    flags.DEFINE_string("step", "last", "Of a work directory: last, best or a step number.")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"],
        "Operands of matrix products; as trained unless given, float32 for published weights.",
    )  # fmt: skip
    flags.DEFINE_string("transform", None, "Preprocessing; the model's own unless given.")
    flags.DEFINE_string("value_range", None, "Of pixels; the model's own unless given.")
    weight_flags.define_flags()
    flags.adopt_module_key_flags(weight_flags)


def from_flags(mesh: Mesh) -> Trained:
    """Opens the model that the flags name.

    Raises:
      UserError: not exactly one of --workdir and --checkpoint is given, or it cannot be read.
    """
    given = flags.FLAGS
    if bool(given.workdir) == bool(given.checkpoint):
        raise UserError("pass one of --workdir and --checkpoint: see --help")
    said = weight_flags.from_flags()
    if given.workdir:
        said.check_unused(given.workdir)
        model = load(Path(given.workdir), given.step, mesh)
    else:
        model = load_any(given.checkpoint, given.step, mesh, said)
        for note in model.notes:
            print(f"note: {note}", file=sys.stderr)
    return for_inference(
        with_preprocessing(model, given.transform, given.value_range), given.dtype
    )
