"""The smallest run with everything random switched on: starting Python takes most of it."""

from tests.tiny_config import tiny
from vit_jax import config as configuration

STEPS, EVALUATION = 30, 10


def get_config():
    config = tiny()
    config.model.depth = 1
    config.data.source = "synthetic:8x8x1,classes=4,examples=128"
    for name, steps in [("total", STEPS), ("eval_every", EVALUATION), ("checkpoint_every", 5)]:
        configuration.set_duration(config, name, steps=steps)
    return config
