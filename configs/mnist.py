"""A small ViT from scratch on MNIST: 28x28 images in patches of 7x7, 5 epochs.

  python -m vit_jax.train --config=configs/mnist.py --workdir=runs/mnist

Data: `tfds:mnist`, prepared once with the [tfds] extra (docs/data.md).

Cost: 2,344 steps of 128, a few minutes on two cores. Expected accuracy on the test split:
not yet measured.
"""

from ml_collections import ConfigDict

from vit_jax import config as base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.image_size = (28, 28)
    config.batch_size = 128
    config.eval_batch_size = 1000
    base.set_duration(config, "total", epochs=5)

    config.model.variant = "mu/7"  # 16 patches
    config.model.depth = 4
    config.model.width = 64
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"

    config.data.source = "tfds:mnist"
    config.data.eval_split = "test"
    config.data.channels = 1
    config.data.train_transform = "shift(2)"
    config.data.eval_transform = "resize"

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.1
    base.set_duration(config.optimizer, "warmup", epochs=0.25)
    return config
