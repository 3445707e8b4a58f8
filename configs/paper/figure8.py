"""Figure 8 of arXiv 2010.11929 (appendix D.2): which dimension of a ViT to scale.

  python -m vit_jax.train --config=configs/paper/figure8.py:depth=16 --workdir=runs/depth16
  python -m vit_jax.train --config=configs/paper/figure8.py:patch=2,digits --workdir=runs/small

The argument is `base` or NAME=VALUE, either with ,i1k or ,digits behind (see recipes.py):

          paper's base   on digits
  depth        8             2       layers
  width     1024            64       D
  mlp       2048           128       hidden width of the MLP
  patch       32             4       pixels

The paper does not say how many heads there are: here 16, and with another width one for each 64
of it (on digits for each 16). Its curve of all dimensions scaled together is not here, as how
they are scaled is in no text.

Then 5-shot accuracy on ImageNet, as table8.py has it.

Cost: the base has 3.6 GMACs an image, 28 exaFLOPs on ImageNet-21k (computed, 90 epochs), about
in proportion to depth and to the number of patches; under a minute with `digits`.
Expected, from the paper: depth helps most, visibly up to 64 layers and less after 16; width
least; smaller patches help reliably at the same number of parameters. It prints no numbers. Not
yet reproduced here on ImageNet; what digits show is in configs/paper/README.md.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.system.errors import UserError

sys.path.append(str(Path(__file__).parents[2]))  # works from any directory

from configs.paper import recipes

BASE = {"depth": 8, "width": 1024, "mlp": 2048, "patch": 32}
BASE_ON_DIGITS = {"depth": 2, "width": 64, "mlp": 128, "patch": 4}


def get_config(argument: str = "base") -> ConfigDict:
    words, data = recipes.parse(argument, example="depth=16")
    shape = dict(BASE_ON_DIGITS if data == "digits" else BASE)
    if words != ["base"]:
        name, value = recipes.number(",".join(words), tuple(shape))
        if value < 1 or value != int(value):
            raise UserError(f"{words[0]!r} is no whole number of at least 1: write {name}=16")
        shape[name] = int(value)
    config = recipes.get(data, "B/32" if data == "digits" else "L/32")
    a_head = 16 if data == "digits" else 64
    config.model.variant = f"mu/{shape['patch']}"
    config.model.depth = shape["depth"]
    config.model.width = shape["width"]
    config.model.mlp_dim = shape["mlp"]
    config.model.num_heads = max(shape["width"] // a_head, 1)
    if config.model.representation_size:
        config.model.representation_size = shape["width"]
    return config
