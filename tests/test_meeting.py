import socket
import threading

import pytest

from vit_jax.distributed import meeting
from vit_jax.system.errors import UserError


def outcomes(*who, timeout=20.0):
    """What each (index, count) is told when all meet at one port: nothing is good."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    told = {}

    def run(place, index, count):
        try:
            meeting.meet(f"localhost:{port}", count, index, timeout)
        except UserError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=run, args=(i, *each)) for i, each in enumerate(who)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return [told.get(i, "") for i in range(len(who))]


def test_those_who_fit_together_go_on():
    assert outcomes((0, 3), (1, 3), (2, 3)) == ["", "", ""]


def test_two_with_one_number_are_told_and_so_are_all():
    for said in outcomes((0, 4), (1, 4), (2, 4), (1, 4)):
        assert "two processes have --process_id=1" in said or "came too late or twice" in said


def test_they_must_agree_on_how_many_they_are():
    first, second = outcomes((0, 2), (1, 3))
    assert "process 1 has --num_processes=3, and process 0 has 2" in first
    assert second == first


def test_a_taken_port_is_said():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen at port {port}"):
            meeting.meet(f"localhost:{port}", 2, 0, 5.0)
