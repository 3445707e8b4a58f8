"""Fine-tuning AugReg's weights over the grid of "How to train your ViT?" (arXiv 2106.10270).

  python -m vit_jax.sweep --config=configs/augreg.py:b16,cifar100 --workdir=runs/augreg
  python -m vit_jax.train --config=configs/augreg.py:b16,cifar100 --workdir=runs/once

`sweep` tries every learning rate with every length, chooses on a held-out part of the training
data, trains on all of it and reports test accuracy (that last step is the protocol of arXiv
2010.11929; not verified: whether this paper's numbers come from the sub-split); `train`
trains once, with the first length. The argument is MODEL,DATA or MODEL,DATA,res=PIXELS:

  MODEL  ti16 s32 s16 b32 b16 b8 l16 rti16 r26s32 r50l32: the best pre-training run on
         ImageNet-21k; or any weights as --config.init_from takes them
  DATA   imagenet2012 (imagenet) cifar100 oxford_iiit_pet (pets) resisc45, prepared once with
         the [tfds] extra (docs/data.md)
  res    224 or 384 (default)

The network is that of the weights. The recipe: SGD with momentum 0.9 kept in bfloat16, batches
of 512, cosine decay, gradients clipped to 1; crops and flips, but no other augmentation, no
dropout and no weight decay. The paper's KITTI and VTAB tasks are not here: the first has no
class label in TFDS, the second is nineteen sets with rules of their own.

On one GPU a batch of 512 may not fit: --config.accumulation=8 computes it in eight parts.

Cost: 10,000 steps of 512 images at 384 pixels are 1.7 exaFLOPs for B/16 (computed, 3 x 2 x 55.5
GMACs an image); cifar100 has three such runs, three of a quarter of it, and the final run.
Expected top-1 on ImageNet at 384 pixels, from the paper's Table 3: Ti/16 78.22, S/32 79.58,
S/16 83.73, B/32 83.59, B/16 85.49, L/16 85.59, R+Ti/16 75.40, R26+S/32 83.85, R50+L/32 85.99.
Not yet reproduced here.
"""

import re

from ml_collections import ConfigDict

from vit_jax import config as base
from vit_jax.system.errors import UserError

MODELS = {
    "ti16": "augreg:Ti_16",
    "s32": "augreg:S_32",
    "s16": "augreg:S_16",
    "b32": "augreg:B_32",
    "b16": "augreg:B_16",
    "b8": "augreg:B_8",
    "l16": "augreg:L_16",
    "rti16": "augreg:R_Ti_16",
    "r26s32": "augreg:R26_S_32",
    "r50l32": "augreg:R50_L_32",
}
SHORT, MIDDLE, LONG, IMAGENET = (500, 100), (2500, 200), (10_000, 500), (20_000, 500)
RATES = (0.001, 0.003, 0.01)
# Name: splits to train on, to choose by, to train on at last, to test on; rates; lengths.
DATA = {
    "imagenet2012": (
        ("train[:99%]", "train[99%:]", "train", "validation"), (0.01, 0.03), (IMAGENET,)
    ),
    "cifar100": (
        ("train[:98%]", "train[98%:]", "train", "test"), RATES, (MIDDLE, LONG)
    ),
    "oxford_iiit_pet": (
        ("train[:90%]", "train[90%:]", "train", "test"), RATES, (SHORT, MIDDLE)
    ),
    "resisc45": (
        ("train[:60%]", "train[60%:80%]", "train[:80%]", "train[80%:]"), RATES, (MIDDLE, LONG)
    ),
}  # fmt: skip
ALIASES = {"pets": "oxford_iiit_pet", "imagenet": "imagenet2012"}


def get_config(argument: str = "b16,cifar100") -> ConfigDict:
    match = re.fullmatch(r"(?P<model>[^,]+),(?P<data>[^,]+)(,res=(?P<res>[1-9]\d*))?", argument)
    if match is None:
        raise UserError(
            f"configs/augreg.py:{argument} is not understood: write MODEL,DATA or "
            f"MODEL,DATA,res=PIXELS, such as b16,cifar100"
        )
    name = ALIASES.get(match["data"], match["data"])
    if name not in DATA:
        raise UserError(
            f"configs/augreg.py has no data {name!r}: use one of {', '.join(DATA)}, or "
            f"configs/finetune.py for others"
        )
    (train_part, held_out, train_all, test), rates, lengths = DATA[name]
    steps, warmup = lengths[0]

    config = base.get_config()
    config.init_from = MODELS.get(match["model"], match["model"])
    config.image_size = (int(match["res"] or 384),) * 2
    config.batch_size = 512
    config.eval_batch_size = 512
    base.set_duration(config, "total", steps=steps)
    base.set_duration(config, "eval_every", steps=500)
    base.set_duration(config, "checkpoint_every", steps=500)

    config.model.variant = None  # the whole model is that of the weights
    config.model.dtype = "bfloat16"

    config.data.source = f"tfds:{name}"
    config.data.train_split = train_part
    config.data.eval_split = held_out
    config.data.train_transform = "inception_crop(0.05, 1.0)|flip"
    config.data.eval_transform = "resize"

    config.optimizer.name = "sgd"
    config.optimizer.lr = 0.01
    config.optimizer.moment_dtype = "bfloat16"
    base.set_duration(config.optimizer, "warmup", steps=warmup)

    config.sweep.lr = rates
    config.sweep.steps = lengths
    config.sweep.train_split = train_all
    config.sweep.test_split = test
    return config
