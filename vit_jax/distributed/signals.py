"""Signals set a flag that the training loop reads."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Within this context SIGTERM, SIGHUP and Ctrl-C set `requested`.

    A second Ctrl-C interrupts. SIGHUP comes when a terminal or a connection is closed; where it
    was ignored from the beginning, as under `nohup`, it stays so. Of several processes, any of
    which may have received the signal, `requested` is set in all of them by `reached` at the
    same step; JAX listens to SIGTERM there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to stop at this step, the same in every process; call it at each step."""
        if jax.process_count() > 1:
            self.requested |= multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> "StopSignal":
        several = jax.process_count() > 1
        heard = {signal.SIGINT, signal.SIGHUP} | (set() if several else {signal.SIGTERM})
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            heard.remove(signal.SIGHUP)
        for number in heard:
            handler = self._pass_on if several else self._handle
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
