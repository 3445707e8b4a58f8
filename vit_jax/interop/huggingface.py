"""Hugging Face folders: `config.json`, `model.safetensors`, `preprocessor_config.json`.

Two generations of names: those of files, which transformers 4 also used for its modules, and
those of the modules of transformers 5, which still writes the old ones. Both are read, the
old ones are written. There, DeiT without a distillation token is a ViT.

https://github.com/huggingface/transformers
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
)
from vit_jax.interop.preprocessing import from_processor, to_processor
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

_ATTENTION = "MultiHeadDotProductAttention_0"
_COMMON = {
    "cls": "embeddings.cls_token",
    "embedding": "embeddings.patch_embeddings.projection",
    POSITIONS: "embeddings.position_embeddings",
    "Transformer/registers": "embeddings.register_tokens",
    f"{_ATTENTION}/query": "attention.attention.query",
    f"{_ATTENTION}/key": "attention.attention.key",
    f"{_ATTENTION}/value": "attention.attention.value",
    f"{_ATTENTION}/out": "attention.output.dense",
    "Transformer/encoder_norm": "layernorm",
    "pre_logits": "pooler.dense",
    "head": "classifier",
}
_VIT = Layout(
    "encoder.layer.{i}.",
    _COMMON
    | {
        "LayerNorm_0": "layernorm_before",
        "LayerNorm_1": "layernorm_after",
        "MlpBlock_0/Dense_0": "intermediate.dense",
        "MlpBlock_0/Dense_1": "output.dense",
    },
)
_DINOV2 = Layout(
    "encoder.layer.{i}.",
    _COMMON
    | {
        "LayerNorm_0": "norm1",
        "LayerNorm_1": "norm2",
        "LayerScale_0/gamma": "layer_scale1.lambda1",
        "LayerScale_1/gamma": "layer_scale2.lambda1",
        "MlpBlock_0/Dense_0": "mlp.fc1",
        "MlpBlock_0/Dense_1": "mlp.fc2",
    },
)
_MODULES = {  # of transformers 5 -> of files
    r"^(?:encoder\.)?layers?\.(\d+)\.": r"encoder.layer.\1.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
}
_VIT_MODULES = {r"\.mlp\.fc1\.": ".intermediate.dense.", r"\.mlp\.fc2\.": ".output.dense."}

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.", "deit.", "beit.")
_PRETRAINING = r"(embeddings\.mask_token|decoder\.)"
_REFUSED = {
    r"distillation": "it has a distillation token (DeiT)",
    r"relative_position_bias|lambda_1": "it has a relative position bias (BEiT)",
    r"weights_in|gate_proj|up_proj": "its MLP is a SwiGLU (DINOv2 giant)",
}
_FAMILY = {
    "vit": "huggingface",
    "vit_mae": "mae",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
_GELU = {"gelu": "erf", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu_fast": "tanh"}


# ---- folders -------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
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
      As `files.read`.

    Raises:
      UserError: there are none, or the index does not fit them.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return files.read(folder / name)
        index = _read_json(folder / f"{name}.index.json")
        if index is not None:
            return _read_shards(folder, index, f"{name}.index.json")
    raise UserError(f"{folder} has no weights: model.safetensors is what is looked for")


def _read_shards(folder: Path, index: dict[str, Any], name: str) -> tuple[Arrays, str]:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{folder / name} has no weight_map")
    arrays: Arrays = {}
    kind = ""
    for shard in sorted({str(shard) for shard in where.values()}):
        if Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{folder / name} names {shard!r}, which is outside the folder")
        part, kind = files.read(folder / shard)
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
    return any(prefix + _PATCHES in names for prefix in _PREFIXES)


def read(
    state: Arrays,
    source: Path,
    config: dict[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> Imported:
    """Reads the arrays of a model, with or without its `config.json`.

    Raises:
      UserError: our model cannot hold it exactly, or arrays are missing or misshapen.
    """
    notes: list[str] = []
    config = config if config and "model_type" in config else {}
    refuse(state, _REFUSED, source)
    state = _canonical(state, source)
    mae = any(name.startswith("decoder.decoder_") for name in state)
    if left := [name for name in state if re.match(_PRETRAINING, name)]:
        state = {name: x for name, x in state.items() if name not in left}
        notes.append(f"Left out: {len(left)} arrays, which only pre-training uses.")
    scaled = "encoder.layer.0.layer_scale1.lambda1" in state
    guess = "dinov2" if scaled else "vit_mae" if mae else "vit"
    model = str(config.get("model_type", guess))
    if model not in _FAMILY:
        raise UserError(f"{source} is a {model!r}, which is none of {', '.join(_FAMILY)}")
    if scaled and "classifier.weight" in state:
        raise UserError(
            f"{source} cannot be held exactly by our model: its head reads the class token "
            f"and the mean of the patches, ours one of them"
        )
    cfg = _configure(state, model, config, source, image_size, num_heads, notes)
    params = convert(state, cfg, _DINOV2 if scaled else _VIT, source)
    folder = source if source.is_dir() else source.parent
    processor = _read_json(folder / "preprocessor_config.json") if config else None
    given = from_processor(processor, cfg, notes) if processor else {}
    given["class_names"] = _class_names(config, cfg.num_classes)
    return imported(_FAMILY[model], cfg, params, notes, **given)


def _canonical(state: Arrays, source: Path) -> Arrays:
    """The names of files, without the prefix that a model with a head gives its encoder."""
    prefix = next(p for p in _PREFIXES if p + _PATCHES in state)
    dinov2 = any(".layer_scale1." in name for name in state)
    rules = list((_MODULES if dinov2 else _MODULES | _VIT_MODULES).items())

    def name(old: str) -> str:
        new = old.removeprefix(prefix)
        if new.startswith("decoder."):
            return new
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        return new

    return rename(state, name, source)


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
    notes: list[str],
) -> ViTConfig:
    """Reads the numbers of the model off the shapes, and what they do not say off `config`."""
    width, channels, patch, _ = axes(state, _PATCHES, 4, source)
    registers = "embeddings.register_tokens"
    rows = axes(state, "embeddings.position_embeddings", 3, source)[1]
    block = "encoder.layer.0."
    scaled = f"{block}layer_scale1.lambda1" in state
    mlp = block + ("mlp.fc1.weight" if scaled else "intermediate.dense.weight")
    mlp_dim, _ = axes(state, mlp, 2, source)
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
    # Hugging Face's defaults, which for MAE are not those of the original code.
    epsilon = FAMILIES["dinov2" if scaled else "huggingface"].layer_norm_eps
    outputs = lambda name: axes(state, name, 2, source)[0] if name in state else 0
    return configure(
        source,
        image_size=square_grid(rows - 1, patch, image_size or _image_size(config), source),
        channels=channels,
        patch_size=patch,
        depth=depth,
        width=width,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_classes=outputs("classifier.weight"),
        representation_size=outputs("pooler.dense.weight") or None,
        registers=axes(state, registers, 3, source)[1] if registers in state else 0,
        layer_scale_init=1e-5 if scaled else None,
        gelu=_GELU[act],
        layer_norm_eps=float(_number(config, "layer_norm_eps", epsilon, source)),
    )


def _image_size(config: dict[str, Any]) -> tuple[int, int] | None:
    size = config.get("image_size")
    match size if isinstance(size, list) else [size, size]:
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
    return None  # the position embeddings will tell


def _class_names(config: dict[str, Any], num_classes: int) -> tuple[str, ...] | None:
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not num_classes:
        return None
    names = [labels.get(str(i)) for i in range(num_classes)]
    if len(labels) != num_classes or not all(isinstance(name, str) for name in names):
        return None
    if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
        return None  # Hugging Face's words for no names
    return tuple(map(str, names))


# ---- writing -------------------------------------------------------------------------------


def write(
    folder: Path,
    cfg: ViTConfig,
    params: Params,
    class_names: tuple[str, ...] | None = None,
    value_range: str = "inception",
    eval_transform: str = "resize",
) -> tuple[str, ...]:
    """Writes a folder that transformers' `from_pretrained` reads with nothing else given.

    Args:
      folder: where to; made if it is not there.
      cfg: the model; position embeddings of any kind become learned ones.
      params: its parameters, one `encoderblock_i` a layer.
      class_names: one an output.
      value_range: `inception` | `imagenet`.
      eval_transform: for `data.preprocess.parse_transform`.

    Returns:
      Sentences about what the folder says less exactly than we would.

    Raises:
      UserError: a Hugging Face ViT has no place for something in the model.
    """
    for present, what in (
        (cfg.pool != "cls", f"pooling by {cfg.pool!r}, only a class token"),
        (cfg.registers, "registers"),
        (cfg.layer_scale_init is not None, "LayerScale"),
        (
            cfg.representation_size and cfg.num_classes,
            "tanh layer (pre_logits) before its head",
        ),
    ):
        if present:
            raise UserError(f"cannot write {folder}: a Hugging Face ViT has no {what}")
    if class_names is not None and len(class_names) != cfg.num_classes:
        raise UserError(
            f"cannot write {folder}: it has {cfg.num_classes} outputs, but {len(class_names)} "
            f"class names"
        )
    notes: list[str] = []
    processor = to_processor(cfg, value_range, eval_transform, notes)
    state = {}
    for ours, value in export(cfg, params, folder).items():
        prefix = "vit." if cfg.num_classes and not ours.startswith("head/") else ""
        state[prefix + _VIT.name(ours)] = np.ascontiguousarray(to_torch(ours, value))
    files.write_safetensors(folder / "model.safetensors", state)
    _write_json(folder / "preprocessor_config.json", processor)
    _write_json(folder / "config.json", _config(cfg, class_names))
    if not cfg.num_classes and not cfg.representation_size:
        notes.append("Load it with ViTModel.from_pretrained(..., add_pooling_layer=False).")
    return tuple(notes)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = (json.dumps(value, indent=2) + "\n").encode()
    files.write_atomically(path, lambda file: file.write(text))


def _config(cfg: ViTConfig, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    height, width = cfg.image_size
    config = {
        "architectures": ["ViTForImageClassification" if cfg.num_classes else "ViTModel"],
        "model_type": "vit",
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
