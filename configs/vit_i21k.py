"""ViT on ImageNet-21k: Table 3 of arXiv 2010.11929, the pre-training that most people use.

  python -m vit_jax.train --config=configs/vit_i21k.py:L/16 --workdir=runs/vit_l16_i21k

The argument is any variant (default B/16), with `,epochs=N` to train for another length
than the 90 epochs of the table (it has L also at 30). ImageNet-21k is not in the public TFDS
catalogue: prepare your copy as an array_record data set named `imagenet21k` with one split,
`full`, and 21,843 classes, or pass --config.data.source=folder:PATH with its own splits.

Cost: 90 epochs of 14.2 million images are 135 exaFLOPs for B/16 (computed); the paper gives
230 TPUv3-core-days for L/16.
Expected precision at 1 on the held-out split, as reported by the authors of the original
code: B/32 44.0, B/16 47.9, L/32 45.4, L/16 49.9, H/14 49.1. Not yet reproduced here.

The paper does not name the loss; sigmoid cross-entropy with the head bias at -10, and the
splits, are those of the same group's later code.
"""

from ml_collections import ConfigDict

from vit_jax import config as base
from vit_jax.models.variants import decode_variant


def get_config(argument: str = "B/16") -> ConfigDict:
    variant, _, epochs = argument.partition(",epochs=")
    config = base.get_config()
    config.batch_size = 4096
    base.set_duration(config, "total", epochs=float(epochs or 90))
    base.set_duration(config, "eval_every", steps=5000)
    base.set_duration(config, "checkpoint_every", steps=1000)

    config.model.variant = variant
    config.model.representation_size = decode_variant(variant)[0].width
    config.model.head_bias_init = -10.0
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"

    config.objective.loss = "sigmoid"

    config.data.source = "tfds:imagenet21k"
    config.data.train_split = "full[51200:]"
    config.data.eval_split = "full[25600:51200]"

    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.03
    config.optimizer.decay = "times_lr"
    config.optimizer.moment_dtype = "bfloat16"
    base.set_duration(config.optimizer, "warmup", steps=10_000)
    return config
