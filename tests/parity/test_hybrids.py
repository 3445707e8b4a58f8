"""Hybrids and Mixers of timm: Google's `.npz` carries weights there, their own files back."""

import functools
import json

import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.interop import files, google
from vit_jax.interop.families import expected_shapes, nest
from vit_jax.interop.load import load_weights
from vit_jax.models import registry
from vit_jax.models.variants import decode_hybrid
from vit_jax.models.vit_config import ViTConfig

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, on import of timm
]
torch = pytest.importorskip("torch")


def hybrid(units, patch_size, image_size, **changes):
    """A configuration and random parameters, kernels off centre: that is taken out again."""
    tiny = {"depth": 2, "width": 64, "mlp_dim": 96, "num_heads": 4, "num_classes": 7}
    cfg = ViTConfig(image_size, 3, patch_size, resnet=units, **tiny | changes)
    rng = np.random.default_rng(0)

    def random(name, shape):
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("/scale"):
            return np.float32(1) + np.float32(0.3) * noise
        convolution = name.startswith(("conv_root", "block")) and name.endswith("/kernel")
        if convolution:
            return np.float32(0.03) + np.float32(0.1) * noise
        return np.float32(2 * cfg.width**-0.5 if len(shape) > 1 else 0.2) * noise

    shapes = expected_shapes(cfg)
    return cfg, nest({name: random(name, shape) for name, shape in shapes.items()})


def timms(cfg, **options):
    """The network that timm builds for a hybrid, with its own random weights."""
    pytest.importorskip("timm")
    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
    from timm.models.vision_transformer import VisionTransformer

    convolution = functools.partial(StdConv2dSame, eps=1e-8)
    if cfg.resnet:
        backbone = ResNetV2(
            cfg.resnet,
            channels=(256, 512, 1024, 2048)[: len(cfg.resnet)],
            num_classes=0,
            global_pool="",
            stem_type="same",
            preact=False,
            conv_layer=convolution,
        )
    else:
        backbone = create_resnetv2_stem(
            3, stem_type="same", preact=False, conv_layer=convolution
        )
    cell = 4 * 2 ** max(len(cfg.resnet) - 1, 0)
    return VisionTransformer(
        img_size=cfg.image_size,
        patch_size=cfg.patch_size // cell,
        embed_dim=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_ratio=cfg.mlp_dim / cfg.width,
        num_classes=cfg.num_classes,
        embed_layer=functools.partial(HybridEmbed, backbone=backbone),
        **options,
    ).eval()


def deviation(cfg, params, theirs):
    """The largest difference of logits on two random images, of the largest logit."""
    x = np.random.default_rng(1).standard_normal((2, *cfg.image_size, 3)).astype(np.float32)
    found, _ = jax.jit(registry.build(cfg).apply)(params, x)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 0.1 * largest  # they see the images
    return np.abs(found - expected).max() / largest


# Small images with as many patches as 224 x 224 and 384 x 384 pixels have at 32, and oblong.
@pytest.mark.parametrize(
    ("units", "patch_size", "image_size"),
    [((), 8, (56, 56)), ((2, 1), 8, (96, 96)), ((1, 1, 1), 16, (32, 80))],
)
def test_logits_equal_timms_through_googles_file(tmp_path, units, patch_size, image_size):
    cfg, params = hybrid(units, patch_size, image_size)
    google.write(tmp_path / "w.npz", cfg, params)
    theirs = timms(cfg, act_layer="gelu_tanh")
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    value = deviation(cfg, params, theirs)
    print("DEV", units, image_size, value)
    assert value < 1e-4


def test_logits_of_the_published_tiny_hybrid_at_its_full_size(tmp_path):
    pytest.importorskip("timm")
    from timm.models.vision_transformer_hybrid import vit_tiny_r_s16_p8_224

    units, variant, patch_size = decode_hybrid("R+Ti/16")
    cfg, params = hybrid(
        units, patch_size, (224, 224), **variant._asdict() | {"num_classes": 1000}
    )
    google.write(tmp_path / "w.npz", cfg, params)
    theirs = vit_tiny_r_s16_p8_224(act_layer="gelu_tanh").eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    value = deviation(cfg, params, theirs)
    print("DEV full", value)
    assert value < 1e-4


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + (0.1 if parameter.ndim > 1 else 0.3) * noise
    return module


def arrays_of(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("units", "patch_size", "image_size", "prefix"),
    [((), 16, (64, 64), "module."), ((2, 1), 8, (32, 40), "")],
)
def test_timms_own_files_are_read(tmp_path, units, patch_size, image_size, prefix):
    cfg, _ = hybrid(units, patch_size, image_size, gelu="erf")
    theirs = randomize(timms(cfg))
    state = {prefix + name: value for name, value in arrays_of(theirs).items()}
    files.write_safetensors(tmp_path / "w", state)
    found = load_weights(tmp_path / "w", image_size, num_heads=4)
    assert (found.cfg, found.family) == (cfg, "timm")
    assert "epsilons" in found.notes[-1]
    value = deviation(found.cfg, found.params, theirs)
    print("DEV timm", units, value)
    assert value < 1e-4


def test_the_config_beside_a_hybrid_is_used(tmp_path):
    cfg, _ = hybrid((1,), 8, (32, 32))
    theirs = randomize(timms(cfg))
    files.write_safetensors(tmp_path / "model.safetensors", arrays_of(theirs))
    config = {
        "architecture": "vit_small_r26_s32_224",
        "model_args": {"act_layer": "gelu_tanh", "num_heads": 2},
        "pretrained_cfg": {"crop_pct": 0.5, "interpolation": "bicubic"},
        "label_names": list("abcdefg"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load_weights(tmp_path)
    assert (found.cfg.num_heads, found.cfg.gelu, found.cfg.patch_size) == (2, "tanh", 8)
    assert found.eval_transform == "resize_shorter(64, method='bicubic')|center_crop"
    assert found.class_names == tuple("abcdefg")


@pytest.mark.parametrize("units", [(), (1, 1)])
def test_what_is_wrong_in_the_backbone_is_listed(tmp_path, units):
    cfg, _ = hybrid(units, 8, (32, 32))
    state = arrays_of(timms(cfg))
    stem = "patch_embed.backbone." + ("stem." if units else "")
    state["patch_embed.backbone.fc.bias"] = state.pop(f"{stem}norm.bias")
    state[f"{stem}norm.weight"] = np.zeros((3, 3), np.float32)
    files.write_safetensors(tmp_path / "w", state)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w", num_heads=4)
    message = str(error.value)
    assert "norm.bias is missing" in message
    assert "fc.bias is unknown" in message
    assert "norm.weight has shape (3, 3), not (64,)" in message


def test_other_backbones_are_refused(tmp_path):
    cfg, _ = hybrid((1,), 8, (32, 32))
    state = arrays_of(timms(cfg))
    deep = {n.replace("stem.conv.", "conv1.0."): x for n, x in state.items()}
    files.write_safetensors(tmp_path / "w", deep)
    with pytest.raises(UserError, match="do not come from a ResNet with weight standard"):
        load_weights(tmp_path / "w", num_heads=4)
    more = {n.replace("stages.0", "stages.1"): x for n, x in state.items()} | state
    files.write_safetensors(tmp_path / "w", more)
    with pytest.raises(UserError, match="256 channels after 2 stages"):
        load_weights(tmp_path / "w", num_heads=4)


# ---- Mixers --------------------------------------------------------------------------------


def timms_mixer(**options):
    pytest.importorskip("timm")
    from timm.models.mlp_mixer import MlpMixer

    shape = {"num_classes": 7, "img_size": (32, 32), "patch_size": 8, "num_blocks": 2}
    shape |= {"embed_dim": 40, "mlp_ratio": (0.5, 3.0)}
    return randomize(MlpMixer(**shape | options)).eval()


@pytest.mark.parametrize(
    "options", [{}, {"num_classes": 0}, {"img_size": (32, 48), "patch_size": 16}]
)
def test_timms_mixers_are_read(tmp_path, options):
    theirs = timms_mixer(**options)
    files.write_safetensors(tmp_path / "w", arrays_of(theirs))
    image_size = options.get("img_size", (32, 32))
    found = load_weights(tmp_path / "w", image_size)
    assert (found.family, found.notes) == ("timm", ())
    assert (found.cfg.image_size, found.cfg.gelu) == (image_size, "erf")
    assert deviation(found.cfg, found.params, theirs) < 1e-5
    google.write(tmp_path / "again.npz", found.cfg, found.params)
    again = load_weights(tmp_path / "again.npz", image_size)
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_other_mixers_are_refused(tmp_path):
    state = arrays_of(timms_mixer(stem_norm=True))
    del state["blocks.1.norm2.bias"]
    files.write_safetensors(tmp_path / "w", state)
    with pytest.raises(
        UserError, match=r"blocks\.1\.norm2\.bias is missing; stem\.norm\.\w+ is"
    ):
        load_weights(tmp_path / "w")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "mixer_b16_224", "model_args": {"act_layer": "relu"}})
    )
    with pytest.raises(UserError, match="its activation is 'relu'"):
        load_weights(tmp_path / "w")
