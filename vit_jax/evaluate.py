"""Evaluates a trained model: `python -m vit_jax.evaluate --workdir=DIR`.

Prints accuracy, loss and the number of examples, each example counted exactly once, and
appends them to DIR/evaluations.jsonl. Without further flags that is the data set and split
that training evaluated on. `--checkpoint=PATH_OR_NAME --data=SOURCE` evaluates published
weights, with the preprocessing of their family.

Classes of the data and outputs of the model are matched by name, whatever their order, and the
data may have some of the model's classes only: the other outputs are then left out, as is usual
on ImageNet-A and ImageNet-R. Where names cannot be compared ("n01440764" and "tench"), classes
are matched by order, and a note says so. --classes gives the output of each class,
--class_names the names of the outputs.

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

The features are the `pre_logits`, the input of the head. Images are preprocessed as in other
evaluations of the model; big_vision's few-shot numbers are for
--transform="resize('bilinear', 256)|center_crop".
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from vit_jax.checkpoints import trained, verify
from vit_jax.command_line import cli, model_flags, process_flags
from vit_jax.data import reading
from vit_jax.data.sources.classes import read_names
from vit_jax.distributed import processes, sharding
from vit_jax.evaluation import few_shot, inference
from vit_jax.evaluation.accuracy import (
    describe_ranking,
    evaluate_trained,
    head_fits,
    ranking_table,
)
from vit_jax.evaluation.probes import Probes, run_probes, table
from vit_jax.evaluation.ranking import Ranking
from vit_jax.system import cache
from vit_jax.system.errors import UserError


def probes_from_flags() -> Probes:
    """Raises UserError for a number that cannot be used."""
    given = flags.FLAGS
    return Probes(
        shots=_numbers("few_shot", at_least=1),
        seeds=_numbers("seeds", at_least=0) or few_shot.SEEDS,
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


def define_flags() -> None:
    model_flags.define_flags()
    process_flags.define_flags()
    flags.adopt_module_key_flags(process_flags)
    flags.adopt_module_key_flags(model_flags)  # so that --help shows them
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
    flags.DEFINE_float("few_shot_l2", few_shot.L2, "Strength of their L2 regularisation.")
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
    with process_flags.together():
        evaluate_as_told()


def evaluate_as_told() -> None:
    """Everything that the flags request; process 0 prints the results.

    Raises:
      UserError: the flags do not fit each other, the model or the data.
    """
    given, asked = flags.FLAGS, probes_from_flags()
    cache.keep_compiled_programs()
    mesh = sharding.make_mesh()
    model = model_flags.from_flags(mesh)
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
    source = reading.open_source(config, config.data.eval_split)
    train_source = reading.open_source(config, config.data.train_split) if asked.any else None
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
        processes.say(
            f"{name} {averages[name]:.4f}  loss {averages['loss']:.4f}  count "
            f"{averages['count']}  ({record['data']} {record['split']}, step {model.step})"
        )
        if several:
            processes.say(ranking_table(several, averages["exact_match"]))
    if asked.any:
        results = run_probes(model, train_source, source, asked, batch_size, mesh)
        split = {"train_split": config.data.train_split, "count": len(source)}
        choices = {"seeds": asked.seeds, "few_shot_l2": asked.l2} if asked.shots else {}
        save(record | split | choices | results)
        processes.say(
            f"frozen features of {record['data']}, step {model.step}: fitted to "
            f"{split['train_split']}, measured on the {split['count']} of {record['split']}"
        )
        processes.say(table(results, asked))


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


if __name__ == "__main__":
    cli.run(main, define_flags)
