"""Exact averages over a whole data set."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vit_jax.data.on_device import Batch, Prepare
from vit_jax.evaluation.ranking import Ranking, mean_average_precision
from vit_jax.objectives.multi_label import RANKING
from vit_jax.objectives.objective import Carried, Metrics, Objective, Params


def evaluate(
    eval_step: Callable[[Any], Metrics],
    batches: Iterable[Any],
    should_stop: Callable[[], bool] = lambda: False,
    tell_ranking: Callable[[Ranking], object] = lambda ranking: None,
) -> dict[str, float] | None:
    """Runs `eval_step(batch) -> {name: (sum, count)}` over all batches.

    What the step has under `RANKING` is gathered, for `mAP`: mean average precision, which no
    sums give. `tell_ranking` is called with it.

    Sums are added in float64 on the host, so neither the batch size nor the number of
    examples costs precision.

    Returns:
      {name: average, "count": number of examples}, or None when told to stop midway.
    """
    results: list[Metrics] = []
    ranked: list[Any] = []
    for batch in batches:
        if should_stop():
            return None
        results.append(eval_step(batch))
        if RANKING in results[-1]:
            ranked.append(results[-1].pop(RANKING))
            ranked[-3:-2] = jax.device_get(
                ranked[-3:-2]
            )  # so that the device need not hold all
        # Stay two batches ahead of the device, no more: each one queued holds its images.
        jax.block_until_ready(results[-3:-2])
    fetched: list[dict[str, tuple[np.ndarray, np.ndarray]]] = jax.device_get(results)
    averages: dict[str, float] = {}
    for name in fetched[0]:
        total = sum(float(result[name][0]) for result in fetched)
        count = sum(float(result[name][1]) for result in fetched)
        averages |= {name: total / count, "count": round(count)}
    if ranked:
        ranking = Ranking.of(jax.device_get(ranked))
        tell_ranking(ranking)
        averages["mAP"] = mean_average_precision(ranking)
    return averages


def make_eval_step(
    objective: Objective, prepare: Prepare
) -> Callable[[Params, Carried, Batch], Metrics]:
    """Returns `step(params, carried, batch) -> {name: (sum, count)}`, to be jitted."""

    def step(params: Params, carried: Carried, batch: Batch) -> Metrics:
        # Nothing is drawn here; only the signature of `prepare` asks for a key.
        return objective.evaluate(params, carried, prepare(batch, jax.random.key(0)))

    return step
