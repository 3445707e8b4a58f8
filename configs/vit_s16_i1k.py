"""The simple ViT baseline, S/16 on ImageNet-1k: "Better plain ViT baselines", arXiv 2205.01580.

  python -m vit_jax.train --config=configs/vit_s16_i1k.py --workdir=runs/vit_s16_i1k

The argument is the number of epochs: 90 (default), 150 or 300, as in the paper's Table 1.
Data: `tfds:imagenet2012` (docs/data.md); 1% of train is held out for the curve, the number
to report is `python -m vit_jax.evaluate --workdir=... --split=validation`.

Cost: 90 epochs take 6 h 30 min on a TPUv3-8 in the paper; 3.2 exaFLOPs (computed).
Expected top-1 on the validation split: 76.5 (90 epochs), 78.5 (150), 80.0 (300). Not yet
reproduced here. RandAugment is that of the code that these numbers were made with, its slips
included (`quirks=True`, see vit_jax/data/transforms/augment.py): at magnitude 10 its Solarize
inverts the whole image, where as written it would do nothing, and its Contrast blends with a
constant. An independent reproduction without the latter found no harm in it.

Known differences: the original cuts off the fraction of a level when it resizes, in training
and evaluation, where we round, half a level of 255 more on average (`resize_shorter(256,
method='area', rounding='floor')` does as it does, in evaluation alone).
"""

from ml_collections import ConfigDict

from vit_jax import config as base


def get_config(epochs: str = "90") -> ConfigDict:
    config = base.get_config()
    config.batch_size = 1024
    base.set_duration(config, "total", epochs=float(epochs))

    config.model.variant = "S/16"
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.representation_size = 384
    config.model.dtype = "bfloat16"

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.eval_split = "train[99%:]"
    augmentation = "randaugment(2, 10, quirks=True)"
    config.data.train_transform = f"inception_crop(0.05, 1.0)|flip|{augmentation}"
    config.data.eval_transform = "resize_shorter(256, method='area')|center_crop"
    config.data.mixup = 0.2

    config.optimizer.lr = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decay = "times_schedule"
    config.optimizer.moment_dtype = "bfloat16"
    base.set_duration(config.optimizer, "warmup", steps=10_000)
    return config
