"""How often a trained model is right, over a whole split."""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vit_jax.checkpoints import trained
from vit_jax.data import on_device
from vit_jax.data.reading import eval_reading
from vit_jax.data.sources.classes import Mismatch, chosen, match
from vit_jax.distributed import processes, sharding
from vit_jax.evaluation import ranking
from vit_jax.evaluation.averages import evaluate, make_eval_step
from vit_jax.evaluation.ranking import Ranking
from vit_jax.models.model import Model
from vit_jax.objectives import registry
from vit_jax.objectives.objective import Carried, only_model


def evaluate_trained(
    model: trained.Trained,
    source: Any,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    outputs: tuple[int, ...] | None = None,
    tell_ranking: Callable[[Ranking], object] = lambda ranking: None,
) -> dict[str, float]:
    """Returns `accuracy`, `loss` (nats, without label smoothing) and `count`.

    Where images have several labels, `mAP` (mean average precision) and `exact_match` stand in
    place of accuracy, and `tell_ranking` is called with the scores that they rest on.
    `outputs` has for each class of `source` the output of the model that it is; None: the same
    classes in the same order. Outputs that are no class of `source` do not take part.
    """
    config = model.config.copy_and_resolve_references()
    config.objective.label_smoothing = 0.0
    network = model.model if outputs is None else with_outputs(model.model, outputs)
    objective = registry.classify(config, network)
    # Whole in every process, which scores of examples would not be otherwise.
    step = jax.jit(
        make_eval_step(objective, on_device.prepare_for_eval(config)),
        out_shardings=sharding.replicated(mesh),
    )
    params, carried = only_model(model.params), Carried({}, {}, {}, jnp.int32(model.step))
    averages = over_batches(
        lambda batches: evaluate(
            lambda batch: step(params, carried, batch), batches, tell_ranking=tell_ranking
        ),
        model,
        source,
        batch_size,
        mesh,
    )
    assert averages is not None  # nothing told it to stop
    return averages


def with_outputs(model: Model, outputs: tuple[int, ...]) -> Model:
    """The same network, whose logits are those of `outputs`, in this order."""
    if outputs == tuple(range(model.config.num_classes)):
        return model

    def apply(*arguments: Any, **options: Any) -> Any:
        logits, out = model.apply(*arguments, **options)
        return logits[..., np.array(outputs)], out

    return model._replace(apply=apply)


def over_batches(
    function: Callable[[Any], Any],
    model: trained.Trained,
    source: Any,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Any:
    """`function` of the batches of `source`, on the device, with a progress bar."""
    batches = eval_reading(model.config, mesh).eval_batches(source, batch_size)
    with contextlib.closing(batches):
        total = -(-len(source) // batch_size)
        shown = tqdm(
            batches, total=total, unit="batch", disable=None if processes.is_first() else True
        )
        return function(sharding.put_batch(batch, mesh) for batch in shown)


def describe_ranking(
    rankings: list[Ranking], names: tuple[str, ...], threshold: float
) -> dict[str, Any]:
    """Average precision of each class (null: no image has it), and what a threshold gives."""
    if not rankings:
        return {}
    [ranked] = rankings
    each = [None if np.isnan(x) else float(x) for x in ranking.average_precisions(ranked)]
    return {
        "average_precision": dict(zip(names, each, strict=True)),
        "images": dict(zip(names, ranked.there.sum(axis=0).tolist(), strict=True)),
        "threshold": threshold,
        **ranking.at_threshold(ranked, threshold)._asdict(),
    }


def ranking_table(found: dict[str, Any], exact_match: float) -> str:
    """A line for each class, and one for the threshold."""
    width = max(map(len, (*found["images"], "class")))
    lines = [f"{'class':{width}}  AP      images"]
    for name, value in found["average_precision"].items():
        shown = "-     " if value is None else f"{value:.4f}"
        lines.append(f"{name:{width}}  {shown}  {found['images'][name]:,}")
    rates = "  ".join(f"{name} {found[name]:.4f}" for name in ("precision", "recall", "f1"))
    lines.append(
        f"at threshold {found['threshold']:g}: {rates}; all labels right of {exact_match:.4f} "
        f"at 0.5"
    )
    return "\n".join(lines)


def head_fits(
    model: trained.Trained,
    found: tuple[str, ...],
    where: str,
    probing: bool,
    given: str | None = None,
) -> tuple[int, ...] | None:
    """The output of the model that each of the classes `found` is, if its head fits them.

    `given` is what --classes says of that. Of published weights whose names say nothing about
    those of the data, the order of the classes is taken on trust, and said to be.

    Raises:
      UserError: it does not fit, and nothing else is to be done.
    """
    try:
        if not model.class_names:
            raise Mismatch(
                "the model has no head: probe its representation with --few_shot=5, --knn=20 "
                "or --linear_probe"
            )
        if given:
            return chosen(given, model.class_names, found).outputs
        matched = match(model.class_names, found, where, model.family != "vit_jax")
    except Mismatch as error:
        if not probing:
            raise
        problem = str(error).partition(": ")[0]
        print(f"note: {problem}, so only the probes are run", file=sys.stderr)
        return None
    if matched.note:
        processes.say(f"note: {matched.note}")
    return matched.outputs
