"""Google's checkpoints: `vision_transformer`, AugReg, SAM, big_vision, SigLIP's image tower.

They are Vision Transformers, hybrids with a ResNet in front, and Mixers; our own ResNets are
kept in the same form. The parameters have our names, with these differences between
generations:

  numbering   before Linen, one counter ran over all modules of a block: LayerNorm_0,
              MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3; Linen counts by class
  prefix      none; `opt/target/` (an optimiser's dump); `params/`, `params/img/` (big_vision)
  positions   `Transformer/posembed_input/pos_embedding` with a row for the class token; in
              big_vision `pos_embedding`, without one; none at all for sine-cosine ones
  GroupNorm   (C,), or (1, 1, 1, C) in old files; none of the published hybrids could be
              opened to verify that, so both are read
  Mixers      `MixerBlock_0/token_mixing/Dense_0/kernel`, or in an older form
              `Mixer/encoderblock_0/token_mixing_phase_0/kernel1`, with axes of size 1 in
              places; which of the two the published Mixers have was not verified either

https://github.com/google-research/vision_transformer, .../big_vision
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.interop import weight_files
from vit_jax.interop.families import (
    FAMILIES,
    Arrays,
    Imported,
    axes,
    check_arrays,
    class_token,
    configure,
    expected_shapes,
    flatten,
    imported,
    nest,
    rename,
    square_grid,
    with_prefix_rows,
)
from vit_jax.interop.torch_layout import POSITIONS, export
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import Params
from vit_jax.models.registry import ModelConfig
from vit_jax.models.resnet import ResNetConfig, reduction
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
# One of these is in every file, and shows which prefix its names have.
_FIRST = ("embedding/kernel", "stem/kernel", "conv_root/kernel")
_LINEN = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_PRE_LINEN = {new: old for old, new in _LINEN.items()}
_RESNET = r"(conv_root|gn_root|block[0-9]{1,4}/unit[0-9]{1,4})/"
_MIXER = r"(MixerBlock_[0-9]+|Mixer)/"
_RESNET_IMAGES = (224, 224)  # (H, W) in pixels, where nothing says another size
_GROUP_NORM = re.compile(r"(block\d+/unit\d+/)?gn(\d|_root|_proj)/(scale|bias)")


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are one of Google's models."""
    transformer = r"Transformer/(encoderblock|encoder_norm)|embedding/kernel$"
    ours = re.compile(rf"(.*/)?({transformer}|{_RESNET}|{_MIXER})")
    return any(ours.match(name) for name in names)


def read(
    arrays: Arrays,
    source: Path,
    image_size: tuple[int, int] | None = None,
    family: str | None = None,
    pool: str | None = None,
) -> Imported:
    """Reads the arrays of a checkpoint.

    Args:
      arrays: by their names in the file.
      source: where they come from, for messages.
      image_size: (H, W) if the position embeddings, or the token mixing of a Mixer, are not
        for a square; of a ResNet, if it is not 224 x 224, for nothing in the file says it.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing, unknown or misshapen.
    """
    arrays, prefix, notes = _strip_prefix(arrays)
    said = family
    arrays = {
        name: _drop_ones(value, 1) if _GROUP_NORM.fullmatch(name) else value
        for name, value in arrays.items()
    }
    family = said or ("big_vision" if prefix.startswith("params/") else "google")
    holds = lambda pattern: any(re.match(pattern, name) for name in arrays)
    cfg: ModelConfig
    if holds(_MIXER) and not holds("Transformer/"):
        arrays = _modernise_mixer(arrays, source)
        cfg = _configure_mixer(arrays, family, source, image_size)
    elif holds(_RESNET) and not holds("Transformer/|embedding/"):
        cfg = _configure_resnet(arrays, source, image_size, notes)
    else:
        arrays = _unstack(_modernise(arrays, source))
        if said is None and POSITIONS not in arrays:
            family = "big_vision"
        arrays, cfg = _configure(arrays, family, source, image_size, notes, pool)
    check_arrays(arrays, expected_shapes(cfg), source)
    params = nest({k: value.astype(np.float32, copy=False) for k, value in arrays.items()})
    return imported(family, cfg, params, notes)


def _strip_prefix(arrays: Arrays) -> tuple[Arrays, str, list[str]]:
    begins = lambda prefix: any(f"{prefix}{name}" in arrays for name in _FIRST)
    prefix = next((prefix for prefix in _PREFIXES if begins(prefix)), "")
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


def _drop_ones(value: np.ndarray, rank: int) -> np.ndarray:
    """Takes axes of size 1 away, the first ones first, until `rank` are left."""
    ones = [axis for axis, size in enumerate(value.shape) if size == 1]
    return value.squeeze(tuple(ones[: max(value.ndim - rank, 0)]))


def _outputs(arrays: Arrays, layer: str, source: Path) -> int:
    """How many outputs a dense layer has; 0 if there is no such layer."""
    name = f"{layer}/kernel"
    return axes(arrays, name, 2, source)[1] if name in arrays else 0


# ---- Vision Transformers and hybrids -------------------------------------------------------


def _modernise(arrays: Arrays, source: Path) -> Arrays:
    """Linen's numbering, and the current place of attention pooling."""
    if "probe" in arrays:  # it was at the top level in old files
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
    given_pool: str | None = None,
) -> tuple[Arrays, ViTConfig]:
    """Infers the configuration from the shapes; moves positions to our place."""
    if "MAPHead_0/probe" in arrays and "cls" in arrays:
        raise UserError(
            f"{source} cannot be held exactly by our model: it pools the class token with the "
            f"patches, ours the patches alone"
        )
    patch, _, channels, width = axes(arrays, "embedding/kernel", 4, source)
    units = None
    if any(re.match(_RESNET, name) for name in arrays):
        units, factor = _resnet(arrays, source)
        if factor != 1:
            raise UserError(
                f"{source} cannot be held exactly by our model: the ResNet in front is "
                f"{factor} times as wide as a ResNet-50, and that of our hybrids is not"
            )
        channels = axes(arrays, "conv_root/kernel", 4, source)[2]
        patch *= reduction(units)  # from cells of its map to pixels
    block = "Transformer/encoderblock_0"
    query = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
    _, heads, _ = axes(arrays, query, 3, source)
    _, mlp_dim = axes(arrays, f"{block}/MlpBlock_0/Dense_0/kernel", 2, source)
    representation_size = _outputs(arrays, "pre_logits", source)
    pool = "cls" if "cls" in arrays else "map" if "MAPHead_0/probe" in arrays else "gap"
    token = "cls" in arrays
    if representation_size and family == "big_vision":
        notes.append("pre_logits is followed by tanh, which early big_vision models lacked.")
    arrays, posemb, image_size = _positions(arrays, pool, patch, image_size, source, notes)
    pool = given_pool or pool
    blocks = {name.split("/")[1] for name in arrays if "/encoderblock_" in name}
    cfg = configure(
        source,
        ViTConfig,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        depth=len(blocks),
        width=width,
        mlp_dim=mlp_dim,
        num_heads=heads,
        num_classes=_outputs(arrays, "head", source),
        resnet=units,
        pool=pool,
        class_token=class_token(token, pool),
        posemb=posemb,
        representation_size=representation_size or None,
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
    added = pool == "cls" and not class_row
    table = with_prefix_rows(arrays[place], int(added))
    if added:
        notes.append(
            "The class token has no position in the file: that of ours begins at zero, and "
            "training moves it."
        )
    rest = {name: value for name, value in arrays.items() if name != place}
    return rest | {POSITIONS: table}, "learned", image_size


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number


# ---- ResNets -------------------------------------------------------------------------------


def _resnet(arrays: Arrays, source: Path) -> tuple[tuple[int, ...], int]:
    """Units in each stage and the width factor of the ResNet among the arrays.

    Raises:
      UserError: its widths are not those of a ResNet.
    """
    names = (re.match(r"block([0-9]{1,4})/unit([0-9]{1,4})/", name) for name in arrays)
    counts = Counter(stage for stage, _ in {match.groups() for match in names if match})
    units = tuple(counts[stage] for stage in sorted(counts, key=int))
    name, last = "conv_root/kernel", 64
    factor, rest = divmod(axes(arrays, name, 4, source)[3], last)
    if units and not rest:
        name, last = f"block{len(units)}/unit1/conv3/kernel", 256 << len(units) - 1
        rest = axes(arrays, name, 4, source)[3] - last * factor
    if rest or not factor:
        raise UserError(
            f"{source}: array {name!r} has {arrays[name].shape[3]} outputs, but a ResNet has a "
            f"multiple of 64 after its root, and four times that, doubled from stage to stage"
        )
    return units, factor


def _configure_resnet(
    arrays: Arrays, source: Path, image_size: tuple[int, int] | None, notes: list[str]
) -> ResNetConfig:
    """Infers the configuration of a ResNet classifier from the shapes."""
    units, factor = _resnet(arrays, source)
    if image_size is None:
        image_size = _RESNET_IMAGES
        notes.append("The file does not say the size of images: 224 x 224 assumed.")
    return configure(
        source,
        ResNetConfig,
        image_size=image_size,
        channels=axes(arrays, "conv_root/kernel", 4, source)[2],
        resnet=units,
        resnet_width=factor,
        num_classes=_outputs(arrays, "head", source),
    )


# ---- Mixers --------------------------------------------------------------------------------


def _modernise_mixer(arrays: Arrays, source: Path) -> Arrays:
    """The older form of a Mixer, with our names and without the axes of size 1."""
    old = any(name.startswith("Mixer/") for name in arrays)
    changes = {
        # Before Linen one counter ran over all modules of a block.
        r"^(MixerBlock_\d+|Mixer/encoderblock_\d+)/LayerNorm_[1-9]\d*/": r"\1/LayerNorm_1/",
        r"(token|channel)_mixing_phase_\d+/(kernel|bias)1$": r"\1_mixing/Dense_0/\2",
        r"(token|channel)_mixing_phase_\d+/(kernel|bias)2$": r"\1_mixing/Dense_1/\2",
        r"^Mixer/encoderblock_": "MixerBlock_",
        r"^Mixer/encoder_norm/": "pre_head_layer_norm/",
    }
    if old:
        changes[r"^embedding/"] = "stem/"

    def todays(name: str) -> str:
        for pattern, new in changes.items():
            name = re.sub(pattern, new, name)
        return name

    def dense(name: str, value: np.ndarray) -> np.ndarray:
        rank = 2 if name.endswith("/kernel") else 1
        return _drop_ones(value, rank) if old and "_mixing/Dense_" in name else value

    return {k: dense(k, value) for k, value in rename(arrays, todays, source).items()}


def _configure_mixer(
    arrays: Arrays, family: str, source: Path, image_size: tuple[int, int] | None
) -> MixerConfig:
    """Infers the configuration of a Mixer from the shapes."""
    patch, _, channels, width = axes(arrays, "stem/kernel", 4, source)
    tokens = "MixerBlock_0/token_mixing/Dense_0/kernel"
    patches, tokens_mlp_dim = axes(arrays, tokens, 2, source)
    _, mlp_dim = axes(arrays, "MixerBlock_0/channel_mixing/Dense_0/kernel", 2, source)
    return configure(
        source,
        MixerConfig,
        image_size=square_grid(patches, patch, image_size, source),
        channels=channels,
        patch_size=patch,
        depth=len({name.split("/")[0] for name in arrays if name.startswith("MixerBlock_")}),
        width=width,
        tokens_mlp_dim=tokens_mlp_dim,
        mlp_dim=mlp_dim,
        num_classes=_outputs(arrays, "head", source),
        gelu=FAMILIES[family].gelu,
        layer_norm_eps=FAMILIES[family].layer_norm_eps,
    )


# ---- writing -------------------------------------------------------------------------------


def write(path: Path, cfg: ModelConfig, params: Params) -> tuple[str, ...]:
    """Writes an `.npz` that Google's loader and timm's read: old numbering, no prefix.

    GroupNorms are written as (1, 1, 1, C), which both accept, and which old files are said to
    have (not verified: none could be opened); Mixers in the newer of their two forms.

    Args:
      path: where to.
      cfg: the model; position embeddings of any kind become learned ones.
      params: its parameters, one `encoderblock_i` a layer.

    Returns:
      Sentences about what readers of the file need to know.

    Raises:
      UserError: the layout has no place for something in the model.
    """
    if isinstance(cfg, ViTConfig):
        arrays = _vit_arrays(path, cfg, params)
    else:
        arrays = {name: np.asarray(value) for name, value in flatten(params).items()}
        check_arrays(arrays, expected_shapes(cfg), path)
    weight_files.write_npz(
        path,
        {
            name: value.reshape(1, 1, 1, -1) if _GROUP_NORM.fullmatch(name) else value
            for name, value in arrays.items()
        },
        _comment(cfg),
    )
    return tuple(_left_unsaid(cfg))


def _comment(cfg: ModelConfig) -> dict[str, list[int]] | None:
    """The size of images, where a reader would take the patches for a square and be wrong."""
    if isinstance(cfg, ResNetConfig) or cfg.grid[0] == cfg.grid[1]:
        return None
    return {"image_size": list(cfg.image_size)} if _is_square(math.prod(cfg.grid)) else None


def _vit_arrays(path: Path, cfg: ViTConfig, params: Params) -> Arrays:
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

    return {pre_linen(name): value for name, value in arrays.items()}


def _left_unsaid(cfg: ModelConfig) -> list[str]:
    """Notes on what a reader of the file would get wrong, or needs to know."""
    notes = []
    height, width = cfg.image_size
    if cfg.image_size != (_RESNET_IMAGES if isinstance(cfg, ResNetConfig) else (height,) * 2):
        notes.append(f"The file cannot say that images have {height} x {width} pixels.")
    if isinstance(cfg, ResNetConfig):
        return notes
    if cfg.gelu != "tanh":
        notes.append(
            "The file cannot say that the model has the exact GELU; its family has tanh."
        )
    if cfg.layer_norm_eps != 1e-6:
        notes.append(f"The file cannot say that the LayerNorm epsilon is {cfg.layer_norm_eps}.")
    if isinstance(cfg, ViTConfig) and cfg.posemb not in ("learned", "none"):
        notes.append(f"The {cfg.posemb} position embeddings were written as learned ones.")
    return notes
