"""A few of the random kills; `python -m tests.campaign` makes many more."""

import pytest

from tests.campaign import kills


@pytest.mark.campaign
@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    done = kills.run(tmp_path, trials=4, seed=0)
    assert [outcome for _, outcome in done] == [kills.SAME] * 4, done
