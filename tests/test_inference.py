import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as configuration
from vit_jax.checkpoints import trained
from vit_jax.distributed import sharding
from vit_jax.evaluation import inference
from vit_jax.models import registry
from vit_jax.system.errors import UserError

ONE, ALL = sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh()


def choose(images, mesh, seconds, fits=1 << 30):
    """The choice where a batch of n takes `seconds(n)`, and the batches that were tried."""
    tried, now = [], [0.0]

    def run(size):
        if size > fits:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        tried.append(size)
        now[0] += seconds(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        return inference.choose_batch_size(run, images, mesh), tried


def test_for_few_images_nothing_is_measured():
    assert choose(1, ONE, None) == (1, [])
    assert choose(1, ALL, None) == (8, [])
    assert choose(50, ALL, None) == (56, [])
    assert choose(2047, ONE, None) == (32, [])


def test_for_many_it_grows_while_that_is_faster_and_fits():
    overhead = lambda size: 1.0 + 0.01 * size  # doubling 512 gains 9%, 1024 only 4.7%
    assert choose(10**6, ONE, overhead) == (1024, [2**i for i in range(5, 12) for _ in "ab"])
    assert choose(10**6, ONE, lambda size: size)[0] == 32
    assert choose(10**6, ALL, overhead, fits=600)[0] == 512
    assert choose(2**12, ONE, overhead)[0] == 256  # a sixteenth of the images
    with pytest.raises(jax.errors.JaxRuntimeError):
        choose(10**6, ONE, overhead, fits=16)


def test_what_devices_do_not_divide_is_refused():
    assert inference.check_batch_size(None, ALL) is None
    assert inference.check_batch_size(16, ALL) == 16
    with pytest.raises(UserError, match="--batch_size is 6"):
        inference.check_batch_size(6, ALL)


def small_hybrid(dtype):
    config = configuration.get_config()
    config.image_size = (32, 32)
    config.model.update({"variant": "R50+B/16", "resnet": (), "depth": 1, "width": 32})
    config.model.update({"num_heads": 2, "mlp_dim": 64, "scan": False, "dtype": dtype})
    model = registry.build_model(config, 3)
    params = jax.jit(model.init)(jax.random.key(0))
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (32, 3))
    return trained.Trained(config, ("a", "b", "c"), model, params, 0)


def test_half_precision_stores_what_products_read_and_changes_no_result():
    half = small_hybrid("bfloat16")
    stored = trained.for_inference(half)
    assert stored.params["head"]["kernel"].dtype == jnp.bfloat16
    assert stored.params["embedding"]["kernel"].dtype == jnp.bfloat16
    assert stored.params["conv_root"]["kernel"].dtype == jnp.float32
    assert stored.params["head"]["bias"].dtype == jnp.float32
    images = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    logits = lambda m: np.asarray(
        jax.jit(lambda p, x: m.model.apply(p, x)[0])(m.params, images)
    )
    np.testing.assert_array_equal(logits(stored), logits(half))
    full = small_hybrid("float32")
    chosen = trained.for_inference(full, "bfloat16")
    assert full.config.model.dtype == "float32"  # it stays what it was
    assert chosen.config.model.dtype == "bfloat16"
    np.testing.assert_array_equal(logits(chosen), logits(half))
    assert np.abs(logits(full) - logits(half)).max() > 0
    assert jax.tree.leaves(trained.for_inference(full).params)[0].dtype == jnp.float32
