"""What flatness finds, and a short run; `python -m tests.campaign` makes long ones."""

import pytest

from tests.campaign import flatness
from tests.campaign.flatness import Sample


def samples(memory=lambda step: 0, files=lambda step: 0):
    return [Sample(i, 1000 + memory(i), 9, 20 + files(i)) for i in range(400)]


@pytest.mark.campaign
def test_what_grows_is_found_and_what_comes_and_goes_is_not():
    assert flatness.growth(samples(), 400) == []
    at_first = samples(memory=lambda step: 500 * (step > 50))
    assert flatness.growth(at_first, 400) == []
    at_times = samples(files=lambda step: 5 * (step % 10 == 0))
    assert flatness.growth(at_times, 400) == []
    [memory] = flatness.growth(samples(memory=lambda step: step // 4), 400)
    assert memory.startswith("memory 1,037 to 1,087")
    [files] = flatness.growth(samples(files=lambda step: step // 100), 400)
    assert files == "files 21 to 23"


@pytest.mark.campaign
@pytest.mark.slow
def test_a_run_stays_flat(tmp_path):
    outcome = flatness.trial(tmp_path, steps=4000, seed=0)
    assert outcome.came == flatness.FLAT, outcome
