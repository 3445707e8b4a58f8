"""timm's state dicts and those of papers, without timm: names, shapes, refusals."""

import dataclasses
import json

import numpy as np
import pytest

from tests.interop.tiny_models import model, same
from vit_jax.interop import timm, weight_files
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError


def save(path, cfg, params, **changes):
    """Writes the state dict with arrays added, replaced or (None) taken out."""
    state = timm.state_dict(cfg, params) | changes
    state = {name: value for name, value in state.items() if value is not None}
    weight_files.write_safetensors(path, state)
    return path


BEIT = {
    "relative": "bias",
    "key_bias": False,
    "pool": "gap",
    "class_token": True,
    "final_norm": "pooled",
    "layer_scale_init": 1e-5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 0},
        {"layer_scale_init": 1e-5},
        {"pool": "gap"},
        {"pool": "map"},
        {"width": 30, "num_heads": 5, "channels": 1},
        {"image_size": (16, 40)},
        {"pool": "gap", "class_token": True},
        {"pool": "gap", "class_token": True, "final_norm": "pooled"},
        {"pool": "map", "class_token": True},
        {"pool": "gap", "registers": 2},
        {"mlp": "swiglu"},
        {"distillation": "heads"},
        {"distillation": "token"},
        BEIT,
        BEIT | {"posemb": "none", "image_size": (16, 40), "layer_scale_init": None},
    ],
)
def test_what_is_written_is_read_back(tmp_path, changes):
    cfg, params = model(gelu="erf", **changes)
    notes = timm.write(tmp_path / "w", cfg, params)
    assert any(f"num_heads={cfg.num_heads}" in note for note in notes)
    found = load_weights(tmp_path / "w", cfg.image_size, cfg.num_heads)
    assert found.cfg == cfg
    same(found.params, params)


def test_registers_take_the_class_position_into_the_class_token(tmp_path):
    cfg, params = model(gelu="erf", registers=2, layer_scale_init=1e-5)
    timm.write(tmp_path / "w", cfg, params)
    found = load_weights(tmp_path / "w", num_heads=3)
    assert found.cfg == cfg
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(found.params["cls"], params["cls"] + table[:, :1])
    again = timm.state_dict(found.cfg, found.params, class_row=False)
    state, _ = weight_files.read(tmp_path / "w")
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)


def test_the_names_are_timms():
    cfg, params = model(num_classes=5)
    state = timm.state_dict(cfg, params)
    assert state["blocks.1.attn.qkv.weight"].shape == (72, 24)
    assert state["patch_embed.proj.weight"].shape == (24, 3, 8, 8)
    assert len(state) == 2 * 12 + 8


def test_deit_3_has_no_class_position_and_its_own_name_for_layer_scale(tmp_path):
    cfg, params = model(gelu="erf", layer_scale_init=1e-5)
    params["Transformer"]["posembed_input"]["pos_embedding"][:, 0] = 0
    state = timm.state_dict(cfg, params, class_row=False)
    for i in (1, 2):
        for b in (0, 1):
            state[f"blocks.{b}.gamma_{i}"] = state.pop(f"blocks.{b}.ls{i}.gamma")
    weight_files.write_safetensors(tmp_path / "w", state)
    found = load_weights(tmp_path / "w", num_heads=3)
    assert (found.family, found.cfg, found.value_range) == ("deit", cfg, "imagenet")
    same(found.params, params)


def test_mae_leaves_its_decoder_behind(tmp_path):
    cfg, params = model(gelu="erf", num_classes=0)
    decoder = {"mask_token": np.ones((1, 1, 4)), "decoder_embed.weight": np.ones((4, 24))}
    found = load_weights(save(tmp_path / "w", cfg, params, **decoder), num_heads=3)
    assert (found.family, found.cfg) == ("mae", cfg)
    assert "decoder" in found.notes[0]
    same(found.params, params)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone.", "model."])
def test_prefixes(tmp_path, prefix):
    cfg, params = model(gelu="erf")
    state = {prefix + name: x for name, x in timm.state_dict(cfg, params).items()}
    weight_files.write_safetensors(tmp_path / "w", state | {"other": np.ones(3)})
    found = load_weights(tmp_path / "w", num_heads=3)
    assert found.cfg == cfg
    assert found.family == ("dino" if "backbone" in prefix else "timm")
    assert any("Left out: 1 arrays" in note for note in found.notes)
    same(found.params, params)


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks.0.attn.relative_position_bias_table": ONE}, "1.attn.relative_.* is missing"),
        ({"blocks.0.attn.relative_position_bias_table": np.ones((9, 3))}, "9 x|unknown|shape"),
        ({"rel_pos_bias.relative_position_bias_table": np.ones((52, 4))}, r"\(52, 4\), not"),
        ({"blocks.0.attn.q_bias": np.ones(24)}, "has query of .* twice"),
        ({"dist_token": ONE, "head_dist.weight": ONE}, "not an image|rows|no square"),
        ({"blocks.0.mlp.w12.weight": ONE}, "array 'blocks.0.mlp.w12.weight' twice"),
        ({"blocks.0.mlp.fc2.weight": np.ones((24, 20), np.float32)}, "fc1.* is unknown|shape"),
        ({"fc_norm.weight": np.ones(24), "norm.weight": None}, "fc_norm.bias is missing"),
        ({"blocks.0.mlp.fc1_g.weight": ONE}, "EVA"),
        ({"norm_pre.weight": ONE}, "before the first block"),
        ({"blocks.0.attn.q_norm.weight": ONE}, "normalises queries"),
        ({"attn_pool.latent": np.ones((1, 1, 24))}, "attn_pool.q.weight is missing"),
        ({"something.new": ONE}, "something.new is unknown"),
        ({"blocks.0.attn.qkv.bias": None}, r"blocks.0.attn.qkv\[key\].bias is missing"),
        ({"blocks.1.attn.qkv.bias": None}, r"blocks.1.attn.qkv\[key\].bias is missing"),
        ({"blocks.0.attn.qkv.bias": np.ones(71)}, "blocks.0.attn.qkv.bias is unknown"),
        ({"pos_embed": None}, "no array 'blocks.0.attn.relative_position_bias_table'"),
        (
            {"reg_token": np.ones((1, 3, 7)), "pos_embed": np.ones((1, 20, 24))},
            r"reg_token has shape \(1, 3, 7\), not \(1, 3, 24\)",
        ),
        (
            {"head.weight": np.ones((5, 240))},
            r"head.weight has shape \(5, 240\), not \(5, 24\)",
        ),
        ({"blocks.7.norm1.weight": np.ones(24)}, "blocks.7.norm1.weight is unknown"),
    ],
)
def test_what_our_model_cannot_hold_is_refused_with_the_reason(tmp_path, changes, reason):
    cfg, params = model(gelu="erf")
    path = save(tmp_path / "w", cfg, params, **changes)
    with pytest.raises(UserError, match=reason) as error:
        load_weights(path, num_heads=3)
    assert str(path) in str(error.value)


def test_heads_are_inferred_from_the_width_or_asked_for(tmp_path):
    cfg, params = model(gelu="erf", width=128, num_heads=2)
    found = load_weights(save(tmp_path / "a", cfg, params))
    assert found.cfg == cfg
    assert any("number of heads: 2" in note for note in found.notes)
    cfg, params = model(gelu="erf")
    with pytest.raises(UserError, match="does not say the number of heads"):
        load_weights(save(tmp_path / "b", cfg, params))
    with pytest.raises(UserError, match="7 heads"):
        load_weights(tmp_path / "b", num_heads=7)


def test_a_known_shape_gives_its_heads(tmp_path):
    cfg, params = model(gelu="erf", depth=1, width=32, mlp_dim=128, num_heads=2)  # mu
    assert load_weights(save(tmp_path / "w", cfg, params)).cfg == cfg


@pytest.mark.parametrize(
    "changes",
    [
        {"representation_size": 8},
        {"pool": "cls_gap"},
        {"key_bias": False},
        {"relative": "bias"},
        {"posemb_at": "shared"},
    ],
)
def test_what_timm_has_no_place_for_is_not_written(tmp_path, changes):
    cfg, params = model(**changes)
    with pytest.raises(UserError, match=r"cannot (write|be written)"):
        timm.write(tmp_path / "w", cfg, params)


def test_parameters_of_another_model_are_not_written(tmp_path):
    cfg, params = model()
    with pytest.raises(UserError, match="head/bias has shape"):
        timm.write(tmp_path / "w", dataclasses.replace(cfg, num_classes=6), params)


def test_a_pooling_of_no_kind_is_refused(tmp_path):
    cfg, params = model()
    timm.write(tmp_path / "model.safetensors", cfg, params)
    config = {"architecture": "vit", "model_args": {"global_pool": ["token"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"pools by \['token'\]"):
        load_weights(tmp_path)
