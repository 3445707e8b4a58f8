"""What every command does around its `main`: parse flags, and print errors in one sentence."""

import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

import vit_jax
from vit_jax import config as configuration
from vit_jax.system.errors import UserError, of_system

# What a wrong override such as --config.model.depht=3 makes ml_collections raise.
_CONFIG_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OSError)


_UNPRINTED = "what is printed cannot be written: check where stdout leads"


def fail(message: str) -> NoReturn:
    """Prints one sentence to stderr and exits with code 1."""
    _flush_output()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)


def _interrupted() -> NoReturn:
    """Exits at once: an orderly exit would wait for a program that is being compiled.

    Nothing is lost that the next start needs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _flush_output()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def _flush_output() -> bool:
    """Whether the output could be written; if not, Python must not try again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


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
    """A suggestion for the first unknown field on the command line."""
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

    So does what the system refuses (a full disk, a missing permission). Flags are defined
    here, not when a command is imported, so that a notebook can import two.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs verbosely at INFO
        try:
            main(argv[1:])
            if not _flush_output():
                fail(_UNPRINTED)
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            _interrupted()
        except Exception as error:
            if not _flush_output():
                fail(_UNPRINTED)
            if (told := of_system(error)) is None:
                raise
            fail(str(told))

    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == vit_jax.__name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see `end_on_ctrl_c`
    define_flags()
    _print_any_name()
    _say_once()
    app.run(guarded, flags_parser=parse)


def _say_once() -> None:
    """Keeps threads from logging the traceback of an error that `run` prints.

    On a full disk Orbax and its libraries log a hundred of them before the main thread gets the
    error.
    """
    logging.getLogger("absl").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record is anything but the traceback of an error that `run` prints."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or of_system(error) is None


def _print_any_name() -> None:
    """Prints names of files that are no valid text, or that the terminal cannot show."""
    if hasattr(sys.stdout, "reconfigure"):  # not where a notebook or a test has replaced it
        sys.stdout.reconfigure(errors="backslashreplace")


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
