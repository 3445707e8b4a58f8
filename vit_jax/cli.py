"""What every door does around its `main`: parse flags, and say errors in one sentence."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from vit_jax.errors import UserError

# What a wrong override such as --config.model.depht=3 makes ml_collections raise.
_CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OSError)


def fail(message: str) -> None:
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
        message = str(error.args[0] if error.args else error).strip().replace("\n", " ")
        fail(f"in the --config flags: {message}")
    raise AssertionError  # `fail` does not return


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(positional arguments)`; a UserError becomes one sentence and exit code 1."""

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

    app.run(guarded, flags_parser=parse)


def required(flag: flags.FlagHolder) -> str:
    """The value of a flag that must be given; says so in one sentence if it is not."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing: run with --help to see what it takes")
    return flag.value
