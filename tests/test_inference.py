import jax
import pytest

from vit_jax import inference
from vit_jax.errors import UserError
from vit_jax.training import sharding


def test_a_batch_is_no_larger_than_what_there_is():
    one = sharding.make_mesh(devices=jax.devices()[:1])
    four = sharding.make_mesh()
    assert inference.default_batch_size(None, 1, one) == 1
    assert inference.default_batch_size(None, 1, four) == 4
    assert inference.default_batch_size(None, 50, four) == 52
    assert inference.default_batch_size(None, 10_000, four) == 128
    assert inference.default_batch_size(8, 1, four) == 8
    with pytest.raises(UserError, match="--batch_size is 6"):
        inference.default_batch_size(6, 1, four)
