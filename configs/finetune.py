"""Fine-tuning published weights, as section 4.1 and Table 4 of arXiv 2010.11929 have it.

  python -m vit_jax.sweep --config=configs/finetune.py:b16,cifar10 --workdir=runs/b16_cifar10
  python -m vit_jax.train --config=configs/finetune.py:b16,cifar10 --workdir=runs/once

`sweep` tries the learning rates of the table, chooses on a held-out part of the training data,
trains on all of it and reports test accuracy; `train` trains once, on the sub-split. The
argument is MODEL,DATA or MODEL,DATA,res=PIXELS:

  MODEL  b16 b32 l16 l32 h14    the original weights, pre-trained on ImageNet-21k
         ti16 s16 s32           AugReg's, as the original release has none of these
         anything else          weights as --config.init_from takes them: augreg:B_16,
                                hf:OWNER/NAME, a file, or a work directory such as runs/pretrain
  DATA   cifar10 cifar100 oxford_iiit_pet (pets) oxford_flowers102 (flowers)
         imagenet2012 (imagenet)       prepared once with the [tfds] extra (docs/data.md)
         tfds:NAME folder:PATH         your own: 10% of `train` is held out, `test` is reported
         digits                        bundled; for small models of one's own

The network and the range of its pixels are those of the weights. The recipe: SGD with momentum
0.9, batches of 512, cosine decay, gradients clipped to 1, no weight decay, 384 pixels; dropout
0.1 for L/16 and H/14. With tfds:NAME and folder:PATH training is 500 steps long, BiT's rule
(1912.11370) for fewer than 20,000 images; for up to 500,000 it has 10,000 steps, beyond that
20,000: --config.total_steps=10_000 --config.optimizer.warmup_steps=500.

Of a folder with `train` and one of `val`, `validation`, `test`, that one is reported. Where
there are both, 10% of `train` still decides, unless --config.data.train_split=train and
--config.data.eval_split=val (and, for the final run, --config.sweep.train_split=train+val).

On one GPU a batch of 512 may not fit: --config.accumulation=8 computes it in eight parts.
Patches must tile the image: for other weights with patches of 14 pixels add res=378.

Cost: 10,000 steps of 512 images at 384 pixels are 1.7 exaFLOPs for B/16 (computed, 3 x 2 x 55.5
GMACs an image), times the number of learning rates, plus the final run.
Expected test accuracy, as reported by the authors of the original code for these weights: B/16
98.8 to 99.0 on CIFAR-10, 91.9 to 92.1 on CIFAR-100, 84.1 to 84.5 on ImageNet (without
averaged weights). Not yet reproduced here.

Where the paper is silent this file follows the code of its authors: the warm-up of 500 steps
(100 where training is 500 long), the momentum in bfloat16, the splits, crops and flips, and
evaluation by resizing without a crop. On ImageNet it follows Table 2: averaged weights
(0.9999), L/16 at 512 pixels and H/14 at 518. Elsewhere H/14 has 378 pixels, as 384 are no
multiple of 14 (not verified: how the paper made them fit). The table has 0.06 for ImageNet,
too, but by appendix B.1.1 for ResNets and hybrids only. Flowers trains on the 1,020 images
that TFDS calls `train` (not verified: whether the paper adds the 1,020 of `validation`).
"""

import re

from ml_collections import ConfigDict

from vit_jax import config as base
from vit_jax.system.errors import UserError

MODELS = {
    "ti16": "augreg:Ti_16",
    "s16": "augreg:S_16",
    "s32": "augreg:S_32",
    "b16": "google:ViT-B_16",
    "b32": "google:ViT-B_32",
    "l16": "google:ViT-L_16",
    "l32": "google:ViT-L_32",
    "h14": "google:ViT-H_14",
}
WITH_DROPOUT = ("google:ViT-L_16", "google:ViT-H_14", "google:R50+ViT-B_16")
SIZE = {"google:ViT-H_14": 378}
IMAGENET_SIZE = {"google:ViT-L_16": 512, "google:ViT-H_14": 518}

RATES = (0.001, 0.003, 0.01, 0.03)
# Name: percentage to train on while choosing, test split, steps, warm-up, learning rates, and
# the rate of a single run (the best for a B/32 of AugReg by the same group's later code).
DATA = {
    "cifar10": (98, "test", 10_000, 500, RATES, 0.003),
    "cifar100": (98, "test", 10_000, 500, RATES, 0.01),
    "oxford_iiit_pet": (90, "test", 500, 100, RATES, 0.003),
    "oxford_flowers102": (90, "test", 500, 100, RATES, 0.003),
    "imagenet2012": (99, "validation", 20_000, 500, (0.003, 0.01, 0.03), 0.03),
}
OWN = (90, "test", 500, 100, RATES, 0.003)
ALIASES = {
    "pets": "oxford_iiit_pet",
    "flowers": "oxford_flowers102",
    "imagenet": "imagenet2012",
}


def get_config(argument: str = "b16,cifar10") -> ConfigDict:
    match = re.fullmatch(r"(?P<model>[^,]+),(?P<data>.+?)(,res=(?P<res>[1-9]\d*))?", argument)
    if match is None:
        raise UserError(
            f"configs/finetune.py:{argument} is not understood: write MODEL,DATA or "
            f"MODEL,DATA,res=PIXELS, such as b16,cifar10"
        )
    name = ALIASES.get(match["data"], match["data"])
    own = name == "digits" or re.match("(tfds|folder):.", name)
    if not own and name not in DATA:
        raise UserError(
            f"configs/finetune.py has no data {name!r}: use one of {', '.join(DATA)}, digits, "
            f"tfds:NAME or folder:PATH"
        )
    weights = MODELS.get(match["model"], match["model"])
    percent, test, steps, warmup, rates, rate = DATA.get(name, OWN)

    config = base.get_config()
    config.init_from = weights
    size = SIZE.get(weights, 384)
    if name == "imagenet2012":
        size = IMAGENET_SIZE.get(weights, 384)
        config.ema_decay = 0.9999
    config.image_size = (int(match["res"] or size),) * 2
    config.batch_size = 512
    config.eval_batch_size = 512
    base.set_duration(config, "total", steps=steps)
    base.set_duration(config, "eval_every", steps=steps / 5)
    base.set_duration(config, "checkpoint_every", steps=steps / 5)

    config.model.variant = None  # the whole model is that of the weights
    config.model.dropout = 0.1 if weights in WITH_DROPOUT else 0.0
    config.model.dtype = "bfloat16"

    config.data.source = name if own else f"tfds:{name}"
    config.data.train_split = f"train[:{percent}%]"
    config.data.eval_split = f"train[{percent}%:]"
    config.data.train_transform = "inception_crop(0.05, 1.0)|flip"
    config.data.eval_transform = "resize"

    config.optimizer.name = "sgd"
    config.optimizer.lr = rate
    config.optimizer.moment_dtype = "bfloat16"
    base.set_duration(config.optimizer, "warmup", steps=warmup)

    config.sweep.lr = rates
    config.sweep.train_split = "train"
    config.sweep.test_split = test

    if name == "digits":  # 8 x 8 pixels, in which left and right differ
        config.image_size = (int(match["res"] or 16),) * 2
        config.batch_size = 64
        config.model.dtype = "float32"
        config.data.train_transform = "resize|shift(2)"
    return config
