"""Vision Transformers in the names of torchvision and of OpenCLIP's image towers.

Both are plain ViTs in which PyTorch's `MultiheadAttention` keeps the query, key and value of
all heads in one matrix, as timm does: their arrays are read under timm's names. Most OpenCLIP
models have a LayerNorm before the first block, which ours has not, and are refused.

https://github.com/pytorch/vision, https://github.com/mlfoundations/open_clip
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.interop.families import Arrays, axes, rename
from vit_jax.interop.torch_layout import refuse

_TORCHVISION = {
    r"^conv_proj\.": "patch_embed.proj.",
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"^encoder\.ln\.": "norm.",
    r"^heads\.pre_logits\.": "pre_logits.fc.",
    r"^heads\.head\.": "head.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(linear_1|0)\.": ".mlp.fc1.",
    r"\.mlp\.(linear_2|3)\.": ".mlp.fc2.",
}
_OPENCLIP = {
    r"^conv1\.": "patch_embed.proj.",
    r"^class_embedding$": "cls_token",
    r"^positional_embedding$": "pos_embed",
    r"^transformer\.resblocks\.(\d+)\.": r"blocks.\1.",
    r"^ln_post\.": "norm.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.attn\.in_proj_": ".attn.qkv.",
    r"\.attn\.out_proj\.": ".attn.proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
_REFUSED = {
    r"^ln_pre\.": "it has a LayerNorm before the first block (CLIP's ln_pre)",
    r"^attn_pool": "it pools by attention in another form (CoCa)",
    r"\.ls_[12]\.|ln_attn|\.mlp\.ln\.": "its blocks have scales or norms that are read nowhere",
}


def recognises(names: Iterable[str]) -> str:
    """The family that arrays of these names are of, "" for none."""
    names = set(names)
    if {"conv_proj.weight", "encoder.pos_embedding"} <= names:
        return "torchvision"
    return "openclip" if {"conv1.weight", "class_embedding"} <= names else ""


def to_timm(state: Arrays, family: str, source: Path, notes: list[str]) -> Arrays:
    """The state dict of the same network in timm.

    Raises:
      UserError: it has something that our model has not, or arrays are misshapen.
    """
    clip = family == "openclip"
    refuse(
        state,
        _REFUSED if clip else {r"conv_proj\.\d": "patches come from convolutions"},
        source,
    )
    table = _OPENCLIP if clip else _TORCHVISION

    def theirs(name: str) -> str:
        for old, new in table.items():
            name = re.sub(old, new, name)
        return name

    new = rename(state, theirs, source)
    return _of_clip(new, source, notes) if clip else new


def _of_clip(state: Arrays, source: Path, notes: list[str]) -> Arrays:
    """What CLIP stores without a bias or an axis, and its projection as a head."""
    width = axes(state, "patch_embed.proj.weight", 4, source)[0]
    if "patch_embed.proj.bias" not in state:
        state["patch_embed.proj.bias"] = np.zeros(width, np.float32)
    for name, rank in (("cls_token", 1), ("pos_embed", 2)):
        axes(state, name, rank, source)
        state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    if "proj" in state:
        outputs = axes(state, "proj", 2, source)[1]
        state["head.weight"] = state.pop("proj").T
        state["head.bias"] = np.zeros(outputs, np.float32)
        notes.append("The head gives an embedding shared with text, not scores of classes.")
    notes.append(
        "The exact GELU assumed; some CLIP models have the quick one, x sigmoid(1.702 x)."
    )
    return state
