"""timm's hybrids, whose patches are cut from the map of a ResNet, and its MLP-Mixers.

A hybrid is read in two parts: a Vision Transformer whose images are feature maps
(`interop.timm`), and the ResNet that makes them. Numerics differ a little in that ResNet:

  weight standardisation   timm divides by sqrt(variance + 1e-8), we by deviation + 1e-5
  GroupNorm                its epsilon is 1e-5 there, 1e-6 here

Ours are those of Google's code, which the weights were trained with. Measured with random
weights at 224 x 224 pixels, logits differ from timm's by 4e-6 of the largest one in R+Ti/16,
4e-5 in R26+S/32 and 1e-4 in R50+B/16; by 5e-6 or less if timm is given our epsilons.

https://github.com/huggingface/pytorch-image-models
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from vit_jax.interop import timm, timm_config
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
    square_grid,
)
from vit_jax.interop.torch_layout import count_blocks
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.resnet import reduction
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system.errors import UserError

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_BACKBONE = "patch_embed.backbone."
_RESNET = r"(conv_root|gn_root|block\d+)/"  # our names for what is in it


def _convert(
    state: Arrays,
    shapes: Mapping[str, tuple[int, ...]],
    name: Callable[[str], str],
    source: Path,
) -> Arrays:
    """Our arrays of these `shapes`, from a state dict where ours is called `name(ours)`.

    Matrices are (out, in) there and convolutions (out, in, height, width).

    Raises:
      UserError: listing all arrays that are missing, unknown or misshapen.
    """
    theirs = lambda s: (s[3], s[2], s[0], s[1]) if len(s) == 4 else s[::-1]
    ours = lambda x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    check_arrays(state, {name(key): theirs(shape) for key, shape in shapes.items()}, source)
    return {key: np.ascontiguousarray(ours(state[name(key)]), np.float32) for key in shapes}


# ---- hybrids -------------------------------------------------------------------------------


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a hybrid of timm."""
    return any(_BACKBONE in name for name in names)


def read(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    pool: str | None = None,
) -> Imported:
    """Reads the state dict of a hybrid; see `timm.read`.

    Raises:
      UserError: its backbone is another one than the ResNet of the published hybrids, our
        model cannot hold it exactly, or arrays are missing, unknown or misshapen.
    """
    prefix = next(name for name in state if _BACKBONE in name).partition(_BACKBONE)[0]
    start = prefix + _BACKBONE
    backbone = {k.removeprefix(start): x for k, x in state.items() if k.startswith(start)}
    stem = next((stem for stem in ("stem.", "") if f"{stem}conv.weight" in backbone), None)
    if stem is None:
        raise UserError(
            f"{source} cannot be held exactly by our model: its patches do not come from a "
            f"ResNet with weight standardisation, whose first array is {start}stem.conv.weight"
        )
    units = _units(backbone)
    cell = reduction(units)  # pixels of one cell of the map
    # Only timm has such names: where there is no config.json, no family is left to guess.
    bare = config is None or "architecture" not in config
    config = {"architecture": "hybrid"} if config is None or bare else config
    # What it says about images is about the pixels, not about the cells of the map.
    of_map = {"architecture": "hybrid", "global_pool": config.get("global_pool")}
    of_map["model_args"] = timm_config.model_args(config) | {"img_size": None}
    rest = {name: x for name, x in state.items() if not name.startswith(start)}
    in_cells = lambda size: (size[0] // cell, size[1] // cell)
    sizes = [image_size] if image_size else list(timm_config.sizes(config))
    map_size = next((in_cells(size) for size in sizes if _holds(rest, in_cells(size))), None)
    if image_size:
        map_size = in_cells(image_size)
    found = timm.read(
        rest, source, of_map, "safetensors", map_size, num_heads, None, pool, prefix
    )
    if map_size is None and bare:
        found = dataclasses.replace(found, notes=(*found.notes, _assumed(found)))
    vit, notes = cast(ViTConfig, found.cfg), list(found.notes)
    if vit.channels != (256 << len(units) - 1 if units else 64):
        raise UserError(
            f"{source} cannot be held exactly by our model: the ResNet in front ends "
            f"in {vit.channels} channels after {len(units)} stages, ours have 64 after the "
            f"root, 256 after one stage, and twice as many after each further"
        )
    fields = {
        "resnet": units,
        "channels": axes(backbone, f"{stem}conv.weight", 4, source)[1],
        "patch_size": vit.patch_size * cell,
        "image_size": (vit.image_size[0] * cell, vit.image_size[1] * cell),
    }
    cfg = configure(source, ViTConfig, **{**vars(vit), **fields})
    shapes = {k: s for k, s in expected_shapes(cfg).items() if re.match(_RESNET, k)}
    arrays = _convert(backbone, shapes, lambda ours: _backbone_name(ours, stem), source)
    notes.append(
        "timm standardises kernels and normalises groups with other epsilons than Google, "
        "whose are taken: logits differ from timm's by up to 1e-4 of the largest one (measured "
        "with random weights: 4e-6 in R+Ti/16, 4e-5 in R26+S/32, 1e-4 in R50+B/16)."
    )
    given = timm_config.read_images(config, cfg, notes)
    return imported("timm", cfg, found.params | nest(arrays), notes, **given)


def _holds(state: Arrays, cells: tuple[int, int]) -> bool:
    """Whether position embeddings of one prefix row or none are for a map of that size."""
    patch, table = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patch is None or table is None or patch.ndim != 4 or table.ndim != 3:
        return False  # which fails when it is read
    patches = (cells[0] // patch.shape[2]) * (cells[1] // patch.shape[2])
    return table.shape[1] - patches in (0, 1, 2)


def _assumed(found: Imported) -> str:
    rows, columns = cast(ViTConfig, found.cfg).grid
    return (
        f"The file does not say the shape of its {rows * columns} patches: {rows} x {columns} "
        f"assumed, --source_image_size=HEIGHTxWIDTH sets another."
    )


def _units(names: Iterable[str]) -> tuple[int, ...]:
    """How many units each stage of a backbone has."""
    matches = (
        re.match(r"stages\.([0-9]{1,4})\.blocks\.([0-9]{1,4})\.", name) for name in names
    )
    counts = Counter(stage for stage, _ in {match.groups() for match in matches if match})
    return tuple(counts[stage] for stage in sorted(counts, key=int))


def _backbone_name(ours: str, stem: str) -> str:
    """`block1/unit1/conv_proj/kernel` -> `stages.0.blocks.0.downsample.conv.weight`."""
    *place, layer, leaf = ours.replace("gn", "norm").split("/")
    layer, _, suffix = layer.partition("_")
    if suffix == "root":
        return f"{stem}{layer}.{_LEAVES[leaf]}"
    stage, unit = (int(re.sub(r"\D", "", part)) - 1 for part in place)
    layer = f"downsample.{layer}" if suffix == "proj" else layer
    return f"stages.{stage}.blocks.{unit}.{layer}.{_LEAVES[leaf]}"


# ---- Mixers --------------------------------------------------------------------------------

_HEAD = "head.weight"
_MIXER = {
    "stem": "stem.proj",
    "LayerNorm_0": "norm1",
    "token_mixing/Dense_0": "mlp_tokens.fc1",
    "token_mixing/Dense_1": "mlp_tokens.fc2",
    "LayerNorm_1": "norm2",
    "channel_mixing/Dense_0": "mlp_channels.fc1",
    "channel_mixing/Dense_1": "mlp_channels.fc2",
    "pre_head_layer_norm": "norm",
    "head": "head",
}


def recognises_mixer(names: Iterable[str]) -> bool:
    """Whether arrays of these names are an MLP-Mixer of timm."""
    return "stem.proj.weight" in names and any("mlp_tokens." in name for name in names)


def read_mixer(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Imported:
    """Reads the state dict of a Mixer.

    Args:
      state: arrays by their names in the file.
      source: where they come from, for messages.
      config: the `config.json` of a timm folder, if there is one.
      image_size: (H, W) if the token mixing is not for a square.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing, unknown or misshapen.
    """
    notes: list[str] = []
    config = config if config and "architecture" in config else {}
    cfg = _configure_mixer(state, source, config, image_size, notes)
    arrays = _convert(state, expected_shapes(cfg), _mixer_name, source)
    given = timm_config.read_images(config, cfg, notes)
    return imported("timm", cfg, nest(arrays), notes, **given)


def _configure_mixer(
    state: Arrays,
    source: Path,
    config: dict[str, Any],
    image_size: tuple[int, int] | None,
    notes: list[str],
) -> MixerConfig:
    """Infers the configuration from the shapes."""
    width, channels, patch, _ = axes(state, "stem.proj.weight", 4, source)
    tokens_mlp_dim, patches = axes(state, "blocks.0.mlp_tokens.fc1.weight", 2, source)
    mlp_dim, _ = axes(state, "blocks.0.mlp_channels.fc1.weight", 2, source)
    holds = lambda size: (size[0] // patch) * (size[1] // patch) == patches
    image_size = image_size or next(filter(holds, timm_config.sizes(config)), None)
    image_size = square_grid(patches, patch, image_size, source, None if config else notes)
    args = config.get("model_args")
    activation = args.get("act_layer", "gelu") if isinstance(args, dict) else "gelu"
    if (gelu := {"gelu": "erf", "gelu_tanh": "tanh"}.get(str(activation))) is None:
        raise UserError(
            f"{source} cannot be held exactly by our model: its activation is {activation!r}"
        )
    return configure(
        source,
        MixerConfig,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        depth=count_blocks(state, r"blocks\.(\d+)\."),
        width=width,
        tokens_mlp_dim=tokens_mlp_dim,
        mlp_dim=mlp_dim,
        num_classes=axes(state, _HEAD, 2, source)[0] if _HEAD in state else 0,
        gelu=gelu,
        layer_norm_eps=FAMILIES["timm"].layer_norm_eps,
    )


def _mixer_name(ours: str) -> str:
    """`MixerBlock_0/token_mixing/Dense_0/kernel` -> `blocks.0.mlp_tokens.fc1.weight`."""
    module, _, leaf = ours.rpartition("/")
    prefix = ""
    if match := re.match(r"MixerBlock_(\d+)/", module):
        prefix, module = f"blocks.{match[1]}.", module[match.end() :]
    return f"{prefix}{_MIXER[module]}.{_LEAVES[leaf]}"
