"""Several processes as one run: detected from the environment, monitored, ended together.

The same command is started once on every machine (or GPU). On a TPU VM, under Slurm's `srun`
and under Open MPI's `mpirun` the processes find each other; elsewhere three flags say where
process 0 is. A single process needs none of this.

A process that dies would leave the others waiting in the middle of a step. JAX notices by
heartbeats, after a while, and aborts. So each process also holds a connection to process 0,
which the system closes when either of them dies, and that ends all of them at once, with a
sentence that names the process that died. If one of them ends with an error, all others print
it, too; one that sends nothing for a minute, because it was stopped or has no network, counts
as dead.
"""

import contextlib
import importlib.util
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.distributed import meeting
from vit_jax.system.errors import UserError, of_system

HEARTBEAT_TIMEOUT = 90  # seconds after which JAX finds a machine without power or network


_SILENCE = 60.0  # the same for our own connections: shorter, because JAX would abort


_BEAT = 5.0  # seconds between heartbeats


_GRACE = 10  # seconds to wait for news that a process died, when a step has failed


# Messages between processes, a line each; the last two are followed by a text.
_DONE, _ALIVE, _DIED, _SAID = "done", "alive", "died", "said"


class Place(NamedTuple):
    """How processes find each other; JAX detects what is None."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None


def launched_together() -> bool:
    """Whether Slurm, Open MPI or a TPU VM has started this process."""
    several = lambda name: os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1
    srun = "SLURM_STEP_NODELIST" in os.environ and several("SLURM_NTASKS")
    return srun or several("OMPI_COMM_WORLD_SIZE") or on_tpu_vm()


def on_tpu_vm() -> bool:
    """Whether there are TPU chips here, and the library for them."""
    if "cpu" in os.environ.get("JAX_PLATFORMS", "") or not importlib.util.find_spec("libtpu"):
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


# --- Together from beginning to end -------------------------------------------------------


@contextlib.contextmanager
def together(place: Place | None, timeout: int) -> Iterator[None]:
    """Joins the other processes, None where there are none; leaves them at the end.

    Must be entered before JAX uses a device. Within it, a process that dies ends all others
    with exit code 1; so does leaving it by an exception.

    Args:
      place: how they find each other.
      timeout: seconds to wait until all have started.
    """
    if place is None:
        yield
        return
    _connect(place, timeout)
    if jax.process_count() == 1:  # a single host of TPUs
        yield
        return
    watch = _Watch(place.coordinator)
    try:
        yield
    except UserError as error:
        watch.end(str(error))
    except KeyboardInterrupt:
        _end(f"process {jax.process_index()} was interrupted")
    except BaseException as error:
        if (told := of_system(error)) and not isinstance(error, ConnectionError):
            watch.end(str(told))
        time.sleep(_GRACE)  # it may fail because another one died: the watch then ends it
        sys.excepthook(*sys.exc_info())
        _end(f"process {jax.process_index()} on {socket.gethostname()} failed: see above")
    watch.leave()


def _connect(place: Place, timeout: int) -> None:
    """`jax.distributed.initialize`, with a sentence where JAX would abort."""
    if place.process_id is None:
        who, where = "this process", "the others that were launched with it"
    else:
        who = f"process {place.process_id}"
        where = f"all of {place.num_processes} processes at {place.coordinator}"

    def give_up() -> None:
        _end(
            f"{who} waited {timeout} s for {where}: start them all, with the same "
            f"--coordinator and --num_processes, and check that they reach that port"
        )

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        if place.coordinator is not None:
            meeting.meet(*place, timeout)  # type: ignore[arg-type]
        jax.distributed.initialize(
            *place,
            # With an explicit address every process uses all devices that it sees.
            cluster_detection_method="deactivate" if place.coordinator else None,
            # Later than ours, since JAX would abort with a stack trace.
            initialization_timeout=timeout + 30,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{who} could not join the others ({str(error).splitlines()[0][:200]}): pass "
            f"--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    finally:
        timer.cancel()


def _end(sentence: str) -> NoReturn:
    """Exits at once: an orderly exit would wait for processes that have ended."""
    sys.stdout.flush()
    os.write(2, f"error: {sentence}\n".encode())
    os._exit(1)


class _Watch:
    """A connection of every process to process 0; the first one that breaks ends this process.

    Where they cannot be made, a note says so, and only JAX's heartbeats remain.
    """

    def __init__(self, coordinator: str | None) -> None:
        self._index, self._leaving = jax.process_index(), threading.Event()
        self._connections: dict[int, socket.socket] = {}
        listener = socket.create_server(("", 0)) if self._index == 0 else None
        port = listener.getsockname()[1] if listener else 0
        names = _from_all(socket.gethostname())
        # The secret word keeps out other programs that connect to the port.
        port, word = _from_all(f"{port} {secrets.token_hex(16)}")[0].split()
        self._names = [f"process {i} on {name}" for i, name in enumerate(names)]
        first = coordinator.rpartition(":")[0].strip("[]") if coordinator else names[0]
        try:
            if listener:
                self._accept(listener, word)
            else:
                self._connect(first, int(port), word)
            problem = ""
        except OSError as error:
            problem = f"{self._names[self._index]} to {first}: {error}"
        if problems := list(filter(None, _from_all(problem))):
            self._connections = {}
            if self._index == 0:
                print(
                    f"note: processes could not be connected ({problems[0]}), so a death is "
                    f"found after {HEARTBEAT_TIMEOUT} s",
                    file=sys.stderr,
                )
        self._speaking = threading.Lock()
        for item in self._connections.items():
            threading.Thread(target=self._listen, args=item, daemon=True).start()
        threading.Thread(target=self._live, daemon=True).start()

    def _connect(self, host: str, port: int, word: str) -> None:
        connection = socket.create_connection((host, port), timeout=_GRACE)
        connection.sendall(f"{self._index:08d}{word}".encode())
        self._connections[0] = connection

    def _accept(self, listener: socket.socket, word: str) -> None:
        listener.settimeout(2 * _GRACE)
        with listener:
            while len(self._connections) < jax.process_count() - 1:
                connection, _ = listener.accept()
                connection.settimeout(_GRACE)
                said = _receive(connection, 8 + len(word)).decode(errors="replace")
                if said[8:] == word:
                    self._connections[int(said[:8])] = connection
                else:
                    connection.close()

    def _live(self) -> None:
        while not self._leaving.wait(_BEAT):
            self._tell(_ALIVE)

    def _tell(self, what: str, but: int | None = None) -> None:
        line = " ".join(what.split())[:2000].encode() + b"\n"
        with self._speaking:
            for index, connection in self._connections.items():
                if index != but:
                    with contextlib.suppress(OSError):
                        connection.sendall(line)

    def _listen(self, index: int, connection: socket.socket) -> None:
        name = self._names[index]
        connection.settimeout(_SILENCE)
        try:
            news = _news(connection)
        except TimeoutError:
            news = (
                f"{_SAID} {name} has said nothing for {_SILENCE:.0f} s: it was stopped, or its "
                "machine has lost power or network"
            )
        except OSError:
            news = ""
        if news == _DONE or self._leaving.is_set():
            return
        kind, _, text = (news or f"{_DIED} {name}").partition(" ")
        self._tell(f"{kind} {text}", but=index)
        if kind == _SAID:
            _end(text)
        _end(
            f"{text} has died, so {self._names[self._index]} ends too: see the log of that "
            f"one; the same command on all of them continues from the last checkpoint"
        )

    def end(self, sentence: str) -> NoReturn:
        """Ends this process and all others with a sentence that each of them prints."""
        self._tell(f"{_SAID} {self._names[self._index]}: {sentence}")
        _end(f"process {self._index}: {sentence}")

    def leave(self) -> None:
        """Ends in order: when all processes are here, tells the others that this one ends."""
        multihost_utils.sync_global_devices("done")
        # JAX's shutdown waits for the others, too, and aborts if one dies meanwhile.
        jax.distributed.shutdown()
        self._leaving.set()
        self._tell(_DONE)


def _news(connection: socket.socket) -> str:
    """The first line that is no heartbeat; empty if the connection ends before.

    A line without an end was cut off when its process died, and is ignored.
    """
    with connection.makefile("rb") as lines:
        for line in lines:
            text = line.decode(errors="replace")
            if not text.endswith("\n"):
                break
            if text.strip() != _ALIVE:
                return text.strip()
    return ""


def _receive(connection: socket.socket, size: int) -> bytes:
    said = b""
    while len(said) < size and (more := connection.recv(size - len(said))):
        said += more
    return said


def _from_all(text: str) -> list[str]:
    """The `text` of every process, cut to 256 bytes, in their order."""
    array = np.frombuffer(text.encode()[:256].ljust(256, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(array))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


# --- Printing -------------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes and prints what one of them must."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints, in one process only, a message that all of them have."""
    if is_first():
        print(message)
