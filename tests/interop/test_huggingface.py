"""Hugging Face folders, without transformers: names, shards, preprocessing, refusals."""

import json

import numpy as np
import pytest

from tests.interop.tiny_models import model, same
from vit_jax.interop import huggingface, weight_files
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError

NAMES = ("cat", "dog", "cow", "pig", "owl")
ONE = np.ones(1, np.float32)


def export(folder, changes=None, **options):
    """Writes a model, then replaces, adds or (None) takes out arrays."""
    cfg, params = model(**options)
    names = NAMES if cfg.num_classes else None
    value_range = "imagenet" if cfg.channels == 3 else "inception"
    huggingface.write(folder, cfg, params, names, value_range, "resize(method='bicubic')")
    state, _ = weight_files.read(folder / "model.safetensors")
    state = {k: v for k, v in (state | (changes or {})).items() if v is not None}
    weight_files.write_safetensors(folder / "model.safetensors", state)
    return cfg, params


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gelu": "erf", "layer_norm_eps": 1e-12},
        {"width": 30, "num_heads": 5, "image_size": (16, 40), "channels": 1},
        {"num_classes": 0, "representation_size": 24},
    ],
)
def test_what_is_written_is_read_back(tmp_path, options):
    cfg, params = export(tmp_path, **options)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = load_weights(path)
        assert (found.cfg, found.family, found.notes) == (cfg, "huggingface", ())
        assert found.class_names == (NAMES if cfg.num_classes else None)
        assert found.eval_transform == "resize(method='bicubic')"
        same(found.params, params)


def test_a_bare_file_takes_hugging_faces_defaults(tmp_path):
    export(tmp_path, width=128, num_heads=2)
    (tmp_path / "config.json").unlink()
    found = load_weights(tmp_path / "model.safetensors")
    assert (found.cfg.num_heads, found.cfg.layer_norm_eps, found.cfg.gelu) == (2, 1e-12, "erf")
    assert found.value_range == "inception"
    assert any("number of heads" in note for note in found.notes)


def shards(folder, where=None):
    cfg, params = export(folder)
    state, _ = weight_files.read(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    placed = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(state)}
    for part in set(placed.values()):
        inside = {name: x for name, x in state.items() if placed[name] == part}
        weight_files.write_safetensors(folder / part, inside)
    index = {"weight_map": placed | (where or {})}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return cfg, params


def test_several_files_with_an_index(tmp_path):
    cfg, params = shards(tmp_path)
    found = load_weights(tmp_path)
    assert found.cfg == cfg
    same(found.params, params)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"classifier.bias": "../outside.safetensors"}, "outside the folder"),
        ({"classifier.bias": "/etc/passwd"}, "outside the folder"),
        ({"classifier.bias": "part-7.safetensors"}, "unknown to its index"),
        ({"new": "part-7.safetensors"}, "no file"),
        ({"classifier.other": "part-0.safetensors"}, "lists classifier.other"),
        ({"new": 3}, "no file"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path, where, match):
    shards(tmp_path, where)
    with pytest.raises(UserError, match=match):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vit.embeddings.distillation_token": ONE}, "distillation_token is unknown"),
        ({"vit.encoder.layer.0.lambda_1": ONE}, "lambda_1 is unknown"),
        ({"vit.encoder.layer.0.mlp.weights_in.weight": ONE}, "weights_in.weight is unknown"),
        ({"vit.encoder.layer.0.attention.attention.key.bias": None}, "key.bias is missing"),
        ({"vit.embeddings.extra": ONE}, "embeddings.extra is unknown"),
        ({"classifier.bias": np.ones(50)}, r"classifier.bias has shape \(50,\), not \(5,\)"),
    ],
)
def test_what_our_model_cannot_hold_is_refused_with_the_reason(tmp_path, changes, reason):
    export(tmp_path, changes)
    with pytest.raises(UserError, match=reason) as error:
        load_weights(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "clip_vision_model"}, "clip_vision_model"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"num_attention_heads": "three"}, "num_attention_heads is 'three'"),
        ({"num_attention_heads": 7}, "7 heads"),
        ({"num_attention_heads": 0}, "must be at least 1"),
        ({"num_attention_heads": 2.5}, "num_attention_heads is 2.5"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"image_size": 64}, "16 patches of 8 pixels, which is not an image of 64 x 64"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, changes, match):
    export(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=match):
        load_weights(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    export(tmp_path)
    for text in ("{", "[1]", "[" * 100_000, "\udcff"):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match="JSON"):
            load_weights(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({str(i): f"LABEL_{i}" for i in range(5)}, None),
        ({str(i): name for i, name in enumerate(NAMES)}, NAMES),
        ({"0": "cat"}, None),
        ({str(i): i for i in range(5)}, None),
        ("cat", None),
    ],
)
def test_labels(tmp_path, labels, expected):
    export(tmp_path)
    edit(tmp_path / "config.json", id2label=labels)
    assert load_weights(tmp_path).class_names == expected


@pytest.mark.parametrize(
    ("changes", "value_range", "transform", "noted"),
    [
        ({}, "imagenet", "resize(method='bicubic')", False),
        ({"size": 32}, "imagenet", "resize(method='bicubic')", False),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "inception", None, False),
        (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3},
            "mean=0.1,0.2,0.3 std=0.5",
            None,
            False,
        ),
        ({"image_mean": "grey"}, "inception", None, True),
        ({"resample": [3]}, "imagenet", "resize(method='bilinear_antialias')", True),
        ({"size": [1, 2]}, "imagenet", "resize(method='bilinear_antialias')", True),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True},
            "imagenet",
            "resize_shorter(40, method='bicubic')|center_crop",
            False,
        ),
        (
            {"size": {"height": 40, "width": 40}, "do_center_crop": True},
            "imagenet",
            "resize(method='bicubic', size=40)|center_crop",
            False,
        ),
    ],
)
def test_preprocessing(tmp_path, changes, value_range, transform, noted):
    export(tmp_path)
    edit(tmp_path / "preprocessor_config.json", **changes)
    found = load_weights(tmp_path)
    assert found.value_range == value_range
    assert found.eval_transform == (transform or "resize(method='bicubic')")
    assert bool(found.notes) == noted


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"pool": "gap"}, "vit has no pooling by 'gap'"),
        ({"pool": "cls_gap"}, "vit has no pooling by 'cls_gap'"),
        ({"registers": 1}, "dinov2_with_registers has no .*LayerScale|pooling by 'cls'"),
        ({"layer_scale_init": 0.1}, "dinov2 has no pooling by 'cls'"),
        ({"layer_scale_init": 0.1, "pool": "cls_gap"}, "dinov2 has no MLP of width 40"),
        ({"mlp": "swiglu", "num_classes": 0}, "dinov2 has no blocks without LayerScale"),
        ({"relative": "bias"}, "beit has no bias of keys"),
        ({"representation_size": 8}, "vit has no tanh layer"),
        ({"posemb_at": "layers"}, "posemb_at='layers'"),
        ({"relative": "keys"}, "relative='keys'"),
    ],
)
def test_what_a_hugging_face_vit_has_no_place_for_is_not_written(tmp_path, options, what):
    cfg, params = model(**options)
    with pytest.raises(UserError, match=what):
        huggingface.write(tmp_path / "folder", cfg, params)
    assert not (tmp_path / "folder").exists()


def test_what_cannot_be_said_about_images(tmp_path):
    cfg, params = model()
    for spec in ("flip", "resize_shorter(36)", "center_crop"):
        with pytest.raises(UserError, match="cannot do"):
            huggingface.write(tmp_path / "a", cfg, params, eval_transform=spec)
    with pytest.raises(UserError, match="value range 'grey'"):
        huggingface.write(tmp_path / "a", cfg, params, value_range="grey")
    with pytest.raises(UserError, match="3 channels, the model has 1"):
        huggingface.write(tmp_path / "a", *model(channels=1), value_range="imagenet")
    with pytest.raises(UserError, match="5 outputs, but 1"):
        huggingface.write(tmp_path / "a", cfg, params, ("cat",))
    notes = huggingface.write(tmp_path / "a", cfg, params, eval_transform="resize")
    assert "bilinear_antialias there" in notes[0]


@pytest.mark.parametrize(
    "size", [{"height": 2**31, "width": 32}, {"height": 8192, "width": 8192}]
)
def test_sizes_that_would_fill_the_memory_are_not_obeyed(tmp_path, size):
    export(tmp_path)
    edit(tmp_path / "preprocessor_config.json", size=size)
    found = load_weights(tmp_path)
    assert found.input_size is None
    assert "preprocessor_config.json" in found.unprepared
