import errno
import logging
import os
import subprocess
import sys

import pytest

from vit_jax.checkpoints import orbax_io
from vit_jax.command_line import cli
from vit_jax.system import bounded
from vit_jax.system.bounded import Unfit
from vit_jax.system.errors import UserError, about, of_system


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EACCES, "get permission"),
        (errno.EROFS, "get permission"),
        (errno.EISDIR, "a file stands where a folder belongs"),
        (errno.ENOENT, "is gone"),
        (errno.ELOOP, "remove the link"),
        (errno.ENOTTY, "once that is mended"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(number, remedy):
    told = str(of_system(OSError(number, os.strerror(number), "a/b")))
    assert told.startswith(f"a/b cannot be used ({os.strerror(number)}): ")
    assert remedy in told
    assert "\n" not in told


def test_an_error_is_followed_to_what_it_was_raised_from_and_no_further():
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    saving, mistake = RuntimeError("saving failed"), AttributeError("a mistake of ours")
    saving.__cause__ = mistake.__context__ = full
    assert "x cannot be used" in str(of_system(saving))
    assert of_system(mistake) is None


def test_the_words_of_tensorstore_are_understood():
    error = ValueError(
        'RESOURCE_EXHAUSTED: Error writing "step/.zarray" in OCDBT database at local file '
        '"/runs/a/": Failed to write 171 bytes to file 17: No space left on device '
        "[os_error_code='28'] [tensorstore_spec='{}']"
    )
    assert str(of_system(error)).startswith("/runs/a/ cannot be used (No space left on device)")
    record = logging.LogRecord("absl", logging.ERROR, "", 0, "", (), (ValueError, error, None))
    assert not cli._is_news(record)
    record.exc_info = (ValueError, ValueError("other"), None)
    assert cli._is_news(record)
    record.msg = "Task exception was never retrieved\nfuture: <Task finished>"  # of asyncio
    assert not orbax_io._is_asked_for(record)


def test_what_orbax_logs_and_then_raises_is_not_said_twice():
    def passes(level, text, path="site-packages/orbax/checkpoint/x.py"):
        return orbax_io._not_raised_too(
            logging.LogRecord("absl", level, path, 1, text, (), None)
        )

    assert not passes(logging.ERROR, "saving failed")
    assert not passes(logging.WARNING, "Metadata file does not exist: %s")
    assert passes(logging.WARNING, "something else")
    assert passes(logging.ERROR, "saving failed", "vit_jax/x.py")


def test_errors_of_open_files_get_their_name(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, about(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path)


CODE = """
import sys
from vit_jax.command_line import cli
def main(arguments):
    {}
cli.run(main, lambda: None)
"""


@pytest.mark.parametrize(
    ("body", "output", "said"),
    [
        (
            "print('x')",
            "/dev/full",
            "where output goes, cannot be used (No space left on device)",
        ),
        ("open('/proc/none/x', 'w')", os.devnull, "/proc/none/x cannot be used"),
        ("print('\\udcff')", os.devnull, ""),
    ],
)
def test_a_command_says_it_and_exits_with_1(body, output, said):
    with open(output, "w") as out:
        ended = subprocess.run(
            [sys.executable, "-c", CODE.format(body)], stdout=out, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    assert "Traceback" not in ended.stderr
    assert ended.returncode == bool(said)
    assert said in ended.stderr


def test_what_a_message_quotes_cannot_break_it_into_lines_or_move_the_cursor():
    assert str(UserError("class 'a\nb\x1b[2J\ud800' of müsli")) == (
        "class 'a\\nb\\x1b[2J\\ud800' of müsli"
    )
    long = str(UserError(f"label {'x' * 100_000} is wrong; mend it."))
    assert len(long) < 5000
    assert long.startswith("label xxx")
    assert long.endswith("is wrong; mend it.")


def test_what_is_no_regular_file_is_told_from_what_the_system_refuses(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unfit) as caught, about(tmp_path / "pipe"):
        bounded.read(tmp_path / "pipe")
    said = str(of_system(caught.value))
    assert said == f"{tmp_path / 'pipe'} cannot be used: it is a pipe, not a regular file"
