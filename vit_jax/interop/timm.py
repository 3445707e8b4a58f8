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

from vit_jax.interop import timm_config, weight_files
from vit_jax.interop.families import (
    FAMILIES,
    Arrays,
    Imported,
    axes,
    class_token,
    configure,
    guess_heads,
    imported,
    relative_size,
    rename,
    square_grid,
    with_prefix_rows,
)
from vit_jax.interop.huggingface_config import classes
from vit_jax.interop.torch_layout import (
    POSITIONS,
    Layout,
    convert,
    count_blocks,
    export,
    join,
    refuse,
    require_plain,
    split,
    to_torch,
)
from vit_jax.models.model import Params
from vit_jax.models.vit_config import CHOICES, ViTConfig
from vit_jax.system.errors import UserError

POOLS = CHOICES["pool"]

# ---- timm ----------------------------------------------------------------------------------

_ATTENTION = "MultiHeadDotProductAttention_0"
LAYOUT = Layout(
    "blocks.{i}.",
    {
        "cls": "cls_token",
        "dist": "dist_token",
        "embedding": "patch_embed.proj",
        POSITIONS: "pos_embed",
        "Transformer/registers": "reg_token",
        "LayerNorm_0": "norm1",
        f"{_ATTENTION}/query": "attn.qkv[query]",
        f"{_ATTENTION}/key": "attn.qkv[key]",
        f"{_ATTENTION}/value": "attn.qkv[value]",
        f"{_ATTENTION}/out": "attn.proj",
        f"{_ATTENTION}/relative/table": "attn.relative_position_bias_table",
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
        "fc_norm": "fc_norm",
        "pre_logits": "pre_logits.fc",
        "head": "head",
        "head_dist": "head_dist",
    },
    {"attn.qkv": ("query", "key", "value"), "attn_pool.kv": ("key", "value")},
)
SWIGLU = LAYOUT._replace(
    names=LAYOUT.names
    | {"MlpBlock_0/gate": "mlp.fc1[gate]", "MlpBlock_0/Dense_0": "mlp.fc1[value]"},
    joined={**LAYOUT.joined, "mlp.fc1": ("gate", "value")},
)
_PAPERS = {
    r"\.gamma_([12])$": r".ls\1.gamma",  # BEiT, DeiT III
    r"\.attn\.q_bias$": ".attn.qkv[query].bias",  # BEiT
    r"\.attn\.v_bias$": ".attn.qkv[value].bias",
    r"^register_tokens$": "reg_token",  # DINOv2
    r"\.mlp\.w12\.": ".mlp.fc1.",
    r"\.mlp\.w3\.": ".mlp.fc2.",
}
_PRETRAINING = r"(mask_token$|decoder_|lm_head\.)"
_MOCO = r"|head\.\d|predictor\."  # the projection of its encoders
_INDEX = r"(^|\.)relative_position_index$"  # follows from the shape
_SHARED = "rel_pos_bias.relative_position_bias_table"
_TABLE = "attn.relative_position_bias_table"
_REFUSED = {
    r"mlp\.(fc1_g|fc1_x)\.": "its MLP is a SwiGLU in another form (EVA)",
    r"attn\.(q_proj|rope)": "it has projections or positions of another kind (EVA)",
    r"^norm_pre\.": "it has a LayerNorm before the first block (CLIP)",
    r"[qk]_norm\.": "it normalises queries and keys",
    r"rel_pos\.(?!relative_position_bias)": "its relative positions are not BEiT's",
}


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a Vision Transformer in timm's layout."""
    return "patch_embed.proj.weight" in names


def read(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    origin: str = "safetensors",
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    family: str | None = None,
    pool: str | None = None,
    prefix: str = "",
) -> Imported:
    """Reads a state dict.

    Args:
      state: arrays by their names in the network.
      source: where they come from, for messages.
      config: the `config.json` of a timm folder, if there is one.
      origin: the second result of `weight_files.read`.
      image_size: (H, W) if the position embeddings are not for a square.
      num_heads: if it is not to be inferred from the width.
      family: a name of `FAMILIES`, if it is not to be guessed.
      pool: `cls` | `gap` | `cls_gap` | `map`, if it does not follow from the arrays.
      prefix: what stood before the names in the file.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing or misshapen.
    """
    notes: list[str] = []
    config = config if config and "architecture" in config else None  # it is of timm
    state = _unchunk(rename(state, _todays, source))
    decoder = any(name.startswith("decoder_") for name in state)
    mask = "mask_token" in state
    contrastive = re.search(r"(base|momentum)_encoder\.", prefix)
    pretraining = _PRETRAINING + (_MOCO if contrastive else "")
    if left := sorted(name for name in state if re.match(pretraining, name)):
        notes.append(f"Left out: {len(left)} arrays, such as {left[0]}, of pre-training only.")
    state = {name: x for name, x in state.items() if name not in left}
    refuse(state, _REFUSED, source)
    layout = SWIGLU if _has_gate(state, source) else LAYOUT
    state = _unshare(split(state, layout, source), notes)
    args = timm_config.model_args(config)
    if offset := timm_config.pretrained_cfg(config or {}).get("label_offset"):
        raise UserError(
            f"{source} has label_offset={offset!r} in its config.json, by which classes are "
            f"moved: save it again with timm, which applies it"
        )
    if args.get("pool_include_prefix"):
        raise UserError(
            f"{source} cannot be held exactly by our model: it pools the class token with the "
            f"patches (pool_include_prefix), ours the patches alone"
        )
    state, rows, image_size = _positions(state, source, image_size, config, notes)
    if family is None:
        seen = "moco" if contrastive else None
        family = seen or _family(state, prefix, origin, decoder, mask, rows, config, notes)
    cfg = _configure(state, family, source, image_size, num_heads, args, pool, notes)
    given = timm_config.read_images(config, cfg, notes) if config else {}
    if config and config.get("problem_type"):  # of transformers' wrapper around timm
        about = classes(config, cfg.num_classes, source, notes)
        given["multi_label"] = about["multi_label"]
    if family == "beit" and config:
        given["posemb_resize"] = "geometric"  # the original interpolates by cubic splines
    params = convert(state, cfg, layout, source)
    return imported(family, cfg, params, notes, **given)


def _todays(name: str) -> str:
    """timm's name for an array of a paper's code."""
    for old, new in _PAPERS.items():
        name = re.sub(old, new, name)
    return name


def _unchunk(state: Arrays) -> Arrays:
    """DINOv2 trains in chunks: `blocks.1.6.norm1.weight` is of block 6."""
    chunked = re.compile(r"blocks\.(\d+)\.(\d+)\.(?=\D)")
    found = {match.groups() for match in map(chunked.match, state) if match}
    order = sorted(found, key=lambda pair: (int(pair[0]), int(pair[1])))
    numbers = [index for _, index in order]
    if len(set(numbers)) < len(numbers):  # each chunk counts from 0
        numbers = list(map(str, range(len(order))))
    place = dict(zip(order, numbers, strict=True))
    new = lambda match: f"blocks.{place[match.groups()]}."
    return {chunked.sub(new, name, count=1): x for name, x in state.items()}


def _has_gate(state: Arrays, source: Path) -> bool:
    hidden, _ = axes(state, "blocks.0.mlp.fc1.weight", 2, source)
    return axes(state, "blocks.0.mlp.fc2.weight", 2, source)[1] * 2 == hidden


def _unshare(state: Arrays, notes: list[str]) -> Arrays:
    """BEiT's pre-training has one table for all layers; its fine-tuning one for each."""
    state = {name: x for name, x in state.items() if not re.search(_INDEX, name)}
    if _SHARED not in state:
        return state
    shared = state.pop(_SHARED)
    notes.append("The relative position bias, shared by all layers, was copied to each.")
    depth = count_blocks(state, r"blocks\.(\d+)\.")
    return state | {LAYOUT.block.format(i=i) + _TABLE: shared for i in range(depth)}


def _pool(state: Arrays, args: dict[str, Any], source: Path, given: str | None) -> str:
    found = "cls" if "cls_token" in state and "fc_norm.weight" not in state else "gap"
    found = "map" if "attn_pool.latent" in state else found
    said = given or args["global_pool"]
    pools = {None: found, "token": "cls", "avg": "gap"} | {name: name for name in POOLS}
    pool = pools.get(said, "") if said is None or isinstance(said, str) else ""
    if not pool or (pool == "map") != (found == "map"):
        raise UserError(
            f"{source} cannot be held exactly by our model: it pools by {said!r}, where the "
            f"arrays are those of {found!r}"
        )
    return pool


def _positions(
    state: Arrays,
    source: Path,
    image_size: tuple[int, int] | None,
    config: dict[str, Any] | None,
    notes: list[str],
) -> tuple[Arrays, int, tuple[int, int]]:
    """Gives position embeddings a row for the class token and none for registers.

    Where no `image_size` is given, they are for the one that `config` says, if they fit it,
    and else for a square, which timm resizes as it loads them.

    Returns:
      The state, how many rows there were before the patches, and (H, W).
    """
    patch = axes(state, "patch_embed.proj.weight", 4, source)[2]
    grid = lambda size: (size[0] // patch, size[1] // patch)
    sizes = [image_size] if image_size else list(timm_config.sizes(config))
    unsaid = None if config else notes
    if "pos_embed" not in state:
        offsets = axes(state, f"blocks.0.{_TABLE}", 2, source)[0]
        holds = lambda size: math.prod(2 * n - 1 for n in grid(size)) + 3 == offsets
        said = image_size or next(filter(holds, sizes), None)
        return state, 0, relative_size(offsets, patch, said, source, unsaid)
    total = axes(state, "pos_embed", 3, source)[1]
    before = sum(name in state for name in ("cls_token", "dist_token"))
    registers = axes(state, "reg_token", 3, source)[1] if "reg_token" in state else 0
    choices = sorted({0, before, before + registers})
    square = lambda n: n > 0 and math.isqrt(n) ** 2 == n
    fits: list[tuple[int, tuple[int, int] | None]]
    fits = [(n, size) for size in sizes for n in choices if total - n == math.prod(grid(size))]
    if not fits and not image_size:
        fits = [(n, None) for n in choices if square(total - n)]
        if sizes and fits:
            notes.append(
                f"config.json says images of {sizes[0][0]} x {sizes[0][1]}, and the positions "
                f"are for others: for a square, as timm assumes it."
            )
    rows, said = fits[0] if fits else (before, image_size)
    image_size = square_grid(total - rows, patch, said, source, unsaid)
    state, table = dict(state), state["pos_embed"]
    if rows > before and state["reg_token"].shape[::2] == table.shape[::2]:
        # Adding a register's position to the register itself is the same.
        state["reg_token"] = state["reg_token"] + table[:, before:rows]
        table = np.concatenate([table[:, :before], table[:, rows:]], axis=1)
    state["pos_embed"] = with_prefix_rows(table, before if rows < before else 0)
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
    """The family: the same arrays and numerics, but another scale of the pixels."""
    scaled = "blocks.0.ls1.gamma" in state
    if f"blocks.0.{_TABLE}" in state or not _key_bias(state):
        return "beit"
    if "dist_token" in state:
        return "deit"
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
        if "fc_norm.weight" in state and "cls_token" in state:
            family = "mae"
        elif "head.weight" in state:
            family = "deit" if origin == "wrapped" else "timm"
        elif rows and not state["pos_embed"][:, 0].any():  # fixed sine-cosine positions
            family = "mae"
        elif scaled:
            family = "dinov2"
        else:
            family = "dino"
    if config is None:
        notes.append(
            f"Nothing in the file distinguishes DeiT, DINO, MAE and timm for sure: the "
            f"preprocessing of {family!r} assumed, from the form of the file; --family=NAME "
            f"sets another."
        )
    return family


def _configure(
    state: Arrays,
    family: str,
    source: Path,
    image_size: tuple[int, int],
    num_heads: int | None,
    args: dict[str, Any],
    pool: str | None,
    notes: list[str],
) -> ViTConfig:
    """Infers the configuration from the shapes."""
    width, channels, patch, _ = axes(state, "patch_embed.proj.weight", 4, source)
    mlp_dim = axes(state, "blocks.0.mlp.fc2.weight", 2, source)[1]
    swiglu = "blocks.0.mlp.fc1[gate].weight" in state
    relative = f"blocks.0.{_TABLE}" in state
    pool = _pool(state, args, source, pool)
    depth = count_blocks(state, r"blocks\.(\d+)\.")
    if num_heads is None and type(args.get("num_heads")) is int:
        num_heads = args["num_heads"]
    if num_heads is None:
        num_heads, note = guess_heads(depth, width, mlp_dim, source)
        notes.append(note)
    gelu = FAMILIES[family].gelu
    if "act_layer" in args and not swiglu:
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
        ViTConfig,
        image_size=image_size,
        channels=channels,
        patch_size=patch,
        depth=depth,
        width=width,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_classes=outputs("head.weight"),
        pool=pool,
        class_token=class_token("cls_token" in state, pool),
        distillation=_distillation(state),
        final_norm="pooled" if "fc_norm.weight" in state else "encoder",
        posemb="learned" if "pos_embed" in state else "none",
        relative="bias" if relative else "none",
        mlp="swiglu" if swiglu else "gelu",
        key_bias=_key_bias(state),
        representation_size=outputs("pre_logits.fc.weight") or None,
        registers=state["reg_token"].shape[1] if "reg_token" in state else 0,
        layer_scale_init=1e-5 if "blocks.0.ls1.gamma" in state else None,
        gelu=gelu,
        layer_norm_eps=FAMILIES[family].layer_norm_eps,
    )


def _key_bias(state: Arrays) -> bool:
    """Whether keys have a bias; BEiT has one of queries and values only."""
    query, key = (f"blocks.0.attn.qkv[{part}].bias" in state for part in ("query", "key"))
    return key or not query


def _distillation(state: Arrays) -> str:
    if "dist_token" not in state:
        return "none"
    return "heads" if "head_dist.weight" in state else "token"


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
    layout = SWIGLU if cfg.mlp == "swiglu" else LAYOUT
    if cfg.has_class_token and cfg.distillation == "none" and not class_row:
        table = arrays[POSITIONS]
        arrays |= {"cls": arrays["cls"] + table[:, :1], POSITIONS: table[:, 1:]}
    if cfg.relative == "bias" and cfg.posemb == "none":
        del arrays[POSITIONS]
    state = {layout.name(k): to_torch(k, v) for k, v in arrays.items()}
    state = join(state, layout)
    if not cfg.key_bias:  # as BEiT writes it
        for part, theirs in (("query", "q_bias"), ("value", "v_bias")):
            for i in range(cfg.depth):
                bias = state.pop(f"blocks.{i}.attn.qkv[{part}].bias")
                state[f"blocks.{i}.attn.{theirs}"] = bias
        for name in [name for name in state if re.search(r"\.ls[12]\.gamma$", name)]:
            state[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = state.pop(name)
    return state


# What our own files say in the header about the network.
SAID = ("num_heads", "gelu", "layer_norm_eps", "image_size", "pool", "class_token")
# And about images and classes: fields of an `Imported`.
IMAGES = (
    "family",
    "value_range",
    "eval_transform",
    "posemb_resize",
    "input_size",
    "class_names",
)


def write(
    path: Path, cfg: ViTConfig, params: Params, images: dict[str, Any] | None = None
) -> tuple[str, ...]:
    """Writes a `.safetensors` file with the state dict of a timm model.

    That is a `VisionTransformer`, a `VisionTransformerDistilled` or a `Beit`.

    Args:
      path: where to.
      cfg: the model.
      params: its parameters, one `encoderblock_i` a layer.
      images: the values of `IMAGES` for the header, which only we read.

    Returns:
      Sentences about what readers of the file need to know.

    Raises:
      UserError: timm has no place for something in the model.
    """
    require_plain(cfg, path)
    for present, what in (
        (cfg.representation_size, "tanh layer (pre_logits)"),
        (cfg.pool == "cls_gap", "pooling by 'cls_gap'"),
        (cfg.key_bias == (cfg.relative == "bias"), "such relative positions and key biases"),
    ):
        if present:
            raise UserError(f"cannot write {path}: timm has no {what}")
    # timm's arrays say none of this; the header can, to us.
    said = {field: getattr(cfg, field) for field in SAID}
    metadata = {"vit_jax": json.dumps(said | (images or {}))}
    weight_files.write_safetensors(
        path, state_dict(cfg, params, class_row=not cfg.registers), metadata
    )
    options = {
        "num_heads": cfg.num_heads,
        "class_token": cfg.has_class_token,
        "global_pool": {"cls": "token", "gap": "avg", "map": "map"}[cfg.pool],
    }
    if cfg.pool == "gap":
        options["fc_norm"] = cfg.final_norm == "pooled"
    if cfg.registers:
        options |= {"reg_tokens": cfg.registers, "no_embed_class": True}
    if cfg.layer_scale_init is not None:
        options["init_values"] = cfg.layer_scale_init
    if cfg.gelu == "tanh":
        options["act_layer"] = "gelu_tanh"
    model = "VisionTransformer"
    if cfg.relative == "bias":
        model, options["use_rel_pos_bias"] = "Beit", True
        options["use_abs_pos_emb"] = cfg.posemb != "none"
        del options["class_token"], options["fc_norm"]
    elif cfg.distillation == "heads":
        model = "VisionTransformerDistilled"
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    notes = [f"The arrays are those of timm's {model}({given})."]
    if cfg.layer_norm_eps != 1e-6:
        notes.append(f"Build timm's model with a LayerNorm of eps={cfg.layer_norm_eps}.")
    return tuple(notes)
