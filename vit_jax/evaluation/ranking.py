"""How well scores rank images, class by class: average precision, and a threshold."""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Ranking(NamedTuple):
    """Scores (N, K) float32, and which of the K labels are there, bool (N, K)."""

    scores: np.ndarray
    there: np.ndarray

    @classmethod
    def of(cls, parts: Iterable[tuple[Any, Any]]) -> "Ranking":
        """Joins batches of scores and of 1, 0 or -1, which is for examples to leave out."""
        scores, there = (np.concatenate(list(x)) for x in zip(*parts, strict=True))
        counted = there[:, 0] >= 0
        return cls(scores[counted], there[counted] > 0)


def average_precisions(ranking: Ranking) -> np.ndarray:
    """(K,) float64: of each class, NaN where no image has it."""
    from sklearn.metrics import average_precision_score

    found = np.full(ranking.there.shape[1], np.nan)
    for k in np.flatnonzero(ranking.there.any(axis=0)):
        found[k] = average_precision_score(ranking.there[:, k], ranking.scores[:, k])
    return found


def mean_average_precision(ranking: Ranking) -> float:
    """The mean over the classes that some image has; NaN if there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an empty mean
        return float(np.nanmean(average_precisions(ranking)))


class AtThreshold(NamedTuple):
    """Of all decisions together (micro averages); 0 where nothing is to be divided by."""

    precision: float
    recall: float
    f1: float


def at_threshold(ranking: Ranking, threshold: float) -> AtThreshold:
    """When every score of at least `threshold` counts as a label."""
    said = ranking.scores >= threshold
    right = float((said & ranking.there).sum())
    precision = right / max(int(said.sum()), 1)
    recall = right / max(int(ranking.there.sum()), 1)
    f1 = 2 * right / max(int(said.sum()) + int(ranking.there.sum()), 1)
    return AtThreshold(precision, recall, f1)
