import numpy as np
import pytest

from vit_jax.evaluation.averages import evaluate


def test_averages_are_exact_sums_over_exact_counts():
    # In float32 the sum of the losses would stop growing at 2**24.
    batches = [(2.0**24, 3.0)] + [(1.0, 1.0)] * 5
    result = evaluate(lambda b: {"loss": (np.float32(b[0]), np.float32(b[1]))}, batches)
    assert result == {"loss": (2**24 + 5) / 8, "count": 8}


def test_stops_when_told_to():
    calls = []
    stop = lambda: len(calls) == 2
    result = evaluate(lambda b: calls.append(b) or {"loss": (1.0, 1.0)}, range(10), stop)
    assert result is None
    assert calls == [0, 1]


def test_weights_batches_by_their_examples():
    batches = [(1.0, 4.0), (1.0, 1.0)]
    assert evaluate(lambda b: {"accuracy": b}, batches)["accuracy"] == pytest.approx(0.4)
