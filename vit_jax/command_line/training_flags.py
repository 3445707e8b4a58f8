"""What to train and where, for the commands that train."""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.command_line import cli, weight_flags


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Configuration: FILE.py[:ARGUMENT].")
    flags.DEFINE_string("workdir", None, "Where results go; what is there is continued.")
    flags.DEFINE_bool(
        "begin_anew", False, "Start at step 0 where all saved states are damaged."
    )
    weight_flags.define_flags()  # about the weights of config.init_from
    flags.adopt_module_key_flags(weight_flags)


def from_flags() -> tuple[ConfigDict, Path, list[str]]:
    """The configuration, the work directory, and the fields set on the command line.

    Raises:
      UserError: a flag is missing, or the file cannot be read.
    """
    workdir = Path(cli.required("workdir"))
    config, overridden = cli.config_from_flag()
    return config, workdir, overridden
