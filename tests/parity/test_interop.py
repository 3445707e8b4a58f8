"""Models of timm and Hugging Face, saved to disk, read by us: the same numbers come out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.parity.networks import (
    SIZES,
    assert_close,
    compute,
    hf_model,
    images,
    ours,
    timm_model,
)
from vit_jax.data.transforms.language import normalize, parse_transform
from vit_jax.interop import google, huggingface, timm
from vit_jax.interop.families import expected_shapes, nest
from vit_jax.interop.load import load_weights
from vit_jax.models import vit
from vit_jax.models.resize_positions import resize_params

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, on import
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),  # of timm's BEiT
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]
torch = pytest.importorskip("torch")

# Square with a round width, oblong with an odd one.
CASES = pytest.mark.parametrize(
    ("shape", "image_size"), [(SIZES[0], (32, 32)), (SIZES[1], (16, 40))]
)


def assert_same_state(module, arrays):
    expected = {name: value.numpy() for name, value in module.state_dict().items()}
    assert arrays.keys() == expected.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


def assert_same_files(a, b):
    load = pytest.importorskip("safetensors.numpy").load_file
    a, b = load(a / "model.safetensors"), load(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- timm ----------------------------------------------------------------------------------


TIMM = {
    "vit": {},
    "headless": {"num_classes": 0},
    "deit3": {"no_embed_class": True, "init_values": 0.1},
    "dinov2_reg": {
        "num_classes": 0,
        "init_values": 0.1,
        "reg_tokens": 3,
        "no_embed_class": True,
    },
    "registers_with_positions": {"reg_tokens": 3},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "siglip": {"class_token": False, "global_pool": "map"},
    "map_with_class_token": {"global_pool": "map"},
    "mae_finetuned": {"global_pool": "avg"},
    "gap_registers": {
        "class_token": False,
        "reg_tokens": 2,
        "global_pool": "avg",
        "fc_norm": False,
        "no_embed_class": True,
    },
    "deit_distilled": {},
    "dinov2_giant": {"num_classes": 0, "init_values": 0.1, "mlp_ratio": 3, "swiglu": True},
    "beit": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
    "beit_pretrained": {"use_shared_rel_pos_bias": True, "global_pool": "token"},
    "beit_absolute": {"global_pool": "token", "num_classes": 0},
}


@CASES
@pytest.mark.parametrize("kind", TIMM)
def test_timm_models(tmp_path, kind, shape, image_size):
    theirs = timm_model(shape, image_size, kind, **TIMM[kind])
    torch.save({"model": theirs.state_dict()}, tmp_path / "checkpoint")
    found = load_weights(tmp_path / "checkpoint", image_size, shape["heads"])
    x, tensor = images(image_size)
    logits, out = ours(found, x)
    assert_close(logits, theirs(tensor))
    assert_close(out["encoded"], theirs.forward_features(tensor))
    if kind not in ("registers_with_positions", "beit_pretrained"):
        row = kind not in ("deit3", "dinov2_reg", "gap_registers")
        assert_same_state(theirs, timm.state_dict(found.cfg, found.params, class_row=row))


def test_dinos_backbone_out_of_a_training_checkpoint(tmp_path):
    theirs = timm_model(SIZES[0], (32, 32), num_classes=0)
    state = {f"module.backbone.{name}": x for name, x in theirs.state_dict().items()}
    state["module.head.mlp.0.weight"] = torch.zeros(3, 3)
    student = {name: torch.zeros_like(x) for name, x in state.items()}
    torch.save({"student": student, "teacher": state, "epoch": 3}, tmp_path / "c.pth")
    found = load_weights(tmp_path / "c.pth", num_heads=2)
    x, tensor = images((32, 32))
    assert found.family == "dino"
    assert any("projection head" in note for note in found.notes)
    assert_close(ours(found, x)[0], theirs(tensor))


@pytest.mark.parametrize("shape", SIZES)
def test_dinov2_as_its_authors_store_it(tmp_path, shape):
    """A class position, registers without, and a mask token."""
    theirs = timm_model(shape, (32, 32), num_classes=0, init_values=0.1, reg_tokens=3)
    state = theirs.state_dict()
    # timm's model with rows for the registers, which are zero, computes the same.
    theirs.pos_embed.data[:, 1:4] = 0
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 4:]], 1)
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, shape["width"])
    torch.save(dict(state), tmp_path / "dinov2.pth")
    found = load_weights(tmp_path / "dinov2.pth", num_heads=shape["heads"])
    assert (found.family, found.posemb_resize) == ("dinov2", "bicubic_antialias")
    assert any("mask_token" in note for note in found.notes)
    x, tensor = images((32, 32))
    assert_close(ours(found, x)[0], theirs(tensor))


@pytest.mark.parametrize("kind", ["vit", "gap", "siglip"])
@pytest.mark.parametrize("shape", SIZES)
def test_timm_reads_googles_layout_as_we_write_it(tmp_path, shape, kind):
    options = TIMM[kind] | {"act_layer": "gelu_tanh"}
    theirs = timm_model(shape, (32, 32), **options)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    found = load_weights(tmp_path / "timm.pth", num_heads=shape["heads"])
    cfg = dataclasses.replace(found.cfg, gelu="tanh")
    google.write(tmp_path / "google.npz", cfg, found.params)
    again = timm_model(shape, (32, 32), **options)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_pretrained(str(tmp_path / "google.npz"))
    x, tensor = images((32, 32))
    assert_close(compute(cfg, found.params, x)[0], again(tensor))


# ---- Hugging Face --------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_hugging_faces_classifier_and_back(tmp_path, shape, image_size, act):
    labels = {i: f"class {i}" for i in range(4)}
    theirs = hf_model(
        "ViTForImageClassification", shape, image_size, hidden_act=act, id2label=labels
    )
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_weights(tmp_path / "theirs")
    assert found.class_names == tuple(labels.values())
    assert found.cfg.layer_norm_eps == 1e-12
    x, tensor = images(image_size)
    assert_close(ours(found, x)[0], theirs(tensor).logits)
    huggingface.write(tmp_path / "ours", found.cfg, found.params, found.class_names)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@CASES
def test_hugging_faces_pooler_is_our_representation(tmp_path, shape, image_size):
    theirs = hf_model("ViTModel", shape, image_size)
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_weights(tmp_path / "theirs")
    x, tensor = images(image_size)
    expected, (logits, out) = theirs(tensor), ours(found, x)
    assert_close(logits, expected.pooler_output)
    assert_close(out["encoded"], expected.last_hidden_state)
    huggingface.write(tmp_path / "ours", found.cfg, found.params)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_hugging_faces_dinov2(tmp_path, name, shape):
    theirs = hf_model(name, shape, (32, 32))  # these allow squares only
    theirs.save_pretrained(tmp_path)
    found = load_weights(tmp_path)
    assert (found.family, found.cfg.layer_norm_eps) == ("dinov2", 1e-6)
    x, tensor = images((32, 32))
    expected, (features, out) = theirs(tensor), ours(found, x)
    assert_close(out["encoded"], expected.last_hidden_state)
    assert_close(features, expected.pooler_output)


HUGGING_FACE = {
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", {}),
    "deit_one_head": ("DeiTForImageClassification", {}),
    "deit_pooler": ("DeiTModel", {}),
    "beit": ("BeitForImageClassification", {"use_relative_position_bias": True}),
    "beit_class_token": (
        "BeitForImageClassification",
        {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
    ),
    "beit_headless": ("BeitModel", {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", {}),
    "dinov2_giant": ("Dinov2ForImageClassification", {"use_swiglu_ffn": True}),
    "dinov2_giant_headless": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "dinov2_registers": (
        "Dinov2WithRegistersForImageClassification",
        {"num_register_tokens": 3},
    ),
}


@CASES
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_faces_other_models_and_back(tmp_path, kind, shape, image_size):
    transformers = pytest.importorskip("transformers")
    name, options = HUGGING_FACE[kind]
    if "deit" not in kind:
        # DINOv2 and BEiT's absolute positions take squares only there, and the table of
        # BEiT's relative ones is reshaped to (columns, rows), which only squares survive.
        image_size = (32, 32)
    labels = {i: f"class {i}" for i in range(4)}
    theirs = hf_model(name, shape, image_size, id2label=labels, **options)
    if "dinov2" in kind:
        theirs.base_model.embeddings.mask_token.data.zero_()  # pre-training only, we drop it
    theirs.save_pretrained(tmp_path / "theirs")
    found = load_weights(tmp_path / "theirs")
    assert found.cfg.image_size == image_size
    x, tensor = images(image_size)
    expected = theirs(tensor)
    expected = expected.logits if found.cfg.num_classes else expected.pooler_output
    assert_close(ours(found, x)[0], expected)
    huggingface.write(tmp_path / "ours", found.cfg, found.params, found.class_names)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()(tensor)
    again = again.logits if found.cfg.num_classes else again.pooler_output
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert load_weights(tmp_path / "ours").cfg == found.cfg
    # The names of the modules of transformers 5, and no configuration beside the file.
    torch.save(theirs.state_dict(), tmp_path / "state.bin")
    bare = load_weights(tmp_path / "state.bin", image_size, shape["heads"])
    assert_close(ours(bare, x)[0], expected)


def test_beits_pretraining_shares_one_table(tmp_path):
    theirs = hf_model(
        "BeitForMaskedImageModeling",
        SIZES[0],
        (32, 32),
        use_shared_relative_position_bias=True,
        use_mask_token=True,
        use_mean_pooling=False,
        vocab_size=8,
    )
    theirs.save_pretrained(tmp_path)
    found = load_weights(tmp_path)
    assert any("copied to each" in note for note in found.notes)
    x, tensor = images((32, 32))
    expected = theirs.beit(tensor).last_hidden_state
    assert_close(ours(found, x)[1]["encoded"], expected)


def resized(found, size, method=None):
    """`found` for images of another size, positions as its own code resizes them."""
    cfg = dataclasses.replace(found.cfg, image_size=size)
    params = resize_params(found.params, found.cfg, cfg, method or found.posemb_resize)
    return dataclasses.replace(found, cfg=cfg, params=params)


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (16, 16)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTForImageClassification", {}),
        ("DeiTForImageClassificationWithTeacher", {}),
        ("BeitForImageClassification", {"use_relative_position_bias": True}),
        ("Dinov2ForImageClassification", {}),
        ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 3}),
    ],
)
def test_resized_as_hugging_face_resizes(tmp_path, name, options, size):
    theirs = hf_model(name, SIZES[1], (32, 32), **options)
    theirs.save_pretrained(tmp_path)
    found = resized(load_weights(tmp_path), size)
    x, tensor = images(size)
    extra = {} if "Dinov2" in name or "Beit" in name else {"interpolate_pos_encoding": True}
    assert_close(ours(found, x)[0], theirs(tensor, **extra).logits)


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (16, 16)])
@pytest.mark.parametrize("kind", ["vit", "deit3", "siglip", "beit", "deit_distilled"])
def test_resized_as_timm_resizes(tmp_path, kind, size):
    """timm resizes weights when they are loaded into a model of another size."""
    theirs = timm_model(SIZES[1], (32, 32), kind, **TIMM[kind])
    torch.save(theirs.state_dict(), tmp_path / "checkpoint")
    method = "geometric" if kind == "beit" else "bicubic_antialias"
    found = resized(load_weights(tmp_path / "checkpoint", None, 5), size, method)
    larger = timm_model(SIZES[1], size, kind, **TIMM[kind])
    library = pytest.importorskip("timm")
    module = library.models.beit if kind == "beit" else library.models.vision_transformer
    larger.load_state_dict(module.checkpoint_filter_fn(theirs.state_dict(), larger))
    x, tensor = images(size)
    assert_close(ours(found, x)[0], larger(tensor))


@pytest.mark.parametrize("shape", SIZES)
def test_hugging_faces_mae_encoder(tmp_path, shape):
    theirs = hf_model(
        "ViTMAEForPreTraining",
        shape,
        (32, 32),
        mask_ratio=0.0,
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=16,
    )
    theirs.save_pretrained(tmp_path)
    found = load_weights(tmp_path)
    assert found.family == "mae"
    assert found.value_range == "imagenet"
    x, tensor = images((32, 32))
    patches = (32 // shape["patch"]) ** 2
    order = torch.arange(patches, dtype=torch.float32)[None].repeat(2, 1)  # nothing shuffled
    expected = theirs.vit(tensor, noise=order).last_hidden_state
    assert_close(ours(found, x)[1]["encoded"], expected)


def test_names_of_the_modules_of_transformers_5(tmp_path):
    theirs = hf_model("ViTForImageClassification", SIZES[1], (32, 32))
    torch.save(theirs.state_dict(), tmp_path / "state.bin")
    found = load_weights(tmp_path / "state.bin", num_heads=5)
    x, tensor = images((32, 32))
    assert_close(ours(found, x)[0], theirs(tensor).logits)


@pytest.mark.parametrize(("gelu", "epsilon"), [("tanh", 1e-6), ("erf", 1e-12)])
@pytest.mark.parametrize(
    ("image_size", "transform"),
    [
        ((32, 32), "resize(method='bilinear_antialias')"),
        ((16, 40), "resize(method='bicubic')"),
        ((32, 32), "resize_shorter(36, method='bicubic')|center_crop"),
        ((32, 32), "resize(method='bicubic', size=36)|center_crop"),
    ],
)
def test_our_models_open_in_transformers(tmp_path, gelu, epsilon, image_size, transform):
    transformers = pytest.importorskip("transformers")
    cfg = vit.ViTConfig(
        image_size, 3, 4, 2, 60, 100, 5, num_classes=3, gelu=gelu, layer_norm_eps=epsilon
    )
    rng = np.random.default_rng(0)
    params = nest(
        {
            name: 0.2 * rng.standard_normal(shape).astype(np.float32)
            for name, shape in expected_shapes(cfg).items()
        }
    )
    names = ("cat", "dog", "cow")
    notes = huggingface.write(tmp_path, cfg, params, names, "imagenet", transform)
    assert notes == ()
    theirs, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(names))
    x, tensor = images(image_size)
    logits, _ = compute(cfg, params, x)
    assert_close(logits, theirs.eval()(tensor).logits)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    y, x, c = np.indices((60, 50, 3))
    picture = (127 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 7 - c)).astype(np.uint8)
    pixels = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, *image_size)
    prepared = np.asarray(parse_transform(transform, image_size)(Image.fromarray(picture)))
    expected = np.asarray(normalize(jax.numpy.asarray(prepared), "imagenet"))
    # Both round to 8 bits, but not the same way: two levels of 0.018 at most.
    np.testing.assert_allclose(pixels[0].transpose(1, 2, 0), expected, atol=0.04)

    again = load_weights(tmp_path)
    assert (again.cfg, again.class_names) == (cfg, names)
    assert (again.value_range, again.eval_transform) == ("imagenet", transform)


def test_a_timm_folder_says_what_a_bare_file_cannot(tmp_path):
    theirs = timm_model(SIZES[0], (32, 32), act_layer="gelu_tanh")
    library = pytest.importorskip("safetensors.torch")
    library.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny",
        "num_classes": 7,
        "global_pool": "token",
        "model_args": {"num_heads": 2, "act_layer": "gelu_tanh"},
        "pretrained_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "crop_pct": 0.9,
            "interpolation": "bicubic",
        },
        "label_names": [f"class {i}" for i in range(7)],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_weights(tmp_path)
    assert (found.value_range, found.notes) == ("imagenet", ())
    assert found.eval_transform == "resize_shorter(35, method='bicubic')|center_crop('even')"
    assert found.class_names[6] == "class 6"
    x, tensor = images((32, 32))
    assert_close(ours(found, x)[0], theirs(tensor))
