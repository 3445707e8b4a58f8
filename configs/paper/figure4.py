"""Figure 4 of arXiv 2010.11929 (section 4.3): ViTs and ResNets on subsets of the data.

  python -m vit_jax.train --config=configs/paper/figure4.py:B/32,10% --workdir=runs/b32_10
  python -m vit_jax.train --config=configs/paper/figure4.py:R50x1,10%,digits \
    --workdir=runs/small

The argument is VARIANT,PERCENT%, with ,i1k or ,digits behind if wanted (see recipes.py).
VARIANT is a ViT, a ResNet or a hybrid; the paper's "ViT-b", B with all hidden dimensions
halved, is S/32 if the heads are halved, too. It compares B/32 with R50x1, which cost about the
same, and L/16 with R152x2.

As in the paper all sizes have the same hyper-parameters and no dropout. Not verified: whether
they were trained for the same number of steps, as they are here. TFDS stores ImageNet in random
order, so that the first part is a random subset; digits come as they were collected.

The paper stops early, where accuracy on the validation set is best: that state is in `best/`.
Then its measure, few-shot accuracy on ImageNet:

  python -m vit_jax.evaluate --workdir=runs/b32_10 --step=best --few_shot=5,10 \
    --data=tfds:imagenet2012 --train_split=train --split=validation

Cost: as much as on all of the data, 34 exaFLOPs for B/32 on ImageNet-21k (computed, 90 epochs
of it); under a minute with `digits`.
Expected, from the paper, on JFT-300M (which is not public) and subsets of 9, 30 and 90 million:
at 9 million B/32 is much worse than the R50x1 of the same cost, from 90 million it is better;
the same of L/16 and R152x2. The numbers are in the picture alone. Not yet reproduced here on
ImageNet-21k, whose 14 million lie between the paper's first two subsets; what digits show is in
configs/paper/README.md.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as base
from vit_jax.system.errors import UserError

sys.path.append(str(Path(__file__).parents[2]))  # works from any directory

from configs.paper import recipes

LENGTH = {"i21k": 90 * 14_200_000, "i1k": 300 * 1_281_167}  # examples seen, of any subset
PART = {"i21k": "full[51200:{}%]", "i1k": "train[:{}%]", "digits": "train[:{}%]"}


def get_config(argument: str = "B/32,100%") -> ConfigDict:
    words, data = recipes.parse(argument, example="B/32,10%")
    percent = ",".join(words[1:]).removesuffix("%")
    if not percent.isdecimal() or not 1 <= int(percent) <= 100:
        raise UserError(
            f"the argument {argument!r} names no part of the data: write VARIANT,PERCENT% with "
            f"1% to 100%, such as B/32,10%"
        )
    config = recipes.get(data, words[0])
    config.model.dropout = 0.0
    if int(percent) < 100:  # all of it is what the recipe has, which holds a part out itself
        config.data.train_split = PART[data].format(percent)
    if data in LENGTH:
        base.set_duration(config, "total", examples=LENGTH[data])
        base.set_duration(config, "eval_every", steps=5000)
        base.set_duration(config, "checkpoint_every", steps=1000)
        base.set_duration(config.few_shot, "every", steps=5000)
    return config
