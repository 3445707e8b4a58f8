"""Adapts the first layer to another number of channels, as timm does.

One channel gets the sum of the kernel over all channels: a grey image then has the same result
as its colour version. Other numbers of channels repeat the kernels in turn, scaled so that
their sum stays about as large. Other layers do not change.
"""

from typing import Any

import numpy as np

from vit_jax.system.errors import UserError

# Where a network meets the pixels: the kernel's axis 2 is the channel.
FIRST = ("conv_root", "embedding", "stem")


def adapt_first(params: Any, old: int, new: int) -> tuple[Any, str]:
    """The parameters with a first layer for `new` channels instead of `old`, and a note.

    Args:
      params: of a Vision Transformer, a hybrid, a ResNet or a Mixer.
      old: channels that they were trained with.
      new: channels of the new images.
    """
    name = next(name for name in FIRST if name in params)
    kernel = np.asarray(params[name]["kernel"], np.float32)
    if new == 1:
        kernel, how = kernel.sum(axis=2, keepdims=True), "kernel summed"
    else:
        in_turn = np.arange(new) % old
        kernel = kernel[:, :, in_turn] * np.float32(old / new)
        how = f"kernels in turn, scaled by {old}/{new}"
    note = f"{name}: from {old} to {new} channels ({how}, as timm does)"
    return {**params, name: {**params[name], "kernel": kernel}}, note


def check(name: str, ours: int, theirs: int, asked: bool) -> None:
    """Refuses images of another number of channels than the weights', unless it was requested.

    Setting data.channels, on the command line or to anything but its default, requests it.

    Args:
      name: of the weights.
      ours: data.channels.
      theirs: channels that they were trained with.
      asked: whether data.channels was set.

    Raises:
      UserError: naming both numbers and what to set.
    """
    if ours != theirs and not asked:
        raise UserError(
            f"{name} was trained on images of {theirs} channels, and data.channels is {ours}: "
            f"pass --config.data.channels={theirs} to read such images, or "
            f"--config.data.channels={ours} to adapt its first layer to {ours}"
        )
