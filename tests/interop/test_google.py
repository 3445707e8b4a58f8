"""Google's files in every generation, into our parameters and back."""

import ml_dtypes
import numpy as np
import pytest

from tests.interop.tiny_models import model, same
from vit_jax.interop import google, weight_files
from vit_jax.interop.families import flatten, nest
from vit_jax.interop.load import load_weights
from vit_jax.models import vit
from vit_jax.models.registry import variant_name
from vit_jax.system.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"representation_size": 12},
        {"num_classes": 0},
        {"pool": "gap"},
        {"pool": "map", "patch_size": 4},
        {"width": 30, "num_heads": 5, "channels": 1},
    ],
)
def test_what_is_written_is_read_back(tmp_path, changes):
    cfg, params = model(**changes)
    assert google.write(tmp_path / "w.npz", cfg, params) == ()
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg == cfg
    assert (found.family, found.notes, found.class_names) == ("google", (), None)
    assert (found.value_range, found.eval_transform) == ("inception", "resize")
    same(found.params, params)
    google.write(tmp_path / "again.npz", found.cfg, found.params)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "w.npz").read_bytes()


def test_the_written_file_has_the_numbering_of_the_published_ones(tmp_path):
    cfg, params = model()
    google.write(tmp_path / "w.npz", cfg, params)
    with np.load(tmp_path / "w.npz", allow_pickle=False) as file:
        names = set(file)
    block = {name.split("/")[2] for name in names if "encoderblock_1/" in name}
    assert block == {
        "LayerNorm_0",
        "MultiHeadDotProductAttention_1",
        "LayerNorm_2",
        "MlpBlock_3",
    }
    assert len(names) == 2 * 16 + 8


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/"])
def test_every_prefix_and_linen_numbering(tmp_path, prefix):
    cfg, params = model()
    arrays = {prefix + name: value for name, value in flatten(params).items()}
    if prefix:
        arrays["opt/state/step"] = np.int32(3)
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz")
    assert found.cfg == cfg
    same(found.params, params)
    assert any("opt/state" in note for note in found.notes) == bool(prefix)


def test_big_visions_layers_stacked_in_bfloat16_without_a_class_position(tmp_path):
    cfg, params = model()
    arrays = flatten(vit.stack_layers(params))
    table = arrays.pop(POSITIONS)
    arrays["pos_embedding"] = table[:, 1:]
    arrays = {
        f"params/{name}": np.asarray(value, ml_dtypes.bfloat16)
        for name, value in arrays.items()
    }
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz")
    assert (found.family, found.cfg) == ("big_vision", cfg)
    rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in flatten(params).items()}
    rounded = {k: v.astype(np.float32) for k, v in rounded.items()}
    rounded[POSITIONS][:, 0] = 0
    same(found.params, nest(rounded))
    assert any("class token has no position" in note for note in found.notes)
    assert found.eval_transform == (
        "resize_shorter(36, method='area', rounding='floor')|center_crop"
    )


def test_sine_cosine_positions_have_no_array(tmp_path):
    cfg, params = model(pool="gap", posemb="sincos2d", representation_size=24)
    arrays = {f"params/{name}": value for name, value in flatten(params).items()}
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    found = load_weights(tmp_path / "w.npz", image_size=(32, 32))
    assert found.cfg == cfg
    same(found.params, params)
    assumed = load_weights(tmp_path / "w.npz")
    assert assumed.cfg.image_size == (224, 224)
    assert any("224 x 224" in note for note in assumed.notes)


@pytest.mark.parametrize("posemb", ["learned_2d", "sincos2d", "none"])
def test_other_positions_are_written_as_learned_ones_that_compute_the_same(tmp_path, posemb):
    cfg, params = model(posemb=posemb)
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert (posemb in "".join(notes)) == (posemb != "none")
    found = load_weights(tmp_path / "w.npz")
    images = np.random.default_rng(1).standard_normal((2, 32, 32, 3)).astype(np.float32)
    logits, _ = vit.build(found.cfg).apply(found.params, images)
    expected, _ = vit.build(cfg).apply(params, images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_images_that_are_not_square(tmp_path):
    cfg, params = model(image_size=(16, 40))
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert notes == ("The file cannot say that images have 16 x 40 pixels.",)
    with pytest.raises(UserError, match="10 patches, which is no square"):
        load_weights(tmp_path / "w.npz")
    with pytest.raises(UserError, match="not an image of 16 x 48"):
        load_weights(tmp_path / "w.npz", image_size=(16, 48))
    assert load_weights(tmp_path / "w.npz", image_size=(16, 40)).cfg == cfg


def test_everything_wrong_is_listed_at_once(tmp_path):
    _, params = model()
    arrays = flatten(params)
    arrays["Transformer/encoder_norm/scale"] = np.zeros(240, np.float32)
    arrays["extra"] = arrays.pop("cls")[0, 0]
    del arrays["head/bias"]
    arrays[POSITIONS] = arrays[POSITIONS][:, 1:]
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w.npz")
    message = str(error.value)
    assert "head/bias is missing" in message
    assert "extra is unknown" in message
    assert "Transformer/encoder_norm/scale has shape (240,), not (24,)" in message


def test_two_numberings_at_once_do_not_overwrite_each_other(tmp_path):
    cfg, params = model()
    google.write(tmp_path / "w.npz", cfg, params)
    arrays, _ = weight_files.read(tmp_path / "w.npz")
    arrays["Transformer/encoderblock_0/LayerNorm_1/scale"] = np.zeros(24, np.float32)
    weight_files.write_npz(tmp_path / "w.npz", arrays)
    with pytest.raises(UserError, match="twice, under two names"):
        load_weights(tmp_path / "w.npz")


@pytest.mark.parametrize("changes", [{"registers": 2}, {"layer_scale_init": 0.1}])
def test_what_the_layout_has_no_place_for_is_not_written(tmp_path, changes):
    cfg, params = model(**changes)
    with pytest.raises(UserError, match="Google's layout has no"):
        google.write(tmp_path / "w.npz", cfg, params)
    assert not list(tmp_path.iterdir())


def test_numerics_that_the_layout_cannot_say_are_reported(tmp_path):
    cfg, params = model(gelu="erf", layer_norm_eps=1e-12)
    notes = google.write(tmp_path / "w.npz", cfg, params)
    assert len(notes) == 2
    assert "GELU" in notes[0]
    assert "1e-12" in notes[1]


def test_variants_are_recognised_by_their_shape():
    assert variant_name(vit.ViTConfig((224, 224), 3, 16, 12, 768, 3072, 12, 1000)) == "B/16"
    assert variant_name(vit.ViTConfig((224, 224), 3, 16, 12, 768, 3072, 6, 1000)) is None
