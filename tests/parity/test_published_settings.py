"""What published folders say about images, obeyed as transformers and timm obey it.

Pixels: tolerances are those of test_preprocessing, for the same reasons. Networks: 1e-5 of the
largest number.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.parity.networks import SIZES, assert_close, hf_model, images, ours, timm_model
from tests.parity.test_preprocessing import photos
from vit_jax.checkpoints import trained
from vit_jax.data import value_ranges
from vit_jax.data.transforms import resize
from vit_jax.data.transforms.language import parse_transform
from vit_jax.evaluation import embeddings
from vit_jax.interop import weight_files
from vit_jax.interop.load import load_weights
from vit_jax.system.errors import UserError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, on import
]
torch = pytest.importorskip("torch")


def prepared(found, photo):
    """(H, W, C) float32, as our commands prepare a photo for these weights."""
    found = trained.at_input_size(found)
    image = parse_transform(found.eval_transform, found.cfg.image_size)(photo)
    return np.asarray(value_ranges.normalize(jnp.asarray(np.asarray(image)), found.value_range))


# --- transformers -------------------------------------------------------------------------


def folder_with(path, processor, name="ViTModel", **options):
    """A folder of a tiny model for 64 x 64 pixels in patches of 8, and its processor."""
    model = hf_model(name, SIZES[0], (64, 64), **options)
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 72}}
PROCESSORS = {
    "size as a number": VIT | {"size": 64},
    "size as a list": VIT | {"size": [64, 48]},
    "rectangular": VIT | {"size": {"height": 32, "width": 80}},
    "feature extractor": {"feature_extractor_type": "ViTFeatureExtractor", "size": 64},
    "fast": VIT | {"image_processor_type": "ViTImageProcessorFast", "resample": 3},
    "null switches are off": VIT | {"do_normalize": None, "do_center_crop": None},
    "own mean and deviation": VIT
    | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.6, 0.3]},
    "one number for all": VIT | {"image_mean": 0.25, "image_std": 0.75},
    "not normalised": VIT | {"do_normalize": False},
    "not rescaled": VIT
    | {"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3},
    "neither": VIT | {"do_rescale": False, "do_normalize": False},
    "another factor": VIT | {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
    "shorter edge, crop": BIT | {"crop_size": {"height": 64, "width": 64}},
    "shorter edge as a number": BIT | {"size": 72, "crop_size": 64},
    "crop of another size": BIT | {"crop_size": {"height": 32, "width": 48}},
    "defaults of a class": {"image_processor_type": "BitImageProcessor"},
    "squashed, cropped": VIT | {"size": 80, "do_center_crop": True, "crop_size": 64},
    "rectangle, cropped": VIT
    | {"size": {"height": 80, "width": 72}, "do_center_crop": True, "crop_size": [64, 56]},
    "a crop that is filled": BIT | {"size": {"shortest_edge": 40}, "crop_size": 64},
    "a crop without a resize": BIT
    | {"do_resize": False, "crop_size": {"height": 64, "width": 64}},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": 72, "crop_size": 64},
    "beit": {"image_processor_type": "BeitImageProcessor", "size": 64},
    "lanczos": VIT | {"resample": 1},
    "settings of others": VIT | {"do_flip_channel_order": True, "num_frames": 3},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_settings_of_image_processors(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    folder_with(tmp_path, PROCESSORS[case])
    found = load_weights(tmp_path)
    assert not found.unprepared
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    _, std = value_ranges.parse(found.value_range)
    level = 1 / min(std)  # of 255, in the scale that the network sees
    for photo in photos():
        theirs = processor(photo, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        mine = prepared(found, photo)
        assert mine.shape == theirs.shape
        difference = abs(mine - theirs)
        assert difference.max() < 4.01 * level
        assert difference.mean() < 0.16 * level


def test_a_processor_within_another(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder_with(tmp_path, BIT | {"crop_size": 64})
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "x.json")
    inside = json.loads((tmp_path / "x.json").read_text())
    outside = {"processor_class": "X", "image_processor": inside}
    (tmp_path / "processor_config.json").write_text(json.dumps(outside))
    found = load_weights(tmp_path)
    assert found.eval_transform == "resize_shorter(72, method='bicubic')|center_crop"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == {"shortest_edge": 72}


@pytest.mark.parametrize("code", [0, 4, 5])
def test_pillows_other_filters(code):
    """Which torch has not: against Pillow itself."""
    for photo in photos():
        name = {0: "nearest", 4: "box", 5: "hamming"}[code]
        mine = np.asarray(resize.resize(photo, (56, 88), name), int)
        theirs = np.asarray(photo.resize((88, 56), code), int)
        assert abs(mine - theirs).max() <= (0 if code == 0 else 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor"),
        ({"size": {"shortest_edge": 64}}, "images keep their shape"),
        ({"size": {"longest_edge": 64}}, "longest_edge"),
        ({"size": {"shortest_edge": 64, "longest_edge": 80}}, "longest_edge"),
        ({"size": {"height": 60, "width": 60}}, "60 x 60"),
        ({"resample": 9}, "resample=9"),
        ({"do_resize": "yes"}, "do_resize='yes'"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.2]}, "2 numbers in image_mean for 3 channels"),
        ({"rescale_factor": 0}, "rescale_factor=0"),
        ({"image_processor_type": None, "auto_map": {"AutoImageProcessor": "a.B"}}, "its own"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_where_images_are_prepared(tmp_path, changes, reason):
    folder_with(tmp_path, VIT | changes)
    found = load_weights(tmp_path)
    assert reason in found.unprepared
    assert any(reason in note and "not prepared as published" in note for note in found.notes)
    model = trained.load_any(str(tmp_path), "last", None)
    with pytest.raises(UserError, match=re.escape(reason)):
        trained.with_preprocessing(model, None, None)
    told = trained.with_preprocessing(model, "resize", "inception")
    assert told.config.data.eval_transform == "resize"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTModel", {}),
        ("Dinov2Model", {}),
        ("Dinov2ForImageClassification", {}),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
        ("BeitForImageClassification", {"use_relative_position_bias": True}),
        ("DeiTForImageClassification", {}),
    ],
)
@pytest.mark.parametrize("crop", [(32, 32), (40, 24), (96, 96)])
def test_a_crop_of_another_size_than_the_positions(tmp_path, name, options, crop):
    """As transformers interpolates positions, with the encoder that each model has."""
    processor = BIT | {"crop_size": {"height": crop[0], "width": crop[1]}}
    theirs = folder_with(tmp_path, processor, name, **options)
    stored = load_weights(tmp_path)
    assert (stored.cfg.image_size, stored.input_size) == ((64, 64), crop)
    found = trained.at_input_size(stored)
    assert found.cfg.image_size == crop
    assert "resized from 8x8" in found.notes[-1]
    x, tensor = images(crop)
    extra = {} if "Dinov2" in name or "Beit" in name else {"interpolate_pos_encoding": True}
    expected = theirs(tensor, **extra)
    expected = expected.logits if "For" in name else expected.pooler_output
    assert_close(ours(found, x)[0], expected)


def test_the_whole_way_of_a_small_crop(tmp_path, monkeypatch):
    """From photos to vectors by `embed`'s own code, against processor and model."""
    transformers = pytest.importorskip("transformers")
    from vit_jax.distributed import sharding
    from vit_jax.evaluation import inference

    processor = BIT | {"crop_size": {"height": 32, "width": 32}, "resample": 3}
    theirs = folder_with(tmp_path, processor, "Dinov2Model")
    theirs_prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    paths = []
    for i, photo in enumerate(photos()):
        paths.append(str(tmp_path / f"{i}.png"))
        photo.save(paths[-1])
    mesh = sharding.make_mesh()
    model = trained.load_any(str(tmp_path), "last", mesh)
    rows = list(inference.apply_to_images(model, embeddings.normalised, paths, 8, mesh))
    pixels = theirs_prepare(photos(), return_tensors="pt")["pixel_values"]
    expected = theirs(pixels).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1).detach().numpy()
    assert np.abs(np.stack(rows) - expected).max() < 0.02  # of pixels that round otherwise


# --- config.json --------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize("form", [[16, 64], {"height": 16, "width": 64}])
def test_rectangles_in_config_json(tmp_path, form):
    theirs = hf_model("ViTModel", SIZES[0], (16, 64))
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, image_size=form)
    found = load_weights(tmp_path)
    assert found.cfg.grid == (2, 8)  # which is as many patches as 4 x 4
    x, tensor = images((16, 64))
    assert_close(ours(found, x)[0], theirs(tensor).pooler_output)


def test_problem_types(tmp_path):
    labels = {0: "a", 1: "b", 2: "c", 3: "d"}
    theirs = hf_model("ViTForImageClassification", SIZES[0], (32, 32), id2label=labels)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, problem_type="multi_label_classification")
    found = load_weights(tmp_path)
    assert found.multi_label
    assert trained.from_imported(found, None).config.objective.loss == "sigmoid"
    edit(tmp_path, problem_type="regression")
    with pytest.raises(UserError, match="problem_type 'regression'"):
        load_weights(tmp_path)
    edit(tmp_path, problem_type=..., num_labels=7)
    assert any("num_labels for 7 classes" in note for note in load_weights(tmp_path).notes)
    edit(tmp_path, num_labels=..., id2label={"0": "a", "1": "b"})
    found = load_weights(tmp_path)
    assert found.class_names is None
    assert any("id2label for 2 classes" in note for note in found.notes)
    edit(tmp_path, id2label=..., label2id={"w": 0, "x": 1, "y": 2, "z": 3})
    assert load_weights(tmp_path).class_names == ("w", "x", "y", "z")


# --- timm ---------------------------------------------------------------------------------


def timm_folder(path, image_size, cfg, args=None, **options):
    theirs = timm_model(SIZES[0], image_size, **options)
    state = {name: x.contiguous().numpy() for name, x in theirs.state_dict().items()}
    weight_files.write_safetensors(path / "model.safetensors", state)
    config = {"architecture": "vit_x", "num_classes": 7, "model_args": {"num_heads": 2}}
    config["model_args"] |= {"img_size": list(image_size)} | (args or {})
    (path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": cfg}))
    return theirs


TIMM = {
    "defaults": {"crop_pct": None},
    "center": {"crop_pct": 0.9, "interpolation": "bilinear"},
    "center of a rectangle": {"crop_pct": 0.8, "input_size": [3, 32, 64]},
    "squash": {"crop_mode": "squash", "crop_pct": 0.9},
    "squash, whole": {"crop_mode": "squash", "crop_pct": 1.0},
    "squash of a rectangle": {
        "crop_mode": "squash",
        "crop_pct": 0.8,
        "input_size": [3, 64, 32],
    },
    "border": {"crop_mode": "border", "crop_pct": 1.0},
    "border of a rectangle": {
        "crop_mode": "border",
        "crop_pct": 0.9,
        "input_size": [3, 64, 32],
    },
    "larger than the image": {"crop_pct": 1.25},
    "mean and deviation": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
    "lanczos": {"interpolation": "lanczos"},
    "box": {"interpolation": "box", "crop_pct": 1.0},
    "nearest": {"interpolation": "nearest"},
    "hamming": {"interpolation": "hamming"},
}


@pytest.mark.parametrize("case", TIMM)
def test_settings_of_timm(tmp_path, case, monkeypatch):
    library = pytest.importorskip("timm")
    monkeypatch.setattr(resize, "cykooz_resizer", None)  # timm resizes with Pillow
    cfg = {"input_size": [3, 48, 48], "fixed_input_size": False} | TIMM[case]
    timm_folder(tmp_path, (48, 48), cfg)
    found = load_weights(tmp_path)
    assert not found.unprepared
    given = {name: value for name, value in cfg.items() if value is not None}
    data = library.data.resolve_data_config(pretrained_cfg=given)
    theirs = library.data.create_transform(**data, is_training=False)
    for photo in photos():
        expected = theirs(photo).numpy().transpose(1, 2, 0)
        mine = prepared(found, photo)
        np.testing.assert_allclose(mine, expected, atol=2e-6)


def test_grey_photos_with_a_border(tmp_path, monkeypatch):
    library = pytest.importorskip("timm")
    monkeypatch.setattr(resize, "cykooz_resizer", None)
    cfg = {"input_size": [1, 32, 32], "crop_mode": "border", "mean": [0.3], "std": [0.2]}
    timm_folder(tmp_path, (32, 32), cfg, in_chans=1)
    found = load_weights(tmp_path)
    assert found.value_range == "mean=0.3 std=0.2"
    theirs = library.data.create_transform(
        **library.data.resolve_data_config(pretrained_cfg=cfg), is_training=False
    )
    photo = photos()[0].convert("L")
    mine = prepared(found, photo).reshape(32, 32)
    np.testing.assert_allclose(mine, theirs(photo).numpy()[0], atol=2e-6)


@pytest.mark.parametrize(
    ("cfg", "reason"),
    [
        ({"interpolation": "random"}, "interpolation='random'"),
        ({"crop_mode": "spiral"}, "crop_mode='spiral'"),
        ({"crop_pct": 0}, "crop_pct=0"),
        ({"std": [0.1, 0.0, 0.1]}, "std="),
        ({"mean": "grey"}, "mean='grey'"),
        ({"input_size": [3, 50, 50]}, "50 x 50"),
        ({"crop_border_pixels": 4, "crop_pct": 1.0}, "crop_border_pixels=4"),
    ],
)
def test_what_of_timm_cannot_be_obeyed(tmp_path, cfg, reason):
    timm_folder(tmp_path, (48, 48), cfg)
    assert reason in load_weights(tmp_path).unprepared


def test_a_timm_rectangle_is_one(tmp_path):
    """8 x 2 patches are as many as 4 x 4; `config.json` says which."""
    cfg = {"input_size": [3, 64, 16], "fixed_input_size": True, "crop_pct": 1.0}
    theirs = timm_folder(tmp_path, (64, 16), cfg)
    x, tensor = images((64, 16))
    for args in ({}, {"img_size": None}):
        edit(tmp_path, model_args={"num_heads": 2, "img_size": [64, 16]} | args)
        found = load_weights(tmp_path)
        assert (found.cfg.grid, found.notes) == ((8, 2), ())
        assert_close(ours(found, x)[0], theirs(tensor))


def test_a_fixed_size_is_that_of_the_network(tmp_path):
    hub = pytest.importorskip("timm.models._hub")
    cfg = {"input_size": [3, 48, 48], "fixed_input_size": True, "crop_pct": 1.0}
    timm_folder(tmp_path, (64, 16), cfg)
    found = load_weights(tmp_path)
    theirs, _, _ = hub.load_model_config_from_path(tmp_path)
    assert theirs["input_size"] == (3, *found.cfg.image_size)
    assert (found.cfg.image_size, found.input_size) == ((64, 16), None)


def test_timm_resizes_positions_to_the_published_size(tmp_path):
    """`dynamic_img_size`: positions for 48 pixels, images of 32 x 64."""
    cfg = {"input_size": [3, 32, 64], "fixed_input_size": False, "crop_pct": 1.0}
    args = {"dynamic_img_size": True}
    theirs = timm_folder(tmp_path, (48, 48), cfg, args, **args)
    found = trained.at_input_size(load_weights(tmp_path))
    assert found.cfg.image_size == (32, 64)
    x, tensor = images((32, 64))
    assert_close(ours(found, x)[0], theirs(tensor))


def test_transformers_wrapper_around_timm(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = {"input_size": [3, 32, 64], "mean": [0.1, 0.2, 0.3], "fixed_input_size": True}
    theirs = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(
            architecture="vit_tiny_patch16_224",
            model_args={"img_size": (32, 64), "depth": 2},
            pretrained_cfg=cfg | {"num_classes": 3},
            id2label={0: "a", 1: "b", 2: "c"},
            problem_type="multi_label_classification",
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    found = load_weights(tmp_path)
    assert (found.cfg.grid, found.class_names) == ((2, 4), ("a", "b", "c"))
    assert found.multi_label
    x, tensor = images((32, 64))
    assert_close(ours(found, x)[0], theirs(tensor).logits)


def test_an_image_is_prepared_for_the_size_that_it_is_cropped_to():
    picture = Image.fromarray(np.zeros((30, 20, 3), np.uint8))
    crop = parse_transform("resize_shorter(10, 'bicubic')|center_crop(fill=0)", (16, 8))
    assert crop(picture).size == (8, 16)
    assert jax.device_count() > 0
