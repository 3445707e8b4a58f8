"""Evaluates a trained model: `python -m vit_jax.evaluate --workdir=DIR`.

Prints accuracy, loss and the number of examples, each example counted exactly once, and
appends them to DIR/evaluations.jsonl. Without further flags that is the data set and split
that training evaluated on.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from vit_jax import cli, experiment, trained
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.objectives.classification import Classification
from vit_jax.training import sharding
from vit_jax.training.evaluate import evaluate
from vit_jax.training.step import make_eval_step


def evaluate_trained(
    model: trained.Trained, source: Any, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Returns `accuracy`, `loss` (nats, without label smoothing) and `count`."""
    config = model.config
    objective = Classification(model.model, config.objective.loss)
    step = jax.jit(make_eval_step(objective, experiment.prepare_for_eval(config)))
    batches = pipeline.eval_batches(
        source, batch_size=batch_size, **experiment.eval_pipeline(config)
    )
    with contextlib.closing(batches):
        total = -(-len(source) // batch_size)
        shown = tqdm(batches, total=total, unit="batch", disable=None)
        on_device = (sharding.put_batch(batch, mesh) for batch in shown)
        averages = evaluate(lambda batch: step(model.params, {}, batch), on_device)
    assert averages is not None  # nothing told it to stop
    return averages


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Work directory of a training run.")
    flags.DEFINE_string("step", "last", "Checkpoint: last, best or a step number.")
    flags.DEFINE_string("data", None, "Data source; that of training unless given.")
    flags.DEFINE_string("data_dir", None, "Where tfds: finds prepared data sets.")
    flags.DEFINE_string("split", None, "Split; that of training unless given.")
    flags.DEFINE_integer("batch_size", None, "Examples at a time, over all devices.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    workdir = Path(cli.required("workdir"))
    mesh = sharding.make_mesh()
    model = trained.load(workdir, given.step, mesh)
    config = model.config
    config.data.source = given.data or config.data.source
    config.data.data_dir = given.data_dir or config.data.data_dir
    config.data.eval_split = given.split or config.data.eval_split
    batch_size = config.eval_batch_size if given.batch_size is None else given.batch_size
    sharding.check_batch_size("--batch_size", batch_size, mesh)
    source = experiment.open_source(config, config.data.eval_split)
    if source.class_names != model.class_names:
        raise UserError(
            f"{config.data.source} has the classes {_some(source.class_names)}, but the model "
            f"was trained on {_some(model.class_names)}: evaluate on data with the same classes"
        )
    averages = evaluate_trained(model, source, batch_size, mesh)
    record = {
        "step": model.step,
        "data": config.data.source,
        "split": config.data.eval_split,
        **averages,
    }
    with (workdir / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    where = f"{config.data.source} {config.data.eval_split}, step {model.step}"
    print(
        f"accuracy {averages['accuracy']:.4f}  loss {averages['loss']:.4f}  "
        f"count {averages['count']}  ({where})"
    )


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"[{shown}{', ...' if len(names) > 5 else ''}] ({len(names)})"


if __name__ == "__main__":
    cli.run(main, define_flags)
