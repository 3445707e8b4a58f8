"""Small models with random weights, no two arrays alike."""

import numpy as np

from vit_jax.interop.families import expected_shapes, flatten, nest
from vit_jax.models import vit

TINY = {
    "image_size": (32, 32),
    "channels": 3,
    "patch_size": 8,
    "depth": 2,
    "width": 24,
    "mlp_dim": 40,
    "num_heads": 3,
    "num_classes": 5,
}


def model(**changes):
    """A configuration and parameters for it."""
    cfg = vit.ViTConfig(**TINY | changes)
    rng = np.random.default_rng(0)
    random = lambda shape: rng.standard_normal(shape).astype(np.float32)
    return cfg, nest({name: random(shape) for name, shape in expected_shapes(cfg).items()})


def same(a, b):
    """Asserts that two nested dicts hold the same bits."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
