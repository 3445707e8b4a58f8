"""A few of the starts on one work directory; `python -m tests.campaign` makes many more."""

import pytest

from tests.campaign import two_starts


@pytest.mark.campaign
@pytest.mark.slow
def test_of_two_starts_one_trains_and_the_other_says_who_is_there(tmp_path):
    done = two_starts.run(tmp_path, trials=3, seed=0)
    right = {two_starts.REFUSED, two_starts.AFTER, two_starts.TAKEN_OVER}
    assert {outcome.came for outcome in done} <= right, done
    assert done[2].came == two_starts.TAKEN_OVER
