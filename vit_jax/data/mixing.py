"""Blending the images of a batch, on the device and inside the jitted step."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax.system.errors import UserError

FORMS = ("google", "timm")


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed. Fields have the names they have in `config.data`.

    Attributes:
      mixup: alpha of mixup (arXiv 1710.09412); 0 turns it off.
      cutmix: alpha of CutMix (arXiv 1905.04899); 0 turns it off.
      mix_probability: share of the batches that are mixed at all.
      mix_switch: share of those that get CutMix, where both are on.
      mix_form: `google` (AugReg, arXiv 2106.10270): the partner of an example is the one
        before it, and of the two the example keeps the larger part. `timm` (DeiT, arXiv
        2012.12877): the partner is the one as far from the batch's other end, and the weight
        is as it is drawn.
      binary_targets: every class that is in the picture counts as fully there (the targets
        of DeiT III, arXiv 2204.07118, for a sigmoid loss).

    Raises (on construction):
      UserError: a value is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    mix_form: str = "google"
    binary_targets: bool = False

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            # Comparisons written so that NaN fails them.
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"data.{name} is {getattr(self, name)}: use 0 for off, or a positive alpha"
                )
        for name in ("mix_probability", "mix_switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"data.{name} is {getattr(self, name)}: it is a share, use 0 to 1"
                )
        if self.mix_form not in FORMS:
            raise UserError(
                f"data.mix_form is {self.mix_form!r}: use one of {', '.join(FORMS)}"
            )

    @property
    def mixes(self) -> bool:
        return bool((self.mixup or self.cutmix) and self.mix_probability)


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mixing: Mixing
) -> tuple[jax.Array, jax.Array]:
    """Mixes every example of a batch with its partner, images and targets by the same share.

    `images` is floating (B, H, W, C), `targets` floating (B, K), such as one-hot labels; both
    keep shape and dtype. One weight, one box and one choice of method are drawn for a batch.
    `mixing` must be static under jit.

    Label smoothing comes afterwards: it is linear, and of mixed targets gives the same as
    mixing smoothed ones. With `binary_targets` it has to come afterwards, for it leaves no
    target at 0.
    """
    if mixing.mixes:
        kept = _draw_kept(key, images.shape[1:3], mixing)
        share = kept.mean()
        roll = mixing.mix_form == "google"

        def blend(x: jax.Array, weight: jax.Array) -> jax.Array:
            w = weight.astype(x.dtype)
            return w * x + (1 - w) * (jnp.roll(x, 1, axis=0) if roll else x[::-1])

        images, targets = blend(images, kept[..., None]), blend(targets, share)
    if mixing.binary_targets:
        targets = (targets > 0).astype(targets.dtype)
    return images, targets


def _draw_kept(key: jax.Array, size: tuple[int, ...], mixing: Mixing) -> jax.Array:
    """How much of itself an example keeps, at every pixel or, (1, 1), at all of them."""
    apply, choose, weigh, place = jax.random.split(key, 4)
    both = mixing.mixup > 0 and mixing.cutmix > 0
    cuts = jax.random.bernoulli(choose, mixing.mix_switch) if both else mixing.cutmix > 0
    alpha = jnp.where(cuts, mixing.cutmix, mixing.mixup)
    weight = jax.random.beta(weigh, alpha, alpha)
    if mixing.mix_form == "google":
        weight = jnp.maximum(weight, 1 - weight)
    kept = weight[None, None]
    if mixing.cutmix:
        kept = jnp.where(cuts, _outside_box(place, size, weight), kept)
    return jnp.where(jax.random.bernoulli(apply, mixing.mix_probability), kept, 1.0)


def _outside_box(key: jax.Array, size: tuple[int, ...], weight: jax.Array) -> jax.Array:
    """(H, W): 1 outside and 0 inside a box with `1 - weight` of the area.

    It lies around any pixel and is clipped at the border, so that it may be smaller; the
    share that is kept is the mean of what is returned.
    """
    inside = jnp.ones(size, bool)
    for axis, length in enumerate(size):
        edge = jnp.int32(length * jnp.sqrt(1 - weight))
        centre = jax.random.randint(jax.random.fold_in(key, axis), (), 0, length)
        place = jax.lax.broadcasted_iota(jnp.int32, size, axis)
        inside &= (place >= centre - edge // 2) & (place < centre + (edge + 1) // 2)
    return 1.0 - inside


def build_mixing(config: ConfigDict) -> Mixing:
    """Raises UserError for a value of `config.data` that mixing cannot have."""
    data = config.data
    return Mixing(
        data.mixup,
        data.cutmix,
        data.mix_probability,
        data.mix_switch,
        data.mix_form,
        data.binary_targets,
    )
