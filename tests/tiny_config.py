"""A model of a few thousand parameters with everything random switched on.

As a configuration file it is a longer run, so that there is time to kill it.
"""

from vit_jax import config as configuration

TOTAL, LONG = 24, 48


def tiny(**fields):
    config = configuration.get_config()
    config.image_size = (8, 8)
    config.batch_size = 32
    config.eval_batch_size = 64
    config.ema_decay = 0.9
    for name, steps in [("total", TOTAL), ("log_every", 1), ("eval_every", 8)]:
        configuration.set_duration(config, name, steps=steps)
    configuration.set_duration(config, "checkpoint_every", steps=4)
    configuration.set_duration(config.optimizer, "warmup", steps=2)
    config.model.variant = "mu/4"
    config.model.depth = 2
    config.model.dropout = 0.2
    config.model.stochastic_depth = 0.2
    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.channels = 1
    config.data.train_transform = "shift(1)"
    config.data.mixup = 0.2
    config.update(fields)
    return config


def get_config():
    config = tiny()
    configuration.set_duration(config, "total", steps=LONG)
    return config
