"""Hugging Face folders: `config.json`, `model.safetensors`, `preprocessor_config.json`.

ViT, DeiT (whose models without a distillation token are ViTs there), BEiT, DINOv2 with and
without registers, and the encoders of ViT-MAE.

https://github.com/huggingface/transformers
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.interop import weight_files
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
)
from vit_jax.interop.huggingface_config import classes, image_size_of
from vit_jax.interop.huggingface_names import (
    PATCHES,
    PREFIXES,
    PRETRAINING,
    SHARED_TABLE,
    TABLE,
    canonical,
    guess_type,
    layout,
)
from vit_jax.interop.preprocessing import from_processor, to_processor
from vit_jax.interop.torch_layout import (
    POSITIONS,
    convert,
    count_blocks,
    export,
    join,
    require_plain,
    split,
    to_torch,
)
from vit_jax.models.model import Params
from vit_jax.models.vit_config import ViTConfig
from vit_jax.system import bounded
from vit_jax.system.atomic import replacing
from vit_jax.system.errors import UserError

_FAMILY = {
    "vit": "huggingface",
    "deit": "deit",
    "beit": "beit",
    "vit_mae": "mae",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
_GELU = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}


# ---- folders -------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        value = bounded.parse_json(bounded.read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def config_beside(path: Path) -> dict[str, Any] | None:
    """The `config.json` of a folder of weights, or of the folder that a file lies in."""
    config = _read_json((path if path.is_dir() else path.parent) / "config.json")
    if config and {"model_type", "architectures", "architecture"} & config.keys():
        return config
    return None


def read_folder(folder: Path) -> tuple[Arrays, str]:
    """Reads the weights of a folder, in one file or in several with an index.

    Returns:
      As `weight_files.read_nested`.

    Raises:
      UserError: there are none, or the index does not fit them.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return weight_files.read_nested(folder / name)
        index = _read_json(folder / f"{name}.index.json")
        if index is not None:
            return _read_shards(folder, index, f"{name}.index.json")
    endings = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in endings)[:4]
    hint = f"; pass a file in it, such as {', '.join(others)}" if others else ""
    raise UserError(f"{folder} has no weights: model.safetensors is what is looked for{hint}")


def _read_shards(folder: Path, index: dict[str, Any], name: str) -> tuple[Arrays, str]:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{folder / name} has no weight_map")
    arrays: Arrays = {}
    kind = ""
    for shard in sorted({str(shard) for shard in where.values()}):
        if Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{folder / name} names {shard!r}, which is outside the folder")
        part, kind = weight_files.read_nested(folder / shard)
        for key, value in part.items():
            if where.get(key) != shard:
                raise UserError(f"{folder / shard} has array {key!r}, unknown to its index")
            arrays[key] = value
    if missing := sorted(where.keys() - arrays.keys()):
        raise UserError(f"{folder / name} lists {', '.join(missing)}, which no file has")
    return arrays, kind


# ---- reading -------------------------------------------------------------------------------


def recognises(names: Iterable[str]) -> bool:
    """Whether arrays of these names are a Vision Transformer of Hugging Face."""
    return any(prefix + PATCHES in names for prefix in PREFIXES)


def read(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    family: str | None = None,
    pool: str | None = None,
) -> Imported:
    """Reads the arrays of a model, with or without its `config.json`.

    Args:
      state: arrays by their names.
      source: where they come from, for messages; the files beside it are read, too.
      config: the `config.json`.
      image_size: (H, W) that positions are for, if neither a square nor said by `config`.
      num_heads: if it is not to be read from `config` or inferred from the width.
      family: a name of `FAMILIES`, if it is not to follow from the kind of model.
      pool: `cls` | `gap` | `cls_gap`, if it is not to follow from it either.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing or misshapen.
    """
    notes: list[str] = []
    config = config if config and "model_type" in config else {}
    prefix = next(p for p in PREFIXES if p + PATCHES in state)
    dinov2 = any(".layer_scale1." in name for name in state)
    state = rename(state, lambda name: canonical(name, prefix, dinov2), source)
    model = str(config.get("model_type", guess_type(state)))
    if model not in _FAMILY:
        raise UserError(f"{source} is a {model!r}, which is none of {', '.join(_FAMILY)}")
    if left := [name for name in state if re.match(PRETRAINING, name)]:
        state = {name: x for name, x in state.items() if name not in left}
        notes.append(f"Left out: {len(left)} arrays, which only pre-training uses.")
    names = layout(model, state)
    state = _unshare(split(state, names, source), notes)
    cfg = _configure(state, model, config, source, image_size, num_heads, family, pool, notes)
    params = convert(state, cfg, names, source)
    folder = source if source.is_dir() else source.parent
    processor = _processor(folder) if config else None
    given = from_processor(processor, model, cfg, notes) if processor else {}
    given |= classes(config, cfg.num_classes, source, notes)
    # Their code resizes in ways of its own: BEiT originally by splines, DINOv2 by an odd scale.
    if model in ("beit", "dinov2"):
        given["posemb_resize"] = "half_pixel" if model == "beit" else "bicubic"
    return imported(family or _FAMILY[model], cfg, params, notes, **given)


def _processor(folder: Path) -> dict[str, Any] | None:
    """What a folder says about images, with other processors or in a file of its own."""
    inside = (_read_json(folder / "processor_config.json") or {}).get("image_processor")
    if isinstance(inside, dict):
        return inside
    return _read_json(folder / "preprocessor_config.json")


def _unshare(state: Arrays, notes: list[str]) -> Arrays:
    """BEiT's pre-training has one table for all layers; its fine-tuning one for each."""
    state = {name: x for name, x in state.items() if "relative_position_index" not in name}
    if SHARED_TABLE not in state:
        return state
    shared = state.pop(SHARED_TABLE)
    notes.append("The relative position bias, shared by all layers, was copied to each.")
    depth = count_blocks(state, r"encoder\.layer\.(\d+)\.")
    return state | {f"encoder.layer.{i}.{TABLE}": shared for i in range(depth)}


def _number(config: dict[str, Any], key: str, default: Any, source: Path) -> Any:
    """A number that is not negative, of the type of `default`, or a whole one."""
    value = config.get(key, default)
    if type(value) not in (type(default), int) or not 0 <= value < math.inf:
        raise UserError(f"{source}: {key} is {value!r} in its config.json, not such a number")
    return value


def _configure(
    state: Arrays,
    model: str,
    config: dict[str, Any],
    source: Path,
    image_size: tuple[int, int] | None,
    num_heads: int | None,
    family: str | None,
    given_pool: str | None,
    notes: list[str],
) -> ViTConfig:
    """Infers the configuration from the shapes, and the rest from `config`."""
    width, channels, patch, _ = axes(state, PATCHES, 4, source)
    block = "encoder.layer.0."
    dinov2 = model.startswith("dinov2")
    swiglu = dinov2 and any("weights_in" in name for name in state)
    mlp = "mlp.weights_out" if swiglu else "mlp.fc2" if dinov2 else "output.dense"
    mlp_dim = axes(state, f"{block}{mlp}.weight", 2, source)[1]
    depth = count_blocks(state, r"encoder\.layer\.(\d+)\.")
    if num_heads is None and config:
        num_heads = _number(config, "num_attention_heads", 12, source)
    if num_heads is None:
        num_heads, note = guess_heads(depth, width, mlp_dim, source)
        notes.append(note)
    act = str(config.get("hidden_act", "gelu"))
    if act not in _GELU:
        raise UserError(f"{source} cannot be held exactly by our model: hidden_act is {act!r}")
    if "pooler.dense.weight" in state and config.get("pooler_act", "tanh") != "tanh":
        raise UserError(f"{source} cannot be held exactly by our model: its pooler has no tanh")
    # Hugging Face's defaults, which for MAE and BEiT are not those of the original code.
    numerics = FAMILIES[family or ("dinov2" if dinov2 else "huggingface")]
    epsilon, gelu = numerics.layer_norm_eps, numerics.gelu
    outputs = lambda name: axes(state, name, 2, source)[0] if name in state else 0
    distillation = "none"
    if model == "deit" and "embeddings.distillation_token" in state:
        distillation = "heads" if "distillation_classifier.weight" in state else "token"
    pooled = "pooler.layernorm.weight" in state
    num_classes = outputs("cls_classifier.weight") or outputs("classifier.weight")
    pool = "cls_gap" if dinov2 and num_classes else "gap" if pooled else "cls"
    pool = given_pool or pool
    given, unsaid = image_size or image_size_of(config), None if config else notes
    positions, table = "embeddings.position_embeddings", f"{block}{TABLE}"
    if positions in state:
        rows = axes(state, positions, 3, source)[1] - 1 - (distillation != "none")
        image_size = square_grid(rows, patch, given, source, unsaid)
    else:
        rows = axes(state, table, 2, source)[0]
        image_size = relative_size(rows, patch, given, source, unsaid)
    registers = "embeddings.register_tokens"
    scale = {"beit": "lambda_1"}.get(model, "layer_scale1.lambda1" if dinov2 else "")
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
        num_classes=num_classes,
        pool=pool,
        class_token=class_token(True, pool),
        distillation=distillation,
        final_norm="pooled" if pooled else "encoder",
        posemb="learned" if positions in state else "none",
        relative="bias" if table in state else "none",
        representation_size=outputs("pooler.dense.weight") or None,
        registers=axes(state, registers, 3, source)[1] if registers in state else 0,
        layer_scale_init=1e-5 if f"{block}{scale}" in state else None,
        mlp="swiglu" if swiglu else "gelu",
        key_bias=model != "beit",
        gelu=_GELU[act] if "hidden_act" in config else gelu,
        layer_norm_eps=float(_number(config, "layer_norm_eps", epsilon, source)),
    )


# ---- writing -------------------------------------------------------------------------------


def write(
    folder: Path,
    cfg: ViTConfig,
    params: Params,
    class_names: tuple[str, ...] | None = None,
    value_range: str = "inception",
    eval_transform: str = "resize",
    input_size: tuple[int, int] | None = None,
    multi_label: bool = False,
) -> tuple[str, ...]:
    """Writes a folder that transformers' `from_pretrained` reads without other arguments.

    Args:
      folder: where to; made if it is not there.
      cfg: the model; position embeddings of any kind become learned ones.
      params: its parameters, one `encoderblock_i` a layer.
      class_names: one an output.
      value_range: for `data.value_ranges`.
      eval_transform: for `data.transforms.language.parse_transform`.
      input_size: (H, W) that it ends in, if not that of the model: see `Imported`.
      multi_label: whether an image may have several classes.

    Returns:
      Sentences about what the folder says less exactly than we would.

    Raises:
      UserError: a Hugging Face ViT has no place for something in the model.
    """
    require_plain(cfg, folder)
    model = _model_type(cfg, folder)
    if class_names is not None and len(class_names) != cfg.num_classes:
        raise UserError(
            f"cannot write {folder}: it has {cfg.num_classes} outputs, but {len(class_names)} "
            f"class names"
        )
    notes: list[str] = []
    processor = to_processor(cfg, value_range, eval_transform, notes, input_size)
    arrays = export(cfg, params, folder)
    if cfg.posemb == "none" and model == "beit":
        del arrays[POSITIONS]
    names = layout(model, arrays)
    state = {}
    for ours, value in arrays.items():
        prefix = f"{model}." if cfg.num_classes and not ours.startswith("head") else ""
        state[prefix + names.name(ours)] = to_torch(ours, value)
    if model.startswith("dinov2"):  # which every model of theirs has
        prefix = f"{model}." if cfg.num_classes else ""
        state[f"{prefix}embeddings.mask_token"] = np.zeros((1, cfg.width), np.float32)
    state = join(state, names)
    config = _config(cfg, class_names) | _special(cfg, model)
    if multi_label:
        config["problem_type"] = "multi_label_classification"
    weight_files.write_safetensors(folder / "model.safetensors", state)
    _write_json(folder / "preprocessor_config.json", processor)
    _write_json(folder / "config.json", config)
    pooler = cfg.representation_size or model in ("beit", "dinov2", "dinov2_with_registers")
    if not cfg.num_classes and not pooler:
        notes.append("Load it with ViTModel.from_pretrained(..., add_pooling_layer=False).")
    return tuple(notes)


def _model_type(cfg: ViTConfig, folder: Path) -> str:
    """Which of Hugging Face's models computes the same.

    Raises:
      UserError: none does.
    """
    relative, scaled = cfg.relative == "bias", cfg.layer_scale_init is not None
    model, pools = "vit", {"cls"}
    if relative or not cfg.key_bias or cfg.final_norm == "pooled":
        model, pools = "beit", {"gap"} if cfg.final_norm == "pooled" else {"cls"}
    elif scaled or cfg.registers or cfg.mlp == "swiglu":
        model = "dinov2_with_registers" if cfg.registers else "dinov2"
        pools = {"cls_gap"} if cfg.num_classes else {"cls"}
    elif cfg.distillation != "none":
        model = "deit"
    for present, what in (
        (cfg.pool not in pools or not cfg.has_class_token, f"pooling by {cfg.pool!r}"),
        (cfg.registers and model != "dinov2_with_registers", "registers"),
        (cfg.distillation != "none" and model != "deit", "distillation token"),
        (cfg.mlp == "swiglu" and not model.startswith("dinov2"), "SwiGLU"),
        (model == "beit" and cfg.key_bias, "bias of keys"),
        (model.startswith("dinov2") and not scaled, "blocks without LayerScale"),
        (
            cfg.representation_size and cfg.num_classes,
            "tanh layer (pre_logits) before its head",
        ),
        (cfg.representation_size and model not in ("vit", "deit"), "tanh layer (pre_logits)"),
        (model.startswith("dinov2") and not _mlp_ratio(cfg), f"MLP of width {cfg.mlp_dim}"),
    ):
        if present:
            raise UserError(f"cannot write {folder}: a Hugging Face {model} has no {what}")
    return model


def _mlp_ratio(cfg: ViTConfig) -> int | None:
    """The whole number that DINOv2's configuration gives the width of the MLP by."""
    for ratio in range(1, 17):
        hidden = cfg.width * ratio
        gated = (int(hidden * 2 / 3) + 7) // 8 * 8
        if cfg.mlp_dim == (gated if cfg.mlp == "swiglu" else hidden):
            return ratio
    return None


def _special(cfg: ViTConfig, model: str) -> dict[str, Any]:
    """What the configuration of models other than the plain ViT says besides."""
    head = {
        "vit": "ViTForImageClassification",
        "deit": "DeiTForImageClassification",
        "beit": "BeitForImageClassification",
        "dinov2": "Dinov2ForImageClassification",
        "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    }[model]
    head += "WithTeacher" * (cfg.distillation == "heads")
    name = head if cfg.num_classes else re.sub(r"ForImage.*", "Model", head)
    special: dict[str, Any] = {"architectures": [name], "model_type": model}
    scale = cfg.layer_scale_init
    if model == "beit":
        special |= {
            "use_absolute_position_embeddings": cfg.posemb != "none",
            "use_relative_position_bias": cfg.relative == "bias",
            "use_mean_pooling": cfg.pool == "gap",
            "layer_scale_init_value": scale or 0.0,
            "drop_path_rate": 0.0,
        }
    if model.startswith("dinov2"):
        special |= {
            "mlp_ratio": _mlp_ratio(cfg),
            "use_swiglu_ffn": cfg.mlp == "swiglu",
            "layerscale_value": scale,
        }
    if cfg.registers:
        special["num_register_tokens"] = cfg.registers
    return special


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _config(cfg: ViTConfig, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    height, width = cfg.image_size
    config: dict[str, Any] = {
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.mlp_dim,
        "hidden_act": "gelu_pytorch_tanh" if cfg.gelu == "tanh" else "gelu",
        "layer_norm_eps": cfg.layer_norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": cfg.patch_size,
        "num_channels": cfg.channels,
        "qkv_bias": True,
        "hidden_dropout_prob": cfg.dropout,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    if cfg.representation_size:
        config |= {"pooler_act": "tanh", "pooler_output_size": cfg.representation_size}
    if cfg.num_classes:
        names = class_names or [f"LABEL_{i}" for i in range(cfg.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config
