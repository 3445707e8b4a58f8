"""A small ViT from scratch on scikit-learn's bundled digits: 1,797 real 8x8 scans.

The smallest complete run of everything here; needs no download and no accelerator.

  python -m vit_jax.train --config=configs/digits.py --workdir=runs/digits

Cost and expected accuracy on the held-out 20%: under a minute on two cores, at least 97%
(measured values: docs/results.md).
"""

from ml_collections import ConfigDict

from vit_jax import config as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.image_size = (8, 8)
    config.batch_size = 64
    config.eval_batch_size = 360
    config.ema_decay = 0.99
    base.set_duration(config, "total", epochs=80)
    base.set_duration(config, "eval_every", epochs=10)
    base.set_duration(config, "checkpoint_every", epochs=10)

    config.model.variant = "mu/2"  # 16 patches
    config.model.depth = 4
    config.model.width = 64
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.stochastic_depth = 0.1

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.channels = 1
    config.data.train_transform = "shift(1)"
    config.data.eval_transform = "resize"

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.5
    base.set_duration(config.optimizer, "warmup", epochs=5)
    return config
