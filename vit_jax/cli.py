"""What every door does around its `main`: parse flags, and say errors in one sentence."""

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vit_jax import config as configuration
from vit_jax.errors import UserError

# What a wrong override such as --config.model.depht=3 makes ml_collections raise.
_CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OSError)


def fail(message: str) -> NoReturn:
    """Prints one sentence to stderr and exits with code 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags into `flags.FLAGS`; `--help` prints them; errors end the process."""
    try:
        return app.parse_flags_with_usage(list(argv))
    except UserError as error:
        fail(str(error))
    except _CONFIG_ERRORS as error:
        # ml_collections quotes its messages once or twice and breaks them over lines.
        message = str(error).replace("\\n", " ").replace("\\'", "'").replace("\n", " ")
        if message[:1] == message[-1:] and message[:1] in ("'", '"'):
            message = message[1:-1]
        hint = "" if "Did you mean" in message else _meant(argv)
        fail(f"a --config flag cannot be used: {message}{hint}")


def _meant(argv: Sequence[str]) -> str:
    """A field that exists for the first on the command line that does not."""
    known = configuration.flatten(configuration.to_dict(configuration.get_config()))
    for name in re.findall(r"(?m)^--(?:no)?config\.([\w.]+)", "\n".join(argv)):
        leaf = name.rpartition(".")[2]
        same = [field for field in known if field.rpartition(".")[2] == leaf]
        close = same or difflib.get_close_matches(name, known)
        if name not in known and close:
            return f" Did you mean --config.{close[0]}?"
    return ""


def run(main: Callable[[list[str]], None], define_flags: Callable[[], None]) -> None:
    """Runs `main(positional arguments)`; a UserError becomes one sentence and exit code 1.

    Flags are defined here, not when a door is imported, so that a notebook can import two.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells its life at INFO
        try:
            main(argv[1:])
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    define_flags()
    app.run(guarded, flags_parser=parse)


def required(name: str) -> Any:
    """The value of a flag that must be given.

    Raises:
      UserError: it was not given, or (for --config) its file could not be read.
    """
    value = flags.FLAGS[name].value
    if value is None:
        raise UserError(f"--{name} is missing: run with --help to see what there is")
    return value


def config_from_flag() -> tuple[ConfigDict, list[str]]:
    """The configuration of --config, and the names of the fields set on the command line.

    Raises:
      UserError: the flag is missing, or the file cannot be read.
    """
    config, flag = required("config"), flags.FLAGS["config"]
    try:
        config.seed  # noqa: B018 - a file that could not be read is reported only when used
    except OSError as error:
        path = config_flags.get_config_filename(flag)
        raise UserError(f"--config={path} cannot be read: check the path") from error
    overridden = list(config_flags.get_override_values(flag))
    configuration.prefer_overrides(config, overridden)
    configuration.square_image_size(config)
    return config, overridden


def no_positional(arguments: list[str]) -> None:
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: run with --help to see what there is")
