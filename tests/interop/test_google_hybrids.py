"""Google's hybrids and Mixers, and our ResNets, into our parameters and back."""

import re

import numpy as np
import pytest

from tests.interop.test_hostile import attempt, shuffled
from tests.interop.tiny_models import model, same
from vit_jax.interop import google, weight_files
from vit_jax.interop.families import expected_shapes, flatten, nest
from vit_jax.interop.load import load_weights
from vit_jax.models.mixer import MixerConfig
from vit_jax.models.model import count_parameters
from vit_jax.models.registry import variant_name
from vit_jax.models.resnet import ResNetConfig
from vit_jax.system.errors import UserError

TINY_MIXER = {
    "image_size": (32, 32),
    "channels": 3,
    "patch_size": 8,
    "depth": 2,
    "width": 24,
    "tokens_mlp_dim": 10,
    "mlp_dim": 40,
    "num_classes": 5,
}
TINY_RESNET = {
    "image_size": (224, 224),
    "channels": 3,
    "resnet": (2, 1),
    "resnet_width": 1,
    "num_classes": 5,
}


def random(shapes):
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


def mixer(**changes):
    cfg = MixerConfig(**TINY_MIXER | changes)
    return cfg, nest(random(expected_shapes(cfg)))


def resnet(**changes):
    cfg = ResNetConfig(**TINY_RESNET | changes)
    return cfg, nest(random(expected_shapes(cfg)))


def hybrid(**changes):
    return model(**{"resnet": (2, 1)} | changes)


def written(path, cfg, params):
    """The arrays of the file that `google.write` makes of a model."""
    google.write(path, cfg, params)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


# ---- all three -----------------------------------------------------------------------------

MODELS = {
    "hybrid": (hybrid, {}),
    "root alone": (hybrid, {"resnet": ()}),
    "cells of 2 x 2": (hybrid, {"resnet": (1, 2), "patch_size": 16, "image_size": (64, 64)}),
    "three stages": (hybrid, {"resnet": (1, 2, 1), "patch_size": 16}),
    "pre_logits": (hybrid, {"resnet": (1,), "representation_size": 12}),
    "no head, gap": (hybrid, {"resnet": (1,), "num_classes": 0, "pool": "gap"}),
    "one channel": (hybrid, {"resnet": (1,), "channels": 1}),
    "Mixer": (mixer, {}),
    "Mixer, no head": (mixer, {"num_classes": 0, "channels": 1, "depth": 1}),
    "ResNet": (resnet, {}),
    "ResNet, wide": (resnet, {"resnet": (1,), "resnet_width": 3, "channels": 1}),
    "ResNet, no head": (resnet, {"resnet": (1,), "num_classes": 0}),
    "ResNet, root alone": (resnet, {"resnet": ()}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(tmp_path, name):
    build, changes = MODELS[name]
    cfg, params = build(**changes)
    assert google.write(tmp_path / "w.npz", cfg, params) == ()
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg == cfg
    assert (found.family, found.class_names, found.value_range, found.eval_transform) == (
        "google",
        None,
        "inception",
        "resize",
    )
    same(found.params, params)
    google.write(tmp_path / "again.npz", found.cfg, found.params)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "w.npz").read_bytes()


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
@pytest.mark.parametrize("build", [hybrid, mixer, resnet])
def test_every_prefix_with_linens_names(tmp_path, build, prefix):
    cfg, params = build()
    arrays = {prefix + name: value for name, value in flatten(params).items()}
    if prefix:
        arrays["opt/state/step"] = np.int32(3)
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg == cfg
    assert found.family == ("big_vision" if prefix == "params/" else "google")
    same(found.params, params)
    assert any("opt/state" in note for note in found.notes) == bool(prefix)


@pytest.mark.parametrize("build", [hybrid, mixer, resnet])
def test_everything_wrong_is_listed_at_once(tmp_path, build):
    cfg, params = build()
    arrays = flatten(params)
    middle = sorted(name for name in arrays if re.match("block1/unit2|MixerBlock_1", name))
    missing, misshapen = middle[0], middle[-1]
    del arrays[missing]
    arrays[misshapen] = np.zeros((3, 3), np.float32)
    arrays["extra"] = np.zeros(3, np.float32)
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w.npz")
    message = str(error.value)
    assert f"{missing} is missing" in message
    assert f"{misshapen} has shape (3, 3), not {expected_shapes(cfg)[misshapen]}" in message
    assert "extra is unknown" in message


@pytest.mark.parametrize("kind", ["hybrid", "mixer", "old mixer", "resnet"])
def test_any_wrong_array_is_a_sentence(tmp_path, kind):
    build = {"hybrid": hybrid, "resnet": resnet}.get(kind, mixer)
    changes = {} if build is mixer else {"resnet": (1,)}
    cfg, params = build(depth=1, **changes) if build is not resnet else build(**changes)
    arrays = written(tmp_path / "w", cfg, params)
    if kind == "old mixer":
        arrays = older(arrays)
    rng = np.random.default_rng(0)
    for _ in range(100):
        weight_files.write_npz(tmp_path / "w", shuffled(arrays, rng))
        attempt(load_weights, tmp_path / "w")


def test_the_parameters_must_be_those_of_the_model(tmp_path):
    cfg, params = mixer()
    del params["head"]
    with pytest.raises(UserError, match="head/bias is missing"):
        google.write(tmp_path / "w.npz", cfg, params)
    assert not list(tmp_path.iterdir())


# ---- hybrids -------------------------------------------------------------------------------


def test_the_written_hybrid_has_the_names_and_shapes_of_the_published_ones(tmp_path):
    arrays = written(tmp_path / "w.npz", *hybrid(resnet=(2, 1)))
    shapes = {
        name: value.shape
        for name, value in arrays.items()
        if not name.startswith(("Transformer/", "cls", "head"))
    }
    norm = lambda name, size: {
        f"{name}/scale": (1, 1, 1, size),
        f"{name}/bias": (1, 1, 1, size),
    }
    assert shapes == {
        "conv_root/kernel": (7, 7, 3, 64),
        **norm("gn_root", 64),
        "block1/unit1/conv_proj/kernel": (1, 1, 64, 256),
        **norm("block1/unit1/gn_proj", 256),
        "block1/unit1/conv1/kernel": (1, 1, 64, 64),
        **norm("block1/unit1/gn1", 64),
        "block1/unit1/conv2/kernel": (3, 3, 64, 64),
        **norm("block1/unit1/gn2", 64),
        "block1/unit1/conv3/kernel": (1, 1, 64, 256),
        **norm("block1/unit1/gn3", 256),
        "block1/unit2/conv1/kernel": (1, 1, 256, 64),
        **norm("block1/unit2/gn1", 64),
        "block1/unit2/conv2/kernel": (3, 3, 64, 64),
        **norm("block1/unit2/gn2", 64),
        "block1/unit2/conv3/kernel": (1, 1, 64, 256),
        **norm("block1/unit2/gn3", 256),
        "block2/unit1/conv_proj/kernel": (1, 1, 256, 512),
        **norm("block2/unit1/gn_proj", 512),
        "block2/unit1/conv1/kernel": (1, 1, 256, 128),
        **norm("block2/unit1/gn1", 128),
        "block2/unit1/conv2/kernel": (3, 3, 128, 128),
        **norm("block2/unit1/gn2", 128),
        "block2/unit1/conv3/kernel": (1, 1, 128, 512),
        **norm("block2/unit1/gn3", 512),
        "embedding/kernel": (1, 1, 512, 24),
        "embedding/bias": (24,),
    }
    assert "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/out/kernel" in arrays


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("representation_size", [None, 12])
def test_hybrids_in_the_old_numbering(tmp_path, squeezed, prefix, representation_size):
    cfg, params = hybrid(representation_size=representation_size)
    arrays = written(tmp_path / "w.npz", cfg, params)
    if squeezed:
        arrays = {k: v.reshape(-1) if "/gn" in f"/{k}" else v for k, v in arrays.items()}
    weight_files.write_npz(tmp_path / "w.npz", {prefix + k: v for k, v in arrays.items()})
    found = load_weights(tmp_path / "w.npz")
    assert (found.cfg, found.notes) == (cfg, ())
    same(found.params, params)


def test_the_tiny_hybrid_of_the_release(tmp_path):
    """Its embedding cuts 8 x 8 cells out of the map of a root without blocks."""
    block = "Transformer/encoderblock_{}/"
    attention = block + "MultiHeadDotProductAttention_1/"
    every = {
        block + "LayerNorm_0/scale": (192,),
        block + "LayerNorm_0/bias": (192,),
        block + "LayerNorm_2/scale": (192,),
        block + "LayerNorm_2/bias": (192,),
        **{attention + f"{part}/kernel": (192, 3, 64) for part in ("query", "key", "value")},
        **{attention + f"{part}/bias": (3, 64) for part in ("query", "key", "value")},
        attention + "out/kernel": (3, 64, 192),
        attention + "out/bias": (192,),
        block + "MlpBlock_3/Dense_0/kernel": (192, 768),
        block + "MlpBlock_3/Dense_0/bias": (768,),
        block + "MlpBlock_3/Dense_1/kernel": (768, 192),
        block + "MlpBlock_3/Dense_1/bias": (192,),
    }
    shapes = {
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (1, 1, 1, 64),
        "gn_root/bias": (1, 1, 1, 64),
        "embedding/kernel": (8, 8, 64, 192),
        "embedding/bias": (192,),
        "cls": (1, 1, 192),
        "Transformer/posembed_input/pos_embedding": (1, 50, 192),
        **{name.format(i): shape for i in range(12) for name, shape in every.items()},
        "Transformer/encoder_norm/scale": (192,),
        "Transformer/encoder_norm/bias": (192,),
        "head/kernel": (192, 1000),
        "head/bias": (1000,),
    }
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz")
    assert variant_name(found.cfg) == "R+Ti/16"
    assert (found.cfg.image_size, found.cfg.patch_size, found.cfg.resnet) == (
        (224, 224),
        32,
        (),
    )
    assert count_parameters(found.params) == 6_337_704


def test_hybrids_for_images_that_are_not_square(tmp_path):
    cfg, params = hybrid(image_size=(16, 40))
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert notes == ("The file cannot say that images have 16 x 40 pixels.",)
    with pytest.raises(UserError, match="10 patches, which is no square"):
        load_weights(tmp_path / "w.npz")
    found = load_weights(tmp_path / "w.npz", image_size=(16, 40))
    assert found.cfg == cfg
    same(found.params, params)


def test_a_wide_resnet_in_front_is_refused_with_its_reason(tmp_path):
    _, params = hybrid(resnet=(1,))
    _, wide = resnet(resnet=(1,), resnet_width=2, num_classes=0)
    params["embedding"]["kernel"] = np.zeros((2, 2, 512, 24), np.float32)
    weight_files.write_npz(tmp_path / "w.npz", flatten(params | wide))
    with pytest.raises(UserError, match="2 times as wide as a ResNet-50"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("build", [hybrid, resnet])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv_root/kernel", (7, 7, 3, 65)),
        ("conv_root/kernel", (7, 7, 3, 63)),
        ("block2/unit1/conv3/kernel", (1, 1, 128, 513)),
        ("block9999/unit9999/conv3/kernel", (1, 1, 128, 512)),
    ],
)
def test_widths_that_no_resnet_has(tmp_path, build, name, shape):
    _, params = build()
    weight_files.write_npz(
        tmp_path / "w.npz", flatten(params) | {name: np.zeros(shape, np.float32)}
    )
    with pytest.raises(UserError, match=r"multiple of 64 after its root|no array 'block3"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("build", [hybrid, resnet])
def test_ten_thousand_stages_are_not_built(tmp_path, build):
    _, params = build(resnet=())
    claimed = {f"block{i}/unit1/gn1/bias": np.zeros(1, np.float32) for i in range(1, 9_999)}
    weight_files.write_npz(tmp_path / "w.npz", flatten(params) | claimed)
    with pytest.raises(UserError, match="no array 'block9998/unit1/conv3/kernel'"):
        load_weights(tmp_path / "w.npz")


# ---- Mixers --------------------------------------------------------------------------------


def older(arrays):
    """A Mixer's arrays in the form that came before `MixerBlock_i`."""
    out = {}
    for name, value in arrays.items():
        part = re.match(r"MixerBlock_(\d+)/(\w+)_mixing/Dense_([01])/(kernel|bias)", name)
        if part:
            i, which, dense, leaf = part.groups()
            name = f"Mixer/encoderblock_{i}/{which}_mixing_phase_0/{leaf}{int(dense) + 1}"
            value = value[None, :, None] if which == "token" else value[..., None]
        name = re.sub(r"MixerBlock_(\d+)/LayerNorm_1", r"MixerBlock_\1/LayerNorm_2", name)
        name = name.replace("MixerBlock_", "Mixer/encoderblock_")
        name = name.replace("pre_head_layer_norm", "Mixer/encoder_norm")
        out[name.replace("stem", "embedding")] = value
    return out


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_mixers_in_the_older_form(tmp_path, prefix):
    cfg, params = mixer()
    arrays = {prefix + name: x for name, x in older(flatten(params)).items()}
    for name, shape in {
        "embedding/kernel": (8, 8, 3, 24),
        "Mixer/encoderblock_1/token_mixing_phase_0/kernel1": (1, 16, 1, 10),
        "Mixer/encoderblock_1/token_mixing_phase_0/bias2": (1, 16, 1),
        "Mixer/encoderblock_1/channel_mixing_phase_0/kernel2": (40, 24, 1),
        "Mixer/encoderblock_0/LayerNorm_2/scale": (24,),
        "Mixer/encoder_norm/bias": (24,),
    }.items():
        assert arrays[prefix + name].shape[: len(shape)] == shape
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg == cfg
    same(found.params, params)


def test_the_written_mixer_has_the_names_and_shapes_of_the_paper(tmp_path):
    arrays = written(tmp_path / "w.npz", *mixer(depth=1))
    assert {name: value.shape for name, value in arrays.items()} == {
        "stem/kernel": (8, 8, 3, 24),
        "stem/bias": (24,),
        "MixerBlock_0/LayerNorm_0/scale": (24,),
        "MixerBlock_0/LayerNorm_0/bias": (24,),
        "MixerBlock_0/token_mixing/Dense_0/kernel": (16, 10),
        "MixerBlock_0/token_mixing/Dense_0/bias": (10,),
        "MixerBlock_0/token_mixing/Dense_1/kernel": (10, 16),
        "MixerBlock_0/token_mixing/Dense_1/bias": (16,),
        "MixerBlock_0/LayerNorm_1/scale": (24,),
        "MixerBlock_0/LayerNorm_1/bias": (24,),
        "MixerBlock_0/channel_mixing/Dense_0/kernel": (24, 40),
        "MixerBlock_0/channel_mixing/Dense_0/bias": (40,),
        "MixerBlock_0/channel_mixing/Dense_1/kernel": (40, 24),
        "MixerBlock_0/channel_mixing/Dense_1/bias": (24,),
        "pre_head_layer_norm/scale": (24,),
        "pre_head_layer_norm/bias": (24,),
        "head/kernel": (24, 5),
        "head/bias": (5,),
    }


def test_mixers_for_images_that_are_not_square(tmp_path):
    cfg, params = mixer(image_size=(16, 40))
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert notes == ("The file cannot say that images have 16 x 40 pixels.",)
    with pytest.raises(UserError, match="10 patches, which is no square"):
        load_weights(tmp_path / "w.npz")
    with pytest.raises(UserError, match="not an image of 16 x 48"):
        load_weights(tmp_path / "w.npz", image_size=(16, 48))
    with pytest.raises(UserError, match=r"w\.npz does not describe a model: image_size"):
        load_weights(tmp_path / "w.npz", image_size=(17, 40))
    assert load_weights(tmp_path / "w.npz", image_size=(16, 40)).cfg == cfg


def test_numerics_that_the_layout_cannot_say_of_a_mixer_are_reported(tmp_path):
    notes = google.write(tmp_path / "w.npz", *mixer(gelu="erf", layer_norm_eps=1e-12))
    assert len(notes) == 2
    assert "GELU" in notes[0]
    assert "1e-12" in notes[1]


def test_two_forms_at_once_do_not_overwrite_each_other(tmp_path):
    _, params = mixer()
    both = flatten(params) | older(flatten(params))
    weight_files.write_npz(tmp_path / "w.npz", both)
    with pytest.raises(UserError, match="twice, under two names"):
        load_weights(tmp_path / "w.npz")


# ---- ResNets -------------------------------------------------------------------------------


def test_the_image_size_of_a_resnet_is_given_or_assumed(tmp_path):
    cfg, params = resnet(image_size=(64, 37))
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert notes == ("The file cannot say that images have 64 x 37 pixels.",)
    assert load_weights(tmp_path / "w.npz", image_size=(64, 37)).cfg == cfg
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg.image_size == (224, 224)
    assert found.notes == ("The file does not say the size of images: 224 x 224 assumed.",)
