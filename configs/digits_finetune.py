"""The paper's pipeline whole, on a laptop: pre-train small, fine-tune larger.

As section 3.2 of arXiv 2010.11929 has it: pre-training at 8x8 pixels with the MLP head and
Adam; then the head is dropped for a zero-initialised linear one, the learned position
embeddings are resized from 4x4 to 8x8 patches, and the model is fine-tuned at 16x16 pixels
with SGD and momentum. `scratch` is the fine-tuning alone, from random weights, to compare.

  python -m vit_jax.train --config=configs/digits_finetune.py:pretrain --workdir=runs/pretrain
  python -m vit_jax.train --config=configs/digits_finetune.py:finetune --workdir=runs/finetune \
    --config.init_from=runs/pretrain
  python -m vit_jax.train --config=configs/digits_finetune.py:scratch --workdir=runs/scratch

Cost: one to two minutes on two cores for the first two. Expected: fine-tuning far ahead of
scratch at the same number of steps (measured values: docs/results.md).
"""

from ml_collections import ConfigDict

from vit_jax import config as base
from vit_jax.system.errors import UserError


def get_config(phase: str = "pretrain") -> ConfigDict:
    if phase not in ("pretrain", "finetune", "scratch"):
        raise UserError(f"there is no phase {phase!r}: use pretrain, finetune or scratch")
    config = base.get_config()
    config.image_size = (8, 8)
    config.batch_size = 64
    config.eval_batch_size = 360
    base.set_duration(config, "total", epochs=80)
    base.set_duration(config, "eval_every", epochs=20)

    config.model.variant = "mu/2"
    config.model.depth = 4
    config.model.width = 64
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.representation_size = 64

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.channels = 1
    config.data.train_transform = "shift(1)"

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.5
    base.set_duration(config.optimizer, "warmup", epochs=5)
    if phase == "pretrain":
        return config

    config.image_size = (16, 16)
    base.set_duration(config, "total", epochs=10)
    config.model.representation_size = None
    config.data.train_transform = "resize|shift(2)"
    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.03
    config.optimizer.weight_decay = 0.0
    base.set_duration(config.optimizer, "warmup", epochs=1)
    return config
