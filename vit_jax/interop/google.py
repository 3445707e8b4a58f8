"""Google's checkpoints: `vision_transformer`, AugReg, SAM, big_vision, SigLIP's image tower.

The parameters have our names, with three differences between generations:

  numbering   before Linen, one counter ran over all modules of a block: LayerNorm_0,
              MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3; Linen counts by class
  prefix      none; `opt/target/` (an optimiser's dump); `params/`, `params/img/` (big_vision)
  positions   `Transformer/posembed_input/pos_embedding` with a row for the class token; in
              big_vision `pos_embedding`, without one; none at all for sine-cosine ones

https://github.com/google-research/vision_transformer, .../big_vision
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError
from vit_jax.interop import files
from vit_jax.interop.families import (
    FAMILIES,
    Arrays,
    Imported,
    axes,
    check_arrays,
    configure,
    expected_shapes,
    imported,
    nest,
    rename,
    square_grid,
    with_prefix_rows,
)
from vit_jax.interop.torch_layout import POSITIONS, export
from vit_jax.models.model import Params
from vit_jax.models.vit_config import ViTConfig

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_LINEN = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_PRE_LINEN = {new: old for old, new in _LINEN.items()}
_OTHER_MODELS = {
    r"(.*/)?(conv_root|gn_root|block\d+/unit\d+)/": "a hybrid with a ResNet in front",
    r"(.*/)?(MixerBlock_\d+|Mixer|token_mixing)/": "an MLP-Mixer",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are one of Google's models."""
    ours = r"(.*/)?(Transformer/(encoderblock|encoder_norm).*|embedding/kernel)"
    patterns = [re.compile(pattern) for pattern in (ours, *_OTHER_MODELS)]
    return any(pattern.match(name) for pattern in patterns for name in names)


def read(arrays: Arrays, source: Path, image_size: tuple[int, int] | None = None) -> Imported:
    """Reads the arrays of a checkpoint.

    Args:
      arrays: by their names in the file.
      source: where they come from, for messages.
      image_size: (H, W) if the position embeddings are not for a square.

    Raises:
      UserError: it is another network, or arrays are missing, unknown or misshapen.
    """
    for pattern, model in _OTHER_MODELS.items():
        if any(re.match(pattern, name) for name in arrays):
            raise UserError(f"{source} holds {model}, which is not modelled yet")
    arrays, prefix, notes = _strip_prefix(arrays)
    arrays = _unstack(_modernise(arrays, source))
    family = "google"
    if prefix.startswith("params/") or POSITIONS not in arrays:
        family = "big_vision"
    if "MAPHead_0/probe" in arrays and "cls" in arrays:
        raise UserError(
            f"{source} cannot be held exactly by our model: it pools the class token with the "
            f"patches, ours the patches alone"
        )
    arrays, cfg = _configure(arrays, family, source, image_size, notes)
    check_arrays(arrays, expected_shapes(cfg), source)
    params = nest({name: value.astype(np.float32) for name, value in arrays.items()})
    return imported(family, cfg, params, notes)


def _strip_prefix(arrays: Arrays) -> tuple[Arrays, str, list[str]]:
    prefix = next((p for p in _PREFIXES if f"{p}embedding/kernel" in arrays), "")
    kept = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    left = {"/".join(k.split("/")[:2]) for k in arrays if not k.startswith(prefix)}
    notes = []
    if left:
        notes.append(
            f"Left out: {', '.join(sorted(left))}, which do not belong to the image model."
        )
    if prefix == "params/img/" and "head/kernel" in kept:
        notes.append("The head gives an embedding shared with text, not scores of classes.")
    return kept, prefix, notes


def _modernise(arrays: Arrays, source: Path) -> Arrays:
    """Linen's numbering, and attention pooling where it stands today."""
    if "probe" in arrays:  # it stood at the top level once
        inline = r"(probe$|MlpBlock_0/|MultiHeadDotProductAttention_0/|LayerNorm_0/)"
        move = lambda name: f"MAPHead_0/{name}" if re.match(inline, name) else name
        arrays = rename(arrays, move, source)

    def linen(name: str) -> str:
        parts = name.split("/")
        if len(parts) > 2 and parts[1].startswith("encoderblock"):
            parts[2] = _LINEN.get(parts[2], parts[2])
        return "/".join(parts)

    # Only a file in the old numbering has an attention number 1.
    old = any("/MultiHeadDotProductAttention_1/" in name for name in arrays)
    return rename(arrays, linen, source) if old else arrays


def _unstack(arrays: Arrays) -> Arrays:
    """Scanned layers are stored as one block with a leading layer axis."""
    prefix, out = "Transformer/encoderblock/", {}
    for name, value in arrays.items():
        if not name.startswith(prefix) or not value.ndim or not value.size:
            out[name] = value
            continue
        for i, layer in enumerate(value):
            out[f"Transformer/encoderblock_{i}/{name.removeprefix(prefix)}"] = layer
    return out


def _configure(
    arrays: Arrays,
    family: str,
    source: Path,
    image_size: tuple[int, int] | None,
    notes: list[str],
) -> tuple[Arrays, ViTConfig]:
    """Reads the numbers of the model off the shapes; positions move to where ours are."""
    patch, _, channels, width = axes(arrays, "embedding/kernel", 4, source)
    block = "Transformer/encoderblock_0"
    query = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
    _, heads, _ = axes(arrays, query, 3, source)
    _, mlp_dim = axes(arrays, f"{block}/MlpBlock_0/Dense_0/kernel", 2, source)
    sizes = {
        name: axes(arrays, f"{name}/kernel", 2, source)[1] if f"{name}/kernel" in arrays else 0
        for name in ("head", "pre_logits")
    }
    pool = "cls" if "cls" in arrays else "map" if "MAPHead_0/probe" in arrays else "gap"
    if sizes["pre_logits"] and family == "big_vision":
        notes.append("pre_logits is followed by tanh, which early big_vision models lacked.")
    arrays, posemb, image_size = _positions(arrays, pool, patch, image_size, source, notes)
    blocks = {name.split("/")[1] for name in arrays if "/encoderblock_" in name}
    cfg = configure(
        source,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        depth=len(blocks),
        width=width,
        mlp_dim=mlp_dim,
        num_heads=heads,
        num_classes=sizes["head"],
        pool=pool,
        posemb=posemb,
        representation_size=sizes["pre_logits"] or None,
        gelu=FAMILIES[family].gelu,
        layer_norm_eps=FAMILIES[family].layer_norm_eps,
    )
    return arrays, cfg


def _positions(
    arrays: Arrays,
    pool: str,
    patch: int,
    image_size: tuple[int, int] | None,
    source: Path,
    notes: list[str],
) -> tuple[Arrays, str, tuple[int, int]]:
    """Returns the arrays with `POSITIONS`, the kind of positions, and (H, W)."""
    places = (POSITIONS, "Transformer/pos_embedding", "pos_embedding")
    place = next((name for name in places if name in arrays), None)
    if place is None:
        if image_size is None:
            image_size = (224 // patch * patch,) * 2
            notes.append(
                f"The file has no position embeddings: sine-cosine ones assumed, for images "
                f"of {image_size[0]} x {image_size[1]}."
            )
        return arrays, "sincos2d", image_size
    _, rows, _ = axes(arrays, place, 3, source)
    class_row = pool == "cls" and place == POSITIONS
    if pool == "cls" and place != POSITIONS:
        # big_vision adds its positions before the class token; its early files did not.
        class_row = not _is_square(rows) and _is_square(rows - 1) and image_size is None
    image_size = square_grid(rows - class_row, patch, image_size, source)
    table = with_prefix_rows(arrays[place], int(pool == "cls" and not class_row))
    rest = {name: value for name, value in arrays.items() if name != place}
    return rest | {POSITIONS: table}, "learned", image_size


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number


def write(path: Path, cfg: ViTConfig, params: Params) -> tuple[str, ...]:
    """Writes an `.npz` that Google's loader and timm's read: old numbering, no prefix.

    Args:
      path: where to.
      cfg: the model; position embeddings of any kind become learned ones.
      params: its parameters, one `encoderblock_i` a layer.

    Returns:
      Sentences about what whoever reads the file has to know.

    Raises:
      UserError: the layout has no place for something in the model.
    """
    for present, what in (
        (cfg.registers, "registers"),
        (cfg.layer_scale_init is not None, "LayerScale"),
        (cfg.distillation != "none", "distillation token"),
        (cfg.relative != "none", "relative positions"),
        (cfg.mlp != "gelu", "SwiGLU"),
        (not cfg.key_bias, "keys without a bias"),
        (cfg.final_norm != "encoder", "LayerNorm after pooling"),
        (cfg.has_class_token != (cfg.pool == "cls"), f"class token with pooling {cfg.pool!r}"),
    ):
        if present:
            raise UserError(f"cannot write {path}: Google's layout has no {what}")
    arrays = export(cfg, params, path)

    def pre_linen(name: str) -> str:
        parts = name.split("/")
        if parts[0] == "Transformer" and parts[1].startswith("encoderblock_"):
            parts[2] = _PRE_LINEN.get(parts[2], parts[2])
        return "/".join(parts)

    files.write_npz(path, {pre_linen(name): value for name, value in arrays.items()})
    notes = []
    if cfg.gelu != "tanh":
        notes.append(
            "The file cannot say that the model has the exact GELU; its family has tanh."
        )
    if cfg.layer_norm_eps != 1e-6:
        notes.append(f"The file cannot say that the LayerNorm epsilon is {cfg.layer_norm_eps}.")
    if cfg.posemb not in ("learned", "none"):
        notes.append(f"The {cfg.posemb} position embeddings were written as learned ones.")
    return tuple(notes)
