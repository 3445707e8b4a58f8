"""Evaluates a trained model: `python -m vit_jax.evaluate --workdir=DIR`.

Prints accuracy, loss and the number of examples, each example counted exactly once, and
appends them to DIR/evaluations.jsonl. Without further flags that is the data set and split
that training evaluated on. `--checkpoint=PATH_OR_NAME --data=SOURCE` evaluates published
weights, with the preprocessing of their family.

How good the representation is without fine-tuning, of any model (one without a head too) and
on data of any classes:

  python -m vit_jax.evaluate --workdir=DIR --few_shot=1,5,10 --knn=20 --linear_probe
  python -m vit_jax.evaluate --checkpoint=X --data=SOURCE --train_split=train --few_shot=5

  --few_shot      regularised least squares on a few images of each class, in closed form: the
                  paper's on-the-fly measure (arXiv 2010.11929, section 4.1). Seeds 0, 1, 2,
                  L2 strength 1024 and the whitening are big_vision's and not in the paper;
                  whether its numbers were made with them is not verified. Of the training
                  split only the images drawn are decoded.
  --knn           vote of the k nearest training images, weighted by exp(cosine / 0.07)
                  (arXiv 2104.14294)
  --linear_probe  softmax regression on standardised features; its L2 strength is chosen on a
                  fifth of the training split

`--workdir=DIR --verify` evaluates nothing: it reads every checkpoint of DIR, compares it with
its digests, prints a line for each, and ends with exit code 1 if one is damaged.

The features are the `pre_logits`, what the head sees. Images are preprocessed as in other
evaluations of the model; big_vision's few-shot numbers are for
--transform="resize('bilinear', 256)|center_crop".
"""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from vit_jax import cache, cli, experiment, processes, trained
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.objectives.classification import Classification
from vit_jax.training import probes, sharding, verify
from vit_jax.training.evaluate import evaluate
from vit_jax.training.step import make_eval_step


def evaluate_trained(
    model: trained.Trained, source: Any, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Returns `accuracy`, `loss` (nats, without label smoothing) and `count`."""
    config = model.config
    objective = Classification(model.model, config.objective.loss)
    step = jax.jit(make_eval_step(objective, experiment.prepare_for_eval(config)))
    averages = _over_batches(
        lambda batches: evaluate(lambda batch: step(model.params, {}, batch), batches),
        model,
        source,
        batch_size,
        mesh,
    )
    assert averages is not None  # nothing told it to stop
    return averages


def _over_batches(
    function: Callable[[Any], Any],
    model: trained.Trained,
    source: Any,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Any:
    """`function` of the batches of `source`, on the device, with a progress bar."""
    batches = pipeline.eval_batches(
        source, batch_size=batch_size, **experiment.eval_pipeline(model.config, mesh)
    )
    with contextlib.closing(batches):
        total = -(-len(source) // batch_size)
        shown = tqdm(
            batches, total=total, unit="batch", disable=None if processes.is_first() else True
        )
        return function(sharding.put_batch(batch, mesh) for batch in shown)


# --- Probes -------------------------------------------------------------------------------


class Probes(NamedTuple):
    """What is asked for beside, or in place of, the accuracy of the model's own head.

    Attributes:
      shots: images a class of the few-shot probe; none: it is not run.
      seeds: of their choice.
      l2: strength of its regularisation.
      neighbours: numbers of voting neighbours; none: they are not asked.
      linear: whether to run the linear probe.
    """

    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    l2: float
    neighbours: tuple[int, ...]
    linear: bool

    @property
    def any(self) -> bool:
        return bool(self.shots or self.neighbours or self.linear)


def probes_from_flags() -> Probes:
    """Raises UserError for a number that cannot be used."""
    given = flags.FLAGS
    return Probes(
        shots=_numbers("few_shot", at_least=1),
        seeds=_numbers("seeds", at_least=0) or probes.SEEDS,
        l2=given.few_shot_l2,
        neighbours=_numbers("knn", at_least=1),
        linear=given.linear_probe,
    )


def _numbers(flag: str, at_least: int) -> tuple[int, ...]:
    """The numbers of a flag such as --few_shot=1,5,10, each once."""
    texts = flags.FLAGS[flag].value or []
    if not all(text.isdecimal() and int(text) >= at_least for text in texts):
        raise UserError(
            f"--{flag} is {','.join(texts)!r}: use whole numbers, at least {at_least}, with "
            f"commas between"
        )
    return tuple(dict.fromkeys(map(int, texts)))


def run_probes(
    model: trained.Trained,
    train: Any,
    test: Any,
    asked: Probes,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Fits the probes to the features of `train` and measures them on those of `test`.

    Returns:
      `few_shot` {shots: accuracy for each seed}, `knn` {k: accuracy} and `linear_probe`
      {accuracy, l2}, as far as asked for.

    Raises:
      UserError: the two sources have different classes, or a probe cannot be fitted.
    """
    if train.class_names != test.class_names:
        raise UserError(
            f"the training split has the classes {_some(train.class_names)}, the test split "
            f"{_some(test.class_names)}: use splits of the same classes"
        )
    classes, results = len(test.class_names), dict[str, Any]()
    prepare = experiment.prepare_for_eval(model.config)
    step = probes.make_feature_step(model.model, prepare, mesh)
    compute = lambda batch: step(model.params, batch)

    def features(source: Any) -> probes.Features:
        extract = lambda batches: probes.extract(compute, batches)
        found: probes.Features = _over_batches(extract, model, source, batch_size, mesh)
        return found

    def draw(labels: np.ndarray) -> probes.Subsets:
        _report_scarcity(labels, classes, max(asked.shots, default=0))
        return probes.choose_subsets(labels, classes, asked.shots, asked.seeds)

    if asked.neighbours or asked.linear:
        fitted = features(train)
        subsets = draw(fitted.labels)
        drawn = fitted.take(subsets.indices)
    else:  # few-shot alone needs no more images than it draws
        subsets = draw(probes.read_labels(train, model.config.data.threads))
        fitted = drawn = features(probes.Rows(train, subsets.indices))
    tested = features(test)
    if asked.shots:
        results["few_shot"] = probes.few_shot_accuracy(
            drawn, tested, subsets, classes, asked.l2
        )
    if asked.neighbours:
        results["knn"] = probes.knn_accuracy(fitted, tested, classes, asked.neighbours)
    if asked.linear:
        found = probes.linear_probe_accuracy(fitted, tested, classes)
        results["linear_probe"] = found._asdict()
    return results


def _report_scarcity(labels: np.ndarray, num_classes: int, shots: int) -> None:
    """Says on stderr when there are classes with fewer than `shots` examples."""
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    if counts.min() < shots:
        print(
            f"note: {(counts < shots).sum()} of {num_classes} classes have fewer than {shots} "
            f"training examples (the smallest {counts.min()}): all that they have are taken",
            file=sys.stderr,
        )


def table(results: dict[str, Any], asked: Probes) -> str:
    """One line for each probe: its accuracy, and what it is made of."""
    lines = [("", "accuracy", f"seeds {', '.join(map(str, asked.seeds))}" * bool(asked.shots))]
    for shots, accuracies in results.get("few_shot", {}).items():
        each = "  ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        lines.append((f"{shots}-shot", f"{np.mean(accuracies):.4f}", each))
    for k, accuracy in results.get("knn", {}).items():
        lines.append((f"{k}-NN", f"{accuracy:.4f}", ""))
    if linear := results.get("linear_probe"):
        lines.append(("linear probe", f"{linear['accuracy']:.4f}", f"L2 {linear['l2']:g}"))
    return "\n".join(f"{a:14}{b:10}{c}".rstrip() for a, b, c in lines)


# --- The door -----------------------------------------------------------------------------


def define_flags() -> None:
    trained.define_flags()
    processes.define_flags()
    flags.adopt_module_key_flags(processes)
    flags.adopt_module_key_flags(trained)  # so that --help shows them
    flags.DEFINE_bool("verify", False, "Only check the checkpoints of --workdir for damage.")
    flags.DEFINE_string("data", None, "Data source; that of training unless given.")
    flags.DEFINE_string("data_dir", None, "Where tfds: finds prepared data sets.")
    flags.DEFINE_string("split", None, "Split; that of training unless given.")
    flags.DEFINE_string("transform", None, "Preprocessing; the model's own unless given.")
    flags.DEFINE_integer("batch_size", None, "Examples at a time, over all devices.")
    flags.DEFINE_list("few_shot", None, "Images a class for least squares, e.g. 1,5,10.")
    flags.DEFINE_list("seeds", None, "Of the choice of these images; 0,1,2 unless given.")
    flags.DEFINE_float("few_shot_l2", probes.L2, "Strength of their L2 regularisation.")
    flags.DEFINE_list("knn", None, "Numbers of nearest neighbours that vote; usually 20.")
    flags.DEFINE_bool("linear_probe", False, "Softmax regression on frozen features.")
    flags.DEFINE_string(
        "train_split", None, "What probes are fitted to; that of training unless given."
    )


def main(positional: list[str]) -> None:
    cli.no_positional(positional)
    if flags.FLAGS.verify:
        verify.verify_workdir(Path(cli.required("workdir")))
        return
    with processes.together():
        evaluate_as_told()


def evaluate_as_told() -> None:
    """Everything that the flags ask for; process 0 tells the results.

    Raises:
      UserError: the flags do not fit each other, the model or the data.
    """
    given, asked = flags.FLAGS, probes_from_flags()
    cache.keep_compiled_programs()
    mesh = sharding.make_mesh()
    model = trained.from_flags(mesh)
    config = model.config
    for flag in ("data", "train_split") if asked.any else ("data",):
        if model.family != "vit_jax" and not given[flag].value:
            raise UserError(
                f"--{flag} is missing: {given.checkpoint or given.workdir} does not say what "
                f"to {'evaluate on' if flag == 'data' else 'fit the probes to'}"
            )
    config.data.source = given.data or config.data.source
    config.data.data_dir = given.data_dir or config.data.data_dir
    config.data.eval_split = given.split or config.data.eval_split
    config.data.train_split = given.train_split or config.data.train_split
    config.data.eval_transform = given.transform or config.data.eval_transform
    batch_size = config.eval_batch_size if given.batch_size is None else given.batch_size
    sharding.check_batch_size("--batch_size", batch_size, mesh)
    source = experiment.open_source(config, config.data.eval_split)
    train_source = (
        experiment.open_source(config, config.data.train_split) if asked.any else None
    )
    record = {
        "step": model.step,
        "data": config.data.source,
        "split": config.data.eval_split,
    }
    if head_fits(model, source.class_names, config.data.source, asked.any):
        averages = evaluate_trained(model, source, batch_size, mesh)
        save(record | averages)
        say(
            f"accuracy {averages['accuracy']:.4f}  loss {averages['loss']:.4f}  count "
            f"{averages['count']}  ({record['data']} {record['split']}, step {model.step})"
        )
    if asked.any:
        results = run_probes(model, train_source, source, asked, batch_size, mesh)
        split = {"train_split": config.data.train_split, "count": len(source)}
        choices = {"seeds": asked.seeds, "few_shot_l2": asked.l2} if asked.shots else {}
        save(record | split | choices | results)
        say(
            f"frozen features of {record['data']}, step {model.step}: fitted to "
            f"{split['train_split']}, measured on the {split['count']} of {record['split']}"
        )
        say(table(results, asked))


def say(message: str) -> None:
    if processes.is_first():
        print(message)


def save(record: dict[str, Any]) -> None:
    """Appends a line to the evaluations of a work directory, where there is one."""
    if (workdir := flags.FLAGS.workdir) and processes.is_first():
        with (Path(workdir) / "evaluations.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def head_fits(
    model: trained.Trained, found: tuple[str, ...], where: str, probing: bool
) -> bool:
    """Whether the model's own head can be evaluated on data of the classes `found`.

    Of published weights only the number of classes is compared. Their names are rarely those
    of a data set ("tabby, tabby cat" against "n02123045"), so there the order is taken on
    trust, and said to be.

    Raises:
      UserError: it cannot, and nothing else is to be done.
    """
    if found == model.class_names:
        return True
    if not model.class_names:
        problem = "the model has no head"
        remedy = "probe its representation with --few_shot=5, --knn=20 or --linear_probe"
    elif model.family == "vit_jax" or len(found) != len(model.class_names):
        problem = (
            f"{where} has the classes {_some(found)}, but the model was trained on "
            f"{_some(model.class_names)}"
        )
        remedy = "evaluate on data with the same classes"
    else:
        print(
            f"note: class names differ ({found[0]!r} in the data, {model.class_names[0]!r} in "
            f"the model): their order is taken to be the same"
        )
        return True
    if not probing:
        raise UserError(f"{problem}: {remedy}")
    print(f"note: {problem}, so only the probes are run", file=sys.stderr)
    return False


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"[{shown}{', ...' if len(names) > 5 else ''}] ({len(names)})"


if __name__ == "__main__":
    cli.run(main, define_flags)
