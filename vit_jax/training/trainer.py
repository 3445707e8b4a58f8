"""Training, whole."""

import contextlib
from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as configuration
from vit_jax.checkpoints.directory import Checkpoints
from vit_jax.distributed import processes
from vit_jax.distributed.signals import StopSignal
from vit_jax.interop import channels, stated
from vit_jax.interop.stated import Stated
from vit_jax.system.errors import about
from vit_jax.system.lock import alone_in
from vit_jax.training import run_data
from vit_jax.training.begin import begin, resolve, weights_to_begin_with
from vit_jax.training.logging import MetricWriter
from vit_jax.training.loop import loop
from vit_jax.training.reporting import Metrics
from vit_jax.training.run import build, describe


def train(
    config: ConfigDict,
    workdir: Path,
    overridden: Collection[str] = (),
    stop: StopSignal | None = None,
    said: Stated = stated.NOTHING,
    begin_anew: bool = False,
) -> Metrics:
    """Trains to the end and returns the last evaluation, or {} when stopped by a signal.

    Args:
      config: stays as it is.
      workdir: what is there is continued.
      overridden: fields that the weights of `config.init_from` shall not decide.
      stop: where somebody else listens for signals already.
      said: about the weights of `config.init_from`, what their file leaves open.
      begin_anew: start at step 0 where every state that there was is damaged.

    Raises:
      UserError: for everything that the person who wrote `config` can mend.
      OSError: the system refuses something, such as room on a disk.
    """
    config, before = resolve(config, workdir, overridden, said)
    before = before or weights_to_begin_with(config, workdir, said)
    if before is not None:
        ours, theirs = config.data.channels, before.config.data.channels
        asked = ours != configuration.get_config().data.channels
        channels.check(config.init_from, ours, theirs, asked or "data.channels" in overridden)
    run = build(config, run_data.stored_classes(workdir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(about(workdir))
        directory = stack.enter_context(alone_in(workdir, processes.is_first()))
        stop = stop or stack.enter_context(StopSignal())
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
        state = begin(run, checkpoints, workdir, before, said, begin_anew)
        del before  # or the memory of its arrays would be held until the end
        first_step = int(state.step)
        saved = (checkpoints.card() or {}).get("last_record")
        log = stack.enter_context(MetricWriter(workdir, first_step, run.plan.total, saved))
        log.say(describe(run, state, workdir))
        result = loop(run, state, checkpoints, directory, log, stop)
        if stop.requested:
            log.say("stopped by a signal, state saved: run the same command to continue")
            return {}
    return result
