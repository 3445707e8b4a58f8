"""Finds what would end a run at its first batch before a model is built."""

from typing import Any

import numpy as np

from vit_jax.data.decode import BadImage, decode
from vit_jax.data.sources.source import Source
from vit_jax.data.transforms.language import Transform

_TRIED = 8  # images, spread over the source, of which one has to be good


def rehearse(
    source: Source,
    transform: Transform,
    channels: int,
    bits: int,
    max_bad: float,
    training: bool,
) -> None:
    """Decodes and transforms one image of `source`.

    Raises:
      UserError: it fails for all of them, or bad images are more than `max_bad` allows.
    """
    failures: list[BadImage] = []
    rng: Any = np.random.default_rng(0) if training else None
    for i in np.unique(np.linspace(0, len(source) - 1, _TRIED, dtype=int)).tolist():
        example = source[i]
        try:
            transform.of(decode(example, channels, bits), example["name"], rng)
            return
        except BadImage as error:
            failures.append(error)
    if len(failures) > max_bad * len(source):
        raise failures[0]
