"""Operations on a batch that run on the device: normalisation and mixing."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.data import mixing, value_ranges
from vit_jax.data.decode import check_channels as check_decoded
from vit_jax.data.mixing import build_mixing
from vit_jax.data.transforms import language

Batch = dict[str, jax.Array]
# Turns uint8 images into the model's input: normalises and, in training, mixes.
Prepare = Callable[[Batch, jax.Array], Batch]


def prepare_for_eval(config: ConfigDict) -> Prepare:
    """uint8 images to the range that the model expects, on the device."""
    value_range = config.data.value_range
    # What does not fit is found here, not when a program is compiled.
    check_decoded(config.data.channels, config.data.bits)
    value_ranges.parse(value_range, config.data.channels)

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        # What an objective does not read of this costs nothing under jit.
        pixels = batch["image"]
        if pixels.dtype == jnp.uint16:  # as levels of 0 .. 255, with what lies between
            pixels = pixels.astype(jnp.float32) / 257
        return {**batch, "image": language.normalize(pixels, value_range), "pixels": pixels}

    return prepare


def prepare_for_training(
    config: ConfigDict, num_classes: int, views: Sequence[str] = ()
) -> Prepare:
    """The same, of `views` too, then mixup and CutMix where the configuration asks for them."""
    normalize, how = prepare_for_eval(config), build_mixing(config)

    def prepare(batch: Batch, key: jax.Array) -> Batch:
        crops = {name: normalize({"image": batch[name]}, key)["image"] for name in views}
        batch = normalize({**batch, **crops}, key)
        if not how.mixes:
            return batch
        targets = batch.get("targets")
        if targets is None:
            targets = jax.nn.one_hot(batch["label"], num_classes)
        images, targets = mixing.mix(key, batch["image"], targets, how)
        return {**batch, "image": images, "targets": targets}

    return prepare
