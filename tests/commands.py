"""The commands: called within this process, which is quick, or as a person runs them."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from absl import flags

from vit_jax.command_line import cli

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny_config.py"


class Result(NamedTuple):
    """What `subprocess.run` gives, as far as it is looked at here."""

    returncode: int
    stdout: str
    stderr: str


def environment(devices=1, optimized=True):
    """For a process that does not test on eight devices, and that starts without torch.

    Without LLVM's optimisations a program is compiled sooner, and may take far longer to run.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if not optimized:
        flags += ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
    path = [str(ROOT / "tests" / "without"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": os.pathsep.join(path)}
    return os.environ | own


def run(command, *arguments, before=()):
    """`python -m vit_jax.<command> <arguments>`, `before` preceding `python`."""
    program = [*before, sys.executable, "-m", f"vit_jax.{command}", *map(str, arguments)]
    return subprocess.run(program, env=environment(), cwd=ROOT, capture_output=True, text=True)


def call(command, *arguments):
    """The same within this process, but for what `absl.app.run` does around the flags."""
    module = importlib.import_module(f"vit_jax.{command}")
    program = [module.__file__, *map(str, arguments)]
    start = lambda main, flags_parser: main(flags_parser(program))
    code, out, error = 0, io.StringIO(), io.StringIO()
    with (
        forgotten_flags(),
        warnings.catch_warnings(),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        mock.patch("absl.app.run", start),
        mock.patch("sys.argv", program),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does
        try:
            cli.run(module.main, module.define_flags)
        except SystemExit as end:
            code = end.code or 0
    return Result(code, out.getvalue(), error.getvalue())


@contextlib.contextmanager
def forgotten_flags():
    """Takes away what flags are defined within, so that another command can define its own."""
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


def names_of_flags(command):
    """Of those that a command shows with --help."""
    module = importlib.import_module(f"vit_jax.{command}")
    with forgotten_flags():
        module.define_flags()
        return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)}


def assert_one_sentence(result, *parts):
    """Exit code 1, no traceback, nothing but `error: ...` in which all parts occur."""
    assert result.returncode == 1, result
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in last, last
