"""The seam between a network and everything else; nothing outside `models` sees Flax."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from vit_jax.system.errors import UserError

Params = dict[str, Any]
Out = dict[str, jax.Array]
# What masked pre-training does to the (B, N, D) patch embeddings before the encoder.
EditPatches = Callable[[jax.Array], jax.Array]


class Apply(Protocol):
    def __call__(
        self,
        params: Params,
        images: jax.Array,
        *,
        train: bool = False,
        rngs: dict[str, jax.Array] | None = None,
        return_attention: bool = False,
        edit_patches: EditPatches | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, Out]: ...


class At(Protocol):
    def __call__(self, image_size: tuple[int, int], method: str = "corner") -> "Model": ...


class Model(NamedTuple):
    """A network as two functions.

    Attributes:
      config: what was built.
      init: `init(key) -> params`, nested dicts of float32 arrays.
      apply: `apply(params, images, train=False, rngs=None, return_attention=False,
        edit_patches=None, keep=None) -> (logits, out)`: (B, H, W, C) float32 images to (B, K)
        float32 logits (with K = 0, to the representation), and a dict of named intermediates.
        Of a Vision Transformer:
        `patch_embedding` (B, N, D), `embedded` z_0 and `encoded` (B, T, D),
        `encoderblock_i/{msa,mlp,output}` (B, T, D), `pooled`, `pre_logits`, `logits`; on
        request `encoderblock_i/attention` (B, k, T, T). Under jit, what is not used costs
        nothing. `rngs={"dropout": key}` is needed when training with dropout or stochastic
        depth. `edit_patches` changes the patch embeddings that the encoder sees. `keep` (B, M)
        int32: the patches, numbered row by row, that the encoder sees; the others are left out
        after positions are added, so that M takes the place of N.
      at: `at((H, W), method="corner") -> Model`: the same parameters for images of another
        size. Position embeddings are resized inside the program, by a name of
        `resize_positions.METHODS`, and gradients pass through that.
    """

    config: Any
    init: Callable[[jax.Array], Params]
    apply: Apply
    at: At


def one_size_only(config: Any) -> At:
    """The `at` of a network that takes images of one size, whatever its parameters."""

    def at(image_size: tuple[int, int], method: str = "corner") -> Model:
        raise UserError(
            f"this network takes images of {tuple(config.image_size)} pixels, and none of "
            f"{image_size}: use a Vision Transformer, whose positions can be resized"
        )

    return at


def count_parameters(params: Params) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
