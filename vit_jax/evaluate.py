"""Evaluates a trained model: `python -m vit_jax.evaluate --workdir=DIR`.

Prints accuracy, loss and the number of examples, each example counted exactly once, and
appends them to DIR/evaluations.jsonl. Without further flags that is the data set and split
that training evaluated on. `--checkpoint=PATH_OR_NAME --data=SOURCE` evaluates published
weights, with the preprocessing of their family.
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
    trained.define_flags()
    flags.adopt_module_key_flags(trained)  # so that --help shows them
    flags.DEFINE_string("data", None, "Data source; that of training unless given.")
    flags.DEFINE_string("data_dir", None, "Where tfds: finds prepared data sets.")
    flags.DEFINE_string("split", None, "Split; that of training unless given.")
    flags.DEFINE_integer("batch_size", None, "Examples at a time, over all devices.")


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    given = flags.FLAGS
    mesh = sharding.make_mesh()
    model = trained.from_flags(mesh)
    config = model.config
    if model.family != "vit_jax" and not given.data:
        raise UserError(
            f"--data is missing: {given.checkpoint} does not say what to evaluate on"
        )
    config.data.source = given.data or config.data.source
    config.data.data_dir = given.data_dir or config.data.data_dir
    config.data.eval_split = given.split or config.data.eval_split
    batch_size = config.eval_batch_size if given.batch_size is None else given.batch_size
    sharding.check_batch_size("--batch_size", batch_size, mesh)
    source = experiment.open_source(config, config.data.eval_split)
    check_classes(model, source.class_names, config.data.source)
    averages = evaluate_trained(model, source, batch_size, mesh)
    record = {
        "step": model.step,
        "data": config.data.source,
        "split": config.data.eval_split,
        **averages,
    }
    if given.workdir:
        with (Path(given.workdir) / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    where = f"{config.data.source} {config.data.eval_split}, step {model.step}"
    print(
        f"accuracy {averages['accuracy']:.4f}  loss {averages['loss']:.4f}  "
        f"count {averages['count']}  ({where})"
    )


def check_classes(model: trained.Trained, found: tuple[str, ...], where: str) -> None:
    """Refuses data of other classes; of published weights only the number is compared.

    The names of published weights are rarely those of a data set ("tabby, tabby cat" against
    "n02123045"), so there the order is taken on trust, and said to be.

    Raises:
      UserError: the classes differ.
    """
    if found == model.class_names:
        return
    if model.family == "vit_jax" or len(found) != len(model.class_names):
        raise UserError(
            f"{where} has the classes {_some(found)}, but the model was trained on "
            f"{_some(model.class_names)}: evaluate on data with the same classes"
        )
    print(
        f"note: class names differ ({found[0]!r} in the data, {model.class_names[0]!r} in the "
        f"model): their order is taken to be the same"
    )


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"[{shown}{', ...' if len(names) > 5 else ''}] ({len(names)})"


if __name__ == "__main__":
    cli.run(main, define_flags)
