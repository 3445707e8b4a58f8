import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from vit_jax.evaluation import ranking
from vit_jax.evaluation.ranking import Ranking


@pytest.fixture(params=[0, 1, 2])
def ranked(request):
    rng = np.random.default_rng(request.param)
    scores = rng.random((200, 6), np.float32).round(request.param + 1)  # with many ties
    there = rng.random((200, 6)) < np.array([0.5, 0.1, 0.9, 0.02, 0.3, 0.0])
    return Ranking(scores, there)


def test_average_precision_is_that_of_its_definition(ranked):
    found = ranking.average_precisions(ranked)
    for k in range(5):
        # The sum over thresholds of the precision there times what is gained in recall.
        expected, recall = 0.0, 0.0
        for threshold in np.unique(ranked.scores[:, k])[::-1]:
            said = ranked.scores[:, k] >= threshold
            right = (said & ranked.there[:, k]).sum()
            gained = right / ranked.there[:, k].sum()
            expected, recall = expected + (gained - recall) * right / said.sum(), gained
        assert found[k] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(found[5])
    mean = average_precision_score(ranked.there[:, :5], ranked.scores[:, :5], average="macro")
    assert ranking.mean_average_precision(ranked) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.8])
def test_a_threshold_gives_micro_averages(ranked, threshold):
    expected = precision_recall_fscore_support(
        ranked.there, ranked.scores >= threshold, average="micro", zero_division=0
    )[:3]
    np.testing.assert_allclose(ranking.at_threshold(ranked, threshold), expected, rtol=1e-12)


def test_batches_are_joined_without_what_is_left_out(ranked):
    there = ranked.there.astype(np.int8)
    padding = np.full((3, 6), -1, np.int8)
    parts = [
        (ranked.scores[:120], there[:120]),
        (np.concatenate([ranked.scores[120:], np.ones((3, 6), np.float32)]),
         np.concatenate([there[120:], padding])),
    ]  # fmt: skip
    joined = Ranking.of(parts)
    np.testing.assert_array_equal(joined.scores, ranked.scores)
    np.testing.assert_array_equal(joined.there, ranked.there)


def test_nothing_to_find_is_no_number():
    nothing = Ranking(np.ones((3, 2), np.float32), np.zeros((3, 2), bool))
    assert np.isnan(ranking.mean_average_precision(nothing))
    assert ranking.at_threshold(nothing, 0.5) == (0, 0, 0)
