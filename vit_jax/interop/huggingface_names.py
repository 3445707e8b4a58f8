"""What Hugging Face calls the arrays of its Vision Transformers, by `model_type`.

Two generations of names: those of files, which transformers 4 also used for its modules, and
those of the modules of transformers 5, which still writes the old ones. Both are read, the
old ones are written.
"""

import re
from typing import Any

from vit_jax.interop.torch_layout import POSITIONS, Layout

PATCHES = "embeddings.patch_embeddings.projection.weight"
TABLE = "attention.attention.relative_position_bias.relative_position_bias_table"
SHARED_TABLE = "encoder.relative_position_bias.relative_position_bias_table"
# Where a model with a head keeps its encoder.
PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.", "deit.", "beit.")
# Arrays that only pre-training uses; BEiT's stand outside the prefix.
PRETRAINING = r"(embeddings\.mask_token$|decoder\.|lm_head\.|outside\.layernorm\.)"

_BLOCK = "encoder.layer.{i}."
_ATTENTION = "MultiHeadDotProductAttention_0"
_COMMON = {
    "cls": "embeddings.cls_token",
    "embedding": "embeddings.patch_embeddings.projection",
    POSITIONS: "embeddings.position_embeddings",
    f"{_ATTENTION}/query": "attention.attention.query",
    f"{_ATTENTION}/key": "attention.attention.key",
    f"{_ATTENTION}/value": "attention.attention.value",
    f"{_ATTENTION}/out": "attention.output.dense",
    "Transformer/encoder_norm": "layernorm",
    "pre_logits": "pooler.dense",
    "head": "classifier",
}
_VIT = _COMMON | {
    "LayerNorm_0": "layernorm_before",
    "LayerNorm_1": "layernorm_after",
    "MlpBlock_0/Dense_0": "intermediate.dense",
    "MlpBlock_0/Dense_1": "output.dense",
}
_DINOV2 = _COMMON | {
    "Transformer/registers": "embeddings.register_tokens",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "LayerScale_0/gamma": "layer_scale1.lambda1",
    "LayerScale_1/gamma": "layer_scale2.lambda1",
}
_GELU = {"MlpBlock_0/Dense_0": "mlp.fc1", "MlpBlock_0/Dense_1": "mlp.fc2"}
_SWIGLU = {
    "MlpBlock_0/gate": "mlp.weights_in[gate]",
    "MlpBlock_0/Dense_0": "mlp.weights_in[value]",
    "MlpBlock_0/Dense_1": "mlp.weights_out",
}
_BEIT = {
    "LayerScale_0/gamma": "lambda_1",
    "LayerScale_1/gamma": "lambda_2",
    f"{_ATTENTION}/relative/table": TABLE,
    "fc_norm": "pooler.layernorm",
}
_DEIT = {"dist": "embeddings.distillation_token"}
_DEIT_HEADS = {"head": "cls_classifier", "head_dist": "distillation_classifier"}


def layout(model_type: str, names: Any) -> Layout:
    """The table for a model; `names` are its arrays' names, or ours for one to be written."""
    if model_type.startswith("dinov2"):
        gated = any("weights_in" in name or "/gate/" in name for name in names)
        mlp = _SWIGLU if gated else _GELU
        return Layout(_BLOCK, _DINOV2 | mlp, {"mlp.weights_in": ("gate", "value")})
    if model_type == "beit":
        return Layout(_BLOCK, _VIT | _BEIT)
    if model_type == "deit":
        heads = any(re.match(r"distillation_classifier|head_dist/", name) for name in names)
        return Layout(_BLOCK, _VIT | _DEIT | (_DEIT_HEADS if heads else {}))
    return Layout(_BLOCK, _VIT)


_MODULES = {  # of transformers 5 -> of files
    r"^(?:encoder\.)?layers?\.(\d+)\.": r"encoder.layer.\1.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"^shared_position_bias\.": "encoder.relative_position_bias.",
    r"(\d)\.relative_position_bias\.": r"\1.attention.attention.relative_position_bias.",
    r"\.mlp\.gate_proj\.": ".mlp.weights_in[gate].",
    r"\.mlp\.up_proj\.": ".mlp.weights_in[value].",
    r"\.mlp\.down_proj\.": ".mlp.weights_out.",
}
_VIT_MODULES = {r"\.mlp\.fc1\.": ".intermediate.dense.", r"\.mlp\.fc2\.": ".output.dense."}


def canonical(name: str, prefix: str, dinov2: bool) -> str:
    """The name of files, without the prefix that a model with a head gives its encoder."""
    inside = name.startswith(prefix)
    new = name.removeprefix(prefix)
    if not inside and new.startswith("layernorm."):
        return f"outside.{new}"
    if new.startswith("decoder."):
        return new
    for pattern, replacement in (_MODULES if dinov2 else _MODULES | _VIT_MODULES).items():
        new = re.sub(pattern, replacement, new)
    return new


def guess_type(names: Any) -> str:
    """The `model_type` of canonical names."""
    signs = {
        "embeddings.register_tokens": "dinov2_with_registers",
        "encoder.layer.0.layer_scale1.lambda1": "dinov2",
        "embeddings.distillation_token": "deit",
        "encoder.layer.0.lambda_1": "beit",
        f"encoder.layer.0.{TABLE}": "beit",
        SHARED_TABLE: "beit",
    }
    found = next((model for sign, model in signs.items() if sign in names), "vit")
    mae = any(name.startswith("decoder.decoder_") for name in names)
    return "vit_mae" if mae else found
