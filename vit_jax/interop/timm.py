"""timm's Vision Transformers, and papers' own files in the same names: DeiT, DINO, MAE.

PyTorch stores a matrix as (out, in), a convolution as (out, in, height, width), and timm puts
the query, key and value of all heads into one matrix of 3 D rows. What DeiT III, DINOv2 and
MAE changed in the names is put back before reading.

https://github.com/huggingface/pytorch-image-models
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.interop import files
from vit_jax.interop.families import (
    FAMILIES,
    Arrays,
    Imported,
    axes,
    configure,
    guess_heads,
    imported,
    rename,
    square_grid,
    with_class_row,
)
from vit_jax.interop.preprocessing import from_timm
from vit_jax.interop.torch_layout import (
    POSITIONS,
    Layout,
    convert,
    count_blocks,
    export,
    refuse,
    to_torch,
)
from vit_jax.models.vit import Params, ViTConfig

# ---- timm ----------------------------------------------------------------------------------

_ATTENTION = "MultiHeadDotProductAttention_0"
LAYOUT = Layout(
    "blocks.{i}.",
    {
        "cls": "cls_token",
        "embedding": "patch_embed.proj",
        POSITIONS: "pos_embed",
        "Transformer/registers": "reg_token",
        "LayerNorm_0": "norm1",
        f"{_ATTENTION}/query": "attn.qkv[query]",
        f"{_ATTENTION}/key": "attn.qkv[key]",
        f"{_ATTENTION}/value": "attn.qkv[value]",
        f"{_ATTENTION}/out": "attn.proj",
        "LayerScale_0/gamma": "ls1.gamma",
        "LayerNorm_1": "norm2",
        "MlpBlock_0/Dense_0": "mlp.fc1",
        "MlpBlock_0/Dense_1": "mlp.fc2",
        "LayerScale_1/gamma": "ls2.gamma",
        "Transformer/encoder_norm": "norm",
        "MAPHead_0/probe": "attn_pool.latent",
        f"MAPHead_0/{_ATTENTION}/query": "attn_pool.q",
        f"MAPHead_0/{_ATTENTION}/key": "attn_pool.kv[key]",
        f"MAPHead_0/{_ATTENTION}/value": "attn_pool.kv[value]",
        f"MAPHead_0/{_ATTENTION}/out": "attn_pool.proj",
        "MAPHead_0/LayerNorm_0": "attn_pool.norm",
        "MAPHead_0/MlpBlock_0/Dense_0": "attn_pool.mlp.fc1",
        "MAPHead_0/MlpBlock_0/Dense_1": "attn_pool.mlp.fc2",
        "pre_logits": "pre_logits.fc",
        "head": "head",
    },
)
# Matrices that are several of ours on top of each other.
_JOINED = {"qkv": ("query", "key", "value"), "kv": ("key", "value")}
_PREFIXES = ("", "module.backbone.", "backbone.", "module.", "model.")
_PAPERS = {
    r"\.gamma_([12])$": r".ls\1.gamma",  # DeiT III
    r"^register_tokens$": "reg_token",  # DINOv2
}
_PRETRAINING = r"(mask_token$|decoder_)"
_SWIGLU = "its MLP is a SwiGLU (DINOv2 giant)"
_REFUSED = {
    r"relative_position_bias|rel_pos": "it has a relative position bias (BEiT)",
    r"q_bias|v_bias": "its keys have no bias (BEiT)",
    r"dist_token|head_dist": "it has a distillation token (DeiT)",
    r"mlp\.(w12|w3|fc1_g|fc1_x)\.": _SWIGLU,
    r"^fc_norm\.": "it averages before the last LayerNorm, ours averages after it",
    r"^norm_pre\.": "it has a LayerNorm before the first block (CLIP)",
    r"[qk]_norm\.": "it normalises queries and keys",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a Vision Transformer in timm's layout."""
    return any(f"{prefix}patch_embed.proj.weight" in names for prefix in _PREFIXES)


def read(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    origin: str = "safetensors",
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Imported:
    """Reads a state dict.

    Args:
      state: arrays by their names in the file.
      source: where they come from, for messages.
      config: the `config.json` of a timm folder, if there is one.
      origin: the second result of `files.read`.
      image_size: (H, W) if the position embeddings are not for a square.
      num_heads: if it is not to be inferred from the width.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing or misshapen.
    """
    notes: list[str] = []
    config = config if config and "architecture" in config else None  # it is of timm
    state, prefix = _strip_prefix(state, source, notes)
    decoder = any(name.startswith("decoder_") for name in state)
    mask = "mask_token" in state
    state = {name: x for name, x in state.items() if not re.match(_PRETRAINING, name)}
    if decoder or mask:
        what = "the decoder and the mask token" if decoder else "the mask token"
        notes.append(f"Left out: {what}, which only pre-training uses.")
    refuse(state, _REFUSED, source)
    for name in [name for name in state if re.search(r"\.(qkv|kv)\.(weight|bias)$", name)]:
        state |= _split(name, state.pop(name))
    args = _model_args(config)
    pool = _pool(state, args, source)
    folded, rows, image_size = _positions(state, source, image_size)
    family = _family(folded, prefix, origin, decoder, mask, rows, config, notes)
    cfg = _configure(folded, family, source, pool, image_size, num_heads, args, notes)
    given = from_timm(config, cfg, notes) if config else {}
    params = convert(folded, cfg, LAYOUT, source)
    return imported(family, cfg, params, notes, **given)


def _strip_prefix(state: Arrays, source: Path, notes: list[str]) -> tuple[Arrays, str]:
    prefix = next((p for p in _PREFIXES if f"{p}patch_embed.proj.weight" in state), "")
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if left := len(state) - len(inside):
        notes.append(f"Left out: {left} arrays outside {prefix!r}, such as a projection head.")

    def todays(name: str) -> str:
        for old, new in _PAPERS.items():
            name = re.sub(old, new, name)
        return name

    return rename(inside, todays, source), prefix


def _split(name: str, value: np.ndarray) -> Arrays:
    """`blocks.0.attn.qkv.weight` -> `blocks.0.attn.qkv[query].weight` and so on."""
    module, _, leaf = name.rpartition(".")
    parts = _JOINED[module.rpartition(".")[2]]
    if not value.ndim or len(value) % len(parts):
        return {name: value}  # the check will name it
    thirds = np.split(value, len(parts))
    return {f"{module}[{p}].{leaf}": x for p, x in zip(parts, thirds, strict=True)}


def _model_args(config: dict[str, Any] | None) -> dict[str, Any]:
    """What a timm `config.json` says about the network."""
    config = config or {}
    args = config.get("model_args")
    args = dict(args) if isinstance(args, dict) else {}
    return {"global_pool": config.get("global_pool")} | args


def _pool(state: Arrays, args: dict[str, Any], source: Path) -> str:
    found = "cls" if "cls_token" in state else "gap"
    if "attn_pool.latent" in state:
        found = "map"
        if "cls_token" in state:
            raise UserError(
                f"{source} has a class token and attention pooling: our model has one of them"
            )
    said = {"token": "cls", "avg": "gap", "map": "map"}.get(str(args["global_pool"]), found)
    if said != found:
        raise UserError(
            f"{source} cannot be held exactly by our model: it pools by "
            f"{args['global_pool']!r}, where the arrays are those of {found!r}"
        )
    if "reg_token" in state and found == "gap":
        raise UserError(
            f"{source} cannot be held exactly by our model: it averages the patches without "
            f"the registers, where ours averages all tokens"
        )
    return found


def _positions(
    state: Arrays, source: Path, image_size: tuple[int, int] | None
) -> tuple[Arrays, int, tuple[int, int]]:
    """Gives position embeddings a row for the class token and none for registers.

    Returns:
      The state, how many rows there were before the patches, and (H, W).
    """
    patch = axes(state, "patch_embed.proj.weight", 4, source)[2]
    total = axes(state, "pos_embed", 3, source)[1]
    cls = int("cls_token" in state)
    registers = axes(state, "reg_token", 3, source)[1] if "reg_token" in state else 0
    choices = sorted({0, cls, cls + registers})

    def fits(rows: int) -> bool:
        if image_size:
            return total - rows == (image_size[0] // patch) * (image_size[1] // patch)
        return total > rows and math.isqrt(total - rows) ** 2 == total - rows

    rows = next((rows for rows in choices if fits(rows)), cls)
    image_size = square_grid(total - rows, patch, image_size, source)
    state, table = dict(state), state["pos_embed"]
    if rows > cls and state["reg_token"].shape[::2] == table.shape[::2]:
        # Adding a register's position to the register itself is the same.
        state["reg_token"] = state["reg_token"] + table[:, cls:rows]
        table = np.concatenate([table[:, :cls], table[:, rows:]], axis=1)
    state["pos_embed"] = with_class_row(table, rows < cls)
    return state, rows, image_size


def _family(
    state: Arrays,
    prefix: str,
    origin: str,
    decoder: bool,
    mask: bool,
    rows: int,
    config: dict[str, Any] | None,
    notes: list[str],
) -> str:
    """Who trained this? Same arrays, same numerics, but another scale of the pixels."""
    scaled = "blocks.0.ls1.gamma" in state
    if decoder:
        return "mae"
    if mask or (scaled and "reg_token" in state):
        return "dinov2"
    if scaled and rows == 0 and "cls_token" in state:
        return "deit"
    if "backbone." in prefix:
        return "dino"
    family = "timm"
    if config is None and origin in ("torch", "wrapped"):
        if "head.weight" in state:
            family = "deit" if origin == "wrapped" else "timm"
        elif rows and not state["pos_embed"][:, 0].any():  # fixed sine-cosine positions
            family = "mae"
        elif scaled:
            family = "dinov2"
        else:
            family = "dino"
    if config is None:
        notes.append(
            f"Nothing in the file tells DeiT, DINO, MAE and timm apart for sure: the "
            f"preprocessing of {family!r} assumed, from the form of the file."
        )
    return family


def _configure(
    state: Arrays,
    family: str,
    source: Path,
    pool: str,
    image_size: tuple[int, int],
    num_heads: int | None,
    args: dict[str, Any],
    notes: list[str],
) -> ViTConfig:
    """Reads the numbers of the model off the shapes."""
    width, channels, patch, _ = axes(state, "patch_embed.proj.weight", 4, source)
    mlp_dim, _ = axes(state, "blocks.0.mlp.fc1.weight", 2, source)
    if axes(state, "blocks.0.mlp.fc2.weight", 2, source)[1] * 2 == mlp_dim:
        raise UserError(f"{source} cannot be held exactly by our model: {_SWIGLU}")
    depth = count_blocks(state, r"blocks\.(\d+)\.")
    if num_heads is None and type(args.get("num_heads")) is int:
        num_heads = args["num_heads"]
    if num_heads is None:
        num_heads, note = guess_heads(depth, width, mlp_dim, source)
        notes.append(note)
    gelu = FAMILIES[family].gelu
    if "act_layer" in args:
        gelu = {"gelu": "erf", "gelu_tanh": "tanh"}.get(str(args["act_layer"]), "")
        if not gelu:
            raise UserError(
                f"{source} cannot be held exactly by our model: its activation is "
                f"{args['act_layer']!r}"
            )
    elif pool == "map":
        notes.append("The exact GELU assumed; some SigLIP models have the tanh one.")
    outputs = lambda name: axes(state, name, 2, source)[0] if name in state else 0
    return configure(
        source,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        depth=depth,
        width=width,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_classes=outputs("head.weight"),
        pool=pool,
        representation_size=outputs("pre_logits.fc.weight") or None,
        registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
        layer_scale_init=1e-5 if "blocks.0.ls1.gamma" in state else None,
        gelu=gelu,
        layer_norm_eps=FAMILIES[family].layer_norm_eps,
    )


# ---- writing -------------------------------------------------------------------------------


def state_dict(cfg: ViTConfig, params: Params, class_row: bool = True) -> Arrays:
    """The arrays of a timm model.

    Args:
      cfg: the model; position embeddings of any kind become learned ones.
      params: its parameters, one `encoderblock_i` a layer.
      class_row: whether the position embeddings have a row for the class token; without it
        (`no_embed_class=True`, as in DeiT III) its position is added to the token.
    """
    arrays = export(cfg, params, Path("the model"))
    if cfg.pool == "cls" and not class_row:
        table = arrays[POSITIONS]
        arrays |= {"cls": arrays["cls"] + table[:, :1], POSITIONS: table[:, 1:]}
    state = {LAYOUT.name(k): np.ascontiguousarray(to_torch(k, v)) for k, v in arrays.items()}
    for name in [name for name in state if "[query]" in name or ".kv[key]" in name]:
        joined = re.sub(r"\[\w+\]", "", name)
        parts = _JOINED[joined.split(".")[-2]]
        keys = [re.sub(r"\[\w+\]", f"[{part}]", name) for part in parts]
        state[joined] = np.concatenate([state.pop(key) for key in keys])
    return state


# What our own files say in the header about the network.
SAID = ("num_heads", "gelu", "layer_norm_eps", "image_size")


def write(path: Path, cfg: ViTConfig, params: Params) -> tuple[str, ...]:
    """Writes a `.safetensors` file with the state dict of a timm `VisionTransformer`.

    Returns:
      Sentences about what whoever reads the file has to know.

    Raises:
      UserError: timm has no place for something in the model.
    """
    if cfg.representation_size:
        raise UserError(f"cannot write {path}: timm has no tanh layer (pre_logits)")
    if cfg.registers and cfg.pool != "cls":
        raise UserError(f"cannot write {path}: timm's average leaves the registers out")
    # timm's arrays say none of this; the header can, to us.
    said = {field: getattr(cfg, field) for field in SAID}
    metadata = {"vit_jax": json.dumps(said)}
    files.write_safetensors(
        path, state_dict(cfg, params, class_row=not cfg.registers), metadata
    )
    notes = [f"Build timm's model with num_heads={cfg.num_heads}, which its arrays do not say."]
    if cfg.gelu == "tanh":
        notes.append("Build timm's model with act_layer='gelu_tanh'.")
    if cfg.layer_norm_eps != 1e-6:
        notes.append(f"Build timm's model with a LayerNorm of eps={cfg.layer_norm_eps}.")
    if cfg.registers:
        notes.append(f"Build it with reg_tokens={cfg.registers}, no_embed_class=True.")
    if cfg.pool == "gap":
        notes.append("Build it with class_token=False, global_pool='avg', fc_norm=False.")
    return tuple(notes)
