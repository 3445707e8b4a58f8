"""Flags that say how several processes find each other, where the environment does not."""

from contextlib import AbstractContextManager

from absl import flags

from vit_jax.distributed import processes
from vit_jax.distributed.processes import Place, launched_together
from vit_jax.system.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where it is not detected."
    )
    flags.DEFINE_integer("num_processes", None, "How many there are, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0, with --coordinator.")
    flags.DEFINE_integer(
        "process_timeout", 300, "Seconds to wait for all processes to start.", lower_bound=1
    )


def together() -> AbstractContextManager[None]:
    """`distributed.processes.together`, with the processes that the flags describe.

    Raises:
      UserError: the flags are wrong.
    """
    return processes.together(place_from_flags(), flags.FLAGS.process_timeout)


def place_from_flags() -> Place | None:
    """How to find the other processes, or None if there are none.

    Raises:
      UserError: the flags are incomplete or contradict each other.
    """
    given = flags.FLAGS
    asked = (given.coordinator, given.num_processes, given.process_id)
    if asked == (None, None, None):
        return Place(None, None, None) if launched_together() else None
    if None in asked:
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together, and "
            f"{sum(value is None for value in asked)} of them are missing: pass all three"
        )
    host, _, port = given.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"--coordinator is {given.coordinator!r}: use HOST:PORT, such as 10.0.0.1:1234"
        )
    if not 0 <= given.process_id < given.num_processes:
        raise UserError(
            f"--process_id is {given.process_id} of --num_processes={given.num_processes}: "
            f"number them from 0 to {given.num_processes - 1}"
        )
    return Place(*asked)
