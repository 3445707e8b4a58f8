"""The short form of the trials of damage; `tests.campaign` makes many more."""

import pytest

from tests.campaign import bit_flips


@pytest.mark.campaign
def test_damage_to_any_file_of_a_checkpoint_is_noticed_or_without_effect(tmp_path):
    kinds = (*bit_flips.KINDS, "remove")
    done = bit_flips.run(tmp_path, trials=40, seed=0, kinds=kinds)
    assert bit_flips.wrong(done) == []
    assert bit_flips.counts(done)[bit_flips.NOTICED] > 15
