"""A few of the random kills; `python -m tests.campaign` makes many more."""

import pytest

from tests.campaign import kills


@pytest.mark.campaign
@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    done = kills.run(tmp_path, trials=6, seed=0)
    assert [outcome.came for outcome in done] == [kills.SAME] * 6, done
    assert sum(outcome.events for outcome in done) >= 6
