"""Evaluates a trained model: `python -m vit_jax.evaluate --workdir=DIR`.

Prints accuracy, loss and the number of examples, each example counted exactly once, and
appends them to DIR/evaluations.jsonl. Without further flags that is the data set and split
that training evaluated on. `--checkpoint=PATH_OR_NAME --data=SOURCE` evaluates published
weights, with the preprocessing of their family.

Classes of the data and outputs of the model are matched by name, whatever their order, and the
data may have some of the model's classes only: the other outputs are left out then, as it is
done on ImageNet-A and ImageNet-R. Where names say nothing ("n01440764" and "tench"), the order
counts, and a note says so. --classes says which output is which class, --class_names what the
outputs are called.

Of images with several labels (`data.multi_label`, or --multi_label for published weights),
mean average precision stands in place of accuracy, with that of each class, and precision,
recall and F1 of all labels together at --threshold.

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

from vit_jax.checkpoints import trained, verify
from vit_jax.command_line import cli
from vit_jax.data import pipeline
from vit_jax.data.sources.classes import Mismatch, as_classes, chosen, match, read_names, some
from vit_jax.distributed import processes, sharding
from vit_jax.evaluation import inference, probes, ranking
from vit_jax.evaluation.averages import evaluate
from vit_jax.evaluation.ranking import Ranking
from vit_jax.models.model import Model
from vit_jax.system import cache
from vit_jax.system.errors import UserError
from vit_jax.training import experiment
from vit_jax.training.step import make_eval_step


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
    objective = experiment.classify(config, network)
    # Whole in every process, which scores of examples would not be otherwise.
    step = jax.jit(
        make_eval_step(objective, experiment.prepare_for_eval(config)),
        out_shardings=sharding.replicated(mesh),
    )
    averages = _over_batches(
        lambda batches: evaluate(
            lambda batch: step(model.params, {}, batch), batches, tell_ranking=tell_ranking
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
    same = as_classes(test, train.class_names)
    if same is None or len(train.class_names) != len(test.class_names):
        raise UserError(
            f"the training split has the classes {some(train.class_names)}, the test split "
            f"{some(test.class_names)}: use splits of the same classes"
        )
    test = same
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
    flags.DEFINE_string(
        "classes", None,
        "Which output each class of the data is, in their order: names or numbers, with commas "
        "between, or a file of one a line. By name unless given.",
    )  # fmt: skip
    flags.DEFINE_string("class_names", None, "What the outputs are called: a file, one a line.")
    flags.DEFINE_string(
        "multi_label", None, "Images have several labels: as config.data.multi_label."
    )
    flags.DEFINE_float(
        "threshold", 0.5, "Probability from which on a label counts, of several.", 0, 1
    )
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
    if given.class_names:
        model = model._replace(class_names=named_outputs(model, given.class_names))
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
    if given.multi_label:
        config.data.multi_label, config.objective.loss = given.multi_label, "sigmoid"
    if asked.any and config.data.multi_label:
        raise UserError(
            "probes (--few_shot, --knn, --linear_probe) need one label of each image, but here "
            "images have several: leave them out"
        )
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
    fits = head_fits(model, source.class_names, config.data.source, asked.any, given.classes)
    if fits is not None:
        if note := inference.head_note(model):
            print(f"note: {note}", file=sys.stderr)
        rankings: list[Ranking] = []
        averages = evaluate_trained(model, source, batch_size, mesh, fits, rankings.append)
        several = describe_ranking(rankings, source.class_names, given.threshold)
        save(record | averages | several)
        name = "mAP" if rankings else "accuracy"
        say(
            f"{name} {averages[name]:.4f}  loss {averages['loss']:.4f}  count "
            f"{averages['count']}  ({record['data']} {record['split']}, step {model.step})"
        )
        if several:
            say(ranking_table(several, averages["exact_match"]))
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


def say(message: str) -> None:
    if processes.is_first():
        print(message)


def save(record: dict[str, Any]) -> None:
    """Appends a line to the evaluations of a work directory, where there is one.

    One that may only be read is evaluated all the same, with a note.
    """
    if (workdir := flags.FLAGS.workdir) and processes.is_first():
        path = Path(workdir) / "evaluations.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"note: {path} cannot be written ({error.strerror})", file=sys.stderr)


def named_outputs(model: trained.Trained, given: str) -> tuple[str, ...]:
    """The names that --class_names lists, one for each output. Raises UserError."""
    names = read_names("class_names", given)
    if len(names) != len(model.class_names):
        raise UserError(
            f"--class_names={given} has {len(names)} names, but the model has "
            f"{len(model.class_names)} outputs: give one for each"
        )
    return names


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
        say(f"note: {matched.note}")
    return matched.outputs


if __name__ == "__main__":
    cli.run(main, define_flags)
