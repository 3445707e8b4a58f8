"""What the experiments of this folder share: how each data set is trained on.

  i21k    ImageNet-21k, the recipe of configs/vit_i21k.py: the largest public data set of the
          paper. Most of its studies pre-train on JFT-300M, which is not public.
  i1k     ImageNet-1k, the recipe of configs/vit_i1k.py, with the few-shot accuracy beside it
  digits  scikit-learn's 1,797 scans at 16x16 pixels, to see an experiment in well under a
          minute: a ViT of 2 layers of width 64 with patches of 4x4 pixels, 250 steps

This file is no experiment: the others import it.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from configs import vit_i1k, vit_i21k
from vit_jax import config as base
from vit_jax.models import registry
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

DATA = ("i21k", "i1k", "digits")

# What a variant of the paper stands for on digits. Patches of 4 pixels give 16 tokens; the map
# of a ResNet has 4 x 4 cells after the root and after one stage, 2 x 2 after two.
SMALL = {"variant": "mu/4", "depth": 2, "width": 64, "mlp_dim": 128, "num_heads": 4}
LARGE = {"variant": "mu/4", "depth": 4, "width": 96, "mlp_dim": 192, "num_heads": 6}
DIGITS = {
    "B/32": SMALL,
    "L/32": LARGE,
    "R50x1": {"variant": "R26x1", "resnet": (1, 1)},
    "R101x1": {"variant": "R26x1", "resnet": (2, 2)},
    "R50+B/32": {**SMALL, "resnet": ()},
}


def parse(argument: str, example: str, default: str = "i21k") -> tuple[list[str], str]:
    """Splits an argument such as `1d,stem,digits` into its words and the data set.

    Args:
      argument: words with commas between; the last may be one of `DATA`.
      example: an argument that works, for the error.
      default: the data set if the argument names none.

    Raises:
      UserError: a word is empty.
    """
    words = argument.split(",")
    if not all(words):
        raise UserError(
            f"the argument {argument!r} of the experiment is not understood: write e.g. "
            f"{example}"
        )
    data = words.pop() if words[-1] in DATA else default
    return words, data


def choose(what: str, value: str, choices: Sequence[str]) -> str:
    """Returns `value` if it is one of `choices`, and raises UserError otherwise."""
    if value not in choices:
        raise UserError(
            f"the experiment has no {what} {value!r}: use one of {', '.join(choices)}"
        )
    return value


def number(word: str, names: Sequence[str]) -> tuple[str, float]:
    """Reads `depth=16`: one of `names`, and a number that is not negative.

    Raises:
      UserError: it does not read like that.
    """
    name, _, text = word.partition("=")
    choose("setting", name, names)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UserError(f"{word!r} needs a number that is not negative, such as {name}=1")
    return name, value


def get(data: str, variant: str) -> ConfigDict:
    """Returns the recipe of `data` for `variant`, of any kind of network.

    Raises:
      UserError: there is no such variant, or none of that name on digits.
    """
    if data == "digits":
        return digits(variant)
    config = (vit_i1k if data == "i1k" else vit_i21k).get_config("B/16")
    config.model.variant = variant
    kind, shape = registry.decode(variant)
    if kind is ViTConfig:
        config.model.representation_size = shape["width"]
    else:  # the others have neither a tanh layer nor dropout
        config.model.representation_size = None
        config.model.dropout = 0.0
    if data == "i1k":
        config.few_shot.shots = (5, 10)
    return config


def digits(variant: str = "B/32") -> ConfigDict:
    """Returns the recipe for digits; 250 steps of 64 images are 11 epochs."""
    choose("variant on digits", variant, tuple(DIGITS))
    config = base.get_config()
    config.image_size = (16, 16)
    config.batch_size = 64
    config.eval_batch_size = 360
    base.set_duration(config, "total", steps=250)
    base.set_duration(config, "eval_every", steps=50)
    base.set_duration(config, "checkpoint_every", steps=0)  # at the end

    config.model.update(DIGITS[variant])

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.channels = 1
    config.data.train_transform = "resize|shift(1)"
    config.data.threads = 2

    config.optimizer.lr = 2e-3
    config.optimizer.weight_decay = 0.1
    base.set_duration(config.optimizer, "warmup", steps=25)
    return config
