"""Probes of a frozen network: few-shot, nearest neighbours, linear."""

import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax.checkpoints import trained
from vit_jax.data import on_device
from vit_jax.data.sources.classes import as_classes, some
from vit_jax.evaluation import features, few_shot, knn, linear_probe
from vit_jax.evaluation.accuracy import over_batches
from vit_jax.system.errors import UserError


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
    prepare = on_device.prepare_for_eval(model.config)
    step = features.make_feature_step(model.model, prepare, mesh)
    compute = lambda batch: step(model.params, batch)

    def features_of(source: Any) -> features.Features:
        extract = lambda batches: features.extract(compute, batches)
        found: features.Features = over_batches(extract, model, source, batch_size, mesh)
        return found

    def draw(labels: np.ndarray) -> few_shot.Subsets:
        _report_scarcity(labels, classes, max(asked.shots, default=0))
        return few_shot.choose_subsets(labels, classes, asked.shots, asked.seeds)

    if asked.neighbours or asked.linear:
        fitted = features_of(train)
        subsets = draw(fitted.labels)
        drawn = fitted.take(subsets.indices)
    else:  # few-shot alone needs no more images than it draws
        subsets = draw(features.read_labels(train, model.config.data.threads))
        fitted = drawn = features_of(features.Rows(train, subsets.indices))
    tested = features_of(test)
    if asked.shots:
        results["few_shot"] = few_shot.few_shot_accuracy(
            drawn, tested, subsets, classes, asked.l2
        )
    if asked.neighbours:
        results["knn"] = knn.knn_accuracy(fitted, tested, classes, asked.neighbours)
    if asked.linear:
        found = linear_probe.linear_probe_accuracy(fitted, tested, classes)
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
