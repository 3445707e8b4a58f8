"""What a run says of itself while it runs: metrics one step late, and traces."""

import contextlib
import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax.models.kernels import contract
from vit_jax.system.errors import UserError
from vit_jax.training.logging import MetricWriter

Metrics = dict[str, Any]


class Diverged(UserError):
    """A loss or another metric is no longer a number."""


def check_finite(step: int, metrics: Metrics, workdir: Path) -> None:
    """Raises Diverged if a metric of this step is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{name} is {value} at step {step}: the last good checkpoint in {workdir} is "
                f"intact; use a lower config.optimizer.lr, a longer warm-up or a smaller "
                f"config.optimizer.clip_norm in a new --workdir"
            )


class Reporter:
    """Checks the metrics of every step, one step late, and writes those that are due.

    Late, so that the device has its next step to do while the host looks at the last.

    Args:
      log: where to.
      due: whether a step is to be written.
      batch_size: images in a step.
      flops: analytic FLOPs of a step, see models/flops.py.
      peak: FLOP/s of all devices together in large matrix products.
      workdir: named in errors.
    """

    def __init__(
        self,
        log: MetricWriter,
        due: Callable[[int], bool],
        batch_size: int,
        flops: float,
        peak: float,
        workdir: Path,
    ):
        self._log, self._due, self._batch_size, self._workdir = log, due, batch_size, workdir
        self._flops, self._peak = flops, peak
        self._pending: tuple[int, Metrics] | None = None
        self.restart_clock()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of `step`, still being computed, and reports the step before.

        Whose time ends where the wait for this one's data began, for that wait is this one's.
        """
        self._flush(self._began, self._wait)
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the step that was added last, and reports it."""
        self._flush(None, 0.0)

    def _flush(self, until: float | None, wait: float) -> None:
        if self._pending:
            step, metrics = self._pending
            self._pending = None
            found = {k: float(v) for k, v in jax.device_get(metrics).items()}
            self._report(step, found, time.monotonic() if until is None else until, wait)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as spent waiting for the data of the next step."""
        self._began = time.monotonic()
        yield
        self._wait = time.monotonic() - self._began
        self._waited += self._wait

    def restart_clock(self) -> None:
        """Keeps what happened since the last report out of the measured speed."""
        self._restart(time.monotonic(), 0.0)

    def _restart(self, now: float, waited: float) -> None:
        self._steps, self._start, self._began = 0, now, now
        self._wait = self._waited = waited

    def _report(self, step: int, metrics: Metrics, until: float, wait: float) -> None:
        """Reports a step whose time ended at `until`; since then `wait` seconds were waited."""
        check_finite(step, metrics, self._workdir)
        self._log.progress(step)
        self._steps += 1
        if self._due(step):
            seconds = max(until - self._start, 1e-9)
            metrics["images_per_second"] = self._steps * self._batch_size / seconds
            metrics["data_wait"] = max(self._waited - wait, 0.0) / seconds  # share of the time
            # Model-FLOPs utilisation: of the measured peak, and recomputation is no work.
            metrics["mfu"] = self._steps * self._flops / seconds / self._peak
            self._log.write(step, metrics)
            self._restart(until, wait)


@functools.cache
def matmul_peak(dtype: str) -> float:
    """FLOP/s of the first device in a large matrix product of `dtype` operands, measured.

    Not the number of a data sheet: that one is reached by nobody, and differs from it by
    another share on every kind of device. Takes a tenth of a second; the median of five.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    product = jax.jit(lambda x: contract("nk,km->nm", x, x, dtype))
    x = jnp.ones((size, size), dtype)
    product(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def parse_profile(text: str | None) -> tuple[int, int] | None:
    """`10:20` as (10, 20): the first and the last step to trace."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"profile is {text!r}: write the first and the last step, e.g. 10:20")
    return int(match[1]), int(match[2])


class Profiler:
    """Traces steps `first` to `last` into `folder`, for TensorBoard (XProf) and Perfetto.

    What follows the last of `total` steps, the evaluation, does not belong to the trace.
    """

    def __init__(self, steps: tuple[int, int] | None, total: int, folder: Path):
        self._first, last = steps or (0, 0)
        self._last = min(last, total)
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        if self._first <= step <= self._last and not self._running:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        if self._running and step == self._last:
            jax.block_until_ready(state)  # what was dispatched belongs to the trace
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
