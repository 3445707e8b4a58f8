"""Figure 5 and Table 6 of arXiv 2010.11929 (section 4.4): quality against cost of pre-training.

  python -m vit_jax.train --config=configs/paper/figure5.py:R50+B/16 --workdir=runs/r50_b16
  python -m vit_jax.train --config=configs/paper/figure5.py:R50+B/32,digits --workdir=runs/small

The argument is VARIANT or VARIANT,epochs=N, either with ,i1k or ,digits behind (recipes.py).
The paper's models are the ViTs B/32, B/16, L/32, L/16, H/14; the ResNets R50x1, R50x2, R101x1,
R152x1, R152x2, R200x3; the hybrids R50+B/32, R50+B/16, R50+L/32, R50+L/16. All have Adam, the
ResNets too (appendix D.1). On digits there are B/32, L/32, R50x1, R101x1 and R50+B/32.

Then fine-tuning, whose accuracy the table has (configs/finetune.py):

  python -m vit_jax.sweep --config=configs/finetune.py:runs/r50_b16,imagenet \
    --workdir=runs/tuned

Cost on ImageNet-21k, 90 epochs, computed: B/32 34 exaFLOPs, R50x1 32, R50+B/32 66, B/16 135,
R50+B/16 166; under a minute with `digits`.
Expected top-1 on ImageNet, fine-tuned, from the paper, after 7 epochs of JFT-300M, which is not
public: R50x1 77.54, R50x2 82.12, R101x1 80.67, R152x1 81.88, R152x2 84.97; B/32 80.73, B/16
84.15, L/32 84.37, L/16 86.30; R50+B/32 84.90, R50+B/16 85.58, R50+L/32 85.68, R50+L/16 86.60.
Not yet reproduced here; what digits show is in configs/paper/README.md.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import config as base

sys.path.append(str(Path(__file__).parents[2]))  # works from any directory

from configs.paper import recipes


def get_config(argument: str = "R50+B/16") -> ConfigDict:
    words, data = recipes.parse(argument, example="R50+B/16 or R50+B/16,epochs=30")
    config = recipes.get(data, ",".join(words[:1]))
    if len(words) > 1:
        _, epochs = recipes.number(",".join(words[1:]), ("epochs",))
        base.set_duration(config, "total", epochs=epochs)
    return config
