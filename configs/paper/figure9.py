"""Figure 9 of arXiv 2010.11929 (appendix D.3): class token or mean of the patches, which head.

  python -m vit_jax.train --config=configs/paper/figure9.py:gap_linear --workdir=runs/gap_linear
  python -m vit_jax.train --config=configs/paper/figure9.py:gap_linear,lr=2e-3,digits \
    --workdir=runs/small

The argument is HEAD or HEAD,lr=RATE, either with ,i1k or ,digits behind (see recipes.py):

  HEAD  cls_mlp     class token, then the tanh layer and a linear one: the paper's model
        cls_linear  class token, linear
        gap_linear  mean of the patches, no class token, linear
  lr    peak learning rate; by default 8e-4 with a class token and 3e-4 without (on digits, with
        its smaller batches and model, 2.5 times these)

Both default rates are second-hand and not verified: the paper has them in the picture alone.
What its text says is that the mean seemed much worse at first, that this was because of a
learning rate chosen for the class token, and that each does as well as the other at its own.

Then 5-shot accuracy on ImageNet, as table8.py has it.

Cost: 135 exaFLOPs each on ImageNet-21k (computed: B/16, 90 epochs), 41 with `i1k`; under a
minute with `digits`.
Expected: the same from cls_mlp and gap_linear, each at its learning rate; the paper prints no
numbers. Not yet reproduced here on ImageNet; what digits show is in configs/paper/README.md.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.append(str(Path(__file__).parents[2]))  # works from any directory

from configs.paper import recipes

# Pooling, whether there is a tanh layer, and the peak learning rate.
HEADS = {
    "cls_mlp": ("cls", True, 8e-4),
    "cls_linear": ("cls", False, 8e-4),
    "gap_linear": ("gap", False, 3e-4),
}


def get_config(argument: str = "cls_mlp") -> ConfigDict:
    words, data = recipes.parse(argument, example="gap_linear or gap_linear,lr=8e-4")
    name = recipes.choose("head", ",".join(words[:1]), tuple(HEADS))
    pool, tanh_layer, rate = HEADS[name]
    config = recipes.get(data, "B/32" if data == "digits" else "B/16")
    width = config.model.width or config.model.representation_size
    config.model.pool = pool
    config.model.representation_size = width if tanh_layer else None
    config.optimizer.lr = rate * 2.5 if data == "digits" else rate
    if len(words) > 1:
        _, config.optimizer.lr = recipes.number(",".join(words[1:]), ("lr",))
    return config
