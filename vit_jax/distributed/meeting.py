"""Checks that the flags of several processes are consistent, before JAX connects them.

JAX aborts all processes of a run with a stack trace if two of them have the same number. So
they first connect to the port of JAX's future service: process 0 waits there until all the
others have sent their number, and then lets all of them continue, or none.
"""

import contextlib
import socket
import time

from vit_jax.system.errors import UserError

_GO, _NO = "go", "no"
_ANSWER = 10.0  # seconds in which a connected process must send its number
_PAUSE = 0.2  # seconds between tries to reach process 0


def meet(coordinator: str, count: int, index: int, timeout: float) -> None:
    """Returns when all processes have connected.

    Args:
      coordinator: HOST:PORT of process 0.
      count: of processes.
      index: of this one, from 0.
      timeout: seconds to wait for processes that are missing.

    Raises:
      UserError: two have the same number, they do not agree on how many there are, or the port
        is taken.
    """
    if count == 1:
        return
    host, _, port = coordinator.rpartition(":")
    if index == 0:
        _gather(int(port), count, timeout)
    else:
        _report((host.strip("[]"), int(port)), count, index, timeout)


def _gather(port: int, count: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    arrived: dict[int, socket.socket] = {}
    refusal = answer = ""  # to processes that must not continue
    try:
        with _listener(port) as listener:
            while len(arrived) < count - 1 and not refusal:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                connection, _ = listener.accept()
                refusal = _admit(connection, count, arrived)
        answer = f"{_NO} {refusal}" if refusal else _GO
    except TimeoutError:
        return  # the wait for JAX's service, which follows, reports it
    finally:
        for connection in arrived.values():
            _say(connection, answer)
    if refusal:
        raise UserError(refusal)


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} ({error.strerror}): another process has "
            "--process_id=0 too, or another run is there; choose another port of --coordinator"
        ) from error


def _admit(connection: socket.socket, count: int, arrived: dict[int, socket.socket]) -> str:
    """Registers a process, or returns why no process may continue."""
    said = _hear(connection).split()
    if len(said) != 3 or said[0] != __name__ or not all(word.isdigit() for word in said[1:]):
        connection.close()  # not one of our processes
        return ""
    index, others = int(said[1]), int(said[2])
    if others != count:
        refusal = (
            f"process {index} has --num_processes={others}, and process 0 has {count}: start "
            "all with the same number"
        )
    elif index in arrived:
        refusal = (
            f"two processes have --process_id={index}: number them from 0 to {count - 1}, each "
            "once"
        )
    else:
        arrived[index] = connection
        return ""
    _say(connection, f"{_NO} {refusal}")
    return refusal


def _report(address: tuple[str, int], count: int, index: int, timeout: float) -> None:
    deadline = time.monotonic() + 0.9 * timeout
    answer, reached = "", False
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=_ANSWER) as connection:
                connection.sendall(f"{__name__} {index} {count}\n".encode())
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                reached, answer = True, _hear(connection)
        except OSError:
            answer = ""
        if answer == _GO:
            return
        if answer.startswith(_NO):
            raise UserError(answer.removeprefix(_NO).strip())
        time.sleep(_PAUSE)  # process 0 has not started, or an earlier run is ending
    if reached:
        raise UserError(
            f"process {index} came too late or twice: the run at port {address[1]} has begun "
            "with all its processes; give each another --process_id, or choose another port"
        )


def _hear(connection: socket.socket) -> str:
    if connection.gettimeout() is None:
        connection.settimeout(_ANSWER)
    try:
        return connection.makefile("rb").readline(2000).decode(errors="replace").strip()
    except OSError:
        return ""


def _say(connection: socket.socket, text: str) -> None:
    with connection, contextlib.suppress(OSError):  # JAX finds processes that have ended
        connection.sendall(f"{text}\n".encode())
